/* Finding guest addresses: the search, and the methods that only look.
 */
#include "native.h"

#include "args.h"
#include "guest.h"
#include "range.h"

/* The index over the addresses: entry i is the last region that begins at or before
 * address i << shift (or the first one). Fills it in; returns how many regions a search
 * has to choose from at most. */
static size_t
index_fill(const guest_object *self, uint32_t *first, size_t entries)
{
    size_t region = 0, most = 1;
    for (size_t i = 0; i < entries; i++) {
        while (region + 1 < self->count
               && self->starts[region + 1] <= (uint64_t)i << self->shift) {
            region++;
        }
        first[i] = (uint32_t)region;
        most = i == 0 ? most : Py_MAX(most, first[i] - first[i - 1] + 1);
    }
    first[entries] = self->count == 0 ? 0 : (uint32_t)(self->count - 1);
    return Py_MAX(most, first[entries] - first[entries - 1] + 1);
}

/* With at least as many entries as there are regions, and more, up to 16 times as many,
 * where regions crowd: a hole below 4 GiB takes most of a small guest's addresses. So
 * mostly one or two are looked at, and nowhere more than their logarithm. -1 with
 * MemoryError. */
int
guest_index(guest_object *self)
{
    unsigned least = 1;
    while (least < 20 && (size_t)1 << least < self->count) {
        least++;
    }
    unsigned width = self->last == 0 ? 1 : 64 - (unsigned)__builtin_clzll(self->last);
    for (unsigned bits = least;; bits++) {
        size_t entries = (size_t)1 << bits;
        uint32_t *first = PyMem_Calloc(entries + 1, sizeof(*first));
        if (first == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        PyMem_Free(self->first);
        self->first = first;
        self->shift = width > bits ? width - bits : 0;
        if (index_fill(self, first, entries) <= 2 || bits == least + 4) {
            return 0;
        }
    }
}

/* Without a branch that depends on the address: mispredicted ones are what a search
 * costs. */
struct region *
guest_search(guest_object *self, uint64_t addr)
{
    if (addr > self->last || self->count == 0) {
        return NULL;
    }
    const uint32_t *entry = &self->first[addr >> self->shift];
    size_t low = entry[0]; /* the region is one of [low, low + left) */
    for (size_t left = entry[1] - low + 1; left > 1;) {
        size_t half = left / 2;
        low += self->starts[low + half] <= addr ? half : 0;
        left -= half;
    }
    struct region *region = &self->regions[low];
    if (addr - region->start >= region->size) {
        return NULL;
    }
    atomic_store_explicit(&self->hint, low, memory_order_relaxed);
    return region;
}

struct piece
guest_piece(guest_object *self, uint64_t addr, uint64_t count)
{
    struct region *region = guest_find(self, addr);
    uint64_t offset = addr - region->start;
    return (struct piece){&region->part, offset,
                          range_clamp(offset, count, region->size)};
}

/* Whether [addr, addr + count) passes 2**64. It may end there, so its last byte is
 * looked at, not its end. */
static inline bool
guest_overflows(uint64_t addr, uint64_t count)
{
    return count != 0 && addr + (count - 1) < addr;
}

/* Of a range that does not overflow; false where addr itself is in a hole. */
static bool
guest_measure(guest_object *self, uint64_t addr, uint64_t count, uint64_t *reach)
{
    struct region *region = guest_find(self, addr);
    *reach = 0;
    if (region == NULL) {
        return count == 0 && addr != 0 && guest_find(self, addr - 1) != NULL;
    }
    *reach = range_clamp(addr - region->start, count, region->size);
    struct region *end = self->regions + self->count;
    for (region++; *reach < count && region < end && region->start == addr + *reach;
         region++) {
        *reach += Py_MIN(region->size, count - *reach);
    }
    return true;
}

int
guest_reach(guest_object *self, uint64_t addr, uint64_t count, uint64_t *reach)
{
    if (hold_is_closed(&self->hold)) {
        memory_say_closed(self->state, A_REGION);
        return -1;
    }
    if (guest_overflows(addr, count)) {
        errors_address_overflow(self->state, addr, count);
        return -1;
    }
    if (!guest_measure(self, addr, count, reach)) {
        errors_invalid_guest_address(self->state, addr);
        return -1;
    }
    return 0;
}

int
guest_reach_on(guest_object *self, uint64_t addr, uint64_t *reach)
{
    if (guest_reach(self, addr, UINT64_MAX - addr, reach) < 0) {
        return -1;
    }
    if (addr != 0 && *reach == UINT64_MAX - addr
        && guest_find(self, UINT64_MAX) != NULL) {
        *reach += 1; /* the last byte of all; 2**64 of them do not fit a count */
    }
    return 0;
}

int
guest_reach_all(guest_object *self, uint64_t addr, uint64_t count)
{
    uint64_t reach;
    if (guest_reach(self, addr, count, &reach) < 0) {
        return -1;
    }
    if (reach < count) {
        errors_invalid_guest_address(self->state, addr + reach);
        return -1;
    }
    return 0;
}

PyObject *
guest_region_object(module_state *state, struct region *region)
{
    PyObject *result = PyStructSequence_New(state->guest_region_type);
    if (result == NULL) {
        return NULL;
    }
    PyObject *fields[] = {
        PyLong_FromUnsignedLongLong(region->start),
        PyLong_FromUnsignedLongLong(region->size),
        PyLong_FromUnsignedLongLong(region->start + (region->size - 1)),
        Py_NewRef(region->memory),
    };
    bool failed = false;
    for (Py_ssize_t i = 0; i < 4; i++) {
        failed = failed || fields[i] == NULL;
        PyStructSequence_SetItem(result, i, fields[i]);
    }
    if (!PyObject_GC_IsTracked(result)) { /* as made, it is not: a cycle would stay */
        PyObject_GC_Track(result);
    }
    if (failed) {
        Py_CLEAR(result);
    }
    return result;
}

const char guest_find_region_doc[] =
    PyDoc_STR("find_region($self, addr, /)\n--\n\n"
              "Return the GuestRegion that holds a guest address, or None.\n"
              "\n"
              "ClosedError once closed.");

PyObject *
guest_find_region(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    uint64_t addr;
    if (args_count(nargs, 1, 1, "find_region", "addr") < 0
        || args_u64(args[0], "addr", &addr) < 0 || guest_begin(self, LONG) < 0) {
        return NULL;
    }
    struct region *region = guest_find(self, addr);
    PyObject *result =
        region == NULL ? Py_NewRef(Py_None) : guest_region_object(self->state, region);
    guest_end(self, LONG);
    return result;
}

const char guest_address_in_range_doc[] =
    PyDoc_STR("address_in_range($self, addr, /)\n--\n\n"
              "Return whether a region holds this guest address.");

PyObject *
guest_address_in_range(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t addr;
    if (args_count(nargs, 1, 1, "address_in_range", "addr") < 0
        || args_u64(args[0], "addr", &addr) < 0) {
        return NULL;
    }
    return PyBool_FromLong(guest_find(guest_of(op), addr) != NULL);
}

const char guest_check_range_doc[] =
    PyDoc_STR("check_range($self, addr, count, /)\n--\n\n"
              "Return whether all of [addr, addr + count) is there, without a hole.\n"
              "\n"
              "It may cross from one region into the next. False beyond 2**64, too.");

PyObject *
guest_check_range(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    uint64_t addr, count, reach;
    if (args_count(nargs, 2, 2, "check_range", "addr, count") < 0
        || args_u64(args[0], "addr", &addr) < 0
        || args_u64(args[1], "count", &count) < 0) {
        return NULL;
    }
    return PyBool_FromLong(!guest_overflows(addr, count)
                           && guest_measure(self, addr, count, &reach)
                           && reach == count);
}

const char guest_checked_offset_doc[] =
    PyDoc_STR("checked_offset($self, addr, n, /)\n--\n\n"
              "Return addr + n where a region holds that address, else None.");

PyObject *
guest_checked_offset(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t addr, n, sum;
    if (args_count(nargs, 2, 2, "checked_offset", "addr, n") < 0
        || args_u64(args[0], "addr", &addr) < 0 || args_u64(args[1], "n", &n) < 0) {
        return NULL;
    }
    if (!range_end(addr, n, &sum) || guest_find(guest_of(op), sum) == NULL) {
        Py_RETURN_NONE;
    }
    return PyLong_FromUnsignedLongLong(sum);
}
