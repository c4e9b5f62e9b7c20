/* ctypes classes: which of them are plain data, and how large they are. */
#include "native.h"

#include "foreign.h"
#include "plain_class.h"

enum { FAMILY_STRUCTURE, FAMILY_UNION, FAMILY_ARRAY, FAMILY_SIMPLE, FAMILIES };

/* How many classes are remembered. */
#define KNOWN 64

struct known {
    PyObject *weak; /* reference to the class; NULL where the place is free */
    struct object_type type;
};

struct foreign_ctypes {
    /* The four families of plain data. Every other ctypes class (pointers,
     * functions) is refused. */
    PyObject *base[FAMILIES];
    newfunc make[FAMILIES];
    get_buffer_function get_buffer[FAMILIES];
    PyObject *size_of;
    PyObject *field_type;      /* of the descriptors in a Structure or Union */
    PyObject *value_of_simple; /* a descriptor */
    PyObject *reduce;          /* of every ctypes instance */
    ssizeargfunc item_of_array;
    /* type.__dict__, __mro__ and __base__ as they are: a metaclass cannot hide what
     * its classes hold. */
    PyObject *dict_of_type;
    PyObject *mro_of_type;
    PyObject *base_of_type;
    /* Classes that were found to be plain, each in the place that its address gives
     * it. */
    struct known known[KNOWN];
    atomic_flag busy; /* somebody is at the table */
};

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

static int
class_family(const struct foreign_ctypes *ctypes, PyObject *cls)
{
    for (int i = 0; i < FAMILIES; i++) {
        if (cls != ctypes->base[i]
            && PyType_IsSubtype((PyTypeObject *)cls, (PyTypeObject *)ctypes->base[i])) {
            return i;
        }
    }
    return FAMILIES;
}

static int
refuse(PyObject *culprit)
{
    PyErr_Format(PyExc_TypeError,
                 "%R is, or holds, a host pointer or a Python object, which a guest "
                 "could forge",
                 culprit);
    return -1;
}

/* What a class holds is asked of an instance full of zeros, by ctypes' own getters:
 * its _fields_ and _type_ are attributes, which anybody can change afterwards. A
 * pointer is then None or an object of a class that is none of the families', a
 * Python object a ValueError; everything else is a number, characters, or an
 * instance that is asked in turn. */
static int check_instance(const struct foreign_ctypes *ctypes, PyObject *instance,
                          PyObject *seen);

/* value is stolen, NULL where the getter raised. */
static int
check_value(const struct foreign_ctypes *ctypes, PyObject *value, PyObject *culprit,
            PyObject *seen)
{
    if (value == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_ValueError)) {
            return -1;
        }
        PyErr_Clear();
        return refuse(culprit);
    }
    int result;
    if (Py_IsNone(value)) {
        result = refuse(culprit);
    }
    else if (PyLong_CheckExact(value) || PyBool_Check(value)
             || PyFloat_CheckExact(value) || PyComplex_CheckExact(value)
             || PyBytes_CheckExact(value) || PyUnicode_CheckExact(value)) {
        result = 0;
    }
    else {
        result = check_instance(ctypes, value, seen);
    }
    Py_DECREF(value);
    return result;
}

static bool
is_field(const struct foreign_ctypes *ctypes, PyObject *value)
{
    return Py_IS_TYPE(value, (PyTypeObject *)ctypes->field_type);
}

/* What stands in one class's own namespace. */
static PyObject *
own_values(const struct foreign_ctypes *ctypes, PyObject *cls)
{
    PyObject *dict = foreign_describe(ctypes->dict_of_type, cls);
    PyObject *values = dict == NULL ? NULL : PyMapping_Values(dict);
    Py_XDECREF(dict);
    return values;
}

static Py_ssize_t
int_attribute(PyObject *obj, const char *name)
{
    PyObject *number = PyObject_GetAttrString(obj, name);
    Py_ssize_t value = number == NULL ? -1 : PyLong_AsSsize_t(number);
    Py_XDECREF(number);
    return value;
}

/* Whether a field lies within the instance: anybody can make one of another class an
 * attribute of this one, and its getter does not look. Of a bit field, size tells of
 * its bits, and is 2**16 or more. */
static int
check_bounds(const struct foreign_ctypes *ctypes, PyObject *field, PyObject *instance)
{
    PyObject *number = PyObject_CallFunctionObjArgs(ctypes->size_of, instance, NULL);
    Py_ssize_t room = number == NULL ? -1 : PyLong_AsSsize_t(number);
    Py_XDECREF(number);
    Py_ssize_t offset = room < 0 ? -1 : int_attribute(field, "offset");
    Py_ssize_t size = offset < 0 ? -1 : int_attribute(field, "size");
    if (size < 0) {
        return -1;
    }
    if (offset > room || (size >> 16 == 0 && size > room - offset)) {
        PyErr_Format(PyExc_TypeError, "%R is not a field of %R", field,
                     (PyObject *)Py_TYPE(instance));
        return -1;
    }
    return 0;
}

/* The fields of a class that the layout of the instance builds on. */
static int
check_own_fields(const struct foreign_ctypes *ctypes, PyObject *cls, PyObject *instance,
                 PyObject *seen)
{
    PyObject *values = own_values(ctypes, cls);
    Py_ssize_t count = values == NULL ? 0 : PyList_Size(values);
    int result = values == NULL ? -1 : 0;
    for (Py_ssize_t i = 0; i < count && result == 0; i++) {
        PyObject *field = PyList_GetItem(values, i);
        if (is_field(ctypes, field)) {
            result = check_bounds(ctypes, field, instance);
        }
        if (result == 0 && is_field(ctypes, field)) {
            result =
                check_value(ctypes, foreign_describe(field, instance), field, seen);
        }
    }
    Py_XDECREF(values);
    return result;
}

