/* What other types need of guestmem.Scalar: bits to objects and back. */
#ifndef GUESTMEM_SCALAR_H
#define GUESTMEM_SCALAR_H

#include "native.h"

enum scalar_kind { SCALAR_UNSIGNED, SCALAR_SIGNED, SCALAR_FLOAT };

typedef struct {
    PyObject_HEAD
    const char *name;
    size_t width; /* bytes: 1, 2, 4 or 8 */
    enum scalar_kind kind;
    bool swapped; /* its byte order is not the host's */
} scalar_object;

static inline bool
scalar_check(const module_state *state, PyObject *obj)
{
    return Py_IS_TYPE(obj, state->scalar_type);
}

/* A new int or float from the bits that memory holds. */
PyObject *scalar_to_object(const scalar_object *self, uint64_t bits);

/* The bits for memory. May run Python code (__index__, __float__). -1 with
 * OverflowError where the value does not fit, TypeError where it is none. */
int scalar_from_object(const scalar_object *self, PyObject *value, uint64_t *bits);

#endif
