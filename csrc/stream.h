/* What came of a system call between a file and memory: what is marked as written, and
 * what its errno means. Transfers and vectored I/O say it alike. */
#ifndef GUESTMEM_STREAM_H
#define GUESTMEM_STREAM_H

#include "native.h"

#include "span.h"

#include <sys/uio.h>

/* One call, and those that are made again in its place. The caller is inside all of the
 * memory. */
struct stream_call {
    module_state *state;
    bool reading;                    /* from the file into memory */
    bool numbered;                   /* errors say which piece it was */
    size_t before;                   /* bytes that have come across before it */
    const struct span *const *spans; /* of each piece */
    const struct iovec *pieces;
    size_t count;
    unsigned *tries; /* since something moved last: of a fault that was gone again */
};

/* After a call that ended with err (0: it moved so many bytes). Where that is an error of
 * a read, what it was to fill is marked: pipes and sockets give some of it, and then the
 * error. 0: it moved them, or is to be made again (err is not 0; the signal handlers are
 * the caller's to run). -1 with an exception. */
int stream_settle(const struct stream_call *self, int err, size_t moved);

/* -1: the file failed after so many bytes. err 0: no errno, and text says what happened;
 * cause (stolen, may be NULL) becomes __cause__. */
int stream_fail(module_state *state, bool reading, int err, const char *text,
                size_t transferred, PyObject *cause);

/* The same: it is non-blocking, and would block. */
int stream_would_block(module_state *state, bool reading, size_t transferred);

/* -1 with InvalidOffsetError: count bytes from this offset of a file on pass the largest
 * off_t. */
int stream_check_offset(module_state *state, uint64_t offset, uint64_t count);

#endif
