/* def preadv(fd, memories, offset=None, /): ...
 * def pwritev(fd, memories, offset=None, /): ...
 *
 * One system call for a request that is scattered over memory.
 */
#include "native.h"

#include "args.h"
#include "os_file.h"
#include "range.h"
#include "volatile_memory.h"

#include <sys/uio.h>

/* What one system call takes (IOV_MAX): it is short where there are more. */
#define PIECES_AT_MOST 1024

struct vectored {
    module_state *state;
    bool reading;
    int fd;
    int64_t position;
    PyObject *memories; /* a tuple */
    Py_ssize_t count;
    Py_ssize_t entered; /* so many of them */
    struct iovec *pieces;
};

static memory_object *
vectored_memory(const struct vectored *self, Py_ssize_t i)
{
    return memory_of(PyTuple_GetItem(self->memories, i));
}

static int
vectored_enter(struct vectored *self)
{
    for (Py_ssize_t i = 0; i < self->count; i++) {
        PyObject *memory = PyTuple_GetItem(self->memories, i);
        if (!PyObject_TypeCheck(memory, self->state->memory_type)) {
            errors_wrong_type("a piece", "a VolatileMemory", memory);
            return -1;
        }
        if (memory_enter(memory_of(memory), LONG) < 0) {
            return -1;
        }
        self->entered++;
        self->pieces[i] =
            (struct iovec){memory_of(memory)->span.addr, memory_of(memory)->span.size};
    }
    return 0;
}

/* Marks what a read has written. */
static void
vectored_wrote(const struct vectored *self, size_t moved)
{
    for (Py_ssize_t i = 0; i < self->count && moved > 0; i++) {
        const struct span *span = &vectored_memory(self, i)->span;
        size_t here = Py_MIN(moved, span->size);
        span_wrote(span, 0, here);
        moved -= here;
    }
}

/* -1: the kernel found a bad address. Whose page it is says so. */
static int
vectored_bad_address(const struct vectored *self)
{
    for (Py_ssize_t i = 0; i < self->count; i++) {
        const struct span *span = &vectored_memory(self, i)->span;
        size_t at = span->size;
        if (span->can_fault && span->size != 0
            && os_map_first_fault(span->addr, span->size, self->reading, &at)
            && at < span->size) {
            return span_faulted(span, (struct fault){span->addr + at, self->reading});
        }
    }
    return errors_transfer(self->reading ? self->state->ReadFromSourceError
                                         : self->state->WriteToDestinationError,
                           EFAULT, NULL, 0, NULL);
}

static int
vectored_fail(const struct vectored *self, int err)
{
    PyObject *cause = NULL;
    if (err == EFAULT) {
        return vectored_bad_address(self);
    }
    if (err == EAGAIN) {
        cause = PyObject_CallFunction(PyExc_BlockingIOError, "iN", EAGAIN,
                                      errors_strerror(EAGAIN));
        if (cause == NULL) {
            return -1;
        }
    }
    return errors_transfer(self->reading ? self->state->ReadFromSourceError
                                         : self->state->WriteToDestinationError,
                           err, NULL, 0, cause);
}

static int
vectored_run(struct vectored *self, size_t *moved)
{
    int err, pieces = (int)self->count;
    for (;;) {
        Py_BEGIN_ALLOW_THREADS
        err =
            self->reading
                ? os_file_readv(self->fd, self->pieces, pieces, self->position, moved)
                : os_file_writev(self->fd, self->pieces, pieces, self->position, moved);
        Py_END_ALLOW_THREADS
        if (err != EINTR) {
            break;
        }
        if (PyErr_CheckSignals() < 0) {
            return -1;
        }
    }
    if (err != 0) {
        return vectored_fail(self, err);
    }
    if (self->reading) {
        vectored_wrote(self, *moved);
    }
    return 0;
}

static PyObject *
vectored_call(PyObject *module, PyObject *const *args, Py_ssize_t nargs, bool reading)
{
    struct vectored self = {.state = PyModule_GetState(module),
                            .reading = reading,
                            .position = OS_FILE_POSITION};
    uint64_t position = 0;
    size_t moved = 0;
    bool positioned = nargs == 3 && !Py_IsNone(args[2]);
    if (args_count(nargs, 2, 3, reading ? "preadv" : "pwritev",
                   "fd, memories, offset=None")
            < 0
        || (positioned && args_u64(args[2], "offset", &position) < 0)
        || args_fd(args[0], "fd", &self.fd) < 0) {
        return NULL;
    }
    if (positioned && position > INT64_MAX) {
        return errors_invalid_offset_u64(self.state, position, 0);
    }
    if (positioned) {
        self.position = (int64_t)position;
    }
    if ((self.memories = PySequence_Tuple(args[1])) == NULL) {
        return NULL;
    }
    self.count = Py_MIN(PyTuple_Size(self.memories), PIECES_AT_MOST);
    self.pieces = PyMem_Calloc((size_t)self.count + 1, sizeof(*self.pieces));
    int failed = -1;
    if (self.pieces == NULL) {
        PyErr_NoMemory();
    }
    else if (vectored_enter(&self) == 0) {
        failed = vectored_run(&self, &moved);
    }
    while (self.entered > 0) {
        memory_leave(vectored_memory(&self, --self.entered), LONG);
    }
    PyMem_Free(self.pieces);
    Py_DECREF(self.memories);
    return failed ? NULL : PyLong_FromSize_t(moved);
}

PyDoc_STRVAR(
    vectored_preadv_doc,
    "preadv($module, fd, memories, offset=None, /)\n--\n\n"
    "Read from a file descriptor into several pieces of memory; return how many bytes.\n"
    "\n"
    "memories is an iterable of mappings and slices, such as GuestMemory.slices():\n"
    "they are filled one after the other, by one system call, which may be short (and\n"
    "takes at most 1,024 of them). 0 is the end of the file. With offset preadv(2), at\n"
    "that offset of the file, whose position stays; else readv(2). The GIL is\n"
    "released.\n"
    "\n"
    "ReadFromSourceError where the file fails or would block, WriteToMemoryError with\n"
    "an offset in the piece of which a page is missing.");

static PyObject *
vectored_preadv(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return vectored_call(module, args, nargs, true);
}

PyDoc_STRVAR(
    vectored_pwritev_doc,
    "pwritev($module, fd, memories, offset=None, /)\n--\n\n"
    "Write several pieces of memory to a file descriptor; return how many bytes.\n"
    "\n"
    "memories is an iterable of mappings and slices, such as GuestMemory.slices():\n"
    "they are written one after the other, by one system call, which may be short (and\n"
    "takes at most 1,024 of them). With offset pwritev(2), at that offset of the file,\n"
    "whose position stays; else writev(2). The GIL is released.\n"
    "\n"
    "WriteToDestinationError where the file fails or would block, ReadFromMemoryError\n"
    "with an offset in the piece of which a page is missing.");

static PyObject *
vectored_pwritev(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return vectored_call(module, args, nargs, false);
}

static PyMethodDef vectored_functions[] = {
    {"preadv", FASTCALL(vectored_preadv), vectored_preadv_doc},
    {"pwritev", FASTCALL(vectored_pwritev), vectored_pwritev_doc},
    {NULL, NULL, 0, NULL},
};

int
vectored_init(PyObject *module, module_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, vectored_functions);
}
