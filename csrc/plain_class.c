/* ctypes classes: which of them are plain data, and how large they are. */
#include "native.h"

#include "foreign.h"
#include "foreign_ctypes.h"
#include "plain_class.h"

void
plain_class_free(struct foreign_ctypes *self)
{
    for (int i = 0; i < FAMILIES; i++) {
        Py_XDECREF(self->base[i]);
    }
    Py_XDECREF(self->size_of);
    Py_XDECREF(self->field_type);
    Py_XDECREF(self->value_of_simple);
    Py_XDECREF(self->reduce);
    Py_XDECREF(self->dict_of_type);
    Py_XDECREF(self->mro_of_type);
    Py_XDECREF(self->base_of_type);
    for (int i = 0; i < KNOWN; i++) {
        Py_XDECREF(self->known[i].weak);
    }
    PyMem_Free(self);
}

/* One of the descriptors that type itself has. */
static PyObject *
type_descriptor(const char *name)
{
    PyObject *dict = PyObject_GetAttrString((PyObject *)&PyType_Type, "__dict__");
    PyObject *result = dict == NULL ? NULL : PyMapping_GetItemString(dict, name);
    Py_XDECREF(dict);
    return result;
}

/* type(base)(name, (base,), {attribute: value}), where value is stolen */
static PyObject *
class_new(PyObject *base, const char *name, const char *attribute, PyObject *value)
{
    return PyObject_CallFunction((PyObject *)Py_TYPE(base), "s(O){sN}", name, base,
                                 attribute, value);
}

/* The type of a Structure's fields has no name that every CPython gives: make a
 * Structure and look. */
static PyObject *
field_type(const struct foreign_ctypes *self)
{
    PyObject *byte = class_new(self->base[FAMILY_SIMPLE], "byte", "_type_",
                               PyUnicode_FromString("B"));
    PyObject *structure =
        byte == NULL ? NULL
                     : class_new(self->base[FAMILY_STRUCTURE], "structure", "_fields_",
                                 Py_BuildValue("[(sN)]", "field", byte));
    PyObject *field =
        structure == NULL ? NULL : PyObject_GetAttrString(structure, "field");
    PyObject *type = field == NULL ? NULL : Py_NewRef((PyObject *)Py_TYPE(field));
    Py_XDECREF(structure);
    Py_XDECREF(field);
    return type;
}

static int
families_load(struct foreign_ctypes *self, PyObject *module)
{
    static const char *const names[FAMILIES] = {"Structure", "Union", "Array",
                                                "_SimpleCData"};
    for (int i = 0; i < FAMILIES; i++) {
        if ((self->base[i] = foreign_type(module, names[i])) == NULL) {
            return -1;
        }
        PyTypeObject *base = (PyTypeObject *)self->base[i];
        self->make[i] = SLOT_OF(base, Py_tp_new, newfunc);
        self->get_buffer[i] = SLOT_OF(base, Py_bf_getbuffer, get_buffer_function);
        if (self->make[i] == NULL || self->get_buffer[i] == NULL) {
            PyErr_Format(PyExc_ImportError, "%R makes no data", self->base[i]);
            return -1;
        }
    }
    self->item_of_array =
        SLOT_OF((PyTypeObject *)self->base[FAMILY_ARRAY], Py_sq_item, ssizeargfunc);
    return self->item_of_array == NULL ? -1 : 0;
}

