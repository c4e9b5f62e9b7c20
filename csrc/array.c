/* class VolatileArrayRef(Generic[T]):
 *     type: Scalar[T] | type[T] | Struct
 *     size: int                              # bytes of all
 *     def __len__(self): ...
 *     def __getitem__(self, key): ...        # an int: load; a slice: a part of it
 *     def __setitem__(self, i, val): ...
 *     def load(self, i): ...
 *     def store(self, i, val): ...
 *     def tolist(self): ...
 *     def copy_to(self, buf): ...
 *     def copy_from(self, src): ...
 *     def to_slice(self): ...
 *
 * So many objects of one type, side by side. As a ref it cannot be released.
 */
#include "native.h"

#include "args.h"
#include "range.h"
#include "ref.h"
#include "volatile_memory.h"

#include <string.h>

typedef struct {
    ref_object base;
    Py_ssize_t length;
} array_object;

static inline array_object *
array_of(PyObject *op)
{
    return (array_object *)op;
}

PyObject *
array_new(const struct span *memory, size_t offset, size_t length, PyObject *type,
          size_t element)
{
    array_object *self = (array_object *)ref_make(
        memory->state->array_type, memory, offset, length * element, type, element);
    if (self != NULL) {
        self->length = (Py_ssize_t)length;
    }
    return ref_made((ref_object *)self);
}

static PyObject *
array_repr(PyObject *op)
{
    PyObject *name = element_name(&array_of(op)->base.element);
    PyObject *result =
        name == NULL
            ? NULL
            : PyUnicode_FromFormat("<guestmem.VolatileArrayRef type=%U len=%zd>", name,
                                   array_of(op)->length);
    Py_XDECREF(name);
    return result;
}

/* Where the i-th begins; -1 with OutOfBoundsError where there is none. */
static int
array_offset(const array_object *self, uint64_t i, size_t *offset)
{
    if (i >= (uint64_t)self->length) {
        uint64_t end;
        if (__builtin_mul_overflow(i, self->base.element.size, &end)
            || !range_end(end, self->base.element.size, &end)) {
            end = UINT64_MAX;
        }
        errors_out_of_bounds(self->base.span.state, end, self->base.span.size);
        return -1;
    }
    *offset = (size_t)i * self->base.element.size;
    return 0;
}

static Py_ssize_t
array_length(PyObject *op)
{
    return array_of(op)->length;
}

/* Indexes of the sequence protocol: whoever calls it has added the length to
 * negative ones, so these are out of range. */
static PyObject *
array_item(PyObject *op, Py_ssize_t i)
{
    const array_object *self = array_of(op);
    size_t offset;
    return array_offset(self, (uint64_t)i, &offset) < 0
               ? NULL
               : element_load(&self->base.element, &self->base.span, offset);
}

static PyObject *
array_iter(PyObject *op)
{
    return PySeqIter_New(op); /* by array_item, up to the end */
}

/* The index that key is; -1 with an exception. */
static int
array_index(const array_object *self, PyObject *key, size_t *offset)
{
    Py_ssize_t i = PyNumber_AsSsize_t(key, PyExc_IndexError);
    if (i == -1 && PyErr_Occurred()) {
        return -1;
    }
    return array_offset(self, (uint64_t)(i < 0 ? i + self->length : i), offset);
}

static PyObject *
array_part(const array_object *self, PyObject *key)
{
    Py_ssize_t start, stop, step;
    if (PySlice_Unpack(key, &start, &stop, &step) < 0) {
        return NULL;
    }
    if (step != 1) {
        PyErr_SetString(PyExc_ValueError,
                        "a slice of an array in memory must have step 1");
        return NULL;
    }
    Py_ssize_t length = PySlice_AdjustIndices(self->length, &start, &stop, step);
    return array_new(&self->base.span, (size_t)start * self->base.element.size,
                     (size_t)length, self->base.element.type, self->base.element.size);
}

static PyObject *
array_subscript(PyObject *op, PyObject *key)
{
    const array_object *self = array_of(op);
    size_t offset;
    if (PySlice_Check(key)) {
        return array_part(self, key);
    }
    if (!PyIndex_Check(key)) {
        return errors_wrong_type("an index", "an int or a slice", key);
    }
    return array_index(self, key, &offset) < 0
               ? NULL
               : element_load(&self->base.element, &self->base.span, offset);
}

static int
array_assign(PyObject *op, PyObject *key, PyObject *value)
{
    const array_object *self = array_of(op);
    size_t offset;
    if (value == NULL) {
        PyErr_SetString(PyExc_TypeError, "objects in memory cannot be deleted");
        return -1;
    }
    if (!PyIndex_Check(key)) {
        errors_wrong_type("an index to store at", "an int", key);
        return -1;
    }
    return array_index(self, key, &offset) < 0
               ? -1
               : element_store(&self->base.element, &self->base.span, offset, value);
}

