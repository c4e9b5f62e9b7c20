/* What came of a system call. See stream.h. */
#include "native.h"

#include "os_map.h"
#include "range.h"
#include "stream.h"

/* So often a page may be gone when the kernel comes to it, and back when we look. */
#define TRIES_AT_MOST 100

int
stream_fail(module_state *state, bool reading, int err, const char *text,
            size_t transferred, PyObject *cause)
{
    return errors_transfer(reading ? state->ReadFromSourceError
                                   : state->WriteToDestinationError,
                           err, text, transferred, cause);
}

int
stream_would_block(module_state *state, bool reading, size_t transferred)
{
    PyObject *cause = PyObject_CallFunction(PyExc_BlockingIOError, "iN", EAGAIN,
                                            errors_strerror(EAGAIN));
    return cause == NULL
               ? -1
               : stream_fail(state, reading, EAGAIN, NULL, transferred, cause);
}

int
stream_check_offset(module_state *state, uint64_t offset, uint64_t count)
{
    if (range_fits(offset, count, INT64_MAX)) {
        return 0;
    }
    errors_invalid_offset_u64(state, offset, count);
    return -1;
}

/* The first so many bytes of the pieces were written. */
static void
stream_wrote(const struct stream_call *self, size_t moved)
{
    for (size_t i = 0; i < self->count && moved > 0; i++) {
        size_t here = Py_MIN(moved, self->pieces[i].iov_len);
        const char *addr = self->pieces[i].iov_base;
        span_wrote(self->spans[i], (size_t)(addr - self->spans[i]->addr), here);
        moved -= here;
    }
}

/* The kernel found a bad address: the memory's fault if a page of it is gone. */
static int
stream_bad_address(const struct stream_call *self)
{
    bool can_fault = false;
    for (size_t i = 0; i < self->count; i++) {
        const struct span *span = self->spans[i];
        char *addr = self->pieces[i].iov_base;
        size_t size = self->pieces[i].iov_len, at = size;
        bool known = true;
        if (size != 0) {
            Py_BEGIN_ALLOW_THREADS
            known = os_map_first_fault(addr, size, self->reading, &at);
            Py_END_ALLOW_THREADS
        }
        if (!known) { /* the kernel just said that there is one: here, if anywhere */
            at = span->can_fault ? 0 : size;
        }
        if (at != size) {
            return span_faulted(span, (struct fault){addr + at, self->reading},
                                self->numbered ? (Py_ssize_t)i : NO_PIECE);
        }
        can_fault = can_fault || span->can_fault;
    }
    /* The page came back before we looked, or it is the file's own error. */
    return can_fault && (*self->tries)++ < TRIES_AT_MOST
               ? 0
               : stream_fail(self->state, self->reading, EFAULT, NULL, self->before,
                             NULL);
}

int
stream_settle(const struct stream_call *self, int err, size_t moved)
{
    bool nothing_came = err == EINTR || err == EAGAIN || err == EBADF;
    if (self->reading && !nothing_came) {
        stream_wrote(self, err == 0 ? moved : SIZE_MAX);
    }
    switch (err) {
    case 0:
    case EINTR:
        return 0;
    case EFAULT:
        return stream_bad_address(self);
    case EAGAIN:
        return stream_would_block(self->state, self->reading, self->before);
    default:
        return stream_fail(self->state, self->reading, err, NULL, self->before, NULL);
    }
}
