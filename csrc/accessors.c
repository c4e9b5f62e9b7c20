/* The methods of VolatileMemory, which MemoryMapping and VolatileSlice share.
 *
 * Each has the same four steps: arguments into C values (which may run Python
 * code, and so may close the memory), enter the memory, check the range, touch
 * it. The last two are not separated by anything that could run Python code.
 */
#include "native.h"

#include "accessors.h"
#include "args.h"
#include "object_type.h"
#include "range.h"
#include "scalar.h"
#include "volatile_memory.h"

/* What a method of VolatileMemory and GuestMemory share is inlined into the former: a
 * call more would cost up to a tenth. */
#define INLINED static inline __attribute__((always_inline))

/* NULL with InvalidAddressError, having left the memory. */
static PyObject *
accessor_out_of_range(memory_object *self, enum stay stay, uint64_t offset,
                      uint64_t count)
{
    memory_leave(self, stay);
    return errors_invalid_address(self->span.state, offset, count, self->span.size);
}

/* [offset, offset + count) as a new bytes object. */
static PyObject *
accessor_read_bytes(memory_object *self, uint64_t offset, uint64_t count)
{
    enum stay stay = memory_stay_of_copy(count);
    if (memory_enter(self, stay) < 0) {
        return NULL;
    }
    if (!range_fits(offset, count, self->span.size)) {
        return accessor_out_of_range(self, stay, offset, count);
    }
    PyObject *bytes = span_bytes(&self->span, offset, count);
    memory_leave(self, stay);
    return bytes;
}

/* All of count bytes, or none of them. */
static PyObject *
accessor_write_bytes(memory_object *self, uint64_t offset, const void *host,
                     size_t count)
{
    enum stay stay = memory_stay_of_copy(count);
    if (memory_enter(self, stay) < 0) {
        return NULL;
    }
    if (!range_fits(offset, count, self->span.size)) {
        return accessor_out_of_range(self, stay, offset, count);
    }
    int failed = span_write(&self->span, offset, host, count);
    memory_leave(self, stay);
    return failed ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(
    accessor_as_ptr_doc,
    "as_ptr($self, /)\n--\n\n"
    "Return the host address of the first byte, for passing to ioctls.\n"
    "\n"
    "It holds nothing: keep the mapping or a slice alive for as long as the\n"
    "kernel may use the address (KVM_SET_USER_MEMORY_REGION: until the slot is\n"
    "removed), or the guest writes into whatever is mapped there next.\n"
    "ClosedError once closed.");

static PyObject *
accessor_as_ptr(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
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
accessor_make_borrower(const struct span *span, uint64_t offset,
                       const struct borrower *what)
{
    switch (what->kind) {
    case A_REF:
        return ref_new(span, offset, what->count, what->type);
    case AN_ATOMIC_REF:
        if ((uintptr_t)(span->addr + offset) % what->count != 0) {
            return errors_misaligned(span->state, offset, what->count);
        }
        return atomic_ref_new(span, offset, what->count, what->type);
    case AN_ARRAY_REF:
        return array_new(span, offset, what->length, what->type, what->element);
    default:
        return slice_new(span, offset, what->count);
    }
}

PyObject *
accessor_borrow(memory_object *self, uint64_t offset, const struct borrower *what)
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
    result = accessor_make_borrower(&self->span, offset, what);
    memory_leave(self, SHORT);
    return result;
}

PyDoc_STRVAR(
    accessor_get_slice_doc,
    "get_slice($self, offset, count, /)\n--\n\n"
    "Return a VolatileSlice of count bytes from offset on.\n"
    "\n"
    "It borrows from the mapping (from a slice, from what that one borrows), which\n"
    "stays mapped for as long as the slice lives. count 0 at the end is fine.\n"
    "AddressOverflowError where offset + count passes 2**64 - 1, OutOfBoundsError\n"
    "where it passes the size.");

static PyObject *
accessor_get_slice(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t offset, count;
    if (args_count(nargs, 2, 2, "get_slice", "offset, count") < 0
        || args_u64(args[0], "offset", &offset) < 0
        || args_u64(args[1], "count", &count) < 0) {
        return NULL;
    }
    struct borrower what = {.kind = A_SLICE_OF_IT, .count = count};
    return accessor_borrow(memory_of(op), offset, &what);
}

PyDoc_STRVAR(accessor_get_ref_doc,
             "get_ref($self, offset, type, /)\n--\n\n"
             "Return a VolatileRef to the object of this type at offset.\n"
             "\n"
             "type is a Scalar, a ctypes class of plain data, or a struct.Struct. The\n"
             "errors are those of get_slice(offset, size of type). No alignment is\n"
             "needed, but only a scalar at a multiple of its size is one access.");

/* The size of an object of this type; -1 with TypeError. */
static int
accessor_size_of(module_state *state, PyObject *kind, size_t *size)
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
accessor_want_ref(module_state *state, PyObject *type, struct borrower *what)
{
    size_t size;
    if (accessor_size_of(state, type, &size) < 0) {
        return -1;
    }
    *what = (struct borrower){.kind = A_REF, .count = size, .type = type};
    return 0;
}

int
accessor_want_atomic_ref(module_state *state, PyObject *type, struct borrower *what)
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
accessor_want_array_ref(module_state *state, uint64_t offset, PyObject *n,
                        PyObject *type, struct borrower *what)
{
    *what = (struct borrower){.kind = AN_ARRAY_REF, .type = type};
    if (args_unsigned(n, "n", PY_SSIZE_T_MAX, "2**63 - 1", &what->length) < 0
        || accessor_size_of(state, type, &what->element) < 0) {
        return -1;
    }
    if (__builtin_mul_overflow(what->length, what->element, &what->count)) {
        errors_array_overflow(state, offset, what->length, what->element);
        return -1;
    }
    return 0;
}

static PyObject *
accessor_get_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    uint64_t offset;
    struct borrower what;
    if (args_count(nargs, 2, 2, "get_ref", "offset, type") < 0
        || args_u64(args[0], "offset", &offset) < 0
        || accessor_want_ref(self->span.state, args[1], &what) < 0) {
        return NULL;
    }
    return accessor_borrow(self, offset, &what);
}

