/* Holds a buffer that somebody exported to us. */
#ifndef GUESTMEM_BUFFER_OWNER_H
#define GUESTMEM_BUFFER_OWNER_H

#include "native.h"

/* A new owner of exporter's writable contiguous buffer, at *addr and of *size. */
PyObject *buffer_owner_new(module_state *state, PyObject *exporter, char **addr,
                           size_t *size);

#endif
