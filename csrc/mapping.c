/* class MemoryMapping(VolatileMemory):
 *     dirty: DirtyBitmap | None
 *     def __new__(cls, size, *, track_dirty=False): ...
 *     @classmethod
 *     def from_fd(cls, fd, size, *, track_dirty=False): ...
 *     @classmethod
 *     def from_fd_offset(cls, fd, size, offset, *, track_dirty=False): ...
 *     def close(self): ...
 *
 * The owner of pages. The pages themselves are a record of their own (pages.h),
 * because slices and refs outlive the object. It refers to no Python object but
 * its type, so it needs no garbage collection.
 */
#include "native.h"

#include "args.h"
#include "bitmap.h"
#include "volatile_memory.h"


/* The object for pages that were just mapped; they are unmapped where it fails. */
static PyObject *
mapping_from_pages(module_state *state, const struct os_mapping *mapped,
                   bool track_dirty)
{
    PyObject *dirty =
        track_dirty ? bitmap_new(state, mapped->addr, mapped->size) : NULL;
    struct pages *pages =
        track_dirty && dirty == NULL ? NULL : pages_new(mapped, dirty);
    if (pages == NULL) {
        Py_XDECREF(dirty);
        pages_unmap_or_report(mapped);
        return NULL;
    }
    memory_object *self = PyObject_New(memory_object, state->mapping_type);
    if (self == NULL) {
        pages_disown(pages);
        return NULL;
    }
    struct span span = {.state = state,
                        .addr = mapped->addr,
                        .size = mapped->size,
                        .lender = {.pages = pages},
                        .dirty = dirty == NULL ? NULL : bitmap_map(dirty),
                        .can_fault = mapped->can_fault,
                        .is_plain = !mapped->can_fault && dirty == NULL};
    memory_start(self, &span, &pages->hold, A_MAPPING);
    return (PyObject *)self;
}

/* The memory works all the same when it could not be kept out of dumps; who wants
 * an error instead turns the warning into one, and gets no mapping. */
static int
mapping_warn_of_dumps(module_state *state, int err)
{
    PyObject *reason = errors_strerror(err);
    if (reason == NULL) {
        return -1;
    }
    int result = PyErr_WarnFormat(
        state->CoreDumpWarning, 1,
        "guest memory will be part of core dumps: madvise(MADV_DONTDUMP): %U", reason);
    Py_DECREF(reason);
    return result;
}

static PyObject *
mapping_create(module_state *state, bool anonymous, int fd, uint64_t offset,
               uint64_t size, bool track_dirty)
{
    struct os_mapping mapped;
    int err, dump_err = 0;
    Py_BEGIN_ALLOW_THREADS
    err = anonymous ? os_map_anonymous(size, &mapped)
                    : os_map_fd(fd, (int64_t)offset, size, &mapped);
    if (err == 0) {
        dump_err = os_map_dont_dump(&mapped);
    }
    Py_END_ALLOW_THREADS
    if (err != 0) {
        return errors_system_call(state, err, "mmap");
    }
    if (mapped.can_fault && span_take_signal(state) < 0) {
        pages_unmap_or_report(&mapped);
        return NULL;
    }
    PyObject *self = mapping_from_pages(state, &mapped, track_dirty);
    if (self != NULL && dump_err != 0 && mapping_warn_of_dumps(state, dump_err) < 0) {
        Py_CLEAR(self);
    }
    return self;
}

/* An argument that was given, perhaps: -1 where its truth cannot be told. */
static int
mapping_flag(PyObject *given)
{
    return given == NULL ? 0 : PyObject_IsTrue(given);
}

static const char *const mapping_new_names[] = {"size", "track_dirty", NULL};
static const struct args_spec mapping_new_spec = {.function = "MemoryMapping",
                                                  .names = mapping_new_names,
                                                  .required = 1,
                                                  .keywords = 1};

