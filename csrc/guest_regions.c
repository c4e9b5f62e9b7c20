/* Making a GuestMemory: of memory, of ranges, of another one and a region more or less. */
#include "native.h"

#include "args.h"
#include "guest.h"

#include <stdlib.h>

void
region_drop(struct region *region)
{
    Py_XDECREF((PyObject *)region->part);
    Py_XDECREF(region->memory);
    Py_XDECREF(region->dirty);
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
        PyErr_SetString(PyExc_ValueError, "a region of guest memory cannot be empty");
        return -1;
    }
    if (start + (whole->span.size - 1) < start) {
        errors_address_overflow(state, start, whole->span.size);
        return -1;
    }
    if (memory_enter(whole, SHORT) < 0) {
        return -1;
    }
    PyObject *part = slice_new(&whole->span, 0, whole->span.size);
    memory_leave(whole, SHORT);
    if (part == NULL) {
        return -1;
    }
    const struct pages *pages = memory_of(part)->span.lender.pages;
    memory_of(part)->kind = A_REGION;
    memory_of(part)->span.first = start;
    *self = (struct region){.start = start,
                            .size = whole->span.size,
                            .part = memory_of(part),
                            .memory = Py_NewRef(memory),
                            .dirty = pages == NULL ? NULL : Py_XNewRef(pages->dirty)};
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

/* What a pair of the argument says; memory is borrowed from it. */
typedef int (*pair_function)(struct region *out, module_state *state, PyObject *first,
                             PyObject *second);

static int
pair_of_memory(struct region *out, module_state *state, PyObject *first,
               PyObject *second)
{
    uint64_t start;
    return args_u64(first, "the address of a region", &start) < 0
               ? -1
               : region_fill(out, state, start, second);
}

static int
pair_of_range(struct region *out, module_state *state, PyObject *first,
              PyObject *second)
{
    PyObject *mapping =
        PyObject_CallFunctionObjArgs((PyObject *)state->mapping_type, second, NULL);
    int result = mapping == NULL ? -1 : pair_of_memory(out, state, first, mapping);
    Py_XDECREF(mapping);
    if (result == 0) {
        out->made = true;
    }
    return result;
}

/* From an iterable of pairs. */
static PyObject *
guest_from_pairs(module_state *state, PyObject *pairs, const char *name,
                 const char *wanted, pair_function fill)
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
            errors_wrong_type(name, wanted, pair);
            break;
        }
        if (fill(&regions[done], state, PyTuple_GetItem(pair, 0),
                 PyTuple_GetItem(pair, 1))
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
                            pair_of_memory);
}

const char guest_from_ranges_doc[] = PyDoc_STR(
    "from_ranges($type, ranges)\n--\n\n"
    "Map anonymous memory for each (address, size) of an iterable.\n"
    "\n"
    "close() closes these mappings. The errors are those of GuestMemory() and of\n"
    "MemoryMapping().");

PyObject *
guest_from_ranges(PyObject *cls, PyObject *const *args, Py_ssize_t nargs,
                  PyObject *kwnames)
{
    static const char *const names[] = {"ranges", NULL};
    static const struct args_spec spec = {
        .function = "from_ranges", .names = names, .required = 1};
    module_state *state = PyType_GetModuleState((PyTypeObject *)cls);
    PyObject *given[1];
    if (state == NULL || args_named(&spec, args, nargs, kwnames, given) < 0) {
        return NULL;
    }
    return guest_from_pairs(state, given[0], "a range", "a tuple (address, size)",
                            pair_of_range);
}

/* The regions but for one (NULL: all), and room for one more; borrowed memory again. */
static struct region *
guest_copy_regions(guest_object *self, const struct region *without)
{
    struct region *regions = PyMem_Calloc(self->count + 1, sizeof(*regions));
    size_t done = 0;
    if (regions == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (size_t i = 0; i < self->count; i++) {
        const struct region *region = &self->regions[i];
        if (region == without) {
            continue;
        }
        if (region_fill(&regions[done], self->state, region->start, region->memory)
            < 0) {
            while (done > 0) {
                region_drop(&regions[--done]);
            }
            PyMem_Free(regions);
            return NULL;
        }
        done++;
    }
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
    if (pair_of_memory(&regions[self->count], self->state, args[0], args[1]) < 0) {
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
    "at addr, ValueError where it has another size.");

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
    const struct region *region = guest_find(self, addr);
    if (region == NULL || region->start != addr) {
        return errors_invalid_guest_address(self->state, addr);
    }
    if (region->size != size) {
        char text[96];
        PyOS_snprintf(text, sizeof(text),
                      "the region at %#llx has %#llx bytes, not %#llx",
                      (unsigned long long)addr, (unsigned long long)region->size,
                      (unsigned long long)size);
        PyErr_SetString(PyExc_ValueError, text);
        return NULL;
    }
    struct region *regions = guest_copy_regions(self, region);
    return regions == NULL ? NULL : guest_make(self->state, regions, self->count - 1);
}
