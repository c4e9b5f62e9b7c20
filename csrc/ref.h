/* What VolatileRef, AtomicRef and VolatileArrayRef have in common: a range of memory that
 * is borrowed for as long as the object lives, and the type of what is in it. */
#ifndef GUESTMEM_REF_H
#define GUESTMEM_REF_H

#include "native.h"

#include "element.h"
#include "span.h"

typedef struct {
    PyObject_HEAD
    struct span span;
    struct element element;
    PyObject *module; /* strong, where the collector tracks the object; else NULL */
} ref_object;

static inline ref_object *
ref_of(PyObject *op)
{
    return (ref_object *)op;
}

/* A new object of a class that begins with a ref_object: it borrows [offset, offset + size)
 * of memory that the caller is inside of, or borrows itself. NULL with MemoryError. Once
 * all of it is filled in, ref_made() lets the collector, and so anybody, find it. */
ref_object *ref_make(PyTypeObject *cls, const struct span *memory, size_t offset,
                     size_t size, PyObject *type, size_t element);

static inline PyObject *
ref_made(ref_object *self)
{
    if (self != NULL && self->module != NULL) {
        PyObject_GC_Track((PyObject *)self);
    }
    return (PyObject *)self;
}

/* Slots, methods and getters of all three. */
int ref_traverse(PyObject *op, visitproc visit, void *arg);
void ref_dealloc(PyObject *op);
PyObject *ref_to_slice(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *ref_as_ptr(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
extern const char ref_to_slice_doc[], ref_as_ptr_doc[];
PyObject *ref_get_type(PyObject *op, void *closure);
PyObject *ref_get_size(PyObject *op, void *closure);

#endif
