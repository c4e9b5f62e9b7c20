/* class Scalar(Generic[T]):
 *     name: str
 *     size: int
 *
 * The type of the constants u8 ... be64. Final, immutable, made by the module
 * alone; each constant exists once, and copies and pickles to itself.
 */
#include "native.h"

#include "access_atomic.h"
#include "scalar.h"

#include <float.h>
#include <math.h>
#include <string.h>

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
# define LITTLE false
# define BIG    true
#else
# define LITTLE true
# define BIG    false
#endif

static const struct {
    const char *name;
    size_t width;
    enum scalar_kind kind;
    bool swapped;
} scalar_constants[] = {
    {"u8", 1, SCALAR_UNSIGNED, false},
    {"u16", 2, SCALAR_UNSIGNED, false},
    {"u32", 4, SCALAR_UNSIGNED, false},
    {"u64", 8, SCALAR_UNSIGNED, false},
    {"usize", sizeof(size_t), SCALAR_UNSIGNED, false},
    {"i8", 1, SCALAR_SIGNED, false},
    {"i16", 2, SCALAR_SIGNED, false},
    {"i32", 4, SCALAR_SIGNED, false},
    {"i64", 8, SCALAR_SIGNED, false},
    {"isize", sizeof(size_t), SCALAR_SIGNED, false},
    {"f32", 4, SCALAR_FLOAT, false},
    {"f64", 8, SCALAR_FLOAT, false},
    {"le16", 2, SCALAR_UNSIGNED, LITTLE},
    {"le32", 4, SCALAR_UNSIGNED, LITTLE},
    {"le64", 8, SCALAR_UNSIGNED, LITTLE},
    {"be16", 2, SCALAR_UNSIGNED, BIG},
    {"be32", 4, SCALAR_UNSIGNED, BIG},
    {"be64", 8, SCALAR_UNSIGNED, BIG},
};

static inline scalar_object *
scalar_of(PyObject *op)
{
    return (scalar_object *)op;
}

static PyObject *
scalar_float_to_object(uint64_t bits, size_t width)
{
    double value;
    if (width == sizeof(float)) {
        uint32_t narrow = (uint32_t)bits;
        float single;
        memcpy(&single, &narrow, sizeof(single));
        value = (double)single;
    }
    else {
        memcpy(&value, &bits, sizeof(value));
    }
    return PyFloat_FromDouble(value);
}

PyObject *
scalar_to_object_slow(const scalar_object *self, uint64_t bits)
{
    if (self->swapped) {
        bits = access_swap(bits, self->width);
    }
    switch (self->kind) {
    case SCALAR_FLOAT:
        return scalar_float_to_object(bits, self->width);
    case SCALAR_SIGNED: {
        unsigned unused = 64 - 8 * (unsigned)self->width;
        return PyLong_FromLongLong((int64_t)(bits << unused) >> unused);
    }
    default:
        if (bits <= INT64_MAX) {
            return PyLong_FromLongLong((long long)bits);
        }
        return PyLong_FromUnsignedLongLong(bits);
    }
}

/* OverflowError that names the value (text is stolen, NULL on error) and the
 * scalar. */
static int
scalar_does_not_fit(const scalar_object *self, PyObject *text)
{
    if (text != NULL) {
        PyErr_Format(PyExc_OverflowError, "%U does not fit guestmem.%s", text,
                     self->name);
        Py_DECREF(text);
    }
    return -1;
}

/* An int that is too large for a double. */
static int
scalar_int_is_no_float(const scalar_object *self, PyObject *value)
{
    PyErr_Clear();
    PyObject *number = PyNumber_Index(value);
    PyObject *text = number == NULL ? NULL : errors_int_text(number);
    Py_XDECREF(number);
    return scalar_does_not_fit(self, text);
}

static int
scalar_float_does_not_fit(const scalar_object *self, double value)
{
    PyObject *number = PyFloat_FromDouble(value);
    PyObject *text = number == NULL ? NULL : PyObject_Repr(number);
    Py_XDECREF(number);
    return scalar_does_not_fit(self, text);
}

static int
scalar_float_from_object(const scalar_object *self, PyObject *value, uint64_t *bits)
{
    double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) {
        if (PyUnicode_Check(value) || Py_IsNone(value)) {
            errors_wrong_type("val", "a float", value);
        }
        if (PyErr_ExceptionMatches(PyExc_OverflowError) && PyIndex_Check(value)) {
            return scalar_int_is_no_float(self, value);
        }
        return -1;
    }
    if (self->width == sizeof(double)) {
        memcpy(bits, &number, sizeof(number));
        return 0;
    }
    float single = (float)number;
    if (isinf(single) && !isinf(number)) {
        return scalar_float_does_not_fit(self, number);
    }
    uint32_t narrow;
    memcpy(&narrow, &single, sizeof(narrow));
    *bits = narrow;
    return 0;
}

