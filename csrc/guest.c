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
