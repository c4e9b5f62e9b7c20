/* The record of a mapping's pages: what slices and refs borrow from, so that the
 * pages outlive the MemoryMapping object where a borrower does. One word is both
 * the lifetime and what close() asks. */
#ifndef GUESTMEM_PAGES_H
#define GUESTMEM_PAGES_H

#include "hold.h"
#include "os_map.h"

struct pages {
    hold hold;
    struct os_mapping mapping;
    PyObject *dirty; /* strong: its DirtyBitmap; NULL where writes are not tracked */
    /* How many of the borrowers are slices and refs; the rest are exported
     * buffers. They decide nothing: close() quotes them when it refuses. */
    _Atomic uint64_t slices;
    _Atomic uint64_t refs;
};

enum borrow_kind { BORROW_SLICE, BORROW_REF };

/* Takes the mapping over, and a DirtyBitmap (strong, or NULL). NULL with MemoryError
 * set: both are the caller's still. */
struct pages *pages_new(const struct os_mapping *mapping, PyObject *dirty);

/* One more borrower. The caller is inside the memory or borrows already. */
static inline void
pages_borrow(struct pages *self, enum borrow_kind kind)
{
    hold_add(kind == BORROW_SLICE ? &self->slices : &self->refs, 1);
    hold_add(&self->hold, HOLD_BORROW);
}

/* One less; the last one out of closed pages unmaps them. */
void pages_drop(struct pages *self);

static inline void
pages_give_back(struct pages *self, enum borrow_kind kind)
{
    hold_add(kind == BORROW_SLICE ? &self->slices : &self->refs, UINT64_MAX);
#ifndef Py_GIL_DISABLED
    if (!hold_is_closed(&self->hold)) { /* so the mapping object keeps them */
        hold_add(&self->hold, -HOLD_BORROW);
        return;
    }
#endif
    pages_drop(self);
}

/* Unmaps without the GIL; 0 or an errno. */
int pages_unmap(const struct os_mapping *mapping);

/* The same where there is nobody to raise an error to. */
void pages_unmap_or_report(const struct os_mapping *mapping);

/* The MemoryMapping object goes away; the last borrower unmaps. */
void pages_disown(struct pages *self);

#endif
