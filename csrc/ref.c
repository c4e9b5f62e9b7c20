/* class VolatileRef(Generic[T]):
 *     type: Scalar[T] | type[T] | Struct
 *     size: int
 *     def load(self): ...
 *     def store(self, val): ...
 *     def to_slice(self): ...
 *     def as_ptr(self): ...
 *
 * One object in memory. A ref cannot be released, so its borrow lasts as long as
 * it does, and no access asks whether the memory is still there: a load of an
 * aligned scalar is one instruction and the making of an int. What it has in common with
 * atomic refs and arrays is here, too (ref.h).
 */
#include "native.h"

#include "args.h"
#include "ref.h"
#include "volatile_memory.h"

ref_object *
ref_make(PyTypeObject *cls, const struct span *memory, size_t offset, size_t size,
         PyObject *type, size_t element)
{
    struct span span = span_part(memory, offset, size);
    lender_borrow(span.lender, BORROW_REF); /* first, as in slice_new */
    ref_object *self = PyObject_GC_New(ref_object, cls);
    if (self == NULL) {
        lender_give_back(&span.lender, BORROW_REF);
        return NULL;
    }
    self->span = span;
    self->element = element_of(span.state, type, element);
    /* A Scalar and our own pages lead to no cycle. */
    bool tracked = self->element.scalar == NULL || span.lender.buffer_owner != NULL;
    self->module = tracked ? Py_NewRef(span.state->module) : NULL;
    return self;
}

PyObject *
ref_new(const struct span *memory, size_t offset, size_t size, PyObject *type)
{
    return ref_made(
        ref_make(memory->state->ref_type, memory, offset, size, type, size));
}

int
ref_traverse(PyObject *op, visitproc visit, void *arg)
{
    ref_object *self = ref_of(op);
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->element.type);
    Py_VISIT(self->span.lender.buffer_owner);
    Py_VISIT(self->module);
    return 0;
}

void
ref_dealloc(PyObject *op)
{
    ref_object *self = ref_of(op);
    PyTypeObject *type = Py_TYPE(op);
    PyObject *module = self->module;
    if (module != NULL) {
        PyObject_GC_UnTrack(op);
    }
    lender_give_back(&self->span.lender, BORROW_REF);
    Py_DECREF(self->element.type);
    PyObject_GC_Del(op);
    Py_DECREF(type);
    Py_XDECREF(module);
}

static PyObject *
ref_repr(PyObject *op)
{
    PyObject *name = element_name(&ref_of(op)->element);
    PyObject *result =
        name == NULL ? NULL
                     : PyUnicode_FromFormat("<guestmem.VolatileRef type=%U>", name);
    Py_XDECREF(name);
    return result;
}

PyDoc_STRVAR(ref_load_doc,
             "load($self, /)\n--\n\n"
             "Return the object: an int or float, a ctypes instance, or a tuple.\n"
             "\n"
             "A scalar at an address that is a multiple of its size is one access;\n"
             "anything else is one copy, which tears no aligned field of up to 8\n"
             "bytes. TypeError where the type has changed its size meanwhile.");

static PyObject *
ref_load(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    const ref_object *self = ref_of(op);
    return args_count(nargs, 0, 0, "load", "") < 0
               ? NULL
               : element_load(&self->element, &self->span, 0);
}

PyDoc_STRVAR(ref_store_doc,
             "store($self, val, /)\n--\n\n"
             "Store val, as VolatileMemory.write_obj() does.\n"
             "\n"
             "A scalar at an address that is a multiple of its size is one access.\n"
             "OverflowError where val does not fit it: nothing is stored then.");

static PyObject *
ref_store(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    const ref_object *self = ref_of(op);
    if (args_count(nargs, 1, 1, "store", "val") < 0
        || element_store(&self->element, &self->span, 0, args[0]) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

const char ref_to_slice_doc[] = PyDoc_STR("to_slice($self, /)\n--\n\n"
                                          "Return a VolatileSlice of its bytes.");

PyObject *
ref_to_slice(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    const struct span *span = &ref_of(op)->span;
    return args_count(nargs, 0, 0, "to_slice", "") < 0 ? NULL
                                                       : slice_new(span, 0, span->size);
}

const char ref_as_ptr_doc[] =
    PyDoc_STR("as_ptr($self, /)\n--\n\n"
              "Return the host address of its first byte, for passing to ioctls.\n"
              "\n"
              "It holds nothing: keep the ref alive for as long as the kernel may use\n"
              "the address, or it writes into whatever is mapped there next.");

PyObject *
ref_as_ptr(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    return args_count(nargs, 0, 0, "as_ptr", "") < 0
               ? NULL
               : PyLong_FromVoidPtr(ref_of(op)->span.addr);
}

PyObject *
ref_get_type(PyObject *op, void *Py_UNUSED(closure))
{
    return Py_NewRef(ref_of(op)->element.type);
}

PyObject *
ref_get_size(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(ref_of(op)->span.size);
}

static PyMethodDef ref_methods[] = {
    {"load", FASTCALL(ref_load), ref_load_doc},
    {"store", FASTCALL(ref_store), ref_store_doc},
    {"to_slice", FASTCALL(ref_to_slice), ref_to_slice_doc},
    {"as_ptr", FASTCALL(ref_as_ptr), ref_as_ptr_doc},
    {"__reduce__", errors_not_copied, METH_NOARGS, errors_not_copied_doc},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS,
     PyDoc_STR("__class_getitem__($type, item, /)\n--\n\n"
               "VolatileRef[int], for annotations.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef ref_getset[] = {
    {"type", ref_get_type, NULL, PyDoc_STR("The type that get_ref() was given."), NULL},
    {"size", ref_get_size, NULL, PyDoc_STR("The object's size in bytes."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(ref_doc,
             "One object in memory, made by get_ref(): the fastest access there is.\n"
             "\n"
             "It keeps the memory mapped for as long as it lives; it cannot be\n"
             "released. The range was checked when it was made.");

static PyType_Slot ref_slots[] = {
    {Py_tp_doc, SLOT(ref_doc)},
    {Py_tp_dealloc, SLOT(ref_dealloc)},
    {Py_tp_traverse, SLOT(ref_traverse)},
    {Py_tp_repr, SLOT(ref_repr)},
    {Py_tp_methods, ref_methods},
    {Py_tp_getset, ref_getset},
    {0, NULL},
};

static PyType_Spec ref_spec = {
    .name = "guestmem.VolatileRef",
    .basicsize = sizeof(ref_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = ref_slots,
};

int
ref_init(PyObject *module, module_state *state)
{
    state->ref_type = native_add_type(module, &ref_spec, NULL, true);
    return state->ref_type == NULL ? -1 : 0;
}
