/* def preadv(fd, memories, offset=None, /): ...
 * def pwritev(fd, memories, offset=None, /): ...
 *
 * One system call for a request that is scattered over memory.
 */
#include "native.h"

#include "args.h"
#include "os_file.h"
#include "stream.h"
#include "volatile_memory.h"

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
    uint64_t size;      /* their bytes */
    struct iovec *pieces;
    const struct span **spans;
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
        const struct span *span = &memory_of(memory)->span;
        self->entered++;
        self->size += span->size;
        self->spans[i] = span;
        self->pieces[i] = (struct iovec){span->addr, span->size};
    }
    return 0;
}

static int
vectored_run(const struct vectored *self, size_t *moved)
{
    unsigned tries = 0;
    const struct stream_call call = {.state = self->state,
                                     .reading = self->reading,
                                     .numbered = true,
                                     .spans = self->spans,
                                     .pieces = self->pieces,
                                     .count = (size_t)self->count,
                                     .tries = &tries};
    int err, pieces = (int)self->count;
    do {
        Py_BEGIN_ALLOW_THREADS
        err =
            self->reading
                ? os_file_readv(self->fd, self->pieces, pieces, self->position, moved)
                : os_file_writev(self->fd, self->pieces, pieces, self->position, moved);
        Py_END_ALLOW_THREADS
        if (stream_settle(&call, err, *moved) < 0
            || (err != 0 && PyErr_CheckSignals() < 0)) {
            return -1;
        }
    } while (err != 0);
    return 0;
}

/* -1 with an exception; what self has come to hold is the caller's to give back, in any
 * case. */
static int
vectored_do(struct vectored *self, const uint64_t *position, size_t *moved)
{
    size_t count = (size_t)self->count + 1;
    self->pieces = PyMem_Calloc(count, sizeof(*self->pieces));
    self->spans = (const struct span **)PyMem_Calloc(count, sizeof(*self->spans));
    if (self->pieces == NULL || self->spans == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (vectored_enter(self) < 0
        || (position != NULL
            && stream_check_offset(self->state, *position, self->size) < 0)) {
        return -1;
    }
    self->position = position != NULL ? (int64_t)*position : OS_FILE_POSITION;
    return vectored_run(self, moved);
}

static PyObject *
vectored_call(PyObject *module, PyObject *const *args, Py_ssize_t nargs, bool reading)
{
    struct vectored self = {.state = PyModule_GetState(module), .reading = reading};
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
    if ((self.memories = PySequence_Tuple(args[1])) == NULL) {
        return NULL;
    }
    self.count = Py_MIN(PyTuple_Size(self.memories), PIECES_AT_MOST);
    int failed = vectored_do(&self, positioned ? &position : NULL, &moved);
    while (self.entered > 0) {
        memory_leave(vectored_memory(&self, --self.entered), LONG);
    }
    PyMem_Free(self.pieces);
    PyMem_Free((void *)self.spans);
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
    "ReadFromSourceError where the file fails or would block, WriteToMemoryError where\n"
    "a page of a piece is missing: its piece is that one's index, its offset one in it.\n"
    "InvalidOffsetError where offset + the size of all pieces does not fit off_t.");

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
    "where a page of a piece is missing: its piece is that one's index, its offset one\n"
    "in it. InvalidOffsetError where offset + the size of all pieces does not fit off_t.");

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
