/* Accesses to memory whose pages may not be there when they are touched: a file that
 * was truncated under its mapping, a full tmpfs, an empty pool of huge pages. The
 * bus error becomes a return value. No Python here.
 *
 * Aligned scalars are one instruction each, with an entry in a table of those that
 * may fault: the signal handler goes on after it. Copies and fills are those of
 * access.h between sigsetjmp and siglongjmp, and so are scalars on processors that
 * the table is not written for.
 */
#ifndef GUESTMEM_FAULT_H
#define GUESTMEM_FAULT_H

#include "access_atomic.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What could not be brought in: by value, because it is returned in registers. */
struct fault {
    const char *at; /* the first byte that faulted; NULL where none did */
    bool writing;
};

struct fault_value {
    const char *at; /* as above */
    uint64_t bits;
};

/* Takes SIGBUS over; once more where somebody else has taken it since. What is not
 * ours goes on to whoever had it before. 0 or an errno. */
int fault_claim(void);

/* As the functions of access.h. Guest memory is guarded, a host's buffer is not. What
 * a store, write, fill or copy had done before the fault stays done; what a read
 * leaves in the host's buffer is not defined. */
struct fault_value fault_load(const char *guest, size_t width);
struct fault fault_store(char *guest, uint64_t bits, size_t width);
struct fault fault_read(void *host, const char *guest, size_t count);
struct fault fault_write(char *guest, const void *host, size_t count);
struct fault fault_copy(char *dst, const char *src, size_t count);
struct fault fault_fill(char *guest, unsigned char byte, size_t count);
struct fault fault_atomic(char *guest, struct atomic_call *call, uint64_t *result);

#endif
