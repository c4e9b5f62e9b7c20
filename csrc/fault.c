/* The guard of memory that can fault. See fault.h.
 *
 * The signal handler is the process's: what is static here serves it alone. It may
 * run at any instruction, on any thread, on an alternate stack, below the handler of
 * somebody else who passes the signal on to us, and does nothing that is not
 * async-signal-safe. A signal is ours in three cases:
 *
 *  - its instruction is in the table: go on at the landing of that entry;
 *  - its address lies in what the thread's guard covers: jump back to the guard;
 *  - this thread raised it, inside a guarded access: so a handler raised it again
 *    (faulthandler, where it was enabled after us). Return, and the access faults
 *    once more, with an address; if it does not, the signal is raised after it.
 *    (Unless it is we who passed it to that handler.)
 *
 * Any other goes to who had SIGBUS before, and ends as it would have ended without us.
 */
#define _GNU_SOURCE
#include "fault.h"

#include "access.h"
#include "os_map.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

/* What of the processor's state the handler looks at or changes. */
#if defined(__x86_64__)
# define PC(context)       ((context)->uc_mcontext.gregs[REG_RIP])
# define SP(context)       ((uintptr_t)(context)->uc_mcontext.gregs[REG_RSP])
# define IS_WRITE(context) (((context)->uc_mcontext.gregs[REG_ERR] & 2) != 0)
#elif defined(__aarch64__)
# define PC(context) ((context)->uc_mcontext.pc)
# define SP(context) ((uintptr_t)(context)->uc_mcontext.sp)
#endif

/* A copy or fill under way, on the stack of the thread that makes it. */
struct guard {
    const char *src, *dst; /* NULL where that side is not guest memory */
    size_t count;
    const char *volatile at; /* where it faulted */
    volatile bool writing;   /* and whether it did so in a store */
    sigjmp_buf env;
};

/* The default model may allocate at a variable's first use in a thread, and that
 * would be in the handler. musl refuses to load the other, and never allocates. */
#if defined(__GLIBC__)
# define TLS __attribute__((tls_model("initial-exec"))) _Thread_local
#else
# define TLS _Thread_local
#endif

#if defined(PC)
static const struct guard one_access; /* armed while a scalar is accessed */
#endif
static TLS const struct guard *volatile armed;
static TLS volatile sig_atomic_t
    put_off; /* a signal that this thread got from itself */

/* --- Who had SIGBUS before --------------------------------------------------------- */

/* Who had it when we took it, and whom that one passes it on to, as far as we know:
 * who had it when we took it the time before. Records are never freed, because the
 * handler may be reading them; the same one is not made twice. */
struct earlier {
    struct sigaction action;
    const struct earlier *older;
    struct earlier *next; /* of all there are */
};

static const struct earlier by_default = {.action = {.sa_handler = SIG_DFL}};
static struct earlier *_Atomic all_earlier;
static const struct earlier *_Atomic earlier;

static void on_bus_error(int signum, siginfo_t *info, void *context);

static bool
is_ours(const struct sigaction *action)
{
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_bus_error;
}

/* The kernel knows 64 signals; the rest of a sigset_t is whatever was on the stack. */
static bool
same_action(const struct sigaction *a, const struct sigaction *b)
{
    for (int signum = 1; signum <= 64; signum++) {
        if (sigismember(&a->sa_mask, signum) != sigismember(&b->sa_mask, signum)) {
            return false;
        }
    }
    return a->sa_flags == b->sa_flags
           && (a->sa_flags & SA_SIGINFO ? a->sa_sigaction == b->sa_sigaction
                                        : a->sa_handler == b->sa_handler);
}

