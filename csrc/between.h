/* The buffer between memory and a file object, where a view of the memory itself will
 * not do. */
#ifndef GUESTMEM_BETWEEN_H
#define GUESTMEM_BETWEEN_H

#include "native.h"

#include "span.h"

struct between {
    Py_buffer view; /* a bytearray's; obj is NULL between two steps */
    size_t step;    /* how many bytes the next one is for; 0 before the first */
};

/* A step in which an object is asked for up to `left` bytes: *asked says for how many.
 * For a writer they are copied from memory at offset, as many as can be read. Returns
 * what it gets a view of, a new reference, or NULL; between_end() follows. */
PyObject *between_begin(struct between *self, const struct span *span, size_t offset,
                        size_t left, bool reading, size_t *asked);

/* The end of the step: `moved` bytes that a reader gave are copied to memory. -1 with an
 * exception. failed: there is one already, and this only cleans up. */
int between_end(struct between *self, const struct span *span, size_t offset,
                size_t asked, size_t moved, bool reading, bool failed);

#endif