static PyObject *
mapping_new(PyTypeObject *cls, PyObject *args, PyObject *kwargs)
{
    module_state *state = PyType_GetModuleState(cls);
    PyObject *given[2];
    uint64_t size;
    int track_dirty;
    if (state == NULL || args_named_tuple(&mapping_new_spec, args, kwargs, given) < 0
        || args_u64(given[0], "size", &size) < 0
        || (track_dirty = mapping_flag(given[1])) < 0) {
        return NULL;
    }
    return mapping_create(state, true, -1, 0, size, track_dirty);
}

/* An offset in a file: an int that fits off_t, or InvalidOffsetError. */
static int
mapping_file_offset(module_state *state, PyObject *arg, uint64_t *out)
{
    PyObject *number = args_index(arg, "offset");
    if (number == NULL) {
        return -1;
    }
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (overflow != 0 || value < 0) {
        errors_invalid_offset(state, number);
        Py_DECREF(number);
        return -1;
    }
    Py_DECREF(number);
    *out = (uint64_t)value;
    return 0;
}

PyDoc_STRVAR(mapping_from_fd_doc,
             "from_fd($type, fd, size, *, track_dirty=False)\n--\n\n"
             "Map the first size bytes of a file: shared, readable and writable.\n"
             "\n"
             "As from_fd_offset(fd, size, 0), which tells of the errors and of what\n"
             "happens beyond the end of the file.");

/* given: fd, size, track_dirty, offset; the last two may be NULL. */
static PyObject *
mapping_from_fd_parsed(PyObject *cls, PyObject *const *given)
{
    module_state *state = PyType_GetModuleState((PyTypeObject *)cls);
    uint64_t size, offset = 0;
    int fd, track_dirty;
    /* The offset before the fd: a bad one leaves the fd untouched. */
    if (state == NULL || args_u64(given[1], "size", &size) < 0
        || (given[3] != NULL && mapping_file_offset(state, given[3], &offset) < 0)
        || (track_dirty = mapping_flag(given[2])) < 0
        || args_fd(given[0], "fd", &fd) < 0) {
        return NULL;
    }
    return mapping_create(state, false, fd, offset, size, track_dirty);
}

static PyObject *
mapping_from_fd(PyObject *cls, PyObject *const *args, Py_ssize_t nargs,
                PyObject *kwnames)
{
    static const char *const names[] = {"fd", "size", "track_dirty", NULL};
    static const struct args_spec spec = {
        .function = "from_fd", .names = names, .required = 2, .keywords = 1};
    PyObject *given[4] = {NULL, NULL, NULL, NULL};
    if (args_named(&spec, args, nargs, kwnames, given) < 0) {
        return NULL;
    }
    return mapping_from_fd_parsed(cls, given);
}

PyDoc_STRVAR(
    mapping_from_fd_offset_doc,
    "from_fd_offset($type, fd, size, offset, *, track_dirty=False)\n--\n\n"
    "Map size bytes of a file from offset on: shared, readable and writable.\n"
    "\n"
    "fd is an int or an object with fileno(); the mapping outlives it. The size of\n"
    "the file is not looked at: what touches a page beyond its end, or one that the\n"
    "file system has no room for, is ReadFromMemoryError or WriteToMemoryError. For\n"
    "that SIGBUS is handled from now on; what is not ours goes on to whoever handled\n"
    "it before. (Somebody who takes it later and does not pass it on, as\n"
    "signal.signal() and faulthandler.disable() do, has it until the next call of\n"
    "this or of VolatileSlice.from_buffer().)\n"
    "\n"
    "The pages are kept out of core dumps; where that fails, CoreDumpWarning.\n"
    "\n"
    "InvalidOffsetError where offset does not fit off_t. SystemCallFailedError for\n"
    "what mmap(2) refuses: EBADF, EINVAL for size 0 or an offset that is not a\n"
    "multiple of the page size, EACCES, ENODEV, ENOMEM.");

