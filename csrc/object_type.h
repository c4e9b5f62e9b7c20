/* What T of read_obj, write_obj and get_ref can be besides a Scalar: a ctypes
 * class or a struct.Struct. Plain data only: a class that holds a Python object
 * or a host pointer at any depth is refused, because a guest could forge it. */
#ifndef GUESTMEM_OBJECT_TYPE_H
#define GUESTMEM_OBJECT_TYPE_H

#include "native.h"

struct object_type {
    PyObject *type; /* borrowed from the caller */
    size_t size;    /* bytes, at the time it was looked up */
    /* The ctypes metaclass's from_buffer_copy, borrowed from the state; NULL for a
     * struct.Struct. */
    PyObject *from_buffer_copy;
};

/* Looks type up; may run Python code. TypeError where it is neither. */
int object_type_find(module_state *state, PyObject *type, struct object_type *out);

/* The same for a value whose type was left out: a ctypes instance, or TypeError. */
int object_type_of_value(module_state *state, PyObject *value, struct object_type *out);

/* A new object out of bytes (of out->size), and bytes out of an object. Both may
 * run Python code. */
PyObject *object_type_load(module_state *state, const struct object_type *self,
                           PyObject *bytes);
PyObject *object_type_store(module_state *state, const struct object_type *self,
                            PyObject *value);

int object_type_traverse(module_state *state, visitproc visit, void *arg);
void object_type_clear(module_state *state);

#endif
