/* Copies and fills of spans. See span.h. */
#include "native.h"

#include "span.h"

/* What Py_BEGIN_ALLOW_THREADS does, for copies that are worth it. */
static inline PyThreadState *
copy_begin(size_t count)
{
    return span_copy_is_long(count) ? PyEval_SaveThread() : NULL;
}

static inline void
copy_end(PyThreadState *released)
{
    if (released != NULL) {
        PyEval_RestoreThread(released);
    }
}

int
span_take_signal(module_state *state)
{
    int err = fault_claim();
    if (err == ENOMEM) {
        PyErr_NoMemory();
    }
    else if (err != 0) {
        errors_system_call(state, err, "sigaction");
    }
    return err == 0 ? 0 : -1;
}

int
span_faulted(const struct span *self, struct fault fault, Py_ssize_t piece)
{
    return errors_memory_fault(fault.writing ? self->state->WriteToMemoryError
                                             : self->state->ReadFromMemoryError,
                               EFAULT, self->first + (uint64_t)(fault.at - self->addr),
                               piece);
}

int
span_store_slow(const struct span *self, size_t offset, size_t width, uint64_t bits)
{
    char *at = self->addr + offset;
    struct fault fault = {NULL, true};
    if (self->can_fault) {
        fault = fault_store(at, bits, width);
    }
    else {
        access_store(at, bits, width);
    }
    span_wrote(self, offset, width);
    return span_result(self, fault);
}

int
span_read(const struct span *self, size_t offset, void *host, size_t count)
{
    const char *at = self->addr + offset;
    if (!self->can_fault && !span_copy_is_long(count)) {
        access_read(host, at, count);
        return 0;
    }
    struct fault fault = {NULL, false};
    PyThreadState *released = copy_begin(count);
    if (self->can_fault) {
        fault = fault_read(host, at, count);
    }
    else {
        access_read(host, at, count);
    }
    copy_end(released);
    return span_result(self, fault);
}

int
span_read_some(const struct span *self, size_t offset, void *host, size_t *count)
{
    const char *at = self->addr + offset;
    struct fault fault;
    PyThreadState *released = copy_begin(*count);
    for (;;) {
        fault = fault_read(host, at, *count);
        if (fault.at == NULL || fault.at == at) {
            break;
        }
        *count = (size_t)(fault.at - at);
    }
    copy_end(released);
    return span_result(self, fault);
}

int
span_write(const struct span *self, size_t offset, const void *host, size_t count)
{
    char *at = self->addr + offset;
    if (self->is_plain && !span_copy_is_long(count)) {
        access_write(at, host, count);
        return 0;
    }
    struct fault fault = {NULL, false};
    PyThreadState *released = copy_begin(count);
    if (self->can_fault) {
        fault = fault_write(at, host, count);
    }
    else {
        access_write(at, host, count);
    }
    span_wrote(self, offset, count);
    copy_end(released);
    return span_result(self, fault);
}

int
span_fill(const struct span *self, size_t offset, unsigned char byte, size_t count)
{
    char *at = self->addr + offset;
    struct fault fault = {NULL, false};
    PyThreadState *released = copy_begin(count);
    if (self->can_fault) {
        fault = fault_fill(at, byte, count);
    }
    else {
        access_fill(at, byte, count);
    }
    span_wrote(self, offset, count);
    copy_end(released);
    return span_result(self, fault);
}

int
span_copy(const struct span *dst, size_t dst_offset, const struct span *src,
          size_t src_offset, size_t count)
{
    char *to = dst->addr + dst_offset;
    const char *from = src->addr + src_offset;
    struct fault fault = {NULL, false};
    PyThreadState *released = copy_begin(count);
    if (dst->can_fault || src->can_fault) {
        fault = fault_copy(to, from, count);
    }
    else {
        access_copy(to, from, count);
    }
    span_wrote(dst, dst_offset, count);
    copy_end(released);
    return span_result(fault.writing ? dst : src, fault);
}

PyObject *
span_bytes(const struct span *self, size_t offset, size_t count)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)count);
    if (bytes != NULL && span_read(self, offset, PyBytes_AsString(bytes), count) < 0) {
        Py_CLEAR(bytes);
    }
    return bytes;
}
