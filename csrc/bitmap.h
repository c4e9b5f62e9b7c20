/* What mappings and GuestMemory need of guestmem.DirtyBitmap. */
#ifndef GUESTMEM_BITMAP_H
#define GUESTMEM_BITMAP_H

#include "native.h"

#include "dirty_map.h"

/* A new one, all clean, of so many bytes of memory from addr on. */
PyObject *bitmap_new(module_state *state, const char *addr, size_t size);

/* It lives as long as the object. */
struct dirty_map *bitmap_map(PyObject *op);

/* A list of (start, count), and the range at its end, which grows while what comes next
 * adjoins (count 0: there is none yet). */
struct ranges {
    PyObject *list;
    uint64_t start;
    uint64_t count;
};

/* Adds the dirty pages of [offset, offset + count), which is not empty, as far as they
 * lie there; offset is called start. -1 with an exception. */
int bitmap_add_ranges(struct ranges *self, const struct dirty_map *map,
                      const uint64_t *words, size_t offset, size_t count,
                      uint64_t start);

/* The list, complete; NULL with an exception, or where one is set already: failed. */
PyObject *bitmap_end_ranges(struct ranges *self, bool failed);

/* A dirty log as KVM_GET_DIRTY_LOG gives it: first how many words it has, then, once the
 * caller has found that they will do, a copy of them, which is the caller's to free. */
int bitmap_open_log(PyObject *obj, Py_buffer *view, size_t *words);
uint64_t *bitmap_copy_log(const module_state *state, PyObject *obj,
                          const Py_buffer *view);

/* The bytes of memory that so many words tell of, or as many as there can be. */
static inline uint64_t
bitmap_log_size(size_t words, unsigned shift)
{
    return words > UINT64_MAX >> (6 + shift) ? UINT64_MAX
                                             : (uint64_t)words << (6 + shift);
}

#endif
