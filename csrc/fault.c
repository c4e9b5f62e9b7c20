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
#include "fault_chain.h"
#include "os_map.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <ucontext.h>
#include <unistd.h>

/* A copy or fill under way, on the stack of the thread that makes it. */
struct guard {
    const char *src, *dst; /* NULL where that side is not guest memory */
    size_t count;
    const char *volatile at; /* where it faulted */
    volatile bool writing;   /* and whether it did so in a store */
    sigjmp_buf env;
};

#if defined(PC)
static const struct guard one_access; /* armed while a scalar is accessed */
#endif
static TLS const struct guard *volatile armed;
/* A signal that this thread got from itself. */
static TLS volatile sig_atomic_t put_off;

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
        && !fault_chain_has(info, context)) {
        put_off = 1;
        errno = saved_errno;
        return;
    }
    if (guard != NULL && fault_chain_is_fault(info)) {
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
            fault_chain_settled();
            jump_after(hit, context);
            errno = saved_errno;
            return;
        }
    }
    fault_chain_pass_on(signum, info, context);
    errno = saved_errno;
}

int
fault_claim(void)
{
    return fault_chain_claim(on_bus_error);
}
