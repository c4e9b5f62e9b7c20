/* class VolatileSlice(VolatileMemory):
 *     @classmethod
 *     def from_buffer(cls, obj): ...
 *     def offset(self, count): return self.get_slice(count, self.size - count)
 *     def copy_to(self, buf): ...
 *     def copy_from(self, buf): ...
 *     def copy_to_volatile_slice(self, dst): ...
 *     def release(self): ...
 *
 * A borrowed range. Its lender is never another slice: a slice of a slice borrows
 * from what that one borrows.
 */
#include "native.h"

#include "args.h"
#include "buffer_owner.h"
#include "volatile_memory.h"

typedef struct {
    memory_object base;
    hold hold;        /* its calls and exported buffers */
    PyObject *module; /* strong, where the collector tracks the slice; else NULL */
} slice_object;

PyObject *
slice_new(const struct span *memory, size_t offset, size_t size)
{
    struct span span = span_part(memory, offset, size);
    /* Borrow first: making an object may run the garbage collector, and with it
     * Python code that closes the memory. */
    lender_borrow(span.lender, BORROW_SLICE);
    slice_object *self = PyObject_GC_New(slice_object, span.state->slice_type);
    if (self == NULL) {
        lender_give_back(&span.lender, BORROW_SLICE);
        return NULL;
    }
    atomic_init(&self->hold, HOLD_OWNED);
    memory_start(&self->base, &span, &self->hold, A_SLICE);
    /* Only a buffer owner can lead to a cycle. Measured against memoryview[a:b],
     * creation is 0.60 untracked, 0.62 tracked. */
    self->module =
        span.lender.buffer_owner != NULL ? Py_NewRef(span.state->module) : NULL;
    if (self->module != NULL) {
        PyObject_GC_Track((PyObject *)self);
    }
    return (PyObject *)self;
}

static int
slice_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(memory_of(op)->span.lender.buffer_owner);
    Py_VISIT(((slice_object *)op)->module);
    return 0;
}

static void
slice_dealloc(PyObject *op)
{
    memory_object *self = memory_of(op);
    PyTypeObject *type = Py_TYPE(op);
    PyObject *module = ((slice_object *)op)->module;
    if (module != NULL) {
        PyObject_GC_UnTrack(op);
    }
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    if (hold_abandon(self->hold)) {
        lender_give_back(&self->span.lender, BORROW_SLICE);
    }
    PyObject_GC_Del(op);
    Py_DECREF(type);
    Py_XDECREF(module);
}

PyDoc_STRVAR(
    slice_from_buffer_doc,
    "from_buffer($type, obj)\n--\n\n"
    "Return a slice of all of obj's buffer: volatile access to any memory.\n"
    "\n"
    "obj exports a writable contiguous buffer (bytearray, mmap, NumPy array,\n"
    "ctypes instance), which stays exported while the slice, a slice of it or\n"
    "a ref lives. BufferError where it is read-only or not contiguous.\n"
    "Nobody knows whose memory it is, perhaps a file's: so its pages are taken to be\n"
    "ones that may be missing, with what from_fd_offset() says of that and of SIGBUS.\n"
    "ctypes.resize() frees an exported buffer: do not call it on obj.");

static const char *const slice_from_buffer_names[] = {"obj", NULL};
static const struct args_spec slice_from_buffer_spec = {
    .function = "from_buffer", .names = slice_from_buffer_names, .required = 1};

static PyObject *
slice_from_buffer(PyObject *cls, PyObject *const *args, Py_ssize_t nargs,
                  PyObject *kwnames)
{
    module_state *state = PyType_GetModuleState((PyTypeObject *)cls);
    PyObject *exporter;
    struct span span;
    if (state == NULL
        || args_named(&slice_from_buffer_spec, args, nargs, kwnames, &exporter) < 0) {
        return NULL;
    }
    if (buffer_owner_new(state, exporter, &span) < 0) {
        return NULL;
    }
    PyObject *result = slice_new(&span, 0, span.size);
    Py_DECREF(span.lender.buffer_owner);
    return result;
}

PyDoc_STRVAR(slice_offset_doc,
             "offset($self, count, /)\n--\n\n"
             "Return the slice without its first count bytes.\n"
             "\n"
             "OutOfBoundsError (addr is count) where count passes the size.");

static PyObject *
slice_offset(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    uint64_t count;
    if (args_count(nargs, 1, 1, "offset", "count") < 0
        || args_u64(args[0], "count", &count) < 0 || memory_enter(self, SHORT) < 0) {
        return NULL;
    }
    PyObject *result;
    if (count > self->span.size) {
        result = errors_out_of_bounds(self->span.state, count, self->span.size);
    }
    else {
        result = slice_new(&self->span, count, self->span.size - count);
    }
    memory_leave(self, SHORT);
    return result;
}

