/* The buffer that somebody exported to VolatileSlice.from_buffer: an object of
 * its own, so that every slice and ref of it is one reference, and the garbage
 * collector can follow a cycle through the exporter.
 *
 * Like a tuple, it refers only to what existed before it, and so do the slices
 * and refs that refer to it: a cycle always runs through something else that can
 * be cleared. So none of them has a tp_clear, and no ref must ask whether its
 * memory is still there.
 */
#include "native.h"

#include "args.h"
#include "buffer_owner.h"

typedef struct {
    PyObject_HEAD
    Py_buffer view;
    bool is_shown; /* to the garbage collector */
} buffer_owner_object;

/* Before 3.12.7 the garbage collector clears a memoryview even while somebody has its
 * buffer, and releasing that buffer then crashes (CPython's gh-77894). An exporter that
 * we do not show looks held from outside, and a cycle through it lives on. The same
 * goes for the object by which 3.12 stands in for a class with __buffer__. -1 with an
 * exception. */
static int
buffer_owner_shows(PyObject *exporter)
{
    if (Py_Version >= 0x030C0700 || exporter == NULL) {
        return 1;
    }
    if (PyMemoryView_Check(exporter) || Py_Version < 0x030C0000) {
        return !PyMemoryView_Check(exporter);
    }
    PyObject *name = PyType_GetName(Py_TYPE(exporter));
    int result = name == NULL
                     ? -1
                     : PyUnicode_CompareWithASCIIString(name, "_buffer_wrapper") != 0;
    Py_XDECREF(name);
    return result;
}

int
buffer_owner_new(module_state *state, PyObject *exporter, struct span *out)
{
    Py_buffer view;
    if (args_buffer(exporter, "obj", &view, true) < 0) {
        return -1;
    }
    buffer_owner_object *self = NULL;
    int is_shown = buffer_owner_shows(view.obj);
    if (is_shown >= 0 && span_take_signal(state) == 0) {
        self = PyObject_GC_New(buffer_owner_object, state->buffer_owner_type);
    }
    if (self == NULL) {
        PyBuffer_Release(&view);
        return -1;
    }
    self->view = view;
    self->is_shown = is_shown;
    PyObject_GC_Track((PyObject *)self);
    /* Whose memory it is nobody knows: perhaps a file's. */
    *out = (struct span){.state = state,
                         .addr = view.buf,
                         .size = (size_t)view.len,
                         .lender = {.buffer_owner = (PyObject *)self},
                         .can_fault = true,
                         .is_plain = false};
    return 0;
}

static int
buffer_owner_traverse(PyObject *op, visitproc visit, void *arg)
{
    buffer_owner_object *self = (buffer_owner_object *)op;
    Py_VISIT(Py_TYPE(op));
    if (self->is_shown) {
        Py_VISIT(self->view.obj);
    }
    return 0;
}

static void
buffer_owner_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    PyBuffer_Release(&((buffer_owner_object *)op)->view);
    PyObject_GC_Del(op);
    Py_DECREF(type);
}

static PyType_Slot buffer_owner_slots[] = {
    {Py_tp_dealloc, SLOT(buffer_owner_dealloc)},
    {Py_tp_traverse, SLOT(buffer_owner_traverse)},
    {0, NULL},
};

static PyType_Spec buffer_owner_spec = {
    .name = "guestmem._BufferOwner",
    .basicsize = sizeof(buffer_owner_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = buffer_owner_slots,
};

int
buffer_owner_init(PyObject *module, module_state *state)
{
    state->buffer_owner_type = native_add_type(module, &buffer_owner_spec, NULL, false);
    return state->buffer_owner_type == NULL ? -1 : 0;
}