PyDoc_STRVAR(
    accessor_get_atomic_ref_doc,
    "get_atomic_ref($self, offset, type, /)\n--\n\n"
    "Return an AtomicRef to the integer of this type at offset.\n"
    "\n"
    "type is a Scalar, but not f32 or f64. The errors are those of\n"
    "get_slice(offset, type.size); MisalignedError where the integer does not\n"
    "lie at a multiple of its size in memory.");

static PyObject *
accessor_get_atomic_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    uint64_t offset;
    struct borrower what;
    if (args_count(nargs, 2, 2, "get_atomic_ref", "offset, type") < 0
        || args_u64(args[0], "offset", &offset) < 0
        || accessor_want_atomic_ref(self->span.state, args[1], &what) < 0) {
        return NULL;
    }
    return accessor_borrow(self, offset, &what);
}

PyDoc_STRVAR(accessor_get_array_ref_doc,
             "get_array_ref($self, offset, n, type, /)\n--\n\n"
             "Return a VolatileArrayRef to n objects of this type from offset on.\n"
             "\n"
             "type is what get_ref() takes. The errors are those of\n"
             "get_slice(offset, n * size of type); n 0 at the end is fine.");

static PyObject *
accessor_get_array_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    uint64_t offset;
    struct borrower what;
    if (args_count(nargs, 3, 3, "get_array_ref", "offset, n, type") < 0
        || args_u64(args[0], "offset", &offset) < 0
        || accessor_want_array_ref(self->span.state, offset, args[1], args[2], &what)
               < 0) {
        return NULL;
    }
    return accessor_borrow(self, offset, &what);
}

/* The range is checked before the object is made (a size never changes), and the
 * memory entered after it. */
static PyObject *
accessor_load(memory_object *self, uint64_t offset, const struct object_type *type)
{
    char *bytes;
    if (memory_enter(self, SHORT) < 0) {
        return NULL;
    }
    if (!range_fits(offset, type->size, self->span.size)) {
        return accessor_out_of_range(self, SHORT, offset, type->size);
    }
    memory_leave(self, SHORT);
    PyObject *holder = object_type_begin_load(self->span.state, type, &bytes);
    enum stay stay = memory_stay_of_copy(type->size);
    if (holder == NULL || memory_enter(self, stay) < 0) {
        Py_XDECREF(holder);
        return NULL;
    }
    int failed = span_read(&self->span, offset, bytes, type->size);
    memory_leave(self, stay);
    if (failed) {
        Py_DECREF(holder);
        return NULL;
    }
    return object_type_end_load(self->span.state, type, holder);
}

