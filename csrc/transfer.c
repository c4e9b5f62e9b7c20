/* Transfers: between memory and a file descriptor, or
 * an object with readinto(), read() or write().
 *
 * A file descriptor is read with read(2) straight into memory. An object has to
 * be asked, even where it has an fd: a buffered file keeps bytes that its fd has
 * given already. It gets a view of the memory, so that costs no copy either; but
 * where a page of that may be missing, which would kill the process, or what it
 * writes is to be marked, a view of a buffer in between.
 */
#include "native.h"

#include "args.h"
#include "os_file.h"
#include "range.h"
#include "stream.h"
#include "transfer.h"

/* The most that one read() of an object is asked for, which then makes a bytes
 * object of that size. */
#define READ_AT_MOST ((size_t)1 << 20)

static const char *const method_names[] = {[BY_FD] = "fileno",
                                           [BY_READINTO] = "readinto",
                                           [BY_READ] = "read",
                                           [BY_WRITE] = "write"};

/* -1: the stream failed. err 0: no errno, and text says what happened. */
static int
transfer_fail(struct transfer *self, int err, const char *text, PyObject *cause)
{
    return stream_fail(self->state, self->reading, err, text, self->before + self->done,
                       cause);
}

/* An int attribute of an exception: *out stays where it has none. -1 with what asking
 * for it raised. */
static int
transfer_attribute(PyObject *error, const char *name, long *out)
{
    PyObject *value = PyObject_GetAttrString(error, name);
    if (value == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear();
        return 0;
    }
    if (PyLong_Check(value)) {
        int overflow;
        long number = PyLong_AsLongAndOverflow(value, &overflow);
        *out = overflow == 0 ? number : *out;
    }
    Py_DECREF(value);
    return 0;
}

/* The stream raised: an OSError is wrapped, anything else passes untouched. */
static int
transfer_wrap(struct transfer *self)
{
    if (!PyErr_ExceptionMatches(PyExc_OSError)) {
        return -1;
    }
    PyObject *cause = errors_take();
    long taken = 0, err = 0;
    bool may_have_taken =
        self->by == BY_WRITE
        && PyObject_TypeCheck(cause, (PyTypeObject *)PyExc_BlockingIOError);
    if ((may_have_taken && transfer_attribute(cause, "characters_written", &taken) < 0)
        || transfer_attribute(cause, "errno", &err) < 0) {
        errors_set_cause(cause);
        return -1;
    }
    /* A buffered writer took so many before it would have blocked. */
    if (taken > 0 && (uint64_t)taken <= self->count - self->done) {
        self->done += (size_t)taken;
    }
    PyObject *text = PyObject_Str(cause);
    const char *chars = text == NULL ? NULL : PyUnicode_AsUTF8AndSize(text, NULL);
    if (chars == NULL
        && (PyErr_ExceptionMatches(PyExc_MemoryError)
            || !PyErr_ExceptionMatches(PyExc_Exception))) { /* Ctrl-C */
        errors_set_cause(cause);
        Py_XDECREF(text);
        return -1;
    }
    PyErr_Clear(); /* an exception that has no text */
    transfer_fail(self, (int)err,
                  err != 0        ? NULL
                  : chars == NULL ? "it raised an OSError"
                                  : chars,
                  cause);
    Py_XDECREF(text);
    return -1;
}

static int
transfer_would_block(struct transfer *self)
{
    return stream_would_block(self->state, self->reading, self->before + self->done);
}

/* 0 bytes moved, and that is no success. */
static int
transfer_stopped(struct transfer *self)
{
    if (self->once) {
        self->ended = true;
        return 0;
    }
    if (!self->reading) {
        return transfer_fail(self, 0, "it took no bytes", NULL);
    }
    PyObject *cause = PyObject_CallFunction(PyExc_EOFError, "s", "end of the source");
    return cause == NULL ? -1 : transfer_fail(self, 0, "it ended early", cause);
}

/* Each step moves some of the rest: 0 and *moved, or -1 with an exception. Where a signal
 * interrupted it, or a page came back, that is nothing, and it is made again. */
