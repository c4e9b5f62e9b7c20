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
        memory_copy(&self->span, offset, buf, view, 0, count, direction == INTO_MEMORY);
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

static int
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
    {"as_ptr", FASTCALL(borrow_as_ptr), borrow_as_ptr_doc},
    {"get_slice", FASTCALL(borrow_get_slice), borrow_get_slice_doc},
    {"get_ref", FASTCALL(borrow_get_ref), borrow_get_ref_doc},
    {"get_atomic_ref", FASTCALL(borrow_get_atomic_ref), borrow_get_atomic_ref_doc},
    {"get_array_ref", FASTCALL(borrow_get_array_ref), borrow_get_array_ref_doc},
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
    {"__reduce__", errors_not_copied, METH_NOARGS, errors_not_copied_doc},
    {NULL, NULL, 0, NULL},
};
