/* A span: a range of memory that a lender keeps mapped. It is what mappings, slices
 * and refs have in common, and all of them touch memory through it alone: here is
 * decided whether a page may be missing, whether the GIL is given away, and who
 * raises what.
 */
#ifndef GUESTMEM_SPAN_H
#define GUESTMEM_SPAN_H

#include "native.h"

#include "access.h"
#include "dirty_map.h"
#include "fault.h"
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

struct span {
    module_state *state; /* alive as long as the type of who has the span */
    char *addr;
    size_t size;
    uint64_t first; /* what errors call its first byte: a guest address, or 0 */
    struct lender lender;
    struct dirty_map *dirty; /* what writes are marked in, or NULL; the lender's */
    bool can_fault; /* a touch may be a bus error: all but our own anonymous pages */
    bool is_plain;  /* neither: a write is no more than that */
};

/* After a write to [offset, offset + count), also one that failed half-way. */
static inline void
span_wrote(const struct span *self, size_t offset, size_t count)
{
    if (self->dirty != NULL) {
        dirty_map_mark(self->dirty, (size_t)(self->addr - self->dirty->base) + offset,
                       count);
    }
}

/* [offset, offset + count) of it, which the caller has checked. */
static inline struct span
span_part(const struct span *self, size_t offset, size_t count)
{
    struct span part = *self;
    part.addr += offset;
    part.size = count;
    part.first = 0;
    return part;
}

/* Whether a copy of so many bytes gives the GIL away. */
static inline bool
span_copy_is_long(size_t count)
{
    return count >= COPY_WITHOUT_GIL;
}

/* Before a span that can fault is made: what its guard needs. -1 with an exception. */
int span_take_signal(module_state *state);

/* -1 with ReadFromMemoryError or WriteToMemoryError; piece is the index of this memory
 * among several, or NO_PIECE. */
int span_faulted(const struct span *self, struct fault fault, Py_ssize_t piece);
#define NO_PIECE (-1)

static inline int
span_result(const struct span *self, struct fault fault)
{
    return fault.at == NULL ? 0 : span_faulted(self, fault, NO_PIECE);
}

/* All that follows touches [offset, offset + count), or a scalar of width bytes,
 * which the caller has checked, while it is inside the memory or borrows it. -1
 * with an exception where a page could not be brought in: the caller touches
 * nothing after that, because raising may have run Python code. */

static inline int
span_load(const struct span *self, size_t offset, size_t width, uint64_t *bits)
{
    const char *at = self->addr + offset;
    if (!self->can_fault) {
        *bits = access_load(at, width);
        return 0;
    }
    struct fault_value value = fault_load(at, width);
    *bits = value.bits;
    return span_result(self, (struct fault){value.at, false});
}

/* All but plain writes, which are inlined. */
int span_store_slow(const struct span *self, size_t offset, size_t width,
                    uint64_t bits);

static inline int
span_store(const struct span *self, size_t offset, size_t width, uint64_t bits)
{
    if (self->is_plain) {
        access_store(self->addr + offset, bits, width);
        return 0;
    }
    return span_store_slow(self, offset, width, bits);
}

/* At an address that is a multiple of the width. */
static inline int
span_atomic(const struct span *self, size_t offset, struct atomic_call *call,
            uint64_t *result)
{
    char *at = self->addr + offset;
    uint64_t expected = call->expected;
    struct fault fault = {NULL, true};
    if (self->can_fault) {
        fault = fault_atomic(at, call, result);
    }
    else {
        *result = access_atomic(at, call);
    }
    if (call->op != ATOMIC_LOAD
        && (call->op != ATOMIC_COMPARE_EXCHANGE || fault.at != NULL
            || *result == expected)) {
        span_wrote(self, offset, call->width);
    }
    return span_result(self, fault);
}

int span_read(const struct span *self, size_t offset, void *host, size_t count);
/* As much of *count as can be read; -1 only where the first byte cannot. Reads what it
 * keeps twice where a page is missing. */
int span_read_some(const struct span *self, size_t offset, void *host, size_t *count);
int span_write(const struct span *self, size_t offset, const void *host, size_t count);
int span_fill(const struct span *self, size_t offset, unsigned char byte, size_t count);
/* From one span to another: whose page is missing, its is the offset in the error. */
int span_copy(const struct span *dst, size_t dst_offset, const struct span *src,
              size_t src_offset, size_t count);
/* A new bytes object, or NULL. */
PyObject *span_bytes(const struct span *self, size_t offset, size_t count);

#endif
