/* The guard of memory that can fault. See fault.h.
 *
 * The signal handler is the process's: what is static here serves it alone. It may
 * run at any instruction, on any thread, on an alternate stack, and does nothing
 * that is not async-signal-safe. A signal is ours in three cases:
 *
 *  - its instruction is in the table: go on at the landing of that entry;
 *  - its address lies in what the thread's guard covers: jump back to the guard;
 *  - it has no address, because another handler raised it again (faulthandler, where
 *    it was enabled after us), and the thread is inside a guarded access: return,
 *    and the access faults once more, with an address. (Unless it is we who passed it
 *    to that handler.)
 *
 * Any other ends as it would have ended without us.
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
#include <string.h>
#include <ucontext.h>

/* A copy or fill under way, on the stack of the thread that makes it. */
struct guard {
    const char *src, *dst; /* NULL where that side is not guest memory */
    size_t count;
    const char *volatile at; /* where it faulted */
    sigjmp_buf env;
};

/* The default model may allocate at a variable's first use in a thread, and that
 * would be in the handler. musl refuses to load the other, and never allocates. */
#if defined(__GLIBC__)
# define TLS __attribute__((tls_model("initial-exec"))) _Thread_local
#else
# define TLS _Thread_local
#endif

static const struct guard one_access; /* armed while a scalar is accessed */
static TLS const struct guard *volatile armed;
static TLS volatile sig_atomic_t passing_on;

/* --- Who had SIGBUS before --------------------------------------------------------- */

/* Every action that we ever found. None is freed, because the handler may be reading
 * it; the same one is not kept twice. */
struct earlier {
    struct sigaction action;
    struct earlier *next;
};

static struct earlier *_Atomic all_earlier;
static const struct earlier *_Atomic earlier; /* the one to pass signals on to */

static void on_bus_error(int signum, siginfo_t *info, void *context);

static bool
is_ours(const struct sigaction *action)
{
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_bus_error;
}

static bool
same_action(const struct sigaction *a, const struct sigaction *b)
{
    return a->sa_flags == b->sa_flags
           && (a->sa_flags & SA_SIGINFO ? a->sa_sigaction == b->sa_sigaction
                                        : a->sa_handler == b->sa_handler)
           && memcmp(&a->sa_mask, &b->sa_mask, sizeof(a->sa_mask)) == 0;
}

static const struct earlier *
keep_earlier(const struct sigaction *action)
{
    struct earlier *first = atomic_load(&all_earlier);
    for (const struct earlier *one = first; one != NULL; one = one->next) {
        if (same_action(&one->action, action)) {
            return one;
        }
    }
    struct earlier *one = malloc(sizeof(*one));
    if (one != NULL) {
        one->action = *action;
        do {
            one->next = first;
        } while (!atomic_compare_exchange_weak(&all_earlier, &first, one));
    }
    return one;
}

int
fault_claim(void)
{
    struct sigaction found, ours = {.sa_sigaction = on_bus_error};
    if (sigaction(SIGBUS, NULL, &found) < 0) {
        return errno;
    }
    /* Known before the handler can need it; and once more where another thread has
     * installed something between the look and the change. */
    while (!is_ours(&found)) {
        const struct earlier *one = keep_earlier(&found);
        if (one == NULL) {
            return ENOMEM;
        }
        atomic_store(&earlier, one);
        /* SA_NODEFER: siglongjmp restores no mask, and a second fault must arrive. */
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        if (found.sa_flags & SA_RESTART || found.sa_handler == SIG_IGN) {
            ours.sa_flags |= SA_RESTART; /* system calls are interrupted as before */
        }
        struct sigaction replaced;
        if (sigaction(SIGBUS, &ours, &replaced) < 0) {
            return errno;
        }
        if (is_ours(&replaced) || same_action(&replaced, &found)) {
            break;
        }
        found = replaced;
    }
    return 0;
}

static void
end_by_default(int signum, const siginfo_t *info)
{
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigaction(signum, &action, NULL);
    if (info->si_code <= 0) {
        raise(signum);
    } /* else the access faults again */
}