INLINED PyObject *
read_inline(memory_object *self, uint64_t offset, PyObject *kind)
{
    if (scalar_check(self->span.state, kind)) {
        const scalar_object *scalar = (scalar_object *)kind;
        if (memory_enter(self, SHORT) < 0) {
            return NULL;
        }
        if (!range_fits(offset, scalar->width, self->span.size)) {
            return accessor_out_of_range(self, SHORT, offset, scalar->width);
        }
        uint64_t bits;
        int failed = span_load(&self->span, offset, scalar->width, &bits);
        memory_leave(self, SHORT);
        return failed ? NULL : scalar_to_object(scalar, bits);
    }
    struct object_type type;
    if (object_type_find(self->span.state, kind, &type) < 0) {
        return NULL;
    }
    return accessor_load(self, offset, &type);
}

PyObject *
accessor_read_object(memory_object *self, uint64_t offset, PyObject *kind)
{
    return read_inline(self, offset, kind);
}

PyDoc_STRVAR(
    accessor_read_obj_doc,
    "read_obj($self, offset, type, /)\n--\n\n"
    "Return the object of this type at offset.\n"
    "\n"
    "A Scalar gives an int (f32 and f64 a float), a ctypes class a new instance\n"
    "that holds a copy (its __init__ does not run), a struct.Struct a tuple. A\n"
    "scalar at an address that is a multiple of its size is one access; anything\n"
    "else is one copy, which tears no aligned field of up to 8 bytes.\n"
    "\n"
    "InvalidAddressError where it passes the end. TypeError for a ctypes class that\n"
    "holds a pointer or a Python object at any depth: a guest could forge it.");

static PyObject *
accessor_read_obj(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t offset;
    return args_count(nargs, 2, 2, "read_obj", "offset, type") < 0
                   || args_u64(args[0], "offset", &offset) < 0
               ? NULL
               : read_inline(memory_of(op), offset, args[1]);
}

INLINED PyObject *
accessor_write_scalar(memory_object *self, PyObject *value, uint64_t offset,
                      const scalar_object *scalar)
{
    uint64_t bits;
    if (scalar_from_object(scalar, value, &bits) < 0 || memory_enter(self, SHORT) < 0) {
        return NULL;
    }
    if (!range_fits(offset, scalar->width, self->span.size)) {
        return accessor_out_of_range(self, SHORT, offset, scalar->width);
    }
    int failed = span_store(&self->span, offset, scalar->width, bits);
    memory_leave(self, SHORT);
    return failed ? NULL : Py_NewRef(Py_None);
}

INLINED PyObject *
write_inline(memory_object *self, PyObject *value, uint64_t offset, PyObject *kind)
{
    module_state *state = self->span.state;
    if (kind != NULL && scalar_check(state, kind)) {
        return accessor_write_scalar(self, value, offset, (scalar_object *)kind);
    }
    struct object_type type;
    if (kind == NULL || Py_IsNone(kind) ? object_type_of_value(state, value, &type) < 0
                                        : object_type_find(state, kind, &type) < 0) {
        return NULL;
    }
    PyObject *bytes = object_type_store(state, &type, value);
    if (bytes == NULL) {
        return NULL;
    }
    PyObject *result = accessor_write_bytes(self, offset, PyBytes_AsString(bytes),
                                            (size_t)PyBytes_Size(bytes));
    Py_DECREF(bytes);
    return result;
}

PyObject *
accessor_write_object(memory_object *self, PyObject *value, uint64_t offset,
                      PyObject *kind)
{
    return write_inline(self, value, offset, kind);
}

PyDoc_STRVAR(
    accessor_write_obj_doc,
    "write_obj($self, val, offset, /, type=None)\n--\n\n"
    "Write val, an object of this type, at offset.\n"
    "\n"
    "For a Scalar val is what __index__ (f32 and f64: __float__) takes, for a\n"
    "ctypes class an instance of it, for a struct.Struct a tuple. type may be left\n"
    "out where val is a ctypes instance. A scalar at an address that is a multiple\n"
    "of its size is one access; anything else is one copy, which tears no aligned\n"
    "field of up to 8 bytes.\n"
    "\n"
    "InvalidAddressError where it passes the end, OverflowError where val does not\n"
    "fit the scalar: nothing is written then.");