static PyObject *
mapping_from_fd_offset(PyObject *cls, PyObject *const *args, Py_ssize_t nargs,
                       PyObject *kwnames)
{
    static const char *const names[] = {"fd", "size", "offset", "track_dirty", NULL};
    static const struct args_spec spec = {
        .function = "from_fd_offset", .names = names, .required = 3, .keywords = 1};
    PyObject *given[4];
    if (args_named(&spec, args, nargs, kwnames, given) < 0) {
        return NULL;
    }
    PyObject *ordered[4] = {given[0], given[1], given[3], given[2]};
    return mapping_from_fd_parsed(cls, ordered);
}

PyDoc_STRVAR(
    mapping_close_doc,
    "close($self, /)\n--\n\n"
    "Unmap the pages at once.\n"
    "\n"
    "Afterwards every access and as_ptr() is a ClosedError; size and len() keep\n"
    "their value. BufferError while slices, refs or exported buffers live or a call\n"
    "in another thread is inside: its text counts them, and nothing has changed.\n"
    "Closing twice does nothing.");

static PyObject *
mapping_close(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    return args_count(nargs, 0, 0, "close", "") < 0 ? NULL
                                                    : memory_close(memory_of(op));
}

static void
mapping_dealloc(PyObject *op)
{
    memory_object *self = memory_of(op);
    PyTypeObject *type = Py_TYPE(op);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    pages_disown(self->span.lender.pages);
    PyObject_Free(op);
    Py_DECREF(type);
}

static PyObject *
mapping_get_dirty(PyObject *op, void *Py_UNUSED(closure))
{
    PyObject *dirty = memory_of(op)->span.lender.pages->dirty;
    return Py_NewRef(dirty == NULL ? Py_None : dirty);
}

static PyGetSetDef mapping_getset[] = {
    {"dirty", mapping_get_dirty, NULL,
     PyDoc_STR("The DirtyBitmap, or None where the mapping was made without\n"
               "track_dirty. It stays after close()."),
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef mapping_methods[] = {
    {"from_fd", (PyCFunction)(void (*)(void))mapping_from_fd,
     METH_FASTCALL | METH_KEYWORDS | METH_CLASS, mapping_from_fd_doc},
    {"from_fd_offset", (PyCFunction)(void (*)(void))mapping_from_fd_offset,
     METH_FASTCALL | METH_KEYWORDS | METH_CLASS, mapping_from_fd_offset_doc},
    {"close", FASTCALL(mapping_close), mapping_close_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(
    mapping_doc,
    "MemoryMapping(size, *, track_dirty=False)\n--\n\n"
    "Memory of its own: size bytes, anonymous, shared and zero-filled.\n"
    "\n"
    "size is in bytes and need not be a multiple of the page size. No swap space is\n"
    "reserved (MAP_NORESERVE), and the pages are kept out of core dumps\n"
    "(MADV_DONTDUMP); where that fails, CoreDumpWarning. SystemCallFailedError for\n"
    "what mmap(2) refuses: EINVAL for size 0, ENOMEM.\n"
    "\n"
    "With track_dirty, what is written through guestmem is marked in dirty.\n"
    "\n"
    "The pages are unmapped when the mapping and all that borrow from it are gone,\n"
    "or at once by close(); it is a context manager that closes.");

static PyType_Slot mapping_slots[] = {
    {Py_tp_doc, SLOT(mapping_doc)},         {Py_tp_new, SLOT(mapping_new)},
    {Py_tp_dealloc, SLOT(mapping_dealloc)}, {Py_tp_methods, mapping_methods},
    {Py_tp_getset, mapping_getset},         {0, NULL},
};

static PyType_Spec mapping_spec = {
    .name = "guestmem.MemoryMapping",
    .basicsize = sizeof(memory_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = mapping_slots,
};

int
mapping_init(PyObject *module, module_state *state)
{
    state->mapping_type =
        native_add_type(module, &mapping_spec, state->memory_type, true);
    return state->mapping_type == NULL ? -1 : 0;
}
