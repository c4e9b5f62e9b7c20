/* The type of objects that refs and arrays hold, and one such object in memory. */
#ifndef GUESTMEM_ELEMENT_H
#define GUESTMEM_ELEMENT_H

#include "native.h"

#include "scalar.h"
#include "span.h"

struct element {
    PyObject *type;              /* strong */
    const scalar_object *scalar; /* type, where that is a Scalar; else NULL */
    size_t size;                 /* bytes, when it was looked up first */
};

static inline struct element
element_of(const module_state *state, PyObject *type, size_t size)
{
    bool is_scalar = scalar_check(state, type);
    return (struct element){Py_NewRef(type), is_scalar ? (scalar_object *)type : NULL,
                            size};
}

/* All but Scalars. */
PyObject *element_load_slow(const struct element *self, const struct span *span,
                            size_t offset);
int element_store_slow(const struct element *self, const struct span *span,
                       size_t offset, PyObject *value);

/* The name of the type for a repr. Not its own repr: that of a Struct shows an address. */
PyObject *element_name(const struct element *self);

/* The object at offset, where the caller knows that it fits; a new reference, or NULL.
 * TypeError where the type has changed its size. */
static inline PyObject *
element_load(const struct element *self, const struct span *span, size_t offset)
{
    uint64_t bits;
    if (self->scalar == NULL) {
        return element_load_slow(self, span, offset);
    }
    return span_load(span, offset, self->scalar->width, &bits) < 0
               ? NULL
               : scalar_to_object(self->scalar, bits);
}

static inline int
element_store(const struct element *self, const struct span *span, size_t offset,
              PyObject *value)
{
    uint64_t bits;
    if (self->scalar == NULL) {
        return element_store_slow(self, span, offset, value);
    }
    return scalar_from_object(self->scalar, value, &bits) < 0
               ? -1
               : span_store(span, offset, self->scalar->width, bits);
}

#endif
