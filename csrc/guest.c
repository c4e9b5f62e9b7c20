/* class GuestMemory:
 *     regions: tuple[GuestRegion, ...]
 *     num_regions: int; size: int; last_addr: int; closed: bool
 *     def __new__(cls, regions): ...
 *     @classmethod
 *     def from_ranges(cls, ranges, *, track_dirty=False): ...
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

static int
guest_traverse(PyObject *op, visitproc visit, void *arg)
{
    guest_object *self = guest_of(op);
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->module);
    for (size_t i = 0; i < self->count; i++) {
        Py_VISIT(self->regions[i].part.span.lender.buffer_owner);
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

const char guest_close_doc[] = PyDoc_STR(
    "close($self, /)\n--\n\n"
    "Give the borrowed memory back, and close the mappings of from_ranges().\n"
    "\n"
    "Every access is then a ClosedError, and so are regions and find_region().\n"
    "BufferError while a call is inside, or\n"
    "slices, refs or exported buffers of mappings that it made live: nothing\n"
    "has changed then. What borrows from other memory goes on. Closing twice\n"
    "does nothing.");

/* What it was made from is not kept either: a slice would go on borrowing. */
static void
region_give_back(struct region *region)
{
    lender_give_back(&region->part.span.lender, BORROW_SLICE);
    if (!region->made) {
        Py_CLEAR(region->memory);
    }
}

void
guest_vacate(hold *word)
{
    guest_object *self =
        (guest_object *)((uintptr_t)word - offsetof(guest_object, hold));
    for (size_t i = 0; i < self->count; i++) {
        region_give_back(&self->regions[i]);
    }
}

static void
guest_busy(struct region *region, const char *holders)
{
    char where[64] = "it";
    if (region != NULL) {
        PyOS_snprintf(where, sizeof(where), "its region at %#llx",
                      (unsigned long long)region->start);
    }
    PyErr_Format(PyExc_BufferError, "cannot close the guest memory: %s is held by %s",
                 where, holders);
}

/* The mapping that close() closes, or NULL. */
static memory_object *
region_made(struct region *region)
{
    return region->made ? memory_of(region->memory) : NULL;
}

/* Closes the guest's word and those of its own mappings, or none of them: no Python code
 * runs in between, and without a GIL others wait. 1; 0 where it has been closed already;
 * -1 with BufferError. */
static int
guest_shut(guest_object *self)
{
    uint64_t seen;
    char holders[HOLDERS_TEXT];
    if (!hold_begin_close(&self->hold, 0, &seen)) {
        if (seen & HOLD_CLOSED) {
            return 0;
        }
        memory_holders(&self->regions[0].part, seen, 0, holders);
        guest_busy(NULL, holders);
        return -1;
    }
    struct region *busy = NULL;
    size_t begun = 0;
    for (; busy == NULL && begun < self->count; begun++) {
        memory_object *mapping = region_made(&self->regions[begun]);
        /* One that a block has left by an exception is closed, and waits for us. */
        if (mapping != NULL && !hold_begin_close(mapping->hold, HOLD_BORROW, &seen)
            && !(seen & HOLD_CLOSED)) {
            busy = &self->regions[begun];
            memory_holders(mapping, seen, 1, holders);
        }
    }
    for (size_t i = 0; i < begun; i++) {
        memory_object *mapping = region_made(&self->regions[i]);
        if (mapping != NULL && hold_read(mapping->hold) & HOLD_CLOSING) {
            hold_end_close(mapping->hold, busy == NULL);
        }
    }
    hold_end_close(&self->hold, busy == NULL);
    if (busy != NULL) {
        guest_busy(busy, holders);
        return -1;
    }
    return 1;
}

PyObject *
guest_close(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    if (args_count(nargs, 0, 0, "close", "") < 0) {
        return NULL;
    }
    int shut = guest_shut(self), err = 0;
    if (shut < 0) {
        return NULL;
    }
    for (size_t i = 0; shut && i < self->count; i++) {
        struct region *region = &self->regions[i];
        memory_object *mapping = region_made(region);
        /* DONE is ours, because a borrower is left: our own. */
        bool unmap = mapping != NULL && hold_read(mapping->hold) & HOLD_DONE;
        region_give_back(region);
        if (unmap) {
            int failed = pages_unmap(&mapping->span.lender.pages->mapping);
            err = err != 0 ? err : failed;
        }
    }
    return err == 0 ? Py_NewRef(Py_None)
                    : errors_system_call(self->state, err, "munmap");
}

const char guest_enter_doc[] =
    PyDoc_STR("__enter__($self, /)\n--\n\n"
              "Return the object itself; ClosedError once closed.");

PyObject *
guest_enter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    guest_object *self = guest_of(op);
    if (hold_is_closed(&self->hold)) {
        memory_say_closed(self->state, A_REGION);
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
        memory_object *mapping = region_made(&self->regions[i]);
        if (mapping != NULL) {
            memory_abandon(mapping);
        }
    }
    if (hold_abandon(&self->hold)) {
        guest_vacate(&self->hold);
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
                                hold_is_closed(&self->hold) ? " closed" : "");
}

static PyObject *
guest_get_regions(PyObject *op, void *Py_UNUSED(closure))
{
    guest_object *self = guest_of(op);
    if (guest_begin(self, LONG) < 0) {
        return NULL;
    }
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < self->count; i++) {
        PyObject *region = guest_region_object(self->state, &self->regions[i]);
        if (region == NULL || PyList_Append(list, region) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(region);
    }
    guest_end(self, LONG);
    PyObject *result = list == NULL ? NULL : PySequence_Tuple(list);
    Py_XDECREF(list);
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
    const guest_object *self = guest_of(op);
    if (self->count == 0) {
        return PyLong_FromLong(0);
    }
    return args_sum(self->size - 1, 1); /* up to 2**64, which is 0 here */
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
    return PyBool_FromLong(hold_is_closed(&guest_of(op)->hold));
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
    "one passes 2**64, InvalidRegionError where its memory is empty. An access that begins\n"
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