/* The record of an action that was found while `top` was known. */
static const struct earlier *
keep_earlier(const struct sigaction *action, const struct earlier *top)
{
    /* Who comes back is where he was: the ones after him have gone. */
    for (const struct earlier *one = top; one != NULL; one = one->older) {
        if (same_action(&one->action, action)) {
            return one;
        }
    }
    struct earlier *first = atomic_load(&all_earlier);
    for (const struct earlier *one = first; one != NULL; one = one->next) {
        if (one->older == top && same_action(&one->action, action)) {
            return one;
        }
    }
    struct earlier *one = malloc(sizeof(*one));
    if (one != NULL) {
        one->action = *action;
        one->older = top;
        do {
            one->next = first;
        } while (!atomic_compare_exchange_weak(&all_earlier, &first, one));
    }
    return one;
}

int
fault_claim(void)
{
    for (;;) {
        const struct earlier *top = atomic_load(&earlier), *one;
        struct sigaction found, replaced, ours = {.sa_sigaction = on_bus_error};
        if (sigaction(SIGBUS, NULL, &found) < 0) {
            return errno;
        }
        if (is_ours(&found)) {
            return 0;
        }
        if ((one = keep_earlier(&found, top)) == NULL) {
            return ENOMEM;
        }
        /* Known before the handler can need it; once more where another thread has
         * claimed it since we looked. */
        if (!atomic_compare_exchange_strong(&earlier, &top, one)) {
            continue;
        }
        /* SA_NODEFER: a fault while it is blocked would end the process. */
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        bool ignored = !(found.sa_flags & SA_SIGINFO) && found.sa_handler == SIG_IGN;
        if (found.sa_flags & SA_RESTART || ignored) {
            ours.sa_flags |= SA_RESTART; /* system calls are interrupted as before */
        }
        if (sigaction(SIGBUS, &ours, &replaced) < 0) {
            return errno;
        }
        if (is_ours(&replaced) || same_action(&replaced, &found)) {
            return 0;
        } /* else somebody came in between, and is to be kept, too */
        sigaction(SIGBUS, &replaced, NULL);
    }
}

/* What this thread passes on right now. A handler may leave by a jump, which tells us
 * nothing: so what is here counts only where it can be seen to go on. */
static TLS struct {
    const struct earlier *volatile to;
    volatile uintptr_t frame;
    /* The last fault that was passed on, and how often it came back at once. */
    volatile uintptr_t pc, at;
    volatile unsigned again;
} passing;

/* Put into a siginfo_t that is passed on, where the kernel has 0: so one that comes
 * back to us, from a handler that calls its predecessor, is known from a new one. */
#define PASSED_ON 0x6775

/* A handler that returns and changes nothing would fault for ever: faulthandler, once
 * it has been disabled. One that mends the page is never asked so often in a row. */
#define AGAIN_AT_MOST 1000

static bool
is_passed_on(const siginfo_t *info, const void *context)
{
    if (passing.to == NULL || info->si_errno == PASSED_ON) {
        return passing.to != NULL;
    }
#if defined(SP)
    /* Interrupted below our own frame: in the handler that we called. */
    uintptr_t sp = SP((const ucontext_t *)context);
    return sp < passing.frame && passing.frame - sp < (uintptr_t)1 << 20;
#else
    (void)context;
    return true;
#endif
}

static bool
is_fault(const siginfo_t *info)
{
    /* BUS_MCEERR_AO is about some page, not about what this thread does. */
    return info->si_code > 0 && info->si_code != BUS_MCEERR_AO;
}

/* The same signal once more, to the default action: it ends the process. */
static void
end_by_default(int signum, siginfo_t *info)
{
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, signum);
    sigaction(signum, &action, NULL);
    pthread_sigmask(SIG_UNBLOCK, &mask, NULL);
    syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), signum, info);
    (void)raise(signum); /* where a filter forbids that */
}

