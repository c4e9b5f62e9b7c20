/* remove_range: pages given back, so that they read as zeros. */
#include "native.h"

#include "args.h"
#include "range.h"
#include "volatile_memory.h"

/* The whole pages of the range. The kernel rounds a length up: so the last, partial
 * page is not its business. A misaligned start is the kernel's to refuse, whatever
 * the length. */
static int
punch(char *addr, size_t count, size_t tail)
{
    int err = 0;
    if (count > tail || (uintptr_t)addr % os_map_page_size() != 0) {
        Py_BEGIN_ALLOW_THREADS
        err = os_map_remove(addr, count > tail ? count - tail : count);
        Py_END_ALLOW_THREADS
    }
    return err;
}

const char remove_range_doc[] = PyDoc_STR(
    "remove_range($self, mem_offset, count, /)\n--\n\n"
    "Make count bytes from mem_offset on read as zeros, and give their pages back.\n"
    "\n"
    "Whole pages are freed (madvise(2), MADV_REMOVE), a last partial page is zeroed;\n"
    "bytes outside of the range never change. count 0 does nothing.\n"
    "\n"
    "InvalidRangeError where the range passes the end; also, with the\n"
    "SystemCallFailedError as its cause, where its start is not page-aligned in\n"
    "memory or the memory cannot be punched (a private or a locked mapping):\n"
    "nothing has changed then. WriteToMemoryError where the last partial page is\n"
    "missing: the whole pages have been freed then. (Of memory that is locked in\n"
    "part, what comes before the locked pages is gone: the kernel goes part by part.)");

PyObject *
remove_range(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    uint64_t offset, count;
    if (args_count(nargs, 2, 2, "remove_range", "mem_offset, count") < 0
        || args_u64(args[0], "mem_offset", &offset) < 0
        || args_u64(args[1], "count", &count) < 0 || memory_enter(self, LONG) < 0) {
        return NULL;
    }
    int err = 0, failed = 0;
    bool fits = range_fits(offset, count, self->span.size);
    if (fits && count != 0) {
        size_t tail = count % os_map_page_size();
        err = punch(self->span.addr + offset, count, tail);
        /* What the kernel refuses it may have done in part. */
        span_wrote(&self->span, offset, count - tail);
        if (err == 0) { /* so the kernel has agreed to the rest */
            failed = span_fill(&self->span, offset + (count - tail), 0, tail);
        }
    }
    memory_leave(self, LONG);
    if (!fits) {
        return errors_invalid_range(self->span.state, offset, count, self->span.size);
    }
    if (err != 0) {
        return errors_not_removed(self->span.state, offset, count, self->span.size,
                                  err);
    }
    return failed ? NULL : Py_NewRef(Py_None);
}
