/* Objects of refs, arrays and guests that are no Scalars. See element.h. */
#include "native.h"

#include "element.h"
#include "object_type.h"

/* Looks the type up again: a Struct may have been initialised again, a ctypes
 * class may have got its fields since the range was checked. */
static int
element_find(const struct element *self, module_state *state, struct object_type *out)
{
    if (object_type_find(state, self->type, out) < 0) {
        return -1;
    }
    if (out->size != self->size) {
        PyErr_Format(PyExc_TypeError,
                     "the type of the object has %zu bytes now, and had %zu before",
                     out->size, self->size);
        return -1;
    }
    return 0;
}

PyObject *
element_load_slow(const struct element *self, const struct span *span, size_t offset)
{
    struct object_type type;
    char *bytes;
    if (element_find(self, span->state, &type) < 0) {
        return NULL;
    }
    PyObject *holder = object_type_begin_load(span->state, &type, &bytes);
    if (holder == NULL) {
        return NULL;
    }
    if (span_read(span, offset, bytes, self->size) < 0) {
        Py_DECREF(holder);
        return NULL;
    }
    return object_type_end_load(span->state, &type, holder);
}

int
element_store_slow(const struct element *self, const struct span *span, size_t offset,
                   PyObject *value)
{
    struct object_type type;
    if (element_find(self, span->state, &type) < 0) {
        return -1;
    }
    PyObject *bytes = object_type_store(span->state, &type, value);
    if (bytes == NULL) {
        return -1;
    }
    /* What made the bytes may have run Python code that changed the type. */
    int failed = -1;
    if ((size_t)PyBytes_Size(bytes) == self->size) {
        failed = span_write(span, offset, PyBytes_AsString(bytes), self->size);
    }
    else {
        PyErr_SetString(PyExc_TypeError,
                        "the type of the object changed its size meanwhile");
    }
    Py_DECREF(bytes);
    return failed;
}

PyObject *
element_name(const struct element *self)
{
    PyObject *type = self->type;
    if (self->scalar != NULL) {
        return PyObject_Repr(type);
    }
    return PyType_GetName(PyType_Check(type) ? (PyTypeObject *)type : Py_TYPE(type));
}
