/* The buffer between memory and a file object. See between.h.
 *
 * Each step has one of its own, filled with zeros: the object may keep it, or a view
 * of it. Exported to us, it cannot be resized by those who get a view of it.
 */
#include "native.h"

#include "between.h"

/* A step begins with FIRST bytes. While the object takes all, the steps grow up to
 * MOST; one that takes little gets little, because all that is offered is copied. */
#define FIRST ((size_t)64 << 10)
#define LEAST ((size_t)4 << 10)
#define MOST  ((size_t)1 << 20)

PyObject *
between_begin(struct between *self, const struct span *span, size_t offset, size_t left,
              bool reading, size_t *asked)
{
    size_t step = self->step == 0 ? FIRST : self->step;
    *asked = Py_MIN(left, step);
    PyObject *bytes =
        PyObject_CallFunction((PyObject *)&PyByteArray_Type, "n", (Py_ssize_t)*asked);
    if (bytes == NULL || PyObject_GetBuffer(bytes, &self->view, PyBUF_WRITABLE) < 0
        || (!reading && span_read_some(span, offset, self->view.buf, asked) < 0)) {
        Py_XDECREF(bytes);
        return NULL;
    }
    PyObject *whole = PyMemoryView_FromObject(bytes);
    Py_DECREF(bytes);
    if (whole == NULL || *asked == (size_t)self->view.len) {
        return whole;
    }
    PyObject *part = PySequence_GetSlice(whole, 0, (Py_ssize_t)*asked);
    Py_DECREF(whole);
    return part;
}

int
between_end(struct between *self, const struct span *span, size_t offset, size_t asked,
            size_t moved, bool reading, bool failed)
{
    int result = failed ? -1 : 0;
    if (!failed && reading) {
        result = span_write(span, offset, self->view.buf, moved);
    }
    if (self->view.obj != NULL) {
        PyBuffer_Release(&self->view);
    }
    self->step = moved == asked ? Py_MIN(2 * asked, MOST) : Py_MAX(moved, LEAST);
    return result;
}