/* An exact int, of which a value's bits are taken; sign by two's complement. */
static int
scalar_int_from_object(const scalar_object *self, PyObject *value, uint64_t *bits)
{
    int overflow;
    long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    unsigned unused = 64 - 8 * (unsigned)self->width;
    if (overflow == 0) {
        bool fits = self->kind == SCALAR_SIGNED
                        ? number >= INT64_MIN >> unused && number <= INT64_MAX >> unused
                        : number >= 0 && (uint64_t)number <= UINT64_MAX >> unused;
        if (fits) {
            *bits = (uint64_t)number;
            return 0;
        }
    }
    else if (overflow > 0 && unused == 0 && self->kind == SCALAR_UNSIGNED) {
        *bits = PyLong_AsUnsignedLongLong(value);
        if (!PyErr_Occurred()) {
            return 0;
        }
        PyErr_Clear(); /* more than 64 bits */
    }
    return scalar_does_not_fit(self, errors_int_text(value));
}

int
scalar_from_object_slow(const scalar_object *self, PyObject *value, uint64_t *bits)
{
    int result;
    if (self->kind == SCALAR_FLOAT) {
        result = scalar_float_from_object(self, value, bits);
    }
    else if (PyLong_CheckExact(value)) {
        result = scalar_int_from_object(self, value, bits);
    }
    else {
        PyObject *number = PyIndex_Check(value) ? PyNumber_Index(value) : NULL;
        if (number == NULL) {
            if (!PyErr_Occurred()) {
                errors_wrong_type("val", "an int", value);
            }
            return -1;
        }
        result = scalar_int_from_object(self, number, bits);
        Py_DECREF(number);
    }
    if (result == 0 && self->swapped) {
        *bits = access_swap(*bits, self->width);
    }
    return result;
}

static uint64_t
scalar_own_bits(const scalar_object *self)
{
    if (self->kind == SCALAR_FLOAT || self->swapped) {
        return 0;
    }
    /* Of u64 the half that a long long holds. */
    size_t bits = 8 * self->width;
    return UINT64_C(1) << (self->kind == SCALAR_SIGNED || bits == 64 ? bits - 1 : bits);
}

/* A constant refers to its type alone, but the collector must see that: the type
 * refers to the module, and that to the constant. */
static int
scalar_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    return 0;
}

static void
scalar_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    PyObject_GC_Del(op);
    Py_DECREF(type);
}

static PyObject *
scalar_repr(PyObject *op)
{
    return PyUnicode_FromFormat("guestmem.%s", scalar_of(op)->name);
}

PyDoc_STRVAR(scalar_reduce_doc, "__reduce__($self)\n--\n\n"
                                "Pickle and copy to the constant itself.");

static PyObject *
scalar_reduce(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    /* A string names a global of the type's __module__: guestmem.u64. */
    return PyUnicode_FromString(scalar_of(op)->name);
}

static PyObject *
scalar_get_name(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(scalar_of(op)->name);
}

static PyObject *
scalar_get_size(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(scalar_of(op)->width);
}

static PyMethodDef scalar_methods[] = {
    {"__reduce__", scalar_reduce, METH_NOARGS, scalar_reduce_doc},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS,
     PyDoc_STR("__class_getitem__($type, item, /)\n--\n\n"
               "Scalar[int] and Scalar[float], for annotations.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef scalar_getset[] = {
    {"name", scalar_get_name, NULL, PyDoc_STR("The constant's name: 'u64'."), NULL},
    {"size", scalar_get_size, NULL, PyDoc_STR("Bytes: 1, 2, 4 or 8."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(
    scalar_doc,
    "The type of an integer or float in memory: guestmem.u8 to guestmem.be64.\n"
    "\n"
    "u, i and f are unsigned, signed and IEEE 754 values in the host's byte\n"
    "order, usize and isize as wide as a pointer; le and be are unsigned, in\n"
    "a fixed byte order. The constants are all there are of this type.\n"
    "\n"
    "At an address that is a multiple of its size a scalar is loaded and\n"
    "stored by one instruction. A value that does not fit is an OverflowError.");

static PyType_Slot scalar_slots[] = {
    {Py_tp_doc, SLOT(scalar_doc)},
    {Py_tp_dealloc, SLOT(scalar_dealloc)},
    {Py_tp_traverse, SLOT(scalar_traverse)},
    {Py_tp_repr, SLOT(scalar_repr)},
    {Py_tp_methods, scalar_methods},
    {Py_tp_getset, scalar_getset},
    {0, NULL},
};

static PyType_Spec scalar_spec = {
    .name = "guestmem.Scalar",
    .basicsize = sizeof(scalar_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = scalar_slots,
};

int
scalar_init(PyObject *module, module_state *state)
{
    state->scalar_type = native_add_type(module, &scalar_spec, NULL, true);
    if (state->scalar_type == NULL) {
        return -1;
    }
    for (size_t i = 0; i < Py_ARRAY_LENGTH(scalar_constants); i++) {
        scalar_object *scalar = PyObject_GC_New(scalar_object, state->scalar_type);
        if (scalar == NULL) {
            return -1;
        }
        scalar->name = scalar_constants[i].name;
        scalar->width = scalar_constants[i].width;
        scalar->kind = scalar_constants[i].kind;
        scalar->swapped = scalar_constants[i].swapped;
        scalar->own_bits = scalar_own_bits(scalar);
        PyObject_GC_Track((PyObject *)scalar);
        int added = PyModule_AddObjectRef(module, scalar->name, (PyObject *)scalar);
        Py_DECREF(scalar);
        if (added < 0) {
            return -1;
        }
    }
    return 0;
}
