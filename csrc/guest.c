/* class GuestMemory:
 *     regions: tuple[GuestRegion, ...]
 *     num_regions: int; size: int; last_addr: int; closed: bool
 *     def __new__(cls, regions): ...
 *     @classmethod
 *     def from_ranges(cls, ranges): ...
 *     def find_region(self, addr): ...
 *     def address_in_range(self, addr): ...
 *     def check_range(self, addr, count): ...
 *     def checked_offset(self, addr, n): ...
 *     def get_host_address(self, addr): ...
 *     def with_region(self, addr, memory): ...
 *     def without_region(self, addr, size): ...
 *     def close(self): ...
 *     ...the accessors of guest_access.c
 *
 * A guest's physical address space: memory by guest address, immutable. Each region
 * borrows its memory by a slice that nobody else has, which makes its lifetime, its
 * faults and its threads those of any slice.
 */
#include "native.h"

#include "args.h"
#include "guest.h"

#include <stdlib.h>

static void
region_drop(struct region *region)
{
    Py_XDECREF((PyObject *)region->part);
    Py_XDECREF(region->memory);
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
    memory_of(part)->kind = A_REGION;
    memory_of(part)->span.first = start;
    *self = (struct region){.start = start,
                            .size = whole->span.size,
                            .part = memory_of(part),
                            .memory = Py_NewRef(memory)};
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

static PyObject *
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

static int
guest_traverse(PyObject *op, visitproc visit, void *arg)
{
    guest_object *self = guest_of(op);
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->module);
    for (size_t i = 0; i < self->count; i++) {
        Py_VISIT((PyObject *)self->regions[i].part);
        Py_VISIT(self->regions[i].memory);
    }
    return 0;
}

static void
guest_dealloc(PyObject *op)
{
    guest_object *self = guest_of(op);
    PyTypeObject *type = Py_TYPE(op);
    PyObject *module = self->module;
    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    for (size_t i = 0; i < self->count; i++) {
        region_drop(&self->regions[i]);
    }
    PyMem_Free(self->regions);
    PyMem_Free(self->starts);
    PyMem_Free(self->first);
    PyObject_GC_Del(op);
    Py_DECREF(type);
    Py_DECREF(module);
}

/* Whether a region's memory is used by others than its own slice. */
static bool
region_is_busy(const struct region *region)
{
    uint64_t own = hold_read(region->part->hold) & HOLD_ANYONE;
    if (own != 0 || !region->made) {
        return own != 0;
    }
    uint64_t all = hold_read(memory_of(region->memory)->hold);
    return !(all & HOLD_CLOSED) && (all & HOLD_ANYONE) > HOLD_BORROW;
}

const char guest_close_doc[] = PyDoc_STR(
    "close($self, /)\n--\n\n"
    "Give the borrowed memory back, and close the mappings of from_ranges().\n"
    "\n"
    "Every access is then a ClosedError. BufferError while a call is inside, or\n"
    "slices, refs or exported buffers of mappings that it made live: nothing\n"
    "has changed then. What borrows from other memory goes on. Closing twice\n"
    "does nothing.");

PyObject *
guest_close(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    if (args_count(nargs, 0, 0, "close", "") < 0) {
        return NULL;
    }
    for (size_t i = 0; i < self->count; i++) {
        if (region_is_busy(&self->regions[i])) {
            PyErr_SetString(PyExc_BufferError,
                            "cannot close the guest memory: a region of it is in use");
            return NULL;
        }
    }
    for (size_t i = 0; i < self->count; i++) {
        struct region *region = &self->regions[i];
        PyObject *result = memory_close(region->part);
        if (result != NULL && region->made) {
            Py_DECREF(result);
            result = memory_close(memory_of(region->memory));
        }
        if (result == NULL) {
            return NULL;
        }
        Py_DECREF(result);
    }
    Py_RETURN_NONE;
}

static bool
guest_is_closed(const guest_object *self)
{
    return self->count != 0 && hold_is_closed(self->regions[0].part->hold);
}

const char guest_enter_doc[] =
    PyDoc_STR("__enter__($self, /)\n--\n\n"
              "Return the object itself; ClosedError once closed.");

PyObject *
guest_enter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    guest_object *self = guest_of(op);
    if (guest_is_closed(self)) {
        memory_refuse(self->regions[0].part);
        return NULL;
    }
    return Py_NewRef(op);
}

const char guest_exit_doc[] = PyDoc_STR(
    "__exit__($self, exc_type=None, exc_value=None, traceback=None, /)\n--\n\n"
    "Close; BufferError where memory that it made is borrowed still.\n"
    "\n"
    "When the block ends by an exception, that exception is never replaced: it is\n"
    "closed at once, those who borrow go on, and the last of them gives it back.");

PyObject *
guest_exit(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    if (args_count(nargs, 0, 3, "__exit__", "exc_type, exc_value, traceback") < 0) {
        return NULL;
    }
    if (nargs == 0 || Py_IsNone(args[0])) {
        return guest_close(op, NULL, 0);
    }
    for (size_t i = 0; i < self->count; i++) {
        struct region *region = &self->regions[i];
        memory_abandon(region->part);
        if (region->made) {
            memory_abandon(memory_of(region->memory));
        }
    }
    Py_RETURN_NONE;
}

