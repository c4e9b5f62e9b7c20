/* The methods that make a transfer: read_to_memory() and write_from_memory() of memory
 * and of a guest's, read_from() and write_to() of a slice.
 */
#include "native.h"

#include "args.h"
#include "guest.h"
#include "stream.h"
#include "transfer.h"

/* Region by region. */
static int
transfer_in_guest(struct transfer *self, guest_object *guest, uint64_t addr,
                  uint64_t count)
{
    if (guest_reach_all(guest, addr, count) < 0) {
        return -1;
    }
    if (self->positioned
        && stream_check_offset(self->state, self->position, count) < 0) {
        return -1;
    }
    if (guest_begin(guest, LONG) < 0) {
        return -1;
    }
    int failed = 0;
    while (!failed && count > 0) {
        struct piece piece = guest_piece(guest, addr, count);
        self->memory = piece.part;
        self->mem_offset = piece.offset;
        self->count = piece.count;
        self->done = 0;
        failed = transfer_run(self);
        self->before += piece.count;
        addr += piece.count;
        count -= piece.count;
    }
    guest_end(guest, LONG);
    return failed;
}

static PyObject *
transfer_method(PyObject *op, module_state *state, const struct args_spec *spec,
                PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
                bool reading)
{
    struct transfer self = {.state = state, .reading = reading};
    PyObject *given[4];
    if (args_named(spec, args, nargs, kwnames, given) < 0
        || args_u64(given[0], spec->names[0], &self.mem_offset) < 0
        || args_u64(given[2], "count", &self.count) < 0) {
        return NULL;
    }
    int failed = transfer_open(&self, given[1], given[3]);
    if (!failed && Py_IS_TYPE(op, state->guest_type)) {
        failed = transfer_in_guest(&self, guest_of(op), self.mem_offset, self.count);
    }
    else if (!failed) {
        self.memory = memory_of(op);
        failed = transfer_in_memory(&self);
    }
    Py_XDECREF(self.method);
    return failed ? NULL : Py_NewRef(Py_None);
}

const char transfer_read_to_memory_doc[] = PyDoc_STR(
    "read_to_memory($self, mem_offset, src, count, src_offset=None)\n--\n\n"
    "Read exactly count bytes from src into memory at mem_offset.\n"
    "\n"
    "src is a file descriptor, or a binary file: an object with readinto() or\n"
    "read(). A descriptor is read with read(2) straight into memory; so is an\n"
    "unbuffered io.FileIO. Any other object is asked, because a buffered file\n"
    "holds bytes that its descriptor has given already. With src_offset, pread(2)\n"
    "at that offset of the file; src is then a descriptor or has fileno(), and its\n"
    "position stays.\n"
    "\n"
    "Reads on until count bytes are there, past interrupts (Python's signal\n"
    "handlers run) and the 0x7ffff000 bytes of one system call. What the kernel or\n"
    "an object copies may tear. The GIL is released; count 0 does no I/O. An object\n"
    "gets a view of the memory itself; where a page of that may be missing (all but\n"
    "anonymous mappings) of a buffer of up to 1 MiB in between.\n"
    "\n"
    "InvalidRangeError where the range passes the end: nothing is read then.\n"
    "ReadFromSourceError where src fails or ends early (its cause is then\n"
    "EOFError) or would block (BlockingIOError): transferred says how many bytes\n"
    "had arrived, and they stay in memory. WriteToMemoryError where a page of the\n"
    "memory is gone: the bytes before it have arrived; what an object had given\n"
    "beyond, less than 1 MiB, is lost. What an object raises other than OSError\n"
    "passes untouched.");

PyObject *
transfer_read_to_memory(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                        PyObject *kwnames)
{
    static const char *const names[] = {"mem_offset", "src", "count", "src_offset",
                                        NULL};
    static const struct args_spec spec = {
        .function = "read_to_memory", .names = names, .required = 3};
    return transfer_method(op, memory_of(op)->span.state, &spec, args, nargs, kwnames,
                           true);
}

