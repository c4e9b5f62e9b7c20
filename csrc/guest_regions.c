/* Making a GuestMemory: of memory, of ranges, of another one and a region more or less. */
#include "native.h"

#include "args.h"
#include "guest.h"

#include <stdlib.h>

void
region_drop(struct region *region)
{
    lender_give_back(&region->part.span.lender, BORROW_SLICE);
    Py_CLEAR(region->memory);
}

/* A region at start that borrows all of span, which the caller keeps mapped, and which
 * is memory's (borrowed). */
static void
region_borrow(struct region *self, const struct span *span, uint64_t start,
              PyObject *memory)
{
    *self = (struct region){
        .start = start, .size = span->size, .memory = Py_NewRef(memory)};
    self->part.span = *span;
    self->part.span.first = start;
    self->part.kind = A_REGION;
    lender_borrow(span->lender, BORROW_SLICE);
}

/* Takes memory (borrowed) as a region at start. -1 with an exception. */
static int
region_fill(struct region *self, module_state *state, uint64_t start, PyObject *memory)
{
    if (!PyObject_TypeCheck(memory, state->memory_type)) {
        errors_wrong_type("the memory of a region", "a VolatileMemory", memory);
        return -1;
    }
    memory_object *whole = memory_of(memory);
    if (whole->span.size == 0) {
        errors_invalid_region(state, start, 0, NULL);
        return -1;
    }
    if (start + (whole->span.size - 1) < start) {
        errors_address_overflow(state, start, whole->span.size);
        return -1;
    }
    if (memory_enter(whole, SHORT) < 0) {
        return -1;
    }
    region_borrow(self, &whole->span, start, memory);
    memory_leave(whole, SHORT);
    return 0;
}

static int
region_compare(const void *a, const void *b)
{
    uint64_t one = ((const struct region *)a)->start;
    uint64_t other = ((const struct region *)b)->start;
    return (one > other) - (one < other);
}

/* A new object of these regions, which it takes over, also where it fails. */
static PyObject *
guest_make(module_state *state, struct region *regions, size_t count)
{
    guest_object *self = NULL;
    qsort(regions, count, sizeof(*regions), region_compare);
    for (size_t i = 1; i < count; i++) {
        if (regions[i].start - regions[i - 1].start < regions[i - 1].size) {
            errors_region_overlap(state, regions[i].start, regions[i].size,
                                  regions[i - 1].start, regions[i - 1].size);
            goto fail;
        }
    }
    uint64_t *starts = PyMem_Calloc(count + 1, sizeof(*starts));
    if (starts == NULL) {
        PyErr_NoMemory();
        goto fail;
    }
    self = PyObject_GC_New(guest_object, state->guest_type);
    if (self == NULL) {
        PyMem_Free(starts);
        goto fail;
    }
    self->state = state;
    self->module = Py_NewRef(state->module);
    self->weakrefs = NULL;
    atomic_init(&self->hold, HOLD_OWNED);
    self->size = 0;
    self->count = count;
    self->regions = regions;
    self->starts = starts;
    self->last =
        count == 0 ? 0 : regions[count - 1].start + (regions[count - 1].size - 1);
    self->first = NULL;
    atomic_init(&self->hint, 0);
    for (size_t i = 0; i < count; i++) {
        starts[i] = regions[i].start;
        regions[i].part.hold = &self->hold;
        self->size += regions[i].size;
    }
    PyObject_GC_Track((PyObject *)self);
    if (guest_index(self) < 0) {
        Py_CLEAR(self); /* and the regions with it */
    }
    return (PyObject *)self;

fail:
    for (size_t i = 0; i < count; i++) {
        region_drop(&regions[i]);
    }
    PyMem_Free(regions);
    return NULL;
}

/* What a pair of the argument says; memory is borrowed from it. options are keywords of
 * MemoryMapping(), or NULL. */
typedef int (*pair_function)(struct region *out, module_state *state, PyObject *first,
                             PyObject *second, PyObject *options);

static int
pair_of_memory(struct region *out, module_state *state, PyObject *first,
               PyObject *second, PyObject *Py_UNUSED(options))
{
    uint64_t start;
    return args_u64(first, "the address of a region", &start) < 0
               ? -1
               : region_fill(out, state, start, second);
}

static int
pair_of_range(struct region *out, module_state *state, PyObject *first,
              PyObject *second, PyObject *options)
{
    PyObject *args = Py_BuildValue("(O)", second);
    PyObject *mapping =
        args == NULL ? NULL
                     : PyObject_Call((PyObject *)state->mapping_type, args, options);
    int result =
        mapping == NULL ? -1 : pair_of_memory(out, state, first, mapping, NULL);
    Py_XDECREF(args);
    Py_XDECREF(mapping);
    if (result == 0) {
        out->made = true;
    }
    return result;
}