static void
call_earlier(const struct sigaction *action, int signum, siginfo_t *info, void *context)
{
    sigset_t mask = action->sa_mask, before;
    if (!(action->sa_flags & SA_NODEFER)) {
        sigaddset(&mask, signum);
    }
    pthread_sigmask(SIG_BLOCK, &mask, &before);
    passing_on = 1;
    if (action->sa_flags & SA_SIGINFO) {
        action->sa_sigaction(signum, info, context);
    }
    else {
        action->sa_handler(signum);
    }
    passing_on = 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void
pass_on(int signum, siginfo_t *info, void *context)
{
    const struct sigaction *action = &atomic_load(&earlier)->action;
    /* The one whom we passed it to raises it again, to have it passed on: that was
     * enabled after us, and we came back later. This is the end of the chain. */
    if (passing_on && info->si_code <= 0) {
        end_by_default(signum, info);
    }
    else if (action->sa_flags & SA_SIGINFO
             || (action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN)) {
        call_earlier(action, signum, info, context);
    }
    else if (action->sa_handler == SIG_DFL || info->si_code > 0) {
        end_by_default(signum, info); /* a fault cannot be ignored */
    }
}

/* --- Scalars: one instruction, and the table --------------------------------------- */

#if defined(__x86_64__)
# define LOAD_1      "movzbl (%[at]), %k[value]"
# define LOAD_2      "movzwl (%[at]), %k[value]"
# define LOAD_4      "movl (%[at]), %k[value]"
# define LOAD_8      "movq (%[at]), %[value]"
# define STORE_1     "movb %b[value], (%[at])"
# define STORE_2     "movw %w[value], (%[at])"
# define STORE_4     "movl %k[value], (%[at])"
# define STORE_8     "movq %[value], (%[at])"
# define LANDING     "movq %[at], %[faulted]\n\tjmp 2b"
# define PC(context) ((context)->uc_mcontext.gregs[REG_RIP])
#elif defined(__aarch64__)
# define LOAD_1      "ldrb %w[value], [%[at]]"
# define LOAD_2      "ldrh %w[value], [%[at]]"
# define LOAD_4      "ldr %w[value], [%[at]]"
# define LOAD_8      "ldr %x[value], [%[at]]"
# define STORE_1     "strb %w[value], [%[at]]"
# define STORE_2     "strh %w[value], [%[at]]"
# define STORE_4     "str %w[value], [%[at]]"
# define STORE_8     "str %x[value], [%[at]]"
# define LANDING     "mov %x[faulted], %x[at]\n\tb 2b"
# define PC(context) ((context)->uc_mcontext.pc)
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
    union access_bytes bytes;
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

enum what { READ, WRITE, COPY, FILL };

struct job {
    enum what what;
    char *dst;
    const char *src;
    size_t count;
    unsigned char byte;
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
    }
}

/* What the guard of a job that faulted knows. Where both sides are guest memory and
 * have the byte in common, the source was first: it is loaded before it is stored. */
static struct fault
explain(const struct job *job, const struct guard *guard)
{
    struct fault fault = {guard->at, !covers(guard->src, guard->count, guard->at)};
    bool down =
        job->src != NULL && (uintptr_t)job->dst - (uintptr_t)job->src < job->count;
    if (down) { /* it comes to the end of what is missing first */
        const char *start = fault.writing ? guard->dst : guard->src;
        fault.at = start
                   + os_map_first_fault((char *)(uintptr_t)start,
                                        (size_t)(guard->at - start), fault.writing);
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
    return (struct fault){NULL, false};
}

struct fault
fault_read(void *host, const char *guest, size_t count)
{
    struct job job = {READ, host, guest, count, 0};
    return guarded(&job, true, false);
}

struct fault
fault_write(char *guest, const void *host, size_t count)
{
    struct job job = {WRITE, guest, host, count, 0};
    return guarded(&job, false, true);
}

struct fault
fault_copy(char *dst, const char *src, size_t count)
{
    struct job job = {COPY, dst, src, count, 0};
    return guarded(&job, true, true);
}

struct fault
fault_fill(char *guest, unsigned char byte, size_t count)
{
    struct job job = {FILL, guest, NULL, count, byte};
    return guarded(&job, false, true);
}

/* --- The handler ------------------------------------------------------------------- */

static void
on_bus_error(int signum, siginfo_t *info, void *context)
{
    int saved_errno = errno;
    const struct guard *guard = armed;
    if (guard != NULL && info->si_code <= 0 && !passing_on) {
        return;
    }
    /* BUS_MCEERR_AO is about some page, not about what this thread does. */
    if (guard != NULL && info->si_code != BUS_MCEERR_AO) {
#if defined(PC)
        if (guard == &one_access && land(context)) {
            return;
        }
#endif
        const char *at = info->si_addr;
        if (covers(guard->src, guard->count, at)
            || covers(guard->dst, guard->count, at)) {
            struct guard *hit = (struct guard *)(uintptr_t)guard;
            hit->at = at;
            armed = NULL;
            siglongjmp(hit->env, 1);
        }
    }
    pass_on(signum, info, context);
    errno = saved_errno;
}