PyDoc_STRVAR(array_load_doc,
             "load($self, i, /)\n--\n\n"
             "Return the i-th object, as VolatileRef.load() does.\n"
             "\n"
             "i is from 0 to len - 1, else OutOfBoundsError (an IndexError).");

static PyObject *
array_load(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    const array_object *self = array_of(op);
    uint64_t i;
    size_t offset;
    return args_count(nargs, 1, 1, "load", "i") < 0 || args_u64(args[0], "i", &i) < 0
                   || array_offset(self, i, &offset) < 0
               ? NULL
               : element_load(&self->base.element, &self->base.span, offset);
}

PyDoc_STRVAR(array_store_doc,
             "store($self, i, val, /)\n--\n\n"
             "Store val as the i-th object, as VolatileRef.store() does.\n"
             "\n"
             "i is from 0 to len - 1, else OutOfBoundsError (an IndexError).");

static PyObject *
array_store(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    const array_object *self = array_of(op);
    uint64_t i;
    size_t offset;
    if (args_count(nargs, 2, 2, "store", "i, val") < 0 || args_u64(args[0], "i", &i) < 0
        || array_offset(self, i, &offset) < 0
        || element_store(&self->base.element, &self->base.span, offset, args[1]) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* So many bytes are read at once for tolist(): few enough for the stack and the first
 * cache, enough for vectors. */
#define PIECE 2048

static int
array_list_scalars(const array_object *self, PyObject *list)
{
    const scalar_object *scalar = self->base.element.scalar;
    size_t width = scalar->width, done = 0;
    union access_bytes piece[PIECE / sizeof(union access_bytes)];
    for (Py_ssize_t i = 0; i < self->length;) {
        size_t count = Py_MIN(PIECE, self->base.span.size - done);
        if (span_read(&self->base.span, done, piece, count) < 0) {
            return -1;
        }
        const char *at = (const char *)piece;
        for (const char *end = at + count; at < end; at += width, i++) {
            uint64_t bits = access_load(at, width);
            PyObject *value = scalar_to_object(scalar, bits);
            if (value == NULL || PyList_SetItem(list, i, value) < 0) {
                return -1;
            }
        }
        done += count;
    }
    return 0;
}

static int
array_list_objects(const array_object *self, PyObject *list)
{
    for (Py_ssize_t i = 0; i < self->length; i++) {
        PyObject *value = element_load(&self->base.element, &self->base.span,
                                       (size_t)i * self->base.element.size);
        if (value == NULL || PyList_SetItem(list, i, value) < 0) {
            return -1;
        }
    }
    return 0;
}

/* A new list. Where objects are made that the collector tracks (a fault makes an
 * exception), its callbacks may run, and find the list: then no slot of it is NULL. */
static PyObject *
array_new_list(const array_object *self)
{
    PyObject *list = PyList_New(self->length);
    if (self->base.element.scalar != NULL && !self->base.span.can_fault) {
        return list;
    }
    for (Py_ssize_t i = 0; list != NULL && i < self->length; i++) {
        if (PyList_SetItem(list, i, Py_NewRef(Py_None)) < 0) {
            Py_CLEAR(list);
        }
    }
    return list;
}

PyDoc_STRVAR(
    array_tolist_doc,
    "tolist($self, /)\n--\n\n"
    "Return all objects as a list, at the speed of memory.\n"
    "\n"
    "Scalars are copied in bulk: none that is aligned tears. Other objects are\n"
    "loaded one by one.");

static PyObject *
array_tolist(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    const array_object *self = array_of(op);
    if (args_count(nargs, 0, 0, "tolist", "") < 0) {
        return NULL;
    }
    PyObject *list = array_new_list(self);
    if (list != NULL
        && (self->base.element.scalar != NULL ? array_list_scalars(self, list)
                                              : array_list_objects(self, list))
               < 0) {
        Py_CLEAR(list);
    }
    return list;
}

/* How many whole objects a buffer of so many bytes and the array have in common. */
static size_t
array_common(const array_object *self, size_t bytes)
{
    size_t length = (size_t)self->length;
    return self->base.element.size == 0
               ? length
               : Py_MIN(bytes / self->base.element.size, length);
}

PyDoc_STRVAR(
    array_copy_to_doc,
    "copy_to($self, buf, /)\n--\n\n"
    "Copy whole objects to a writable buffer; return how many.\n"
    "\n"
    "Their bytes as they are, as many as fit; no aligned field of up to 8 bytes\n"
    "tears. BufferError where buf is read-only or not contiguous.");

static PyObject *
array_copy_to(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    const array_object *self = array_of(op);
    Py_buffer view;
    if (args_count(nargs, 1, 1, "copy_to", "buf") < 0
        || args_buffer(args[0], "buf", &view, true) < 0) {
        return NULL;
    }
    size_t count = array_common(self, (size_t)view.len);
    int failed = memory_copy(&self->base.span, 0, args[0], &view, 0,
                             count * self->base.element.size, false);
    PyBuffer_Release(&view);
    return failed ? NULL : PyLong_FromSize_t(count);
}

static PyObject *
array_copy_from_buffer(const array_object *self, PyObject *src)
{
    Py_buffer view;
    if (args_buffer(src, "src", &view, false) < 0) {
        return NULL;
    }
    size_t count = array_common(self, (size_t)view.len);
    int failed = memory_copy(&self->base.span, 0, src, &view, 0,
                             count * self->base.element.size, true);
    PyBuffer_Release(&view);
    return failed ? NULL : PyLong_FromSize_t(count);
}

/* The values as the bytes that memory will hold, in a span of their own: so that an
 * array stores them there as it does here. */
static PyObject *
array_pack(const array_object *self, PyObject *values, Py_ssize_t count)
{
    size_t element = self->base.element.size;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)element);
    if (bytes == NULL) {
        return NULL;
    }
    struct span packed = {.state = self->base.span.state,
                          .addr = PyBytes_AsString(bytes),
                          .size = (size_t)count * element};
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *value = PySequence_GetItem(values, i);
        int failed =
            value == NULL
            || element_store(&self->base.element, &packed, (size_t)i * element, value)
                   < 0;
        Py_XDECREF(value);
        if (failed) {
            Py_DECREF(bytes);
            return NULL;
        }
    }
    return bytes;
}

