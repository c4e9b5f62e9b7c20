/* What mappings need of guestmem.DirtyBitmap. */
#ifndef GUESTMEM_BITMAP_H
#define GUESTMEM_BITMAP_H

#include "native.h"

#include "dirty_map.h"

/* A new one, all clean, of so many bytes of memory from addr on. */
PyObject *bitmap_new(module_state *state, const char *addr, size_t size);

/* It lives as long as the object. */
struct dirty_map *bitmap_map(PyObject *op);

#endif