/* From an iterable of pairs. */
static PyObject *
guest_from_pairs(module_state *state, PyObject *pairs, const char *name,
                 const char *wanted, pair_function fill, PyObject *options)
{
    PyObject *list = PySequence_Tuple(pairs);
    if (list == NULL) {
        return NULL;
    }
    size_t count = (size_t)PyTuple_Size(list), done = 0;
    struct region *regions = PyMem_Calloc(count + 1, sizeof(*regions));
    if (regions == NULL) {
        Py_DECREF(list);
        return PyErr_NoMemory();
    }
    for (; done < count; done++) {
        PyObject *pair = PyTuple_GetItem(list, (Py_ssize_t)done);
        if (!PyTuple_Check(pair) || PyTuple_Size(pair) != 2) {
            if (PyTuple_Check(pair)) {
                PyErr_Format(PyExc_TypeError, "%s must be %s, not %zd items", name,
                             wanted, PyTuple_Size(pair));
            }
            else {
                errors_wrong_type(name, wanted, pair);
            }
            break;
        }
        if (fill(&regions[done], state, PyTuple_GetItem(pair, 0),
                 PyTuple_GetItem(pair, 1), options)
            < 0) {
            break;
        }
    }
    Py_DECREF(list);
    if (done == count) {
        return guest_make(state, regions, count);
    }
    while (done > 0) {
        region_drop(&regions[--done]);
    }
    PyMem_Free(regions);
    return NULL;
}

PyObject *
guest_new(PyTypeObject *cls, PyObject *args, PyObject *kwargs)
{
    static const char *const names[] = {"regions", NULL};
    static const struct args_spec spec = {
        .function = "GuestMemory", .names = names, .required = 1};
    module_state *state = PyType_GetModuleState(cls);
    PyObject *given[1];
    if (state == NULL || args_named_tuple(&spec, args, kwargs, given) < 0) {
        return NULL;
    }
    return guest_from_pairs(state, given[0], "a region", "a tuple (address, memory)",
                            pair_of_memory, NULL);
}

const char guest_from_ranges_doc[] = PyDoc_STR(
    "from_ranges($type, ranges, *, track_dirty=False)\n--\n\n"
    "Map anonymous memory for each (address, size) of an iterable.\n"
    "\n"
    "close() closes these mappings. With track_dirty they remember which pages are\n"
    "written, for take_dirty(). The errors are those of GuestMemory() and of\n"
    "MemoryMapping().");

PyObject *
guest_from_ranges(PyObject *cls, PyObject *const *args, Py_ssize_t nargs,
                  PyObject *kwnames)
{
    static const char *const names[] = {"ranges", "track_dirty", NULL};
    static const struct args_spec spec = {
        .function = "from_ranges", .names = names, .required = 1, .keywords = 1};
    module_state *state = PyType_GetModuleState((PyTypeObject *)cls);
    PyObject *given[2];
    if (state == NULL || args_named(&spec, args, nargs, kwnames, given) < 0) {
        return NULL;
    }
    PyObject *options =
        given[1] == NULL ? NULL : Py_BuildValue("{sO}", names[1], given[1]);
    if (options == NULL && given[1] != NULL) {
        return NULL;
    }
    PyObject *result = guest_from_pairs(
        state, given[0], "a range", "a tuple (address, size)", pair_of_range, options);
    Py_XDECREF(options);
    return result;
}

/* The regions but for one (NULL: all), and room for one more. They borrow from where ours
 * do: what those were made from may have been given back since. */
static struct region *
guest_copy_regions(guest_object *self, struct region *without)
{
    if (guest_begin(self, LONG) < 0) {
        return NULL;
    }
    struct region *regions = PyMem_Calloc(self->count + 1, sizeof(*regions));
    size_t done = 0;
    if (regions == NULL) {
        guest_end(self, LONG);
        PyErr_NoMemory();
        return NULL;
    }
    for (size_t i = 0; i < self->count; i++) {
        struct region *region = &self->regions[i];
        if (region == without) {
            continue;
        }
        region_borrow(&regions[done], &region->part.span, region->start,
                      region->memory);
        done++;
    }
    guest_end(self, LONG);
    return regions;
}

const char guest_with_region_doc[] = PyDoc_STR(
    "with_region($self, addr, memory, /)\n--\n\n"
    "Return a new GuestMemory that has this region, too (hot plug).\n"
    "\n"
    "This one stays as it is, for those who have it. The errors are those of\n"
    "GuestMemory().");

PyObject *
guest_with_region(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    if (args_count(nargs, 2, 2, "with_region", "addr, memory") < 0) {
        return NULL;
    }
    struct region *regions = guest_copy_regions(self, NULL);
    if (regions == NULL) {
        return NULL;
    }
    if (pair_of_memory(&regions[self->count], self->state, args[0], args[1], NULL)
        < 0) {
        for (size_t i = 0; i < self->count; i++) {
            region_drop(&regions[i]);
        }
        PyMem_Free(regions);
        return NULL;
    }
    return guest_make(self->state, regions, self->count + 1);
}

const char guest_without_region_doc[] = PyDoc_STR(
    "without_region($self, addr, size, /)\n--\n\n"
    "Return a new GuestMemory without the region at addr of this size.\n"
    "\n"
    "This one stays as it is. InvalidGuestAddressError where no region begins\n"
    "at addr, InvalidRegionError where it has another size.");

PyObject *
guest_without_region(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    uint64_t addr, size;
    if (args_count(nargs, 2, 2, "without_region", "addr, size") < 0
        || args_u64(args[0], "addr", &addr) < 0
        || args_u64(args[1], "size", &size) < 0) {
        return NULL;
    }
    if (hold_is_closed(&self->hold)) {
        memory_say_closed(self->state, A_REGION);
        return NULL;
    }
    struct region *region = guest_find(self, addr);
    if (region == NULL || region->start != addr) {
        return errors_invalid_guest_address(self->state, addr);
    }
    if (region->size != size) {
        return errors_invalid_region(self->state, addr, size, &region->size);
    }
    struct region *regions = guest_copy_regions(self, region);
    return regions == NULL ? NULL : guest_make(self->state, regions, self->count - 1);
}
