/* ctypes classes of plain data. Plain means that every bit pattern is a valid
 * instance: no Python object and no host pointer at any depth, because a guest
 * could forge them. */
#ifndef GUESTMEM_PLAIN_CLASS_H
#define GUESTMEM_PLAIN_CLASS_H

#include "native.h"

#include "object_type.h"

/* 1 and *out if cls is such a class; 0 if it is no class of ctypes; -1 with a
 * TypeError if it is one, but not of plain data. May run Python code. */
int plain_class_find(module_state *state, PyObject *cls, struct object_type *out);

/* A new instance of it, full of zeros, and where its bytes are. Neither the __new__
 * nor the __init__ of the class runs. */
PyObject *plain_class_make(const struct object_type *self, char **bytes);

int plain_class_traverse(struct foreign_ctypes *self, visitproc visit, void *arg);
void plain_class_free(struct foreign_ctypes *self);

#endif