static PyObject *
accessor_write_obj(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                   PyObject *kwnames)
{
    static const char *const names[] = {"val", "offset", "type", NULL};
    static const struct args_spec spec = {
        .function = "write_obj", .names = names, .positional = 2, .required = 2};
    uint64_t offset;
    PyObject *given[3];
    if (kwnames != NULL || nargs != 3) {
        if (args_named(&spec, args, nargs, kwnames, given) < 0) {
            return NULL;
        }
        args = given;
    }
    return args_u64(args[1], "offset", &offset) < 0
               ? NULL
               : write_inline(memory_of(op), args[0], offset, args[2]);
}

PyDoc_STRVAR(accessor_read_bytes_doc,
             "read_bytes($self, offset, count, /)\n--\n\n"
             "Return exactly count bytes from offset on, as bytes.\n"
             "\n"
             "InvalidAddressError where they pass the end.");

static PyObject *
accessor_read_bytes_method(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t offset, count;
    if (args_count(nargs, 2, 2, "read_bytes", "offset, count") < 0
        || args_u64(args[0], "offset", &offset) < 0
        || args_u64(args[1], "count", &count) < 0) {
        return NULL;
    }
    return accessor_read_bytes(memory_of(op), offset, count);
}

INLINED Py_ssize_t
copy_inline(memory_object *self, uint64_t offset, PyObject *buf, const Py_buffer *view,
            enum direction direction, bool exact)
{
    size_t count = (size_t)view->len;
    if (!exact && offset < self->span.size) {
        count = range_clamp(offset, count, self->span.size);
    }
    enum stay stay = memory_stay_of_copy(count);
    if (memory_enter(self, stay) < 0) {
        return -1;
    }
    if (!range_fits(offset, count, self->span.size)
        || (!exact && offset == self->span.size)) {
        accessor_out_of_range(self, stay, offset, count);
        return -1;
    }
    int failed =
        memory_copy(&self->span, offset, buf, view, count, direction == INTO_MEMORY);
    memory_leave(self, stay);
    return failed ? -1 : (Py_ssize_t)count;
}

Py_ssize_t
accessor_copy(memory_object *self, uint64_t offset, PyObject *buf,
              const Py_buffer *view, enum direction direction, bool exact)
{
    return copy_inline(self, offset, buf, view, direction, exact);
}

static PyObject *
accessor_copy_method(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                     const char *name, enum direction direction, bool exact)
{
    uint64_t offset;
    Py_buffer view;
    if (args_count(nargs, 2, 2, name, "buf, offset") < 0
        || args_u64(args[1], "offset", &offset) < 0
        || args_buffer(args[0], "buf", &view, direction == INTO_BUFFER) < 0) {
        return NULL;
    }
    Py_ssize_t count =
        copy_inline(memory_of(op), offset, args[0], &view, direction, exact);
    PyBuffer_Release(&view);
    if (count < 0) {
        return NULL;
    }
    return exact ? Py_NewRef(Py_None) : PyLong_FromSsize_t(count);
}

PyDoc_STRVAR(accessor_read_slice_doc,
             "read_slice($self, buf, offset, /)\n--\n\n"
             "Copy from offset on into a writable buffer; return the count of bytes.\n"
             "\n"
             "Copies what fits: the smaller of len(buf) in bytes and size - offset.\n"
             "InvalidAddressError where offset is not below the size, even for an\n"
             "empty buffer. Where memory and buf overlap, as memmove.");

static PyObject *
accessor_read_slice(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return accessor_copy_method(op, args, nargs, "read_slice", INTO_BUFFER, false);
}

PyDoc_STRVAR(accessor_write_slice_doc,
             "write_slice($self, buf, offset, /)\n--\n\n"
             "Copy a buffer to offset and on; return the count of bytes.\n"
             "\n"
             "Copies what fits: the smaller of len(buf) in bytes and size - offset.\n"
             "InvalidAddressError where offset is not below the size, even for an\n"
             "empty buffer. Where memory and buf overlap, as memmove.");

static PyObject *
accessor_write_slice(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return accessor_copy_method(op, args, nargs, "write_slice", INTO_MEMORY, false);
}

