/* The chain of those who handle SIGBUS: we take it, and pass on what is not ours, so that
 * it ends as it would have ended without us. For fault.c alone. No Python here.
 */
#ifndef GUESTMEM_FAULT_CHAIN_H
#define GUESTMEM_FAULT_CHAIN_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <ucontext.h>

/* What of the processor's state the handler looks at or changes. */
#if defined(__x86_64__)
# define PC(context)       ((context)->uc_mcontext.gregs[REG_RIP])
# define SP(context)       ((uintptr_t)(context)->uc_mcontext.gregs[REG_RSP])
# define IS_WRITE(context) (((context)->uc_mcontext.gregs[REG_ERR] & 2) != 0)
#elif defined(__aarch64__)
# define PC(context) ((context)->uc_mcontext.pc)
# define SP(context) ((uintptr_t)(context)->uc_mcontext.sp)
#endif

/* The default model may allocate at a variable's first use in a thread, and that
 * would be in the handler. musl refuses to load the other, and never allocates. */
#if defined(__GLIBC__)
# define TLS __attribute__((tls_model("initial-exec"))) _Thread_local
#else
# define TLS _Thread_local
#endif

typedef void (*fault_handler)(int signum, siginfo_t *info, void *context);

/* Installs handler, and remembers who was there. 0 or an errno. Once more where somebody
 * has taken the signal since. */
int fault_chain_claim(fault_handler handler);

/* The rest is for the handler. */

/* Whether the signal is about what this thread does. */
bool fault_chain_is_fault(const siginfo_t *info);

/* Whether it came back to us from the one whom we passed it to. */
bool fault_chain_has(const siginfo_t *info, const void *context);

/* It is not ours. */
void fault_chain_pass_on(int signum, siginfo_t *info, void *context);

/* It was ours: so whatever was passed on before has come to its end. */
void fault_chain_settled(void);

#endif
