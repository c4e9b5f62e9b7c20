/* What the accessors of GuestMemory need of its regions. */
#ifndef GUESTMEM_GUEST_H
#define GUESTMEM_GUEST_H

#include "native.h"

#include "volatile_memory.h"

/* A region: its memory from one guest address on. */
struct region {
    uint64_t start;
    uint64_t size; /* at least 1; the last address is start + size - 1 */
    memory_object
        part; /* all of memory, borrowed as by a slice; calls enter the guest's
                           word. No Python object: nobody else can find it. */
    PyObject
        *memory; /* strong: what it was made from; NULL where close() has dropped it */
    bool made;   /* a mapping that close() closes */
};

typedef struct {
    PyObject_HEAD
    module_state *state;
    PyObject *module; /* strong: the collector tracks all of them */
    PyObject *weakrefs;
    hold hold;     /* what calls enter: the word of all regions */
    uint64_t size; /* bytes of all regions */
    size_t count;
    struct region *regions; /* by their starts; they do not overlap */
    uint64_t *starts;       /* of the regions: what is searched, close together */
    uint64_t last;          /* the last address of the last one */
    uint32_t *first; /* in which region 2**shift addresses begin: guest_index() */
    unsigned shift;
    _Atomic size_t hint; /* the region that was found last */
} guest_object;

static inline guest_object *
guest_of(PyObject *op)
{
    return (guest_object *)op;
}

/* What touches more than one region, or a region more than once, is between these two:
 * memory_enter() and memory_leave() of all of them. Accessors of one region enter by
 * themselves. */
static inline int
guest_begin(guest_object *self, enum stay stay)
{
    if (self->count != 0) {
        return memory_enter(&self->regions[0].part, stay);
    }
    if (hold_is_closed(&self->hold)) {
        memory_say_closed(self->state, A_REGION);
        return -1;
    }
    return 0;
}

static inline void
guest_end(guest_object *self, enum stay stay)
{
    if (self->count != 0) {
        memory_leave(&self->regions[0].part, stay);
    }
}

/* The last call has left closed memory, whose word this is: gives all of it back. */
void guest_vacate(hold *word);

/* Makes the index that guest_search() needs. -1 with MemoryError. */
int guest_index(guest_object *self);

/* A GuestRegion. */
PyObject *guest_region_object(module_state *state, struct region *region);

/* The region that holds addr; NULL where none does. */
struct region *guest_search(guest_object *self, uint64_t addr);

static inline struct region *
guest_find(guest_object *self, uint64_t addr)
{
    size_t hint = atomic_load_explicit(&self->hint, memory_order_relaxed);
    if (hint < self->count
        && addr - self->regions[hint].start < self->regions[hint].size) {
        return &self->regions[hint];
    }
    return guest_search(self, addr);
}

/* The region in which [addr, addr + count) lies as a whole; NULL where there is none. */
static inline struct region *
guest_find_all(guest_object *self, uint64_t addr, uint64_t count)
{
    struct region *region = guest_find(self, addr);
    return region != NULL && count <= region->size - (addr - region->start) ? region
                                                                            : NULL;
}

/* How many of count bytes from addr on there are, without a hole; -1 with ClosedError,
 * AddressOverflowError beyond 2**64, InvalidGuestAddressError where addr itself is in a
 * hole. (With count 0 addr may be the end of a region.) */
int guest_reach(guest_object *self, uint64_t addr, uint64_t count, uint64_t *reach);

/* As many as there are from addr on, up to the first hole. */
int guest_reach_on(guest_object *self, uint64_t addr, uint64_t *reach);

/* The same as guest_reach() for all of them: InvalidGuestAddressError with the first address that is in a
 * hole. */
int guest_reach_all(guest_object *self, uint64_t addr, uint64_t count);

/* A piece of a range that guest_reach() has found: as much as one region has. */
struct piece {
    memory_object *part;
    uint64_t offset; /* in the part */
    uint64_t count;
};

struct piece guest_piece(guest_object *self, uint64_t addr, uint64_t count);

/* guest_regions.c */
void region_drop(struct region *region);
PyObject *guest_new(PyTypeObject *cls, PyObject *args, PyObject *kwargs);
PyObject *guest_from_ranges(PyObject *cls, PyObject *const *args, Py_ssize_t nargs,
                            PyObject *kwnames);
PyObject *guest_with_region(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_without_region(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
extern const char guest_from_ranges_doc[], guest_with_region_doc[],
    guest_without_region_doc[];

/* guest_borrow.c */
PyObject *guest_get_slice(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_slices(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_get_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_get_atomic_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_get_array_ref(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_get_host_address(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
extern const char guest_get_slice_doc[], guest_slices_doc[], guest_get_ref_doc[],
    guest_get_atomic_ref_doc[], guest_get_array_ref_doc[], guest_get_host_address_doc[];

/* The methods of guest.c and guest_find.c. */
PyObject *guest_close(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_find_region(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_address_in_range(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_check_range(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_checked_offset(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_exit(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_enter(PyObject *op, PyObject *ignored);
extern const char guest_close_doc[], guest_find_region_doc[],
    guest_address_in_range_doc[], guest_check_range_doc[], guest_checked_offset_doc[],
    guest_exit_doc[], guest_enter_doc[];

/* guest_dirty.c */
PyObject *guest_dirty_ranges(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_take_dirty(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_mark_dirty(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *guest_merge_dirty(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
extern const char guest_dirty_ranges_doc[], guest_take_dirty_doc[],
    guest_mark_dirty_doc[], guest_merge_dirty_doc[];

/* The same methods of remove_range.c and transfer_methods.c, by guest address. */
PyObject *guest_remove_range(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
extern const char guest_remove_range_doc[];
PyObject *transfer_read_to_guest(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                                 PyObject *kwnames);
PyObject *transfer_write_from_guest(PyObject *op, PyObject *const *args,
                                    Py_ssize_t nargs, PyObject *kwnames);

/* All methods: guest_access.c. */
extern PyMethodDef guest_methods[];

#endif
