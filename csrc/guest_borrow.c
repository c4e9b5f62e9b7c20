/* What GuestMemory lends: slices, refs, atomic refs, arrays, each within one region; and
 * bare addresses.
 */
#include "native.h"

#include "args.h"
#include "borrow.h"
#include "guest.h"

static PyObject *
guest_borrow(guest_object *self, uint64_t addr, const struct borrower *what)
{
    uint64_t reach;
    if (guest_reach(self, addr, what->count, &reach) < 0) {
        return NULL;
    }
    if (reach < what->count) {
        return errors_invalid_guest_address(self->state, addr + reach);
    }
    /* With count 0 the end of a region will do. */
    struct region *region = guest_find(self, addr);
    if (region == NULL) {
        region = guest_find(self, addr - 1);
    }
    uint64_t offset = addr - region->start;
    if (what->count > region->size - offset) {
        return errors_crosses_border(self->state, addr, what->count,
                                     region->start + region->size);
    }
    return borrow_new(&region->part, offset, what);
}

const char guest_get_slice_doc[] = PyDoc_STR(
    "get_slice($self, addr, count, /)\n--\n\n"
    "Return a VolatileSlice of count bytes from a guest address on.\n"
    "\n"
    "It lies in one region: OutOfBoundsError where it would cross into the\n"
    "next (slices() gives one for each), InvalidGuestAddressError where a byte\n"
    "is in a hole, AddressOverflowError beyond 2**64.");

PyObject *
guest_get_slice(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    struct borrower what = {.kind = A_SLICE_OF_IT};
    uint64_t addr;
    return args_count(nargs, 2, 2, "get_slice", "addr, count") < 0
                   || args_u64(args[0], "addr", &addr) < 0
                   || args_u64(args[1], "count", &what.count) < 0
               ? NULL
               : guest_borrow(guest_of(op), addr, &what);
}

const char guest_slices_doc[] = PyDoc_STR(
    "slices($self, addr, count, /)\n--\n\n"
    "Return an iterator of the VolatileSlices that cover a range.\n"
    "\n"
    "One for each region that it touches, in order. InvalidGuestAddressError\n"
    "where a byte is in a hole, AddressOverflowError beyond 2**64.");

PyObject *
guest_slices(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    uint64_t addr, count;
    if (args_count(nargs, 2, 2, "slices", "addr, count") < 0
        || args_u64(args[0], "addr", &addr) < 0
        || args_u64(args[1], "count", &count) < 0
        || guest_reach_all(self, addr, count) < 0) {
        return NULL;
    }
    PyObject *list = PyList_New(0);
    while (list != NULL && count > 0) {
        struct piece piece = guest_piece(self, addr, count);
        struct borrower what = {.kind = A_SLICE_OF_IT, .count = piece.count};
        PyObject *slice = borrow_new(piece.part, piece.offset, &what);
        if (slice == NULL || PyList_Append(list, slice) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(slice);
        addr += piece.count;
        count -= piece.count;
    }
    PyObject *result = list == NULL ? NULL : PyObject_GetIter(list);
    Py_XDECREF(list);
    return result;
}

const char guest_get_ref_doc[] =
    PyDoc_STR("get_ref($self, addr, type, /)\n--\n\n"
              "Return a VolatileRef to the object of this type at a guest address.\n"
              "\n"
              "The errors are those of get_slice(addr, size of type).");

PyObject *
guest_get_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    struct borrower what;
    uint64_t addr;
    return args_count(nargs, 2, 2, "get_ref", "addr, type") < 0
                   || args_u64(args[0], "addr", &addr) < 0
                   || borrow_want_ref(guest_of(op)->state, args[1], &what) < 0
               ? NULL
               : guest_borrow(guest_of(op), addr, &what);
}

const char guest_get_atomic_ref_doc[] = PyDoc_STR(
    "get_atomic_ref($self, addr, type, /)\n--\n\n"
    "Return an AtomicRef to the integer of this type at a guest address.\n"
    "\n"
    "The errors are those of get_slice(addr, type.size); MisalignedError where\n"
    "it does not lie at a multiple of its size in memory.");

PyObject *
guest_get_atomic_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    struct borrower what;
    uint64_t addr;
    return args_count(nargs, 2, 2, "get_atomic_ref", "addr, type") < 0
                   || args_u64(args[0], "addr", &addr) < 0
                   || borrow_want_atomic_ref(guest_of(op)->state, args[1], &what) < 0
               ? NULL
               : guest_borrow(guest_of(op), addr, &what);
}

const char guest_get_array_ref_doc[] =
    PyDoc_STR("get_array_ref($self, addr, n, type, /)\n--\n\n"
              "Return a VolatileArrayRef to n objects from a guest address on.\n"
              "\n"
              "The errors are those of get_slice(addr, n * size of type).");

PyObject *
guest_get_array_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    struct borrower what;
    uint64_t addr;
    return args_count(nargs, 3, 3, "get_array_ref", "addr, n, type") < 0
                   || args_u64(args[0], "addr", &addr) < 0
                   || borrow_want_array_ref(guest_of(op)->state, addr, args[1], args[2],
                                            &what)
                          < 0
               ? NULL
               : guest_borrow(guest_of(op), addr, &what);
}

const char guest_get_host_address_doc[] = PyDoc_STR(
    "get_host_address($self, addr, /)\n--\n\n"
    "Return the host address of a guest address, for passing to ioctls.\n"
    "\n"
    "It holds nothing: keep this object alive for as long as the kernel may use\n"
    "the address. InvalidGuestAddressError in a hole, ClosedError once closed.");

PyObject *
guest_get_host_address(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    uint64_t addr;
    if (args_count(nargs, 1, 1, "get_host_address", "addr") < 0
        || args_u64(args[0], "addr", &addr) < 0) {
        return NULL;
    }
    struct region *region = guest_find(self, addr);
    if (region == NULL) {
        return errors_invalid_guest_address(self->state, addr);
    }
    if (memory_enter(&region->part, SHORT) < 0) {
        return NULL;
    }
    PyObject *result =
        PyLong_FromVoidPtr(region->part.span.addr + (addr - region->start));
    memory_leave(&region->part, SHORT);
    return result;
}
