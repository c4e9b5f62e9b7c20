/* The record of a mapping's pages. See hold.h for the word that rules it. */
#include "native.h"

#include "pages.h"

struct pages *
pages_new(const struct os_mapping *mapping, PyObject *dirty)
{
    struct pages *self = PyMem_Malloc(sizeof(*self));
    if (self == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    self->mapping = *mapping;
    self->dirty = dirty;
    atomic_init(&self->hold, HOLD_OWNED);
    atomic_init(&self->slices, 0);
    atomic_init(&self->refs, 0);
    return self;
}

int
pages_unmap(const struct os_mapping *mapping)
{
    int err;
    Py_BEGIN_ALLOW_THREADS
    err = os_map_unmap(mapping);
    Py_END_ALLOW_THREADS
    return err;
}

void
pages_unmap_or_report(const struct os_mapping *mapping)
{
    int err = pages_unmap(mapping);
    if (err != 0) {
        PyObject *pending = errors_take();
        errno = err;
        PyErr_SetFromErrno(PyExc_OSError);
        PyErr_WriteUnraisable(NULL);
        errors_put_back(pending);
    }
}

/* hold_change for one who does not keep the record alive: all that is needed
 * afterwards is read before, because the record may be gone by then. */
static void
pages_change(struct pages *self, uint64_t set, uint64_t clear, uint64_t unit)
{
    struct os_mapping mapping = self->mapping;
    uint64_t after;
    bool unmap = hold_change(&self->hold, set, clear, unit, &after);
    if (!(after & (HOLD_ANYONE | HOLD_OWNED))) {
        Py_XDECREF(self->dirty); /* runs no Python code: only C refers to it weakly */
        PyMem_Free(self);
    }
    if (unmap) {
        pages_unmap_or_report(&mapping);
    }
}

void
pages_drop(struct pages *self)
{
    pages_change(self, 0, 0, HOLD_BORROW);
}

void
pages_disown(struct pages *self)
{
    pages_change(self, HOLD_CLOSED, HOLD_OWNED, 0);
}
