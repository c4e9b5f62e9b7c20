/* The types of objects in memory that are not ours: ctypes classes (plain_class.c
 * says which) and struct.Struct objects. */
#include "native.h"

#include "foreign.h"
#include "object_type.h"
#include "plain_class.h"

/* Larger ones are not kept between calls. */
#define SCRATCH_MOST 4096

struct foreign_struct {
    PyObject *type;
    PyObject *format;
    PyObject *size;
    PyObject *unpack;
    PyObject *pack;
    /* What unpack calls in the end, where it takes one argument (METH_O); a call
     * through the descriptor costs as much again. NULL where it is otherwise. */
    PyCFunction unpack_function;
};

/* NULL with an exception only where something failed. */
static PyCFunction
struct_unpack_function(const struct foreign_struct *structs)
{
    PyCFunction function = NULL;
    PyObject *some = PyObject_CallFunction(structs->type, "s", "");
    PyObject *bound = some == NULL ? NULL : foreign_describe(structs->unpack, some);
    if (bound != NULL && PyCFunction_Check(bound) && PyCFunction_GetSelf(bound) == some
        && PyCFunction_GetFlags(bound) == METH_O) {
        function = PyCFunction_GetFunction(bound);
    }
    Py_XDECREF(bound);
    Py_XDECREF(some);
    return function;
}

static void
foreign_struct_free(struct foreign_struct *self)
{
    Py_XDECREF(self->type);
    Py_XDECREF(self->format);
    Py_XDECREF(self->size);
    Py_XDECREF(self->unpack);
    Py_XDECREF(self->pack);
    PyMem_Free(self);
}

static struct foreign_struct *
foreign_struct_new(PyObject *module)
{
    struct foreign_struct *self = PyMem_Calloc(1, sizeof(*self));
    if (self == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    if ((self->type = foreign_type(module, "Struct")) == NULL
        || (self->format = PyObject_GetAttrString(self->type, "format")) == NULL
        || (self->size = PyObject_GetAttrString(self->type, "size")) == NULL
        || (self->unpack = PyObject_GetAttrString(self->type, "unpack")) == NULL
        || (self->pack = PyObject_GetAttrString(self->type, "pack")) == NULL) {
        foreign_struct_free(self);
        return NULL;
    }
    self->unpack_function = struct_unpack_function(self);
    if (PyErr_Occurred()) {
        foreign_struct_free(self);
        return NULL;
    }
    return self;
}

/* As plain_class_state, for struct. */
static struct foreign_struct *
foreign_struct_get(module_state *state)
{
    struct foreign_struct *self = atomic_load(&state->structs);
    PyObject *module;
    if (self != NULL || (module = foreign_imported("_struct")) == NULL) {
        return self;
    }
    struct foreign_struct *mine = foreign_struct_new(module);
    Py_DECREF(module);
    if (mine != NULL && !atomic_compare_exchange_strong(&state->structs, &self, mine)) {
        foreign_struct_free(mine);
        return self;
    }
    return mine;
}

static int
find_struct(const struct foreign_struct *structs, PyObject *self,
            struct object_type *out)
{
    PyObject *number = foreign_describe(structs->size, self);
    Py_ssize_t size = number == NULL ? -1 : PyLong_AsSsize_t(number);
    Py_XDECREF(number);
    if (size < 0) {
        /* CPython before 3.13 crashes when such a Struct is used. */
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_TypeError, "the struct.Struct was never initialised");
        }
        return -1;
    }
    *out = (struct object_type){self, (size_t)size, NULL, NULL};
    return 0;
}

int
object_type_find(module_state *state, PyObject *type, struct object_type *out)
{
    int found = PyType_Check(type) ? plain_class_find(state, type, out) : 0;
    if (found != 0) {
        return found > 0 ? 0 : -1;
    }
    const struct foreign_struct *structs = foreign_struct_get(state);
    if (structs != NULL && PyObject_TypeCheck(type, (PyTypeObject *)structs->type)) {
        return find_struct(structs, type, out);
    }
    if (!PyErr_Occurred()) {
        errors_wrong_type(
            "type", "a Scalar, a ctypes class of plain data or a struct.Struct", type);
    }
    return -1;
}

int
object_type_of_value(module_state *state, PyObject *value, struct object_type *out)
{
    int found = plain_class_find(state, (PyObject *)Py_TYPE(value), out);
    if (found == 0) {
        errors_wrong_type("val", "a ctypes instance where type is left out", value);
    }
    return found > 0 ? 0 : -1;
}

/* Struct.unpack wants bytes of exactly its size, and keeps none of them: those of
 * the last call serve again. Without a GIL a count of 1 would not say that nobody
 * else has them. */
static PyObject *
scratch_take(module_state *state, size_t size)
{
#ifndef Py_GIL_DISABLED
    PyObject *bytes = state->scratch;
    if (bytes != NULL && PyBytes_Size(bytes) == (Py_ssize_t)size) {
        state->scratch = NULL;
        return bytes;
    }
#else
    (void)state;
#endif
    return PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
}

static void
scratch_give_back(module_state *state, PyObject *bytes)
{
#ifndef Py_GIL_DISABLED
    Py_ssize_t size = PyBytes_Size(bytes);
    if (size != 0 && size <= SCRATCH_MOST && Py_REFCNT(bytes) == 1) {
        PyObject *old = state->scratch;
        state->scratch = bytes;
        bytes = old;
    }
#else
    (void)state;
#endif
    Py_XDECREF(bytes);
}

