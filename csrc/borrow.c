/* What VolatileMemory lends: slices, refs, atomic refs, arrays; and its bare address.
 *
 * GuestMemory lends the same of its regions (guest_borrow.c).
 */
#include "native.h"

#include "args.h"
#include "borrow.h"
#include "object_type.h"
#include "range.h"
#include "scalar.h"
#include "volatile_memory.h"

const char borrow_as_ptr_doc[] = PyDoc_STR(
    "as_ptr($self, /)\n--\n\n"
    "Return the host address of the first byte, for passing to ioctls.\n"
    "\n"
    "It holds nothing: keep the mapping or a slice alive for as long as the\n"
    "kernel may use the address (KVM_SET_USER_MEMORY_REGION: until the slot is\n"
    "removed), or the guest writes into whatever is mapped there next.\n"
    "ClosedError once closed.");

PyObject *
borrow_as_ptr(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    if (args_count(nargs, 0, 0, "as_ptr", "") < 0 || memory_enter(self, SHORT) < 0) {
        return NULL;
    }
    PyObject *result = PyLong_FromVoidPtr(self->span.addr);
    memory_leave(self, SHORT);
    return result;
}

static PyObject *
borrow_make(const struct span *span, uint64_t offset, const struct borrower *what)
{
    switch (what->kind) {
    case A_REF:
        return ref_new(span, offset, what->count, what->type);
    case AN_ATOMIC_REF:
        if ((uintptr_t)(span->addr + offset) % what->count != 0) {
            return errors_misaligned(span->state, span->first + offset, what->count);
        }
        return atomic_ref_new(span, offset, what->count, what->type);
    case AN_ARRAY_REF:
        return array_new(span, offset, what->length, what->type, what->element);
    default:
        return slice_new(span, offset, what->count);
    }
}

PyObject *
borrow_new(memory_object *self, uint64_t offset, const struct borrower *what)
{
    uint64_t end;
    PyObject *result = NULL;
    if (memory_enter(self, SHORT) < 0) {
        return NULL;
    }
    if (!range_end(offset, what->count, &end)) {
        memory_leave(self, SHORT);
        return errors_address_overflow(self->span.state, offset, what->count);
    }
    if (!range_fits(offset, what->count, self->span.size)) {
        memory_leave(self, SHORT);
        return errors_out_of_bounds(self->span.state, end, self->span.size);
    }
    result = borrow_make(&self->span, offset, what);
    memory_leave(self, SHORT);
    return result;
}

const char borrow_get_slice_doc[] = PyDoc_STR(
    "get_slice($self, offset, count, /)\n--\n\n"
    "Return a VolatileSlice of count bytes from offset on.\n"
    "\n"
    "It borrows from the mapping (from a slice, from what that one borrows), which\n"
    "stays mapped for as long as the slice lives. count 0 at the end is fine.\n"
    "AddressOverflowError where offset + count passes 2**64 - 1, OutOfBoundsError\n"
    "where it passes the size.");

PyObject *
borrow_get_slice(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t offset, count;
    if (args_count(nargs, 2, 2, "get_slice", "offset, count") < 0
        || args_u64(args[0], "offset", &offset) < 0
        || args_u64(args[1], "count", &count) < 0) {
        return NULL;
    }
    struct borrower what = {.kind = A_SLICE_OF_IT, .count = count};
    return borrow_new(memory_of(op), offset, &what);
}

const char borrow_get_ref_doc[] = PyDoc_STR(
    "get_ref($self, offset, type, /)\n--\n\n"
    "Return a VolatileRef to the object of this type at offset.\n"
    "\n"
    "type is a Scalar, a ctypes class of plain data, or a struct.Struct. The\n"
    "errors are those of get_slice(offset, size of type). No alignment is\n"
    "needed, but only a scalar at a multiple of its size is one access.");

/* The size of an object of this type; -1 with TypeError. */
static int
borrow_size_of(module_state *state, PyObject *kind, size_t *size)
{
    struct object_type type;
    if (scalar_check(state, kind)) {
        *size = ((scalar_object *)kind)->width;
        return 0;
    }
    if (object_type_find(state, kind, &type) < 0) {
        return -1;
    }
    *size = type.size;
    return 0;
}

int
borrow_want_ref(module_state *state, PyObject *type, struct borrower *what)
{
    size_t size;
    if (borrow_size_of(state, type, &size) < 0) {
        return -1;
    }
    *what = (struct borrower){.kind = A_REF, .count = size, .type = type};
    return 0;
}

int
borrow_want_atomic_ref(module_state *state, PyObject *type, struct borrower *what)
{
    const scalar_object *scalar = (scalar_object *)type;
    if (!scalar_check(state, type)) {
        errors_wrong_type("type", "a Scalar of integers", type);
        return -1;
    }
    if (scalar->kind == SCALAR_FLOAT) {
        PyErr_Format(PyExc_TypeError, "type must be a Scalar of integers, not %R",
                     type);
        return -1;
    }
    *what =
        (struct borrower){.kind = AN_ATOMIC_REF, .count = scalar->width, .type = type};
    return 0;
}

int
borrow_want_array_ref(module_state *state, uint64_t offset, PyObject *n, PyObject *type,
                      struct borrower *what)
{
    *what = (struct borrower){.kind = AN_ARRAY_REF, .type = type};
    if (args_unsigned(n, "n", PY_SSIZE_T_MAX, "2**63 - 1", &what->length) < 0
        || borrow_size_of(state, type, &what->element) < 0) {
        return -1;
    }
    if (__builtin_mul_overflow(what->length, what->element, &what->count)) {
        errors_array_overflow(state, offset, what->length, what->element);
        return -1;
    }
    return 0;
}

PyObject *
borrow_get_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    uint64_t offset;
    struct borrower what;
    if (args_count(nargs, 2, 2, "get_ref", "offset, type") < 0
        || args_u64(args[0], "offset", &offset) < 0
        || borrow_want_ref(self->span.state, args[1], &what) < 0) {
        return NULL;
    }
    return borrow_new(self, offset, &what);
}

const char borrow_get_atomic_ref_doc[] = PyDoc_STR(
    "get_atomic_ref($self, offset, type, /)\n--\n\n"
    "Return an AtomicRef to the integer of this type at offset.\n"
    "\n"
    "type is a Scalar, but not f32 or f64. The errors are those of\n"
    "get_slice(offset, type.size); MisalignedError where the integer does not\n"
    "lie at a multiple of its size in memory.");

PyObject *
borrow_get_atomic_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    uint64_t offset;
    struct borrower what;
    if (args_count(nargs, 2, 2, "get_atomic_ref", "offset, type") < 0
        || args_u64(args[0], "offset", &offset) < 0
        || borrow_want_atomic_ref(self->span.state, args[1], &what) < 0) {
        return NULL;
    }
    return borrow_new(self, offset, &what);
}

const char borrow_get_array_ref_doc[] =
    PyDoc_STR("get_array_ref($self, offset, n, type, /)\n--\n\n"
              "Return a VolatileArrayRef to n objects of this type from offset on.\n"
              "\n"
              "type is what get_ref() takes. The errors are those of\n"
              "get_slice(offset, n * size of type); n 0 at the end is fine.");

PyObject *
borrow_get_array_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    uint64_t offset;
    struct borrower what;
    if (args_count(nargs, 3, 3, "get_array_ref", "offset, n, type") < 0
        || args_u64(args[0], "offset", &offset) < 0
        || borrow_want_array_ref(self->span.state, offset, args[1], args[2], &what)
               < 0) {
        return NULL;
    }
    return borrow_new(self, offset, &what);
}