static PyObject *
guest_repr(PyObject *op)
{
    const guest_object *self = guest_of(op);
    char size[32];
    PyOS_snprintf(size, sizeof(size), "%#llx", (unsigned long long)self->size);
    return PyUnicode_FromFormat("<guestmem.GuestMemory regions=%zu size=%s%s>",
                                self->count, size,
                                guest_is_closed(self) ? " closed" : "");
}

static PyObject *
guest_get_regions(PyObject *op, void *Py_UNUSED(closure))
{
    guest_object *self = guest_of(op);
    PyObject *result = PyTuple_New((Py_ssize_t)self->count);
    for (size_t i = 0; result != NULL && i < self->count; i++) {
        PyObject *region = guest_region_object(self->state, &self->regions[i]);
        if (region == NULL) {
            Py_CLEAR(result);
            break;
        }
        PyTuple_SetItem(result, (Py_ssize_t)i, region);
    }
    return result;
}

static PyObject *
guest_get_num_regions(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(guest_of(op)->count);
}

static PyObject *
guest_get_size(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(guest_of(op)->size);
}

static PyObject *
guest_get_last_addr(PyObject *op, void *Py_UNUSED(closure))
{
    const guest_object *self = guest_of(op);
    if (self->count == 0) {
        Py_RETURN_NONE;
    }
    return PyLong_FromUnsignedLongLong(self->last);
}

static PyObject *
guest_get_closed(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(guest_is_closed(guest_of(op)));
}

static PyGetSetDef guest_getset[] = {
    {"regions", guest_get_regions, NULL,
     PyDoc_STR("The regions by their guest addresses, a tuple of GuestRegion."), NULL},
    {"num_regions", guest_get_num_regions, NULL, PyDoc_STR("How many there are."),
     NULL},
    {"size", guest_get_size, NULL, PyDoc_STR("The bytes of all regions."), NULL},
    {"last_addr", guest_get_last_addr, NULL,
     PyDoc_STR("The last guest address that a region holds; None without regions."),
     NULL},
    {"closed", guest_get_closed, NULL,
     PyDoc_STR("Whether it has been closed: every access is then a ClosedError."),
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef guest_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(guest_object, weakrefs), READONLY,
     NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(
    guest_doc,
    "GuestMemory(regions)\n--\n\n"
    "A guest's physical address space: regions of memory by guest address.\n"
    "\n"
    "regions is an iterable of (address, memory), in any order; memory is a mapping\n"
    "or a slice of one. It is borrowed, and stays mapped. The set never changes:\n"
    "with_region() and without_region() make new ones.\n"
    "\n"
    "The accessors are those of VolatileMemory, with a guest address from 0 to\n"
    "2**64 - 1 instead of the offset. Copies and I/O cross from one region into the\n"
    "next where they adjoin; a scalar is one access where it lies in one region. A\n"
    "range may end at 2**64.\n"
    "\n"
    "MemoryRegionOverlapError where two regions overlap, AddressOverflowError where\n"
    "one passes 2**64, ValueError where its memory is empty. An access that begins\n"
    "in a hole is InvalidGuestAddressError; one that meets a hole later, too, before\n"
    "anything is touched, or stops there if it copies what fits.");

static PyType_Slot guest_slots[] = {
    {Py_tp_doc, SLOT(guest_doc)},
    {Py_tp_new, SLOT(guest_new)},
    {Py_tp_dealloc, SLOT(guest_dealloc)},
    {Py_tp_traverse, SLOT(guest_traverse)},
    {Py_tp_repr, SLOT(guest_repr)},
    {Py_tp_methods, guest_methods},
    {Py_tp_getset, guest_getset},
    {Py_tp_members, guest_members},
    {0, NULL},
};

static PyType_Spec guest_spec = {
    .name = "guestmem.GuestMemory",
    .basicsize = sizeof(guest_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = guest_slots,
};

static PyStructSequence_Field region_fields[] = {
    {"start", PyDoc_STR("The first guest address.")},
    {"size", PyDoc_STR("Its bytes.")},
    {"last_addr", PyDoc_STR("The last guest address: start + size - 1.")},
    {"memory", PyDoc_STR("The VolatileMemory that it was made from.")},
    {NULL, NULL},
};

static PyStructSequence_Desc region_desc = {
    .name = "guestmem.GuestRegion",
    .doc = PyDoc_STR("A region of a GuestMemory: a named tuple."),
    .fields = region_fields,
    .n_in_sequence = 4,
};

int
guest_init(PyObject *module, module_state *state)
{
    state->guest_type = native_add_type(module, &guest_spec, NULL, true);
    if (state->guest_type == NULL) {
        return -1;
    }
    state->guest_region_type = PyStructSequence_NewType(&region_desc);
    if (state->guest_region_type == NULL) {
        return -1;
    }
    return PyModule_AddType(module, state->guest_region_type);
}
