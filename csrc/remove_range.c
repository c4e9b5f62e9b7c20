/* remove_range: pages given back, so that they read as zeros. */
#include "native.h"

#include "access.h"
#include "args.h"
#include "range.h"
#include "volatile_memory.h"

/* The kernel punches whole pages and rounds a length up: so the last, partial
 * page is zeroed by hand, after the kernel has agreed to the rest. */
static int
punch(char *addr, size_t count)
{
    size_t page = os_map_page_size();
    size_t tail = count % page;
    int err = 0;
    /* A misaligned start is the kernel's to refuse, whatever the length. */
    if (count > tail || (uintptr_t)addr % page != 0) {
        err = os_map_remove(addr, count - tail > 0 ? count - tail : count);
    }
    if (err == 0) {
        access_fill(addr + (count - tail), 0, tail);
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
    "nothing has changed then. (Of memory that is locked in part, what comes before\n"
    "the locked pages is gone: the kernel goes part by part.)");

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
    int err = 0;
    bool fits = range_fits(offset, count, self->size);
    if (fits && count != 0) {
        char *addr = self->addr + offset;
        Py_BEGIN_ALLOW_THREADS
        err = punch(addr, count);
        Py_END_ALLOW_THREADS
    }
    memory_leave(self, LONG);
    if (fits && err == 0) {
        Py_RETURN_NONE;
    }
    return err != 0 ? errors_not_removed(self->state, offset, count, self->size, err)
                    : errors_invalid_range(self->state, offset, count, self->size);
}