PyDoc_STRVAR(
    array_copy_from_doc,
    "copy_from($self, src, /)\n--\n\n"
    "Copy from a buffer or a sequence of values; return how many objects.\n"
    "\n"
    "As many as fit. Of a buffer whole objects, their bytes as they are; of a list,\n"
    "tuple or other sequence the values, as store() takes them: all are looked at\n"
    "before the first is written. No aligned field of up to 8 bytes tears.");

static PyObject *
array_copy_from(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    const array_object *self = array_of(op);
    if (args_count(nargs, 1, 1, "copy_from", "src") < 0) {
        return NULL;
    }
    if (PyObject_CheckBuffer(args[0])) {
        return array_copy_from_buffer(self, args[0]);
    }
    if (!PySequence_Check(args[0]) || PyUnicode_Check(args[0])) {
        return errors_wrong_type("src", "a buffer or a sequence of values", args[0]);
    }
    Py_ssize_t length = PySequence_Size(args[0]);
    if (length < 0) {
        return NULL;
    }
    Py_ssize_t count = Py_MIN(length, self->length);
    PyObject *bytes = array_pack(self, args[0], count);
    if (bytes == NULL) {
        return NULL;
    }
    int failed = span_write(&self->base.span, 0, PyBytes_AsString(bytes),
                            (size_t)PyBytes_Size(bytes));
    Py_DECREF(bytes);
    return failed ? NULL : PyLong_FromSsize_t(count);
}

static PyMethodDef array_methods[] = {
    {"load", FASTCALL(array_load), array_load_doc},
    {"store", FASTCALL(array_store), array_store_doc},
    {"tolist", FASTCALL(array_tolist), array_tolist_doc},
    {"copy_to", FASTCALL(array_copy_to), array_copy_to_doc},
    {"copy_from", FASTCALL(array_copy_from), array_copy_from_doc},
    {"to_slice", FASTCALL(ref_to_slice), ref_to_slice_doc},
    {"__reduce__", errors_not_copied, METH_NOARGS, errors_not_copied_doc},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS,
     PyDoc_STR("__class_getitem__($type, item, /)\n--\n\n"
               "VolatileArrayRef[int], for annotations.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef array_getset[] = {
    {"type", ref_get_type, NULL, PyDoc_STR("The type that get_array_ref() was given."),
     NULL},
    {"size", ref_get_size, NULL, PyDoc_STR("The bytes of all objects."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(
    array_doc,
    "Objects of one type side by side in memory, made by get_array_ref().\n"
    "\n"
    "A sequence: len(), iteration, a[i], and a[i:j], which is a part of it and\n"
    "copies nothing. It keeps the memory mapped for as long as it lives. Each\n"
    "load and store is that of a VolatileRef.");

static PyType_Slot array_slots[] = {
    {Py_tp_doc, SLOT(array_doc)},
    {Py_tp_dealloc, SLOT(ref_dealloc)},
    {Py_tp_traverse, SLOT(ref_traverse)},
    {Py_tp_repr, SLOT(array_repr)},
    {Py_tp_methods, array_methods},
    {Py_tp_getset, array_getset},
    {Py_sq_length, SLOT(array_length)},
    {Py_sq_item, SLOT(array_item)},
    {Py_tp_iter, SLOT(array_iter)},
    {Py_mp_length, SLOT(array_length)},
    {Py_mp_subscript, SLOT(array_subscript)},
    {Py_mp_ass_subscript, SLOT(array_assign)},
    {0, NULL},
};

static PyType_Spec array_spec = {
    .name = "guestmem.VolatileArrayRef",
    .basicsize = sizeof(array_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = array_slots,
};

int
array_init(PyObject *module, module_state *state)
{
    state->array_type = native_add_type(module, &array_spec, NULL, true);
    return state->array_type == NULL ? -1 : 0;
}
