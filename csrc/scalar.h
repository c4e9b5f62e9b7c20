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
    /* Ints from 0 up to, but without, this one are their own bits in memory. None
     * are where bytes are swapped or a float's. */
    uint64_t own_bits;
} scalar_object;

static inline bool
scalar_check(const module_state *state, PyObject *obj)
{
    return Py_IS_TYPE(obj, state->scalar_type);
}

/* All cases of the two functions below. */
PyObject *scalar_to_object_slow(const scalar_object *self, uint64_t bits);
int scalar_from_object_slow(const scalar_object *self, PyObject *value, uint64_t *bits);

/* A new int or float from the bits that memory holds. */
static inline PyObject *
scalar_to_object(const scalar_object *self, uint64_t bits)
{
    if (bits < self->own_bits) {
        return PyLong_FromLongLong((long long)bits);
    }
    return scalar_to_object_slow(self, bits);
}

/* The bits for memory. May run Python code (__index__, __float__). -1 with
 * OverflowError where the value does not fit, TypeError where it is none. */
static inline int
scalar_from_object(const scalar_object *self, PyObject *value, uint64_t *bits)
{
    if (PyLong_CheckExact(value)) {
        int overflow;
        long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
        if (number >= 0 && (uint64_t)number < self->own_bits) {
            *bits = (uint64_t)number; /* on overflow number is -1 */
            return 0;
        }
    }
    return scalar_from_object_slow(self, value, bits);
}

#endif