static PyObject *
slice_copy(PyObject *op, PyObject *const *args, Py_ssize_t nargs, bool from)
{
    memory_object *self = memory_of(op);
    Py_buffer view;
    if (args_count(nargs, 1, 1, from ? "copy_from" : "copy_to", "buf") < 0
        || args_buffer(args[0], "buf", &view, !from) < 0) {
        return NULL;
    }
    size_t count = Py_MIN((size_t)view.len, self->span.size);
    enum stay stay = memory_stay_of_copy(count);
    int failed = memory_enter(self, stay);
    if (!failed) {
        failed = memory_copy(&self->span, 0, args[0], &view, 0, count, from);
        memory_leave(self, stay);
    }
    PyBuffer_Release(&view);
    return failed ? NULL : PyLong_FromSize_t(count);
}

PyDoc_STRVAR(slice_copy_to_doc,
             "copy_to($self, buf, /)\n--\n\n"
             "Copy to a writable buffer; return the count of bytes.\n"
             "\n"
             "The count is the smaller of the two lengths in bytes. BufferError where\n"
             "buf is read-only or not contiguous, ClosedError once released.");

static PyObject *
slice_copy_to(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return slice_copy(op, args, nargs, false);
}

PyDoc_STRVAR(slice_copy_from_doc,
             "copy_from($self, buf, /)\n--\n\n"
             "Copy from a buffer; return the count of bytes.\n"
             "\n"
             "The count is the smaller of the two lengths in bytes. BufferError where\n"
             "buf is not contiguous, ClosedError once released.");

static PyObject *
slice_copy_from(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return slice_copy(op, args, nargs, true);
}

PyDoc_STRVAR(
    slice_copy_to_volatile_slice_doc,
    "copy_to_volatile_slice($self, dst, /)\n--\n\n"
    "Copy to another VolatileSlice; return the count of bytes.\n"
    "\n"
    "The count is the smaller of the two sizes. The two may overlap (as memmove).\n"
    "Aligned fields of up to 8 bytes of dst are not torn, and those of the source\n"
    "neither where the two addresses agree modulo 8. ClosedError once either slice\n"
    "was released, TypeError where dst is no VolatileSlice. Where a page is missing,\n"
    "ReadFromMemoryError with an offset in this slice, or WriteToMemoryError with one\n"
    "in dst.");

static PyObject *
slice_copy_to_volatile_slice(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    if (args_count(nargs, 1, 1, "copy_to_volatile_slice", "dst") < 0) {
        return NULL;
    }
    if (!Py_IS_TYPE(args[0], self->span.state->slice_type)) {
        return errors_wrong_type("dst", "a VolatileSlice", args[0]);
    }
    memory_object *dst = memory_of(args[0]);
    size_t count = Py_MIN(self->span.size, dst->span.size);
    enum stay stay = memory_stay_of_copy(count);
    if (memory_enter(self, stay) < 0) {
        return NULL;
    }
    if (memory_enter(dst, stay) < 0) {
        memory_leave(self, stay);
        return NULL;
    }
    int failed = span_copy(&dst->span, 0, &self->span, 0, count);
    memory_leave(dst, stay);
    memory_leave(self, stay);
    return failed ? NULL : PyLong_FromSize_t(count);
}

PyDoc_STRVAR(
    slice_release_doc,
    "release($self, /)\n--\n\n"
    "Give the borrow back at once.\n"
    "\n"
    "Every access is then a ClosedError; slices and refs made from this one\n"
    "go on. BufferError while a buffer of it is exported or a call is inside:\n"
    "nothing has changed then. Releasing twice does nothing.");

static PyObject *
slice_release(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    return args_count(nargs, 0, 0, "release", "") < 0 ? NULL
                                                      : memory_close(memory_of(op));
}

static PyMethodDef slice_methods[] = {
    {"from_buffer", (PyCFunction)(void (*)(void))slice_from_buffer,
     METH_FASTCALL | METH_KEYWORDS | METH_CLASS, slice_from_buffer_doc},
    {"offset", FASTCALL(slice_offset), slice_offset_doc},
    {"copy_to", FASTCALL(slice_copy_to), slice_copy_to_doc},
    {"copy_from", FASTCALL(slice_copy_from), slice_copy_from_doc},
    {"copy_to_volatile_slice", FASTCALL(slice_copy_to_volatile_slice),
     slice_copy_to_volatile_slice_doc},
    {"read_from", FASTCALL(transfer_read_from), transfer_read_from_doc},
    {"write_to", FASTCALL(transfer_write_to), transfer_write_to_doc},
    {"release", FASTCALL(slice_release), slice_release_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(slice_doc,
             "A range of a MemoryMapping, or of another object's buffer, borrowed.\n"
             "\n"
             "Made by get_slice(), offset() and from_buffer(). It keeps the memory\n"
             "mapped for as long as it lives, or until release(); it is a context\n"
             "manager that releases. All offsets count from its own start.");

static PyType_Slot slice_slots[] = {
    {Py_tp_doc, SLOT(slice_doc)},
    {Py_tp_dealloc, SLOT(slice_dealloc)},
    {Py_tp_traverse, SLOT(slice_traverse)},
    {Py_tp_methods, slice_methods},
    {0, NULL},
};

static PyType_Spec slice_spec = {
    .name = "guestmem.VolatileSlice",
    .basicsize = sizeof(slice_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slice_slots,
};

int
slice_init(PyObject *module, module_state *state)
{
    state->slice_type = native_add_type(module, &slice_spec, state->memory_type, true);
    return state->slice_type == NULL ? -1 : 0;
}