static int
transfer_step_fd(struct transfer *self, size_t left, size_t *moved)
{
    char *addr = self->memory->span.addr + self->mem_offset + self->done;
    int64_t position = self->positioned
                           ? (int64_t)(self->position + self->before + self->done)
                           : OS_FILE_POSITION;
    int err;
    Py_BEGIN_ALLOW_THREADS
    err = self->reading ? os_file_read(self->fd, addr, left, position, moved)
                        : os_file_write(self->fd, addr, left, position, moved);
    Py_END_ALLOW_THREADS
    const struct span *span = &self->memory->span;
    const struct iovec piece = {addr, left};
    const struct stream_call call = {.state = self->state,
                                     .reading = self->reading,
                                     .before = self->before + self->done,
                                     .spans = &span,
                                     .pieces = &piece,
                                     .count = 1,
                                     .tries = &self->tries};
    if (stream_settle(&call, err, *moved) < 0) {
        return -1;
    }
    return err == 0 && *moved == 0 ? transfer_stopped(self) : 0;
}

static int
transfer_nonsense(struct transfer *self, Py_ssize_t claimed, size_t asked)
{
    char text[96];
    PyOS_snprintf(text, sizeof(text), "its %s() said %zd of the %zu bytes asked for",
                  method_names[self->by], claimed, asked);
    return transfer_fail(self, 0, text, NULL);
}

/* Calls the method with a view of exporter (stolen), and takes the view back:
 * whatever the object kept of it is released, unless it kept an export of its own. */
static PyObject *
transfer_call_with_view(struct transfer *self, PyObject *exporter)
{
    PyObject *view = PyMemoryView_FromObject(exporter);
    Py_DECREF(exporter);
    if (view == NULL) {
        return NULL;
    }
    PyObject *result = PyObject_CallFunctionObjArgs(self->method, view, NULL);
    PyObject *raised = errors_take();
    PyObject *released = PyObject_CallMethod(view, "release", NULL);
    if (released == NULL && PyErr_ExceptionMatches(PyExc_BufferError)) {
        PyErr_Clear(); /* the borrow lives on with that export */
        released = Py_NewRef(Py_None);
    }
    Py_DECREF(view);
    if (raised != NULL) {
        errors_put_back(raised);
    }
    else if (released == NULL) {
        Py_CLEAR(result);
    }
    Py_XDECREF(released);
    return result;
}

/* Where a view of the memory itself will not do. */
static bool
transfer_needs_between(const struct transfer *self)
{
    const struct span *span = &self->memory->span;
    return span->can_fault || (self->reading && span->dirty != NULL);
}

/* What readinto() and write() return: the count that they moved of those asked for. */
static int
transfer_count(struct transfer *self, PyObject *result, size_t asked, size_t *moved)
{
    if (Py_IsNone(result)) {
        return transfer_would_block(self);
    }
    if (!PyIndex_Check(result)) {
        errors_wrong_type(self->reading ? "what readinto() returns"
                                        : "what write() returns",
                          "an int or None", result);
        return -1;
    }
    /* Clips to the limits of Py_ssize_t, which is nonsense enough. */
    Py_ssize_t count = PyNumber_AsSsize_t(result, NULL);
    if (count == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (count < 0 || (size_t)count > asked) {
        return transfer_nonsense(self, count, asked);
    }
    *moved = (size_t)count;
    return count == 0 ? transfer_stopped(self) : 0;
}

static int
transfer_step_view(struct transfer *self, size_t left, size_t *moved)
{
    const struct span *span = &self->memory->span;
    size_t at = self->mem_offset + self->done, asked = left;
    bool between = transfer_needs_between(self);
    PyObject *exporter =
        between ? between_begin(&self->between, span, at, left, self->reading, &asked)
                : slice_new(span, at, left);
    int failed = -1;
    if (exporter != NULL) {
        PyObject *result = transfer_call_with_view(self, exporter);
        failed = result == NULL ? transfer_wrap(self)
                                : transfer_count(self, result, asked, moved);
        Py_XDECREF(result);
    }
    if (between) {
        failed = between_end(&self->between, span, at, asked, *moved, self->reading,
                             failed != 0);
    }
    return failed;
}

/* read(): the bytes that it returns are copied. */
static int
transfer_step_read(struct transfer *self, size_t left, size_t *moved)
{
    size_t asked = Py_MIN(left, READ_AT_MOST);
    PyObject *result = PyObject_CallFunction(self->method, "n", (Py_ssize_t)asked);
    if (result == NULL) {
        return transfer_wrap(self);
    }
    Py_buffer view = {0};
    int failed;
    if (Py_IsNone(result)) {
        failed = transfer_would_block(self);
    }
    else if (!PyObject_CheckBuffer(result)) {
        errors_wrong_type("what read() returns", "bytes or None", result);
        failed = -1;
    }
    else {
        failed = PyObject_GetBuffer(result, &view, PyBUF_SIMPLE);
    }
    if (failed == 0) {
        *moved = (size_t)view.len;
        if (*moved > asked) {
            failed = transfer_nonsense(self, view.len, asked);
        }
        else if (*moved == 0) {
            failed = transfer_stopped(self);
        }
        else {
            failed = memory_copy(&self->memory->span, self->mem_offset + self->done,
                                 result, &view, 0, *moved, true);
        }
        PyBuffer_Release(&view);
    }
    Py_DECREF(result);
    return failed;
}

int
transfer_run(struct transfer *self)
{
    while (self->done < self->count) {
        size_t left = self->count - self->done, moved = 0;
        int failed = self->by == BY_FD     ? transfer_step_fd(self, left, &moved)
                     : self->by == BY_READ ? transfer_step_read(self, left, &moved)
                                           : transfer_step_view(self, left, &moved);
        if (failed) {
            return -1;
        }
        self->done += moved;
        self->tries = moved != 0 ? 0 : self->tries;
        if (self->once && (moved != 0 || self->ended)) {
            return 0;
        }
        /* Cut short, by a signal perhaps: its handler runs before the next call. */
        if (self->done < self->count && PyErr_CheckSignals() < 0) {
            return -1;
        }
    }
    return 0;
}

/* Text is known by its encoding: that of io.TextIOBase, and of the objects in codecs
 * and tempfile, which pass readinto() on to the binary file below them. */
static int
transfer_refuse_text(struct transfer *self, PyObject *stream)
{
    PyObject *encoding = PyObject_GetAttrString(stream, "encoding");
    if (encoding != NULL) {
        Py_DECREF(encoding);
        errors_wrong_type(self->reading ? "src" : "dst", "a file opened in binary mode",
                          stream);
        return -1;
    }
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
        return -1;
    }
    PyErr_Clear();
    return 0;
}

