/* remove_range: pages given back, so that they read as zeros. */
#include "native.h"

#include "args.h"
#include "guest.h"
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

/* [offset, offset + count) of it, by one who is inside: 0, what madvise says, or -1 with an
 * exception. */
static int
remove_inside(const struct span *span, size_t offset, size_t count)
{
    if (count == 0) {
        return 0;
    }
    size_t tail = count % os_map_page_size();
    int err = punch(span->addr + offset, count, tail);
    /* What the kernel refuses it may have done in part. */
    span_wrote(span, offset, count - tail);
    /* Where it has not, it has agreed to the rest. */
    return err != 0 ? err : span_fill(span, offset + (count - tail), 0, tail);
}

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
    bool fits = range_fits(offset, count, self->span.size);
    int err = fits ? remove_inside(&self->span, offset, count) : 0;
    memory_leave(self, LONG);
    if (!fits) {
        return errors_invalid_range(self->span.state, offset, count, self->span.size);
    }
    if (err > 0) {
        return errors_not_removed(self->span.state, offset, count, self->span.size,
                                  err);
    }
    return err < 0 ? NULL : Py_NewRef(Py_None);
}

const char guest_remove_range_doc[] = PyDoc_STR(
    "remove_range($self, addr, count, /)\n--\n\n"
    "Make count bytes from a guest address on read as zeros, and free their pages.\n"
    "\n"
    "As VolatileMemory.remove_range(), across regions that adjoin, each of which must\n"
    "begin with a page in memory where the range goes on into it.\n"
    "InvalidGuestAddressError where a byte is in a hole, AddressOverflowError beyond\n"
    "2**64; InvalidRangeError, with the SystemCallFailedError as its cause, where the\n"
    "part of the range from offset (a guest address) on cannot be removed: what comes\n"
    "before it has been. WriteToMemoryError where a partial page is missing.");

PyObject *
guest_remove_range(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    uint64_t addr, count;
    if (args_count(nargs, 2, 2, "remove_range", "addr, count") < 0
        || args_u64(args[0], "addr", &addr) < 0
        || args_u64(args[1], "count", &count) < 0
        || guest_reach_all(self, addr, count) < 0 || guest_begin(self, LONG) < 0) {
        return NULL;
    }
    struct piece piece = {0};
    uint64_t done = 0;
    int err = 0;
    for (; err == 0 && done < count; done += piece.count) { /* before any is touched */
        piece = guest_piece(self, addr + done, count - done);
        uintptr_t at = (uintptr_t)piece.part->span.addr + piece.offset;
        err = at % os_map_page_size() != 0 ? EINVAL : 0;
    }
    if (err == 0) {
        for (done = 0; err == 0 && done < count; done += piece.count) {
            piece = guest_piece(self, addr + done, count - done);
            err = remove_inside(&piece.part->span, piece.offset, piece.count);
        }
    }
    guest_end(self, LONG);
    if (err > 0) {
        return errors_not_removed(self->state, addr + done - piece.count, piece.count,
                                  piece.part->span.size, err);
    }
    return err < 0 ? NULL : Py_NewRef(Py_None);
}
