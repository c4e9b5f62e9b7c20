/* The idea of the Python types: a VolatileMemory is an address and a size that
 * something keeps alive. What mappings, slices and refs share is here. */
#ifndef GUESTMEM_VOLATILE_MEMORY_H
#define GUESTMEM_VOLATILE_MEMORY_H

#include "native.h"

#include "span.h"

/* A region of a GuestMemory is no Python object, but memory like the others: its span,
 * hold and kind are used, the rest is not. */
enum memory_kind { A_MAPPING, A_SLICE, A_REGION };

typedef struct {
    PyObject_HEAD
    struct span span;
    PyObject *weakrefs;
    hold *hold; /* the word that calls enter: that of the pages for a mapping, its
                   own for a slice, the guest's for a region */
    enum memory_kind kind;
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
int memory_refuse(memory_object *self);
void memory_say_closed(module_state *state, enum memory_kind kind);
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

/* Nobody enters any more; whoever is inside goes on, and the last one gives it back. */
static inline void
memory_abandon(memory_object *self)
{
    if (hold_abandon(self->hold)) {
        memory_vacate(self);
    }
}

static inline enum stay
memory_stay_of_copy(size_t count)
{
    return span_copy_is_long(count) ? LONG : SHORT;
}

/* Fills in what all memory has; the object is new and of a type that derives from
 * VolatileMemory. */
static inline void
memory_start(memory_object *self, const struct span *span, hold *word,
             enum memory_kind kind)
{
    self->span = *span;
    self->weakrefs = NULL;
    self->hold = word;
    self->kind = kind;
}

/* The span of an object that has a buffer, if that is memory of ours; else NULL. */
static inline const struct span *
memory_span_of(const module_state *state, PyObject *buf)
{
    return Py_IS_TYPE(buf, state->mapping_type) || Py_IS_TYPE(buf, state->slice_type)
               ? &memory_of(buf)->span
               : NULL;
}

/* Copies count bytes between span and buf, from byte `at` of it on: an object whose
 * buffer is exported to the caller as view. Where that is memory of ours, both sides are
 * guarded, and no field of either tears where they agree modulo 8. -1 with an
 * exception. */
static inline int
memory_copy(const struct span *span, size_t offset, PyObject *buf,
            const Py_buffer *view, size_t at, size_t count, bool into_memory)
{
    const struct span *other = memory_span_of(span->state, buf);
    if (other == NULL) {
        char *host = (char *)view->buf + at;
        return into_memory ? span_write(span, offset, host, count)
                           : span_read(span, offset, host, count);
    }
    return into_memory ? span_copy(span, offset, other, at, count)
                       : span_copy(other, at, span, offset, count);
}

/* Who is there, of those that hold_close_over() has seen: "2 slices, 1 running call". */
enum { HOLDERS_TEXT = 160 };
void memory_holders(const memory_object *self, uint64_t seen, uint64_t own,
                    char text[HOLDERS_TEXT]);

/* What a mapping's close() and a slice's release() do: gives the memory back if
 * nobody is inside or borrows from it. NULL with BufferError, which says who, or
 * SystemCallFailedError. Closing twice does nothing. */
PyObject *memory_close(memory_object *self);

/* The methods of VolatileMemory: accessors.c. */
extern PyMethodDef memory_methods[];

/* Those that stand in files of their own: borrow.c, transfer_methods.c, remove_range.c,
 * volatile_memory.c. */
PyObject *borrow_as_ptr(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *borrow_get_slice(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *borrow_get_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *borrow_get_atomic_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *borrow_get_array_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
extern const char borrow_as_ptr_doc[], borrow_get_slice_doc[], borrow_get_ref_doc[],
    borrow_get_atomic_ref_doc[], borrow_get_array_ref_doc[];
PyObject *transfer_read_to_memory(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                                  PyObject *kwnames);
PyObject *transfer_write_from_memory(PyObject *op, PyObject *const *args,
                                     Py_ssize_t nargs, PyObject *kwnames);
PyObject *transfer_read_from(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *transfer_write_to(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *remove_range(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *memory_enter_block(PyObject *op, PyObject *ignored);
PyObject *memory_exit_block(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
extern const char transfer_read_from_doc[], transfer_write_to_doc[],
    transfer_read_to_memory_doc[], transfer_write_from_memory_doc[], remove_range_doc[],
    memory_enter_block_doc[], memory_exit_block_doc[];

/* slice.c and ref.c: a new object that borrows [offset, offset + size) of memory that
 * the caller is inside of, or borrows itself. */
PyObject *slice_new(const struct span *memory, size_t offset, size_t size);
PyObject *ref_new(const struct span *memory, size_t offset, size_t size,
                  PyObject *type);
/* atomic.c and array.c: the same; an atomic ref's address is a multiple of its size. */
PyObject *atomic_ref_new(const struct span *memory, size_t offset, size_t size,
                         PyObject *type);
PyObject *array_new(const struct span *memory, size_t offset, size_t length,
                    PyObject *type, size_t element);

#endif