/* The method by which an object is asked; -1 with TypeError where it has none. */
static int
transfer_find_method(struct transfer *self, PyObject *stream)
{
    enum by candidates[] = {self->reading ? BY_READINTO : BY_WRITE, BY_READ};
    int count = self->reading ? 2 : 1;
    for (int i = 0; i < count; i++) {
        self->by = candidates[i];
        self->method = PyObject_GetAttrString(stream, method_names[self->by]);
        if (self->method != NULL) {
            return 0;
        }
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear();
    }
    errors_wrong_type(self->reading ? "src" : "dst",
                      self->reading ? "an fd or an object with readinto() or read()"
                                    : "an fd or an object with write()",
                      stream);
    return -1;
}

int
transfer_open(struct transfer *self, PyObject *stream, PyObject *position)
{
    self->by = BY_FD;
    self->positioned = position != NULL && !Py_IsNone(position);
    if (self->positioned
        && args_u64(position, self->reading ? "src_offset" : "dst_offset",
                    &self->position)
               < 0) {
        return -1;
    }
    /* An unbuffered FileIO is as good as its fd. A subclass may do otherwise. */
    bool is_fd = PyLong_Check(stream)
                 || Py_IS_TYPE(stream, (PyTypeObject *)self->state->file_io);
    if (!is_fd && transfer_refuse_text(self, stream) < 0) {
        return -1;
    }
    if (is_fd || self->positioned) {
        int result = args_fd(stream, self->reading ? "src" : "dst", &self->fd);
        return result < 0 ? transfer_wrap(self) : 0;
    }
    return transfer_find_method(self, stream);
}

/* The memory is entered and left here; the range has been checked, or is outside. */
int
transfer_in_memory(struct transfer *self)
{
    memory_object *memory = self->memory;
    int failed = -1;
    if (memory_enter(memory, LONG) < 0) {
        return -1;
    }
    if (!range_fits(self->mem_offset, self->count, memory->span.size)) {
        errors_invalid_range(self->state, self->mem_offset, self->count,
                             memory->span.size);
    }
    else if (!self->positioned
             || stream_check_offset(self->state, self->position,
                                    self->before + self->count)
                    == 0) {
        failed = transfer_run(self);
    }
    memory_leave(memory, LONG);
    return failed;
}

int
transfer_init(PyObject *module, module_state *state)
{
    (void)module;
    PyObject *io = PyImport_ImportModule("_io");
    if (io == NULL) {
        return -1;
    }
    state->file_io = PyObject_GetAttrString(io, "FileIO");
    Py_DECREF(io);
    return state->file_io == NULL ? -1 : 0;
}
