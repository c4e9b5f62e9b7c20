/* What other libraries do with SIGBUS, for test_fault_chain.py. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct sigaction before;
static volatile sig_atomic_t calls;
static __thread sigjmp_buf *volatile jump;

static void
pass(int signum, siginfo_t *info, void *context)
{
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(signum, info, context);
    }
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(signum);
    }
    else {
        sigaction(signum, &before, NULL); /* it faults again, and ends */
    }
}

/* Calls its predecessor. */
static void
chains(int signum, siginfo_t *info, void *context)
{
    calls++;
    pass(signum, info, context);
}

/* Puts its predecessor back and returns. */
static void
restores(int signum, siginfo_t *info, void *context)
{
    (void)info, (void)context;
    calls++;
    sigaction(signum, &before, NULL);
}

/* Only counts. */
static void
counts(int signum)
{
    (void)signum;
    calls++;
}

/* Recovers from faults of its own by a jump, and passes on the others. */
static void
jumps(int signum, siginfo_t *info, void *context)
{
    calls++;
    if (jump != NULL) {
        siglongjmp(*jump, 1);
    }
    pass(signum, info, context);
}

void
install(const char *name)
{
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_ONSTACK};
    switch (name[0]) {
    case 'c': /* chains: blocks SIGBUS meanwhile */
        action.sa_sigaction = chains;
        break;
    case 'r':
        action.sa_sigaction = restores;
        break;
    case 'o': /* once */
        action.sa_flags = SA_RESETHAND;
        action.sa_handler = counts;
        break;
    default:
        action.sa_flags |= SA_NODEFER;
        action.sa_sigaction = jumps;
        break;
    }
    sigaction(SIGBUS, &action, &before);
}

int
called(void)
{
    return calls;
}

/* Touches a byte; whether that faulted. */
int
touch(const volatile char *byte)
{
    sigjmp_buf env;
    if (sigsetjmp(env, 1) != 0) {
        jump = NULL;
        return 1;
    }
    jump = &env;
    (void)*byte;
    jump = NULL;
    return 0;
}

/* A page somewhere is poisoned, and nobody has touched it yet. */
void
poison(void)
{
    siginfo_t info = {.si_signo = SIGBUS, .si_code = BUS_MCEERR_AO};
    syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), SIGBUS, &info);
}