const char transfer_write_from_memory_doc[] = PyDoc_STR(
    "write_from_memory($self, mem_offset, dst, count, dst_offset=None)\n--\n\n"
    "Write exactly count bytes of memory from mem_offset on to dst.\n"
    "\n"
    "dst is a file descriptor, or a binary file: an object with write(). A\n"
    "descriptor is written with write(2) straight from memory; so is an unbuffered\n"
    "io.FileIO. With dst_offset, pwrite(2) at that offset of the file; dst is then\n"
    "a descriptor or has fileno(), and its position stays (what a buffered file has\n"
    "not flushed yet comes later). Other objects get a view, as of read_to_memory().\n"
    "\n"
    "Writes on until all is written, past interrupts (Python's signal handlers run)\n"
    "and the 0x7ffff000 bytes of one system call. The GIL is released; count 0 does\n"
    "no I/O.\n"
    "\n"
    "InvalidRangeError where the range passes the end: nothing is written then.\n"
    "WriteToDestinationError where dst fails, takes 0 bytes, or would block (its\n"
    "cause is then BlockingIOError): transferred says how many bytes it took.\n"
    "ReadFromMemoryError where a page of the memory is gone: the bytes before it were\n"
    "written. What an object raises other than OSError passes untouched.");

PyObject *
transfer_write_from_memory(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                           PyObject *kwnames)
{
    static const char *const names[] = {"mem_offset", "dst", "count", "dst_offset",
                                        NULL};
    static const struct args_spec spec = {
        .function = "write_from_memory", .names = names, .required = 3};
    return transfer_method(op, memory_of(op)->span.state, &spec, args, nargs, kwnames,
                           false);
}

PyObject *
transfer_read_to_guest(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                       PyObject *kwnames)
{
    static const char *const names[] = {"addr", "src", "count", "src_offset", NULL};
    static const struct args_spec spec = {
        .function = "read_to_memory", .names = names, .required = 3};
    return transfer_method(op, guest_of(op)->state, &spec, args, nargs, kwnames, true);
}

PyObject *
transfer_write_from_guest(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *kwnames)
{
    static const char *const names[] = {"addr", "dst", "count", "dst_offset", NULL};
    static const struct args_spec spec = {
        .function = "write_from_memory", .names = names, .required = 3};
    return transfer_method(op, guest_of(op)->state, &spec, args, nargs, kwnames, false);
}

const char transfer_read_from_doc[] = PyDoc_STR(
    "read_from($self, src, count, /)\n--\n\n"
    "Read up to count bytes from src to the start of the slice; return how many.\n"
    "\n"
    "One system call, or one call of the object: it may be short, and 0 is the end of\n"
    "src. src is what read_to_memory() takes, and the errors are the same;\n"
    "InvalidRangeError where count passes the size. A call that a signal\n"
    "interrupts before anything came is made again.");

const char transfer_write_to_doc[] = PyDoc_STR(
    "write_to($self, dst, count, /)\n--\n\n"
    "Write up to count bytes from the start of the slice to dst; return how many.\n"
    "\n"
    "One system call, or one call of the object: it may be short. dst is what\n"
    "write_from_memory() takes, and the errors are the same; InvalidRangeError where\n"
    "count passes the size. A call that a signal interrupts before anything was\n"
    "taken is made again.");

static PyObject *
transfer_once(PyObject *op, PyObject *const *args, Py_ssize_t nargs, bool reading)
{
    memory_object *memory = memory_of(op);
    struct transfer self = {.state = memory->span.state,
                            .memory = memory,
                            .reading = reading,
                            .once = true};
    if (args_count(nargs, 2, 2, reading ? "read_from" : "write_to",
                   reading ? "src, count" : "dst, count")
            < 0
        || args_u64(args[1], "count", &self.count) < 0) {
        return NULL;
    }
    int failed = transfer_open(&self, args[0], NULL);
    if (!failed) {
        failed = transfer_in_memory(&self);
    }
    Py_XDECREF(self.method);
    return failed ? NULL : PyLong_FromSize_t(self.done);
}

PyObject *
transfer_read_from(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return transfer_once(op, args, nargs, true);
}

PyObject *
transfer_write_to(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return transfer_once(op, args, nargs, false);
}