static PyObject *
begin_load_struct(module_state *state, const struct object_type *self, char **bytes)
{
    PyObject *holder = scratch_take(state, self->size);
    *bytes = holder == NULL ? NULL : PyBytes_AsString(holder);
    return holder;
}

static PyObject *
end_load_struct(module_state *state, const struct object_type *self, PyObject *holder)
{
    const struct foreign_struct *structs = atomic_load(&state->structs);
    PyObject *result =
        structs->unpack_function != NULL
            ? structs->unpack_function(self->type, holder)
            : PyObject_CallFunctionObjArgs(structs->unpack, self->type, holder, NULL);
    scratch_give_back(state, holder);
    return result;
}

PyObject *
object_type_begin_load(module_state *state, const struct object_type *self,
                       char **bytes)
{
    return self->make != NULL ? plain_class_make(self, bytes)
                              : begin_load_struct(state, self, bytes);
}

PyObject *
object_type_end_load(module_state *state, const struct object_type *self,
                     PyObject *holder)
{
    return self->make != NULL ? holder : end_load_struct(state, self, holder);
}

/* The first `size` bytes of a ctypes instance, whatever its buffer was resized to.
 * A copy: ctypes.resize frees a buffer that is exported. */
static PyObject *
store_ctypes(const struct object_type *self, PyObject *value)
{
    if (!PyObject_TypeCheck(value, (PyTypeObject *)self->type)) {
        PyErr_Format(PyExc_TypeError, "val must be an instance of %R, not of %R",
                     self->type, (PyObject *)Py_TYPE(value));
        return NULL;
    }
    Py_buffer view;
    if (PyObject_GetBuffer(value, &view, PyBUF_SIMPLE) < 0) {
        return NULL;
    }
    PyObject *bytes = NULL;
    if (view.len < (Py_ssize_t)self->size) {
        PyErr_Format(PyExc_BufferError, "val has %zd bytes, and its type %zu", view.len,
                     self->size);
    }
    else {
        bytes = PyBytes_FromStringAndSize(view.buf, (Py_ssize_t)self->size);
    }
    PyBuffer_Release(&view);
    return bytes;
}

/* Whether packing these values can run Python code. */
static bool
values_are_tame(PyObject *values)
{
    for (Py_ssize_t i = 0; i < PyTuple_Size(values); i++) {
        PyObject *value = PyTuple_GetItem(values, i);
        if (!PyLong_CheckExact(value) && !PyFloat_CheckExact(value)
            && !PyBytes_CheckExact(value) && !PyBool_Check(value)) {
            return false;
        }
    }
    return true;
}

/* Struct.pack(self, *values) */
static PyObject *
struct_pack(const struct foreign_struct *structs, PyObject *self, PyObject *values)
{
    Py_ssize_t count = PyTuple_Size(values);
    PyObject *args = PyTuple_New(count + 1);
    if (args == NULL) {
        return NULL;
    }
    PyTuple_SetItem(args, 0, Py_NewRef(self));
    for (Py_ssize_t i = 0; i < count; i++) {
        PyTuple_SetItem(args, i + 1, Py_NewRef(PyTuple_GetItem(values, i)));
    }
    PyObject *bytes = PyObject_CallObject(structs->pack, args);
    Py_DECREF(args);
    if (bytes != NULL && !PyBytes_Check(bytes)) {
        errors_wrong_type("what struct.Struct.pack returns", "bytes", bytes);
        Py_CLEAR(bytes);
    }
    return bytes;
}

static PyObject *
store_struct(const struct foreign_struct *structs, const struct object_type *self,
             PyObject *values)
{
    if (!PyTuple_Check(values)) {
        return errors_wrong_type("val", "a tuple for a struct.Struct", values);
    }
    if (values_are_tame(values)) {
        return struct_pack(structs, self->type, values);
    }
    /* CPython crashes if the Struct is initialised again while it packs, as a
     * value's __index__ might do: so it gets one that nobody else has. */
    PyObject *format = foreign_describe(structs->format, self->type);
    PyObject *copy = format == NULL
                         ? NULL
                         : PyObject_CallFunctionObjArgs(structs->type, format, NULL);
    PyObject *bytes = copy == NULL ? NULL : struct_pack(structs, copy, values);
    Py_XDECREF(format);
    Py_XDECREF(copy);
    return bytes;
}

PyObject *
object_type_store(module_state *state, const struct object_type *self, PyObject *value)
{
    if (self->make != NULL) {
        return store_ctypes(self, value);
    }
    return store_struct(atomic_load(&state->structs), self, value);
}

int
object_type_traverse(module_state *state, visitproc visit, void *arg)
{
    struct foreign_ctypes *ctypes = atomic_load(&state->ctypes);
    struct foreign_struct *structs = atomic_load(&state->structs);
    if (structs != NULL) {
        Py_VISIT(structs->type);
        Py_VISIT(structs->format);
        Py_VISIT(structs->size);
        Py_VISIT(structs->unpack);
        Py_VISIT(structs->pack);
    }
    return ctypes == NULL ? 0 : plain_class_traverse(ctypes, visit, arg);
}

void
object_type_clear(module_state *state)
{
    struct foreign_ctypes *ctypes = atomic_exchange(&state->ctypes, NULL);
    struct foreign_struct *structs = atomic_exchange(&state->structs, NULL);
    if (ctypes != NULL) {
        plain_class_free(ctypes);
    }
    if (structs != NULL) {
        foreign_struct_free(structs);
    }
#ifndef Py_GIL_DISABLED
    Py_CLEAR(state->scratch);
#endif
}