static void
call_earlier(const struct earlier *to, int signum, siginfo_t *info, void *context)
{
    const struct sigaction *action = &to->action;
    const struct earlier *outer = passing.to;
    sigset_t mask = action->sa_mask, before;
    if (!(action->sa_flags & SA_NODEFER)) {
        sigaddset(&mask, signum);
    }
    pthread_sigmask(SIG_BLOCK, &mask, &before);
    int was = info->si_errno;
    info->si_errno = PASSED_ON;
    passing.to = to;
    passing.frame = (uintptr_t)__builtin_frame_address(0);
    if (action->sa_flags & SA_SIGINFO) {
        action->sa_sigaction(signum, info, context);
    }
    else {
        action->sa_handler(signum);
    }
    passing.to = outer;
    info->si_errno = was;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Whether this fault was passed on so often that nobody can be mending it. */
static bool
is_hopeless(const siginfo_t *info, const ucontext_t *context)
{
    uintptr_t at = (uintptr_t)info->si_addr, pc = 0;
#if defined(PC)
    pc = (uintptr_t)PC(context);
#else
    (void)context;
#endif
    passing.again = passing.at == at && passing.pc == pc ? passing.again + 1 : 0;
    passing.at = at;
    passing.pc = pc;
    return passing.again >= AGAIN_AT_MOST;
}

static void
pass_on(int signum, siginfo_t *info, void *context)
{
    bool again = is_passed_on(info, context);
    const struct earlier *to = again ? passing.to->older : atomic_load(&earlier);
    if (to == NULL || (!again && is_fault(info) && is_hopeless(info, context))) {
        end_by_default(signum, info);
        return;
    }
    const struct sigaction *action = &to->action;
    if (action->sa_flags & SA_SIGINFO
        || (action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN)) {
        if ((unsigned)action->sa_flags
            & (unsigned)SA_RESETHAND) { /* it is asked once only */
            const struct earlier *top = to;
            atomic_compare_exchange_strong(&earlier, &top, &by_default);
        }
        call_earlier(to, signum, info, context);
    }
    else if (action->sa_handler == SIG_DFL || is_fault(info)) {
        end_by_default(signum, info); /* a fault cannot be ignored */
    }
}

/* --- Scalars: one instruction, and the table --------------------------------------- */

#if defined(__x86_64__)
# define LOAD_1  "movzbl (%[at]), %k[value]"
# define LOAD_2  "movzwl (%[at]), %k[value]"
# define LOAD_4  "movl (%[at]), %k[value]"
# define LOAD_8  "movq (%[at]), %[value]"
# define STORE_1 "movb %b[value], (%[at])"
# define STORE_2 "movw %w[value], (%[at])"
# define STORE_4 "movl %k[value], (%[at])"
# define STORE_8 "movq %[value], (%[at])"
# define LANDING "movq %[at], %[faulted]\n\tjmp 2b"
#elif defined(__aarch64__)
# define LOAD_1  "ldrb %w[value], [%[at]]"
# define LOAD_2  "ldrh %w[value], [%[at]]"
# define LOAD_4  "ldr %w[value], [%[at]]"
# define LOAD_8  "ldr %x[value], [%[at]]"
# define STORE_1 "strb %w[value], [%[at]]"
# define STORE_2 "strh %w[value], [%[at]]"
# define STORE_4 "str %w[value], [%[at]]"
# define STORE_8 "str %x[value], [%[at]]"
# define LANDING "mov %x[faulted], %x[at]\n\tb 2b"
#endif

#if defined(PC)

/* Both as the distance from where they stand, so that nothing needs relocation. */
struct entry {
    int32_t instruction;
    int32_t landing;
};

/* Subsections are put in the order of their numbers: 0 and 2 hold the ends, 1 the
 * entries. (The symbols that linkers make of a section's ends would be exported.) */
# define TABLE(subsection, text)                                                  \
     "\t.pushsection guestmem_faults, " #subsection ", \"a\"\n\t.balign 4\n" text \
     "\n\t.popsection\n"
# define SYMBOL(name) ".globl " #name "\n.hidden " #name "\n" #name ":"
__asm__(TABLE(0, SYMBOL(fault_table)) TABLE(2, SYMBOL(fault_table_end)));
# define HIDDEN __attribute__((visibility("hidden")))
extern const struct entry fault_table[] HIDDEN, fault_table_end[] HIDDEN;

/* text accesses *guest by one instruction, from or to value; where that faults,
 * faulted becomes guest. */
# define ACCESS(text)                                                    \
     __asm__ volatile("1:\t" text "\n2:\n"                               \
                      "\t.pushsection .text.landings, \"ax\"\n"          \
                      "3:\t" LANDING "\n"                                \
                      "\t.popsection\n" TABLE(1, ".long 1b - ., 3b - .") \
                      : [value] "+r"(value), [faulted] "+r"(faulted)     \
                      : [at] "r"(guest)                                  \
                      : "memory")

static inline struct fault_value
load_aligned(const char *guest, size_t width)
{
    uint64_t value = 0;
    const char *faulted = NULL;
    armed = &one_access;
    if (width == 8) {
        ACCESS(LOAD_8);
    }
    else if (width == 4) {
        ACCESS(LOAD_4);
    }
    else if (width == 2) {
        ACCESS(LOAD_2);
    }
    else {
        ACCESS(LOAD_1);
    }
    armed = NULL;
    return (struct fault_value){faulted, value};
}

static inline struct fault
store_aligned(char *guest, uint64_t value, size_t width)
{
    const char *faulted = NULL;
    armed = &one_access;
    if (width == 8) {
        ACCESS(STORE_8);
    }
    else if (width == 4) {
        ACCESS(STORE_4);
    }
    else if (width == 2) {
        ACCESS(STORE_2);
    }
    else {
        ACCESS(STORE_1);
    }
    armed = NULL;
    return (struct fault){faulted, true};
}

/* Whether the signal came from an instruction of the table, and goes on after it. */
static bool
land(ucontext_t *context)
{
    const struct entry *entry = fault_table;
    for (; entry != fault_table_end; entry++) {
        uintptr_t instruction =
            (uintptr_t)&entry->instruction + (uintptr_t)(intptr_t)entry->instruction;
        if ((uintptr_t)PC(context) == instruction) {
            uintptr_t landing =
                (uintptr_t)&entry->landing + (uintptr_t)(intptr_t)entry->landing;
            PC(context) = (__typeof__(PC(context)))landing;
            return true;
        }
    }
    return false;
}

#endif

/* Apart from the aligned case, which so needs no frame: half of what it costs. */
static __attribute__((noinline)) struct fault_value
load_by_copy(const char *guest, size_t width)
{
    union access_bytes bytes = {.u64 = 0};
    struct fault fault = fault_read(&bytes, guest, width);
    return (struct fault_value){fault.at,
                                fault.at == NULL ? access_bits(&bytes, width) : 0};
}

static __attribute__((noinline)) struct fault
store_by_copy(char *guest, uint64_t bits, size_t width)
{
    union access_bytes bytes = access_bytes_of(bits, width);
    return fault_write(guest, &bytes, width);
}

struct fault_value
fault_load(const char *guest, size_t width)
{
#if defined(PC)
    if (((uintptr_t)guest & (width - 1)) == 0) {
        return load_aligned(guest, width);
    }
#endif
    return load_by_copy(guest, width);
}

struct fault
fault_store(char *guest, uint64_t bits, size_t width)
{
#if defined(PC)
    if (((uintptr_t)guest & (width - 1)) == 0) {
        return store_aligned(guest, bits, width);
    }
#endif
    return store_by_copy(guest, bits, width);
}

/* --- Copies and fills -------------------------------------------------------------- */

enum what { READ, WRITE, COPY, FILL, ATOMIC };

struct job {
    enum what what;
    char *dst;
    const char *src;
    size_t count;
    unsigned char byte;
    struct atomic_call *call; /* and where to put what it returns */
    uint64_t *result;
};

static bool
covers(const char *range, size_t count, const char *at)
{
    return range != NULL && (uintptr_t)at - (uintptr_t)range < count;
}

static ACCESS_RACY void
run(const struct job *job)
{
    switch (job->what) {
    case READ:
        access_read(job->dst, job->src, job->count);
        break;
    case WRITE:
        access_write(job->dst, job->src, job->count);
        break;
    case COPY:
        access_copy(job->dst, job->src, job->count);
        break;
    case FILL:
        access_fill(job->dst, job->byte, job->count);
        break;
    case ATOMIC:
        *job->result = access_atomic(job->dst, job->call);
        break;
    }
}

/* Whether the page of a byte is missing; false where that cannot be told. */
static bool
is_missing(const char *byte, bool writing)
{
    size_t first;
    if (!writing) {
        return fault_load(byte, 1).at != NULL;
    }
    return os_map_first_fault((char *)(uintptr_t)byte, 1, true, &first) && first == 0;
}

/* A copy that goes down comes to the end of what is missing first, at `at`: where does
 * that begin? Page by page, because looking brings them in. */
static const char *
first_missing(const char *start, const char *at, bool writing)
{
    uintptr_t page = os_map_page_size();
    uintptr_t good = (uintptr_t)start / page, bad = (uintptr_t)at / page;
    if (is_missing(start, writing)) {
        return start;
    }
    while (bad - good > 1) { /* the page `good` is there, the page `bad` is not */
        uintptr_t middle = good + (bad - good) / 2;
        if (is_missing((const char *)(middle * page), writing)) {
            bad = middle;
        }
        else {
            good = middle;
        }
    }
    return bad == good ? at : (const char *)(bad * page);
}

static struct fault
explain(const struct job *job, const struct guard *guard)
{
    struct fault fault = {guard->at, guard->writing};
    const char *start = fault.writing ? guard->dst : guard->src;
    bool down =
        job->src != NULL && (uintptr_t)job->dst - (uintptr_t)job->src < job->count;
    if (down) {
        fault.at = first_missing(start, fault.at, fault.writing);
    }
    return fault;
}

/* Nothing here changes between the two returns of sigsetjmp but what is volatile; and
 * nothing is held that a jump would lose. */
static struct fault
guarded(const struct job *job, bool guard_src, bool guard_dst)
{
    struct guard guard; /* not initialised as a whole: a jmp_buf is 200 bytes */
    guard.src = guard_src ? job->src : NULL;
    guard.dst = guard_dst ? job->dst : NULL;
    guard.count = job->count;
    if (sigsetjmp(guard.env, 0) != 0) {
        access_settle();
        return explain(job, &guard);
    }
    armed = &guard;
    atomic_signal_fence(memory_order_seq_cst);
    run(job);
    atomic_signal_fence(memory_order_seq_cst);
    armed = NULL;
    if (put_off) { /* no fault explained it: so it was meant */
        put_off = 0;
        (void)raise(SIGBUS);
    }
    return (struct fault){NULL, false};
}

struct fault
fault_read(void *host, const char *guest, size_t count)
{
    struct job job = {.what = READ, .dst = host, .src = guest, .count = count};
    return guarded(&job, true, false);
}

struct fault
fault_write(char *guest, const void *host, size_t count)
{
    struct job job = {.what = WRITE, .dst = guest, .src = host, .count = count};
    return guarded(&job, false, true);
}

struct fault
fault_copy(char *dst, const char *src, size_t count)
{
    struct job job = {.what = COPY, .dst = dst, .src = src, .count = count};
    return guarded(&job, true, true);
}

struct fault
fault_fill(char *guest, unsigned char byte, size_t count)
{
    struct job job = {.what = FILL, .dst = guest, .count = count, .byte = byte};
    return guarded(&job, false, true);
}

struct fault
fault_atomic(char *guest, struct atomic_call *call, uint64_t *result)
{
    struct job job = {.what = ATOMIC,
                      .dst = guest,
                      .count = call->width,
                      .call = call,
                      .result = result};
    struct fault fault = guarded(&job, false, true);
    fault.writing = call->op != ATOMIC_LOAD;
    return fault;
}

/* --- The handler ------------------------------------------------------------------- */

/* Whether a store faulted; where the processor does not say, fallback. */
static bool
was_writing(const ucontext_t *context, bool fallback)
{
#if defined(IS_WRITE)
    (void)fallback;
    return IS_WRITE(context);
#elif defined(__aarch64__)
    /* Records follow each other up to one of size 0. */
    const char *at = (const char *)context->uc_mcontext.__reserved;
    const char *end = at + sizeof(context->uc_mcontext.__reserved);
    while (at + sizeof(struct esr_context) <= end) {
        const struct esr_context *record = (const void *)at;
        if (record->head.magic == ESR_MAGIC) {
            return (record->esr >> 6 & 1) != 0; /* WnR */
        }
        if (record->head.size == 0) {
            break;
        }
        at += record->head.size;
    }
    return fallback;
#else
    (void)context;
    return fallback;
#endif
}

/* The start of what a fault is about, in the guarded range; NULL where it is not in it. A
 * poisoned page comes as a whole. */
static const char *
hit_in(const char *range, size_t count, const siginfo_t *info)
{
    uintptr_t at = (uintptr_t)info->si_addr, size = 1;
    if (info->si_code == BUS_MCEERR_AR) {
        size = (uintptr_t)1 << info->si_addr_lsb;
        at &= -size;
    }
    if (covers(range, count, (const char *)at)) {
        return (const char *)at;
    }
    return covers((const char *)at, size, range) && range != NULL && count != 0 ? range
                                                                                : NULL;
}

static _Noreturn void
jump(struct guard *hit)
{
    siglongjmp(hit->env, 1);
}

/* Jumps once the handler has returned: so the kernel puts back what it has saved (the
 * mask of signals, the rounding mode, the alternate stack), and a handler that called
 * this one comes to its end. */
static void
jump_after(struct guard *hit, ucontext_t *context)
{
#if defined(__x86_64__)
    greg_t *registers = context->uc_mcontext.gregs;
    /* Past the red zone, and as a call leaves the stack. */
    registers[REG_RSP] = ((registers[REG_RSP] - 128) & ~(greg_t)15) - 8;
    registers[REG_RDI] = (greg_t)(uintptr_t)hit;
    registers[REG_RIP] = (greg_t)(uintptr_t)jump;
#elif defined(__aarch64__)
    context->uc_mcontext.regs[0] = (uintptr_t)hit;
    context->uc_mcontext.sp &= ~(uintptr_t)15;
    context->uc_mcontext.pc = (uintptr_t)jump;
#else
    pthread_sigmask(SIG_SETMASK, &context->uc_sigmask, NULL);
    jump(hit);
#endif
}

static void
on_bus_error(int signum, siginfo_t *info, void *context)
{
    int saved_errno = errno;
    const struct guard *guard = armed;
    if (guard != NULL && info->si_code == SI_TKILL && info->si_pid == getpid()
        && !is_passed_on(info, context)) {
        put_off = 1;
        errno = saved_errno;
        return;
    }
    if (guard != NULL && is_fault(info)) {
#if defined(PC)
        if (guard == &one_access && land(context)) {
            put_off = 0;
            return;
        }
#endif
        const char *read = hit_in(guard->src, guard->count, info);
        const char *write = hit_in(guard->dst, guard->count, info);
        if (read != NULL || write != NULL) {
            struct guard *hit = (struct guard *)(uintptr_t)guard;
            hit->writing =
                write != NULL && (read == NULL || was_writing(context, false));
            hit->at = hit->writing ? write : read;
            armed = NULL;
            put_off = 0;
            passing.again = 0;
            jump_after(hit, context);
            errno = saved_errno;
            return;
        }
    }
    pass_on(signum, info, context);
    errno = saved_errno;
}
