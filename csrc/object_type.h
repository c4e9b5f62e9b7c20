/* What T of read_obj, write_obj and get_ref can be besides a Scalar: a ctypes
 * class or a struct.Struct. Plain data only: a class that holds a Python object
 * or a host pointer at any depth is refused, because a guest could forge it. */
#ifndef GUESTMEM_OBJECT_TYPE_H
#define GUESTMEM_OBJECT_TYPE_H

#include "native.h"

/* getbufferproc, which the limited API of 3.11 does not name. */
typedef int (*get_buffer_function)(PyObject *, Py_buffer *, int);

struct object_type {
    PyObject *type; /* borrowed from the caller */
    size_t size;    /* bytes, at the time it was looked up */
    /* How ctypes itself makes an instance and exports its bytes, whatever the class
     * overrides; NULL for a struct.Struct. */
    newfunc make;
    get_buffer_function get_buffer;
};

/* Looks type up; may run Python code. TypeError where it is neither. */
int object_type_find(module_state *state, PyObject *type, struct object_type *out);

/* object_type_find for a value whose type was left out: a ctypes instance, or TypeError. */
int object_type_of_value(module_state *state, PyObject *value, struct object_type *out);

/* Reading is in two steps, so that memory is copied once, to where it stays. The
 * first makes what will hold the copy, a new reference, and says where its size
 * bytes are; the second turns that (stolen) into the object. Both may run Python
 * code: the memory is entered in between. */
PyObject *object_type_begin_load(module_state *state, const struct object_type *self,
                                 char **bytes);
PyObject *object_type_end_load(module_state *state, const struct object_type *self,
                               PyObject *holder);

/* What write_obj writes, as bytes. May run Python code. */
PyObject *object_type_store(module_state *state, const struct object_type *self,
                            PyObject *value);

int object_type_traverse(module_state *state, visitproc visit, void *arg);
void object_type_clear(module_state *state);

#endif
