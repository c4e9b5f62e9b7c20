/* The idea of the Python types: a VolatileMemory is an address and a size that
 * something keeps alive. What mappings, slices and refs share is here. */
#ifndef GUESTMEM_VOLATILE_MEMORY_H
#define GUESTMEM_VOLATILE_MEMORY_H

#include "native.h"

#include "pages.h"

/* Copies of this many bytes and more are made without the GIL: measured, giving it
 * away pays from 256 KiB on. */
#define COPY_WITHOUT_GIL ((size_t)256 << 10)

/* What keeps memory alive: pages of our own, or somebody's exported buffer. One
 * of the two is NULL; both are once the borrow has been given back. */
struct lender {
    struct pages *pages;
    PyObject *buffer_owner; /* strong; each borrower has a reference of its own, so
                               that the garbage collector can count them */
};

static inline void
lender_borrow(struct lender lender, enum borrow_kind kind)
{
    if (lender.pages != NULL) {
        pages_borrow(lender.pages, kind);
    }
    else {
        Py_INCREF(lender.buffer_owner);
    }
}

/* May unmap, release a buffer and run Python code. Twice does nothing. */
static inline void
lender_give_back(struct lender *lender, enum borrow_kind kind)
{
    struct pages *pages = lender->pages;
    if (pages != NULL) {
        lender->pages = NULL;
        pages_give_back(pages, kind);
    }
    else {
        Py_CLEAR(lender->buffer_owner);
    }
}

typedef struct {
    PyObject_HEAD
    module_state *state; /* alive as long as the type is */
    PyObject *weakrefs;
    char *addr;
    size_t size;
    hold *hold; /* the word that calls enter: that of the pages for a mapping, its
                   own for a slice */
    struct lender lender;
    bool is_mapping;
} memory_object;

static inline memory_object *
memory_of(PyObject *op)
{
    return (memory_object *)op;
}

/* How long a call stays inside the memory. */
enum stay {
    SHORT, /* releases no GIL and runs no Python code */
    LONG,
};

/* The slow ends of memory_enter and memory_leave. */
int memory_refuse(const memory_object *self);
void memory_vacate(memory_object *self);

/* Every access is between these two. Entering keeps the memory mapped and makes
 * close() and release() refuse; it fails with ClosedError. With a GIL nobody can
 * close anything during a SHORT stay, and a look is enough. */
static inline int
memory_enter(memory_object *self, enum stay stay)
{
#ifndef Py_GIL_DISABLED
    if (hold_is_closed(self->hold)) {
        return memory_refuse(self);
    }
    if (stay == LONG) {
        hold_add(self->hold, HOLD_CALL);
    }
#else
    (void)stay;
    if (hold_add(self->hold, HOLD_CALL) & HOLD_CLOSED) {
        if (hold_leave(self->hold, HOLD_CALL)) {
            memory_vacate(self);
        }
        return memory_refuse(self);
    }
#endif
    return 0;
}

static inline void
memory_leave(memory_object *self, enum stay stay)
{
#ifndef Py_GIL_DISABLED
    if (stay == SHORT) {
        return;
    }
#else
    (void)stay;
#endif
    if (hold_leave(self->hold, HOLD_CALL)) {
        memory_vacate(self);
    }
}

static inline enum stay
memory_stay_of_copy(size_t count)
{
    return count < COPY_WITHOUT_GIL ? SHORT : LONG;
}

/* Copies that give the GIL away where they are large. The caller has entered for
 * memory_stay_of_copy(count), or holds a borrow. */
void memory_copy_out(void *host, const char *guest, size_t count);
void memory_copy_in(char *guest, const void *host, size_t count);
void memory_copy_within(char *dst, const char *src, size_t count);
void memory_fill(char *guest, unsigned char byte, size_t count);

/* A new bytes object with count bytes of memory, under the same conditions. */
PyObject *memory_bytes_at(const char *guest, size_t count);

/* Fills in what all memory has; the object is new and of a type that derives from
 * VolatileMemory. */
static inline void
memory_start(memory_object *self, module_state *state, char *addr, size_t size,
             hold *word, struct lender lender, bool is_mapping)
{
    self->state = state;
    self->weakrefs = NULL;
    self->addr = addr;
    self->size = size;
    self->hold = word;
    self->lender = lender;
    self->is_mapping = is_mapping;
}

/* What a mapping's close() and a slice's release() do: gives the memory back if
 * nobody is inside or borrows from it. NULL with BufferError, which says who, or
 * SystemCallFailedError. Closing twice does nothing. */
PyObject *memory_close(memory_object *self);

/* The methods of VolatileMemory: accessors.c. */
extern PyMethodDef memory_methods[];

/* Those that stand in files of their own: transfer.c, remove_range.c,
 * volatile_memory.c. */
PyObject *transfer_read_to_memory(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                                  PyObject *kwnames);
PyObject *transfer_write_from_memory(PyObject *op, PyObject *const *args,
                                     Py_ssize_t nargs, PyObject *kwnames);
PyObject *remove_range(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *memory_enter_block(PyObject *op, PyObject *ignored);
PyObject *memory_exit_block(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *memory_reduce(PyObject *op, PyObject *ignored);
extern const char transfer_read_to_memory_doc[], transfer_write_from_memory_doc[],
    remove_range_doc[], memory_enter_block_doc[], memory_exit_block_doc[],
    memory_reduce_doc[];

/* slice.c and ref.c: a new object that borrows [addr, addr + size) of memory
 * that the caller is inside of, or borrows itself. */
PyObject *slice_new(module_state *state, char *addr, size_t size, struct lender lender);
PyObject *ref_new(module_state *state, char *addr, size_t size, PyObject *type,
                  struct lender lender);

#endif
