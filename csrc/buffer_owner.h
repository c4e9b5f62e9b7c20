/* Holds a buffer that somebody exported to us. */
#ifndef GUESTMEM_BUFFER_OWNER_H
#define GUESTMEM_BUFFER_OWNER_H

#include "native.h"

#include "span.h"

/* A new owner of exporter's writable contiguous buffer: *out is that buffer, and its
 * lender holds the only reference. -1 with an exception. */
int buffer_owner_new(module_state *state, PyObject *exporter, struct span *out);

#endif
