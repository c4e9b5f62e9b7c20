/* What GuestMemory needs of the accessors: each for one piece of memory. */
#ifndef GUESTMEM_ACCESSORS_H
#define GUESTMEM_ACCESSORS_H

#include "native.h"

#include "volatile_memory.h"

/* All enter the memory, check the range, touch it. */
PyObject *accessor_read_object(memory_object *self, uint64_t offset, PyObject *kind);
PyObject *accessor_write_object(memory_object *self, PyObject *value, uint64_t offset,
                                PyObject *kind);

/* Between memory and the bytes of view, which buf exports. Exact, or as many as fit;
 * returns how many, or -1. */
enum direction { INTO_BUFFER, INTO_MEMORY };
Py_ssize_t accessor_copy(memory_object *self, uint64_t offset, PyObject *buf,
                         const Py_buffer *view, enum direction direction, bool exact);

#endif