static struct foreign_ctypes *
plain_class_load(PyObject *module)
{
    struct foreign_ctypes *self = PyMem_Calloc(1, sizeof(*self));
    if (self == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    if (families_load(self, module) < 0
        || (self->size_of = PyObject_GetAttrString(module, "sizeof")) == NULL
        || (self->field_type = field_type(self)) == NULL
        || (self->value_of_simple =
                PyObject_GetAttrString(self->base[FAMILY_SIMPLE], "value"))
               == NULL
        || (self->reduce =
                PyObject_GetAttrString(self->base[FAMILY_SIMPLE], "__reduce__"))
               == NULL
        || (self->dict_of_type = type_descriptor("__dict__")) == NULL
        || (self->mro_of_type = type_descriptor("__mro__")) == NULL
        || (self->base_of_type = type_descriptor("__base__")) == NULL) {
        plain_class_free(self);
        return NULL;
    }
    return self;
}

/* What the state holds once ctypes has been imported; NULL before, or with an
 * exception. Two threads may come here at once: one of them wins. */
static struct foreign_ctypes *
plain_class_state(module_state *state)
{
    struct foreign_ctypes *self = atomic_load(&state->ctypes);
    PyObject *module;
    if (self != NULL || (module = foreign_imported("_ctypes")) == NULL) {
        return self;
    }
    struct foreign_ctypes *mine = plain_class_load(module);
    Py_DECREF(module);
    if (mine != NULL && !atomic_compare_exchange_strong(&state->ctypes, &self, mine)) {
        plain_class_free(mine);
        return self;
    }
    return mine;
}

/* Its place in the table, for this thread alone until known_leave; NULL where another
 * thread is there: nobody waits, so that no fork can leave somebody waiting for ever.
 * With a GIL nobody ever is. */
static inline struct known *
known_enter(struct foreign_ctypes *ctypes, PyObject *cls)
{
#ifdef Py_GIL_DISABLED
    if (atomic_flag_test_and_set(&ctypes->busy)) {
        return NULL;
    }
#endif
    return &ctypes->known[((uintptr_t)cls >> 6) % KNOWN];
}

static inline void
known_leave(struct foreign_ctypes *ctypes)
{
#ifdef Py_GIL_DISABLED
    atomic_flag_clear(&ctypes->busy);
#else
    (void)ctypes;
#endif
}

/* Whether the class is known. The address of a class that is gone may come again,
 * but never with the weak reference that the table kept: a class has one that is
 * shared by all who ask. */
static bool
known_recall(struct foreign_ctypes *ctypes, PyObject *cls, PyObject *weak,
             struct object_type *out)
{
    const struct known *known = known_enter(ctypes, cls);
    bool found = known != NULL && known->weak == weak;
    if (found) {
        *out = known->type;
    }
    if (known != NULL) {
        known_leave(ctypes);
    }
    return found;
}

static void
known_add(struct foreign_ctypes *ctypes, PyObject *cls, PyObject *weak,
          const struct object_type *type)
{
    struct known *known = known_enter(ctypes, cls);
    if (known != NULL) {
        PyObject *old = known->weak;
        *known = (struct known){Py_NewRef(weak), *type};
        known_leave(ctypes);
        Py_XDECREF(old);
    }
}

PyObject *
plain_class_make(const struct object_type *self, char **bytes)
{
    Py_buffer view;
    PyObject *no_args = PyTuple_New(0);
    PyObject *holder =
        no_args == NULL ? NULL : self->make((PyTypeObject *)self->type, no_args, NULL);
    Py_XDECREF(no_args);
    if (holder == NULL || self->get_buffer(holder, &view, PyBUF_WRITABLE) < 0) {
        Py_XDECREF(holder);
        return NULL;
    }
    *bytes = view.buf;
    bool fits = view.len >= (Py_ssize_t)self->size;
    Py_DECREF(view.obj); /* ctypes counts no exports: the holder keeps its bytes */
    if (!fits) {
        PyErr_Format(PyExc_TypeError, "%R has changed its size", self->type);
        Py_CLEAR(holder);
    }
    return holder;
}

/* 1, 0 or -1, as plain_class_find, for a class that is not known. */
static int
plain_examine(const struct foreign_ctypes *ctypes, PyObject *cls,
              struct object_type *out)
{
    char *unused;
    int family = plain_family(ctypes, cls);
    if (family == FAMILIES) {
        return 0;
    }
    PyObject *number = PyObject_CallFunctionObjArgs(ctypes->size_of, cls, NULL);
    Py_ssize_t size = number == NULL ? -1 : PyLong_AsSsize_t(number);
    Py_XDECREF(number);
    *out = (struct object_type){cls, (size_t)size, ctypes->make[family],
                                ctypes->get_buffer[family]};
    if (size <= 0) {
        return size < 0 ? -1 : 1;
    }
    PyObject *instance = plain_class_make(out, &unused);
    int result = instance == NULL ? -1 : plain_check(ctypes, instance);
    Py_XDECREF(instance);
    return result < 0 ? -1 : 1;
}

int
plain_class_find(module_state *state, PyObject *cls, struct object_type *out)
{
    struct foreign_ctypes *ctypes = plain_class_state(state);
    if (ctypes == NULL) {
        return PyErr_Occurred() ? -1 : 0;
    }
    PyObject *weak = PyWeakref_NewRef(cls, NULL);
    if (weak == NULL) {
        return -1;
    }
    int found = 1;
    if (!known_recall(ctypes, cls, weak, out)) {
        found = plain_examine(ctypes, cls, out);
        /* A class of no size may still get fields; an instance makes one final. */
        if (found == 1 && out->size != 0) {
            known_add(ctypes, cls, weak, out);
        }
    }
    Py_DECREF(weak);
    return found;
}

int
plain_class_traverse(struct foreign_ctypes *self, visitproc visit, void *arg)
{
    for (int i = 0; i < FAMILIES; i++) {
        Py_VISIT(self->base[i]);
    }
    Py_VISIT(self->size_of);
    Py_VISIT(self->field_type);
    Py_VISIT(self->value_of_simple);
    Py_VISIT(self->reduce);
    Py_VISIT(self->dict_of_type);
    Py_VISIT(self->mro_of_type);
    Py_VISIT(self->base_of_type);
    for (int i = 0; i < KNOWN; i++) {
        Py_VISIT(self->known[i].weak);
    }
    return 0;
}