/* The layout of a class builds on __base__ alone; attributes are looked up by
 * __mro__. The fields of a class that is in the second but not in the first would
 * read whatever stands at their offsets, even past the instance's end. */
static int
check_stranger(const struct foreign_ctypes *ctypes, PyObject *cls, PyObject *stranger)
{
    PyObject *values = own_values(ctypes, stranger);
    Py_ssize_t count = values == NULL ? 0 : PyList_Size(values);
    int result = values == NULL ? -1 : 0;
    for (Py_ssize_t i = 0; i < count && result == 0; i++) {
        if (is_field(ctypes, PyList_GetItem(values, i))) {
            PyErr_Format(PyExc_TypeError,
                         "%R has fields of %R, on which its layout does not build", cls,
                         stranger);
            result = -1;
        }
    }
    Py_XDECREF(values);
    return result;
}

/* The classes that the layout builds on, the class itself first: a list. */
static PyObject *
layout_of(const struct foreign_ctypes *ctypes, PyObject *cls)
{
    PyObject *layout = PyList_New(0), *next = Py_NewRef(cls);
    while (layout != NULL && next != NULL && !Py_IsNone(next)) {
        PyObject *at = next;
        if (PyList_Append(layout, at) < 0) {
            Py_CLEAR(layout);
        }
        next = foreign_describe(ctypes->base_of_type, at);
        Py_DECREF(at);
    }
    if (next == NULL) {
        Py_CLEAR(layout);
    }
    Py_XDECREF(next);
    return layout;
}

static bool
holds(PyObject *list, PyObject *obj)
{
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
        if (PyList_GetItem(list, i) == obj) {
            return true;
        }
    }
    return false;
}

static int
check_fields(const struct foreign_ctypes *ctypes, PyObject *instance, PyObject *seen)
{
    PyObject *cls = (PyObject *)Py_TYPE(instance);
    PyObject *layout = layout_of(ctypes, cls);
    PyObject *mro = layout == NULL ? NULL : foreign_describe(ctypes->mro_of_type, cls);
    int result = mro == NULL ? -1 : 0;
    for (Py_ssize_t i = 0; result == 0 && i < PyTuple_Size(mro); i++) {
        PyObject *at = PyTuple_GetItem(mro, i);
        if (!holds(layout, at)) {
            result = check_stranger(ctypes, cls, at);
        }
    }
    for (Py_ssize_t i = 0; result == 0 && i < PyList_Size(layout); i++) {
        result = check_own_fields(ctypes, PyList_GetItem(layout, i), instance, seen);
    }
    Py_XDECREF(mro);
    Py_XDECREF(layout);
    return result;
}

static int
check_instance(const struct foreign_ctypes *ctypes, PyObject *instance, PyObject *seen)
{
    PyObject *cls = (PyObject *)Py_TYPE(instance);
    int result = -1;
    if (holds(seen, cls)) {
        return 0;
    }
    if (Py_EnterRecursiveCall(" in a ctypes class")) {
        return -1;
    }
    switch (class_family(ctypes, cls)) {
    case FAMILY_STRUCTURE:
    case FAMILY_UNION:
        result = check_fields(ctypes, instance, seen);
        break;
    case FAMILY_ARRAY: {
        /* All items are alike. Of none there is nothing to forge: IndexError. */
        PyObject *item = ctypes->item_of_array(instance, 0);
        if (item == NULL && PyErr_ExceptionMatches(PyExc_IndexError)) {
            PyErr_Clear();
            result = 0;
        }
        else {
            result = check_value(ctypes, item, cls, seen);
        }
        break;
    }
    case FAMILY_SIMPLE:
        result = check_value(
            ctypes, foreign_describe(ctypes->value_of_simple, instance), cls, seen);
        break;
    default:
        refuse(cls);
    }
    Py_LeaveRecursiveCall();
    /* Once is enough for a class, or the time would double with each nesting. */
    return result == 0 ? PyList_Append(seen, cls) : -1;
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

/* What ctypes itself knows of a class: it refuses to pickle what holds pointers,
 * even where their fields were taken away from the class. (It does not know of a
 * subclass of a pointer class.) */
static int
check_pickles(const struct foreign_ctypes *ctypes, PyObject *cls, PyObject *instance)
{
    PyObject *reduced = PyObject_CallFunctionObjArgs(ctypes->reduce, instance, NULL);
    if (reduced != NULL) {
        Py_DECREF(reduced);
        return 0;
    }
    /* AttributeError: a class without a __dict__ is none that ctypes made as it is. */
    if (PyErr_ExceptionMatches(PyExc_ValueError)
        || PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        refuse(cls);
    }
    return -1;
}

/* 1, 0 or -1, as plain_class_find, for a class that is not known. */
static int
plain_examine(const struct foreign_ctypes *ctypes, PyObject *cls,
              struct object_type *out)
{
    char *unused;
    int family = class_family(ctypes, cls);
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
    PyObject *seen = instance == NULL ? NULL : PyList_New(0);
    int result = -1;
    if (seen != NULL && check_instance(ctypes, instance, seen) == 0) {
        result = check_pickles(ctypes, cls, instance);
    }
    Py_XDECREF(seen);
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