PyDoc_STRVAR(accessor_read_exact_doc,
             "read_exact($self, buf, offset, /)\n--\n\n"
             "Fill the whole writable buffer from offset on.\n"
             "\n"
             "InvalidAddressError where it passes the end: buf is untouched then.");

static PyObject *
accessor_read_exact(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return accessor_copy_method(op, args, nargs, "read_exact", INTO_BUFFER, true);
}

PyDoc_STRVAR(accessor_write_all_doc,
             "write_all($self, buf, offset, /)\n--\n\n"
             "Write the whole buffer at offset.\n"
             "\n"
             "InvalidAddressError where it passes the end: nothing is written then.");

static PyObject *
accessor_write_all(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return accessor_copy_method(op, args, nargs, "write_all", INTO_MEMORY, true);
}

int
accessor_fill_range(memory_object *self, unsigned char byte, uint64_t offset,
                    uint64_t count)
{
    enum stay stay = memory_stay_of_copy(count);
    if (memory_enter(self, stay) < 0) {
        return -1;
    }
    if (!range_fits(offset, count, self->span.size)) {
        accessor_out_of_range(self, stay, offset, count);
        return -1;
    }
    int failed = span_fill(&self->span, offset, byte, count);
    memory_leave(self, stay);
    return failed;
}

PyDoc_STRVAR(
    accessor_fill_doc,
    "fill($self, byte, offset=0, count=None, /)\n--\n\n"
    "Set count bytes from offset on (to the end where count is None) to byte.\n"
    "\n"
    "byte is an int from 0 to 255, else OverflowError. InvalidAddressError\n"
    "where the range passes the end: nothing is written then.");

static PyObject *
accessor_fill(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    uint64_t byte, offset = 0, count = 0;
    bool to_the_end = nargs < 3 || Py_IsNone(args[2]);
    if (args_count(nargs, 1, 3, "fill", "byte, offset=0, count=None") < 0
        || args_unsigned(args[0], "byte", UINT8_MAX, "255", &byte) < 0
        || (nargs > 1 && args_u64(args[1], "offset", &offset) < 0)
        || (!to_the_end && args_u64(args[2], "count", &count) < 0)) {
        return NULL;
    }
    if (to_the_end && offset < self->span.size) {
        count = self->span.size - offset;
    }
    return accessor_fill_range(self, (unsigned char)byte, offset, count) < 0
               ? NULL
               : Py_NewRef(Py_None);
}

PyMethodDef memory_methods[] = {
    {"as_ptr", FASTCALL(accessor_as_ptr), accessor_as_ptr_doc},
    {"get_slice", FASTCALL(accessor_get_slice), accessor_get_slice_doc},
    {"get_ref", FASTCALL(accessor_get_ref), accessor_get_ref_doc},
    {"get_atomic_ref", FASTCALL(accessor_get_atomic_ref), accessor_get_atomic_ref_doc},
    {"get_array_ref", FASTCALL(accessor_get_array_ref), accessor_get_array_ref_doc},
    {"read_obj", FASTCALL(accessor_read_obj), accessor_read_obj_doc},
    {"write_obj", KEYWORDS(accessor_write_obj), accessor_write_obj_doc},
    {"read_slice", FASTCALL(accessor_read_slice), accessor_read_slice_doc},
    {"write_slice", FASTCALL(accessor_write_slice), accessor_write_slice_doc},
    {"read_bytes", FASTCALL(accessor_read_bytes_method), accessor_read_bytes_doc},
    {"read_exact", FASTCALL(accessor_read_exact), accessor_read_exact_doc},
    {"write_all", FASTCALL(accessor_write_all), accessor_write_all_doc},
    {"read_to_memory", KEYWORDS(transfer_read_to_memory), transfer_read_to_memory_doc},
    {"write_from_memory", KEYWORDS(transfer_write_from_memory),
     transfer_write_from_memory_doc},
    {"fill", FASTCALL(accessor_fill), accessor_fill_doc},
    {"remove_range", FASTCALL(remove_range), remove_range_doc},
    {"__enter__", memory_enter_block, METH_NOARGS, memory_enter_block_doc},
    {"__exit__", FASTCALL(memory_exit_block), memory_exit_block_doc},
    {"__reduce__", memory_reduce, METH_NOARGS, memory_reduce_doc},
    {NULL, NULL, 0, NULL},
};
