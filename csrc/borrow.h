/* Lending a range of memory. */
#ifndef GUESTMEM_BORROW_H
#define GUESTMEM_BORROW_H

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
int borrow_want_ref(module_state *state, PyObject *type, struct borrower *what);
int borrow_want_atomic_ref(module_state *state, PyObject *type, struct borrower *what);
int borrow_want_array_ref(module_state *state, uint64_t offset, PyObject *n,
                          PyObject *type, struct borrower *what);

/* A new object that borrows the range from offset on. */
PyObject *borrow_new(memory_object *self, uint64_t offset, const struct borrower *what);

#endif
