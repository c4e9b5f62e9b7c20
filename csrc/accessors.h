/* What GuestMemory needs of the accessors: each for one piece of memory. */
#ifndef GUESTMEM_ACCESSORS_H
#define GUESTMEM_ACCESSORS_H

#include "native.h"

#include "volatile_memory.h"

/* What borrows a range: the range's bytes, and what its object is made of. */
struct borrower {
    enum { A_SLICE_OF_IT, A_REF, AN_ATOMIC_REF, AN_ARRAY_REF } kind;
    uint64_t count;
    PyObject *type;
    size_t element; /* bytes of one */
    uint64_t length;
};

/* Fill in what the arguments say; -1 with an exception. */
int accessor_want_ref(module_state *state, PyObject *type, struct borrower *what);
int accessor_want_atomic_ref(module_state *state, PyObject *type,
                             struct borrower *what);
int accessor_want_array_ref(module_state *state, uint64_t offset, PyObject *n,
                            PyObject *type, struct borrower *what);

/* All enter the memory, check the range, touch it. */
PyObject *accessor_borrow(memory_object *self, uint64_t offset,
                          const struct borrower *what);
PyObject *accessor_read_object(memory_object *self, uint64_t offset, PyObject *kind);
PyObject *accessor_write_object(memory_object *self, PyObject *value, uint64_t offset,
                                PyObject *kind);
int accessor_fill_range(memory_object *self, unsigned char byte, uint64_t offset,
                        uint64_t count);

/* Between memory and the bytes of view, which buf exports. Exact, or as many as fit;
 * returns how many, or -1. */
enum direction { INTO_BUFFER, INTO_MEMORY };
Py_ssize_t accessor_copy(memory_object *self, uint64_t offset, PyObject *buf,
                         const Py_buffer *view, enum direction direction, bool exact);

#endif
