/* Raising: every helper sets the exception and returns NULL or -1, so that a
 * call site is one line. The texts of our own errors are in errors.py. */
#ifndef GUESTMEM_ERRORS_H
#define GUESTMEM_ERRORS_H

#include "native.h"

/* NULL: [offset, offset + count) is not inside [0, size). */
PyObject *errors_invalid_address(module_state *state, uint64_t offset, uint64_t count,
                                 uint64_t size);
PyObject *errors_invalid_range(module_state *state, uint64_t offset, uint64_t count,
                               uint64_t size);
/* NULL: InvalidRangeError, because of what madvise said. */
PyObject *errors_not_removed(module_state *state, uint64_t offset, uint64_t count,
                             uint64_t size, int err);
PyObject *errors_out_of_bounds(module_state *state, uint64_t addr, uint64_t size);
PyObject *errors_address_overflow(module_state *state, uint64_t base, uint64_t offset);
/* NULL: length elements of so many bytes, from base on. */
PyObject *errors_array_overflow(module_state *state, uint64_t base, uint64_t length,
                                uint64_t element);
/* NULL: no region holds the guest address. */
PyObject *errors_invalid_guest_address(module_state *state, uint64_t addr);
/* NULL: the range [addr, addr + count) of guest addresses crosses into another region at
 * border. */
PyObject *errors_crosses_border(module_state *state, uint64_t addr, uint64_t count,
                                uint64_t border);
/* NULL: a region cannot have this size (is NULL), or has another one. */
PyObject *errors_invalid_region(module_state *state, uint64_t start, uint64_t size,
                                const uint64_t *is);
/* NULL: two regions, by their starts and sizes. */
PyObject *errors_region_overlap(module_state *state, uint64_t start, uint64_t size,
                                uint64_t other_start, uint64_t other_size);
/* NULL: what is at offset is not at a multiple of alignment. */
PyObject *errors_misaligned(module_state *state, uint64_t offset, uint64_t alignment);
/* NULL: offset is the int that was given. */
PyObject *errors_invalid_offset(module_state *state, PyObject *offset);
/* NULL: offset + count does not fit off_t. */
PyObject *errors_invalid_offset_u64(module_state *state, uint64_t offset,
                                    uint64_t count);
/* NULL: TypeError "<what> must be <expected>, not '<type of given>'". */
PyObject *errors_wrong_type(const char *what, const char *expected, PyObject *given);
/* An exact int as a text: its digits, or how many bits where they are many, which
 * could take forever, or be refused. */
PyObject *errors_int_text(PyObject *number);
/* What strerror says, which is in the encoding of the locale. */
PyObject *errors_strerror(int err);
PyObject *errors_closed(module_state *state, const char *text);
PyObject *errors_system_call(module_state *state, int err, const char *syscall);

/* NULL: TypeError. The method __reduce__ of memory, and of what tells of it. */
PyObject *errors_not_copied(PyObject *op, PyObject *ignored);
extern const char errors_not_copied_doc[];

/* -1: a transfer failed after `transferred` bytes. err is 0 where there is no
 * errno; cause (stolen, may be NULL) becomes __cause__. */
int errors_transfer(PyObject *error_class, int err, const char *text,
                    size_t transferred, PyObject *cause);
/* -1: the memory itself faulted, at offset; piece is its index, or negative. */
int errors_memory_fault(PyObject *error_class, int err, uint64_t offset,
                        Py_ssize_t piece);

/* The pending exception, taken out (NULL where there is none); and put back. */
PyObject *errors_take(void);
void errors_put_back(PyObject *exception);

/* Makes cause (stolen) the __cause__ of the pending exception. */
void errors_set_cause(PyObject *cause);

#endif
