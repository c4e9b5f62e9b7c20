/* Who had SIGBUS before us, and what is theirs. See fault_chain.h. What is static here
 * serves the signal handler alone, which may run at any instruction.
 */
#define _GNU_SOURCE
#include "fault_chain.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

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

static bool
is_ours(const struct sigaction *action, fault_handler ours)
{
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == ours;
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
fault_chain_claim(fault_handler handler)
{
    for (;;) {
        const struct earlier *top = atomic_load(&earlier), *one;
        struct sigaction found, replaced, ours = {.sa_sigaction = handler};
        if (sigaction(SIGBUS, NULL, &found) < 0) {
            return errno;
        }
        if (is_ours(&found, handler)) {
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
        if (is_ours(&replaced, handler) || same_action(&replaced, &found)) {
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

bool
fault_chain_has(const siginfo_t *info, const void *context)
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

bool
fault_chain_is_fault(const siginfo_t *info)
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

void
fault_chain_pass_on(int signum, siginfo_t *info, void *context)
{
    bool again = fault_chain_has(info, context);
    const struct earlier *to = again ? passing.to->older : atomic_load(&earlier);
    if (to == NULL
        || (!again && fault_chain_is_fault(info) && is_hopeless(info, context))) {
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
    else if (action->sa_handler == SIG_DFL || fault_chain_is_fault(info)) {
        end_by_default(signum, info); /* a fault cannot be ignored */
    }
}

void
fault_chain_settled(void)
{
    passing.again = 0;
}
