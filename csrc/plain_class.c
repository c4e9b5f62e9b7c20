/* ctypes classes: which of them are plain data, and how large they are. */
#include "native.h"

#include "foreign.h"
#include "plain_class.h"

#include <string.h>

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
    /* type.__dict__ and type.__mro__ as they are: a metaclass cannot hide what
     * its classes hold. */
    PyObject *dict_of_type;
    PyObject *mro_of_type;
    /* Classes that were found to be plain and can no longer change, each in the
     * place that its address gives it. */
    struct known known[KNOWN];
#ifdef Py_GIL_DISABLED
    PyMutex lock; /* of known */
#endif
};

void
plain_class_free(struct foreign_ctypes *self)
{
    for (int i = 0; i < FAMILIES; i++) {
        Py_XDECREF(self->base[i]);
    }
    Py_XDECREF(self->size_of);
    Py_XDECREF(self->dict_of_type);
    Py_XDECREF(self->mro_of_type);
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

static struct foreign_ctypes *
plain_class_load(PyObject *module)
{
    static const char *const names[FAMILIES] = {"Structure", "Union", "Array",
                                                "_SimpleCData"};
    struct foreign_ctypes *self = PyMem_Calloc(1, sizeof(*self));
    if (self == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (int i = 0; i < FAMILIES; i++) {
        if ((self->base[i] = foreign_type(module, names[i])) == NULL) {
            goto fail;
        }
        PyTypeObject *base = (PyTypeObject *)self->base[i];
        self->make[i] = SLOT_OF(base, Py_tp_new, newfunc);
        self->get_buffer[i] = SLOT_OF(base, Py_bf_getbuffer, get_buffer_function);
        if (self->make[i] == NULL || self->get_buffer[i] == NULL) {
            PyErr_Format(PyExc_ImportError, "%R makes no data", self->base[i]);
            goto fail;
        }
    }
    if ((self->size_of = PyObject_GetAttrString(module, "sizeof")) == NULL
        || (self->dict_of_type = type_descriptor("__dict__")) == NULL
        || (self->mro_of_type = type_descriptor("__mro__")) == NULL) {
        goto fail;
    }
    return self;
fail:
    plain_class_free(self);
    return NULL;
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

/* The attribute that stands in this class's own namespace: a new reference, or
 * NULL, with an exception only if something went wrong. */
static PyObject *
class_own(const struct foreign_ctypes *ctypes, PyObject *cls, const char *name)
{
    PyObject *dict = foreign_describe(ctypes->dict_of_type, cls);
    PyObject *result = dict == NULL ? NULL : PyMapping_GetItemString(dict, name);
    if (result == NULL && PyErr_ExceptionMatches(PyExc_KeyError)) {
        PyErr_Clear();
    }
    Py_XDECREF(dict);
    return result;
}

/* The attribute as the class or the nearest of its bases has it. */
static PyObject *
class_inherited(const struct foreign_ctypes *ctypes, PyObject *cls, const char *name)
{
    PyObject *mro = foreign_describe(ctypes->mro_of_type, cls), *result = NULL;
    Py_ssize_t count = mro == NULL ? 0 : PyTuple_Size(mro);
    for (Py_ssize_t i = 0; i < count && result == NULL && !PyErr_Occurred(); i++) {
        result = class_own(ctypes, PyTuple_GetItem(mro, i), name);
    }
    Py_XDECREF(mro);
    return result;
}

static int
class_family(const struct foreign_ctypes *ctypes, PyObject *cls)
{
    if (PyType_Check(cls)) {
        for (int i = 0; i < FAMILIES; i++) {
            if (cls != ctypes->base[i]
                && PyType_IsSubtype((PyTypeObject *)cls,
                                    (PyTypeObject *)ctypes->base[i])) {
                return i;
            }
        }
    }
    return FAMILIES;
}

static int
refuse(PyObject *cls)
{
    PyErr_Format(
        PyExc_TypeError,
        "%R cannot be read from guest memory: it is, or holds, a host pointer or "
        "a Python object, which a guest could forge",
        cls);
    return -1;
}

static int check_plain(const struct foreign_ctypes *ctypes, PyObject *cls, bool *final);

/* (name, type) or (name, type, bits) */
static int
check_field(const struct foreign_ctypes *ctypes, PyObject *field, bool *final)
{
    PyObject *type = PySequence_GetItem(field, 1);
    if (type == NULL) {
        return -1;
    }
    int result = check_plain(ctypes, type, final);
    Py_DECREF(type);
    return result;
}

/* The _fields_ of one class, without those of its bases. */
static int
check_own_fields(const struct foreign_ctypes *ctypes, PyObject *cls, PyObject *fields,
                 bool *final)
{
    Py_ssize_t count = PySequence_Size(fields);
    if (count < 0) {
        return refuse(cls);
    }
    int result = 0;
    for (Py_ssize_t i = 0; i < count && result == 0; i++) {
        PyObject *field = PySequence_GetItem(fields, i);
        result = field == NULL ? -1 : check_field(ctypes, field, final);
        Py_XDECREF(field);
    }
    return result;
}

/* A Structure or Union: its fields and those of all its bases. It is final once
 * it has _fields_ of its own; before, ctypes still lets them be set. */
static int
check_fields(const struct foreign_ctypes *ctypes, PyObject *cls, bool *final)
{
    PyObject *mro = foreign_describe(ctypes->mro_of_type, cls);
    if (mro == NULL) {
        return -1;
    }
    int result = 0;
    Py_ssize_t count = PyTuple_Size(mro);
    for (Py_ssize_t i = 0; i < count && result == 0; i++) {
        PyObject *fields = class_own(ctypes, PyTuple_GetItem(mro, i), "_fields_");
        if (fields != NULL) {
            result = check_own_fields(ctypes, cls, fields, final);
            Py_DECREF(fields);
        }
        else if (PyErr_Occurred()) {
            result = -1;
        }
        else if (i == 0) {
            *final = false;
        }
    }
    Py_DECREF(mro);
    return result;
}

/* A simple type: by the letter of its _type_ (ctypes' own, as in struct). */
static int
check_simple(const struct foreign_ctypes *ctypes, PyObject *cls)
{
    PyObject *code = class_inherited(ctypes, cls, "_type_");
    if (code == NULL) {
        return PyErr_Occurred() ? -1 : refuse(cls);
    }
    Py_UCS4 letter = PyUnicode_Check(code) && PyUnicode_GetLength(code) == 1
                         ? PyUnicode_ReadChar(code, 0)
                         : 0;
    Py_DECREF(code);
    /* Numbers, bool, characters, complex numbers (3.14). Not among them: O z Z P X,
     * which are objects and pointers. */
    if (letter == 0 || letter > 127
        || strchr("?cubBhHiIlLqQfdgFDGCEv", (int)letter) == NULL) {
        return refuse(cls);
    }
    return 0;
}

static int
check_array(const struct foreign_ctypes *ctypes, PyObject *cls, bool *final)
{
    PyObject *item = class_inherited(ctypes, cls, "_type_");
    if (item == NULL) {
        return PyErr_Occurred() ? -1 : refuse(cls);
    }
    int result = check_plain(ctypes, item, final);
    Py_DECREF(item);
    return result;
}

/* 0 where every bit pattern is a valid instance of the class, else -1 with a
 * TypeError. *final is cleared where the class may still change. */
static int
check_plain(const struct foreign_ctypes *ctypes, PyObject *cls, bool *final)
{
    int result = -1;
    if (Py_EnterRecursiveCall(" in a ctypes class")) {
        return -1;
    }
    switch (class_family(ctypes, cls)) {
    case FAMILY_STRUCTURE:
    case FAMILY_UNION:
        result = check_fields(ctypes, cls, final);
        break;
    case FAMILY_ARRAY:
        result = check_array(ctypes, cls, final);
        break;
    case FAMILY_SIMPLE:
        result = check_simple(ctypes, cls);
        break;
    default:
        refuse(cls);
    }
    Py_LeaveRecursiveCall();
    return result;
}

static inline struct known *
known_lock(struct foreign_ctypes *ctypes, PyObject *cls)
{
#ifdef Py_GIL_DISABLED
    PyMutex_Lock(&ctypes->lock);
#endif
    return &ctypes->known[((uintptr_t)cls >> 6) % KNOWN];
}

static inline void
known_unlock(struct foreign_ctypes *ctypes)
{
#ifdef Py_GIL_DISABLED
    PyMutex_Unlock(&ctypes->lock);
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
    const struct known *known = known_lock(ctypes, cls);
    bool found = known->weak == weak;
    if (found) {
        *out = known->type;
    }
    known_unlock(ctypes);
    return found;
}

static void
known_add(struct foreign_ctypes *ctypes, PyObject *cls, PyObject *weak,
          const struct object_type *type)
{
    struct known *known = known_lock(ctypes, cls);
    PyObject *old = known->weak;
    *known = (struct known){Py_NewRef(weak), *type};
    known_unlock(ctypes);
    Py_XDECREF(old);
}

/* 1, 0 or -1, as plain_class_find, for a class that is not known. */
static int
plain_examine(const struct foreign_ctypes *ctypes, PyObject *cls,
              struct object_type *out, bool *final)
{
    int family = class_family(ctypes, cls);
    if (family == FAMILIES) {
        return 0;
    }
    if (check_plain(ctypes, cls, final) < 0) {
        return -1;
    }
    PyObject *number = PyObject_CallFunctionObjArgs(ctypes->size_of, cls, NULL);
    Py_ssize_t size = number == NULL ? -1 : PyLong_AsSsize_t(number);
    Py_XDECREF(number);
    *out = (struct object_type){cls, (size_t)size, ctypes->make[family],
                                ctypes->get_buffer[family], false};
    return size < 0 ? -1 : 1;
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
        bool final = true;
        found = plain_examine(ctypes, cls, out, &final);
        if (found == 1 && final) {
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
    Py_VISIT(self->dict_of_type);
    Py_VISIT(self->mro_of_type);
    for (int i = 0; i < KNOWN; i++) {
        Py_VISIT(self->known[i].weak);
    }
    return 0;
}
