/* Reaching into ctypes and struct without importing them for those who do not use
 * them: an object of theirs can only come from somebody who has imported them. */
#ifndef GUESTMEM_FOREIGN_H
#define GUESTMEM_FOREIGN_H

#include "native.h"

/* The module if it has been imported; NULL without an exception if not. */
PyObject *foreign_imported(const char *name);

/* An attribute of a module that must be a type. */
PyObject *foreign_type(PyObject *module, const char *name);

/* What a descriptor says of an object: no class can override that. */
PyObject *foreign_describe(PyObject *descriptor, PyObject *obj);

#endif
