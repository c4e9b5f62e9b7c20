/* The types of objects in memory that are not ours: ctypes classes and
 * struct.Struct objects. Neither module is imported for those who do not use it:
 * an object of theirs can only come from somebody who has imported them.
 */
#include "native.h"

#include "object_type.h"

#include <string.h>

enum { FAMILY_STRUCTURE, FAMILY_UNION, FAMILY_ARRAY, FAMILY_SIMPLE, FAMILIES };

struct foreign_ctypes {
    /* The four families of plain data. Every other ctypes class (pointers,
     * functions) is refused. */
    PyObject *base[FAMILIES];
    PyObject *from_buffer_copy[FAMILIES];
    PyObject *size_of;
    /* type.__dict__ and type.__mro__ as they are: a metaclass cannot hide what
     * its classes hold. */
    PyObject *dict_of_type;
    PyObject *mro_of_type;
    /* id of a class -> (weak reference to it, size), for classes that were found
     * to be plain and can no longer change. */
    PyObject *plain;
};

struct foreign_struct {
    PyObject *type;
    PyObject *size;
    PyObject *unpack;
    PyObject *pack;
};

/* When so many classes are known the table starts anew: a program that makes
 * classes without end must not fill the memory. */
#define PLAIN_MOST 1024

static void
foreign_ctypes_free(struct foreign_ctypes *self)
{
    for (int i = 0; i < FAMILIES; i++) {
        Py_XDECREF(self->base[i]);
        Py_XDECREF(self->from_buffer_copy[i]);
    }
    Py_XDECREF(self->size_of);
    Py_XDECREF(self->dict_of_type);
    Py_XDECREF(self->mro_of_type);
    Py_XDECREF(self->plain);
    PyMem_Free(self);
}

static void
foreign_struct_free(struct foreign_struct *self)
{
    Py_XDECREF(self->type);
    Py_XDECREF(self->size);
    Py_XDECREF(self->unpack);
    Py_XDECREF(self->pack);
    PyMem_Free(self);
}

/* An attribute that must be a type. */
static PyObject *
foreign_type(PyObject *module, const char *name)
{
    PyObject *type = PyObject_GetAttrString(module, name);
    if (type != NULL && !PyType_Check(type)) {
        PyErr_Format(PyExc_ImportError, "%R has no type %s", module, name);
        Py_CLEAR(type);
    }
    return type;
}

static PyObject *
foreign_type_descriptor(const char *name)
{
    PyObject *dict = PyObject_GetAttrString((PyObject *)&PyType_Type, "__dict__");
    PyObject *result = dict == NULL ? NULL : PyMapping_GetItemString(dict, name);
    Py_XDECREF(dict);
    return result;
}

static struct foreign_ctypes *
foreign_ctypes_new(PyObject *module)
{
    static const char *const names[FAMILIES] = {"Structure", "Union", "Array",
                                                "_SimpleCData"};
    struct foreign_ctypes *self = PyMem_Calloc(1, sizeof(*self));
    if (self == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (int i = 0; i < FAMILIES; i++) {
        if ((self->base[i] = foreign_type(module, names[i])) == NULL
            || (self->from_buffer_copy[i] = PyObject_GetAttrString(
                    (PyObject *)Py_TYPE(self->base[i]), "from_buffer_copy"))
                   == NULL) {
            goto fail;
        }
    }
    if ((self->size_of = PyObject_GetAttrString(module, "sizeof")) == NULL
        || (self->dict_of_type = foreign_type_descriptor("__dict__")) == NULL
        || (self->mro_of_type = foreign_type_descriptor("__mro__")) == NULL
        || (self->plain = PyDict_New()) == NULL) {
        goto fail;
    }
    return self;
fail:
    foreign_ctypes_free(self);
    return NULL;
}

static struct foreign_struct *
foreign_struct_new(PyObject *module)
{
    struct foreign_struct *self = PyMem_Calloc(1, sizeof(*self));
    if (self == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    if ((self->type = foreign_type(module, "Struct")) == NULL
        || (self->size = PyObject_GetAttrString(self->type, "size")) == NULL
        || (self->unpack = PyObject_GetAttrString(self->type, "unpack")) == NULL
        || (self->pack = PyObject_GetAttrString(self->type, "pack")) == NULL) {
        foreign_struct_free(self);
        return NULL;
    }
    return self;
}

/* The module where it has been imported; NULL without an exception where not. */
static PyObject *
foreign_imported(const char *name)
{
    PyObject *key = PyUnicode_FromString(name);
    PyObject *module = key == NULL ? NULL : PyImport_GetModule(key);
    Py_XDECREF(key);
    return module;
}

/* Both return what the state holds once the module has been imported, and NULL
 * before (or with an exception). Two threads may come here at once: one of them
 * wins, and the other one's is freed. */
static struct foreign_ctypes *
foreign_ctypes_get(module_state *state)
{
    struct foreign_ctypes *self = atomic_load(&state->ctypes);
    PyObject *module;
    if (self != NULL || (module = foreign_imported("_ctypes")) == NULL) {
        return self;
    }
    struct foreign_ctypes *mine = foreign_ctypes_new(module);
    Py_DECREF(module);
    if (mine != NULL && !atomic_compare_exchange_strong(&state->ctypes, &self, mine)) {
        foreign_ctypes_free(mine);
        return self;
    }
    return mine;
}

static struct foreign_struct *
foreign_struct_get(module_state *state)
{
    struct foreign_struct *self = atomic_load(&state->structs);
    PyObject *module;
    if (self != NULL || (module = foreign_imported("_struct")) == NULL) {
        return self;
    }
    struct foreign_struct *mine = foreign_struct_new(module);
    Py_DECREF(module);
    if (mine != NULL && !atomic_compare_exchange_strong(&state->structs, &self, mine)) {
        foreign_struct_free(mine);
        return self;
    }
    return mine;
}

/* What one of type's own descriptors says of a class. */
static PyObject *
class_attribute(PyObject *descriptor, PyObject *cls)
{
    return PyObject_CallMethod(descriptor, "__get__", "OO", cls,
                               (PyObject *)Py_TYPE(cls));
}

/* The attribute that stands in this class's own namespace: a new reference, or
 * NULL, with an exception only if something went wrong. */
static PyObject *
class_own(const struct foreign_ctypes *ctypes, PyObject *cls, const char *name)
{
    PyObject *dict = class_attribute(ctypes->dict_of_type, cls);
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
    PyObject *mro = class_attribute(ctypes->mro_of_type, cls), *result = NULL;
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
    PyObject *mro = class_attribute(ctypes->mro_of_type, cls);
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

/* The size of a class that was found to be plain before, or -1. Never raises. */
static Py_ssize_t
plain_recall(const struct foreign_ctypes *ctypes, PyObject *key, PyObject *weak)
{
    PyObject *known = PyDict_GetItemWithError(ctypes->plain, key);
    /* The id of a class that is gone may come again, but never with the weak
     * reference that the table kept. */
    if (known == NULL || PyTuple_GetItem(known, 0) != weak) {
        return -1;
    }
    return PyLong_AsSsize_t(PyTuple_GetItem(known, 1));
}

static int
plain_remember(const struct foreign_ctypes *ctypes, PyObject *key, PyObject *weak,
               Py_ssize_t size)
{
    if (PyDict_Size(ctypes->plain) >= PLAIN_MOST) {
        PyDict_Clear(ctypes->plain);
    }
    PyObject *known = Py_BuildValue("(On)", weak, size);
    int result = known == NULL ? -1 : PyDict_SetItem(ctypes->plain, key, known);
    Py_XDECREF(known);
    return result;
}

static Py_ssize_t
plain_examine(const struct foreign_ctypes *ctypes, PyObject *cls, bool *final)
{
    if (check_plain(ctypes, cls, final) < 0) {
        return -1;
    }
    PyObject *number = PyObject_CallFunctionObjArgs(ctypes->size_of, cls, NULL);
    Py_ssize_t size = number == NULL ? -1 : PyLong_AsSsize_t(number);
    Py_XDECREF(number);
    return size;
}

static Py_ssize_t
plain_size(const struct foreign_ctypes *ctypes, PyObject *cls)
{
    PyObject *key = PyLong_FromVoidPtr(cls), *weak = PyWeakref_NewRef(cls, NULL);
    Py_ssize_t size = -1;
    if (key != NULL && weak != NULL) {
        size = plain_recall(ctypes, key, weak);
        if (size < 0) {
            bool final = true;
            size = plain_examine(ctypes, cls, &final);
            if (size >= 0 && final && plain_remember(ctypes, key, weak, size) < 0) {
                size = -1;
            }
        }
    }
    Py_XDECREF(key);
    Py_XDECREF(weak);
    return size;
}

static int
find_ctypes(module_state *state, PyObject *cls, struct object_type *out)
{
    const struct foreign_ctypes *ctypes = foreign_ctypes_get(state);
    int family = ctypes == NULL ? FAMILIES : class_family(ctypes, cls);
    if (family == FAMILIES) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_TypeError,
                         "type must be a Scalar, a ctypes class of plain data or a "
                         "struct.Struct, not %R",
                         cls);
        }
        return -1;
    }
    Py_ssize_t size = plain_size(ctypes, cls);
    if (size < 0) {
        return -1;
    }
    *out = (struct object_type){cls, (size_t)size, ctypes->from_buffer_copy[family]};
    return 0;
}

static int
find_struct(const struct foreign_struct *structs, PyObject *self,
            struct object_type *out)
{
    PyObject *number = class_attribute(structs->size, self);
    Py_ssize_t size = number == NULL ? -1 : PyLong_AsSsize_t(number);
    Py_XDECREF(number);
    if (size < 0) {
        /* CPython before 3.13 crashes when such a Struct is used. */
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_TypeError, "the struct.Struct was never initialised");
        }
        return -1;
    }
    *out = (struct object_type){self, (size_t)size, NULL};
    return 0;
}

int
object_type_find(module_state *state, PyObject *type, struct object_type *out)
{
    if (PyType_Check(type)) {
        return find_ctypes(state, type, out);
    }
    const struct foreign_struct *structs = foreign_struct_get(state);
    if (structs != NULL && PyObject_TypeCheck(type, (PyTypeObject *)structs->type)) {
        return find_struct(structs, type, out);
    }
    if (!PyErr_Occurred()) {
        errors_wrong_type(
            "type", "a Scalar, a ctypes class of plain data or a struct.Struct", type);
    }
    return -1;
}

int
object_type_of_value(module_state *state, PyObject *value, struct object_type *out)
{
    const struct foreign_ctypes *ctypes = foreign_ctypes_get(state);
    PyObject *type = (PyObject *)Py_TYPE(value);
    if (ctypes != NULL && class_family(ctypes, type) != FAMILIES) {
        return find_ctypes(state, type, out);
    }
    if (!PyErr_Occurred()) {
        errors_wrong_type("val", "a ctypes instance where type is left out", value);
    }
    return -1;
}

PyObject *
object_type_load(module_state *state, const struct object_type *self, PyObject *bytes)
{
    if (self->from_buffer_copy != NULL) {
        return PyObject_CallFunctionObjArgs(self->from_buffer_copy, self->type, bytes,
                                            NULL);
    }
    return PyObject_CallFunctionObjArgs(foreign_struct_get(state)->unpack, self->type,
                                        bytes, NULL);
}

/* The first `size` bytes of a ctypes instance, whatever its buffer was resized to.
 * A copy: ctypes.resize frees a buffer that is exported. */
static PyObject *
store_ctypes(const struct object_type *self, PyObject *value)
{
    if (!PyObject_TypeCheck(value, (PyTypeObject *)self->type)) {
        PyErr_Format(PyExc_TypeError, "val must be an instance of %R, not of %R",
                     self->type, (PyObject *)Py_TYPE(value));
        return NULL;
    }
    Py_buffer view;
    if (PyObject_GetBuffer(value, &view, PyBUF_SIMPLE) < 0) {
        return NULL;
    }
    PyObject *bytes = NULL;
    if (view.len < (Py_ssize_t)self->size) {
        PyErr_Format(PyExc_BufferError, "val has %zd bytes, and its type %zu", view.len,
                     self->size);
    }
    else {
        bytes = PyBytes_FromStringAndSize(view.buf, (Py_ssize_t)self->size);
    }
    PyBuffer_Release(&view);
    return bytes;
}

/* Struct.pack(self, *value) */
static PyObject *
store_struct(PyObject *pack, const struct object_type *self, PyObject *value)
{
    if (!PyTuple_Check(value)) {
        return errors_wrong_type("val", "a tuple for a struct.Struct", value);
    }
    Py_ssize_t count = PyTuple_Size(value);
    PyObject *args = PyTuple_New(count + 1);
    if (args == NULL) {
        return NULL;
    }
    PyTuple_SetItem(args, 0, Py_NewRef(self->type));
    for (Py_ssize_t i = 0; i < count; i++) {
        PyTuple_SetItem(args, i + 1, Py_NewRef(PyTuple_GetItem(value, i)));
    }
    PyObject *bytes = PyObject_CallObject(pack, args);
    Py_DECREF(args);
    if (bytes != NULL && !PyBytes_Check(bytes)) {
        errors_wrong_type("what struct.Struct.pack returns", "bytes", bytes);
        Py_CLEAR(bytes);
    }
    return bytes;
}

PyObject *
object_type_store(module_state *state, const struct object_type *self, PyObject *value)
{
    if (self->from_buffer_copy != NULL) {
        return store_ctypes(self, value);
    }
    return store_struct(foreign_struct_get(state)->pack, self, value);
}

int
object_type_traverse(module_state *state, visitproc visit, void *arg)
{
    struct foreign_ctypes *ctypes = atomic_load(&state->ctypes);
    struct foreign_struct *structs = atomic_load(&state->structs);
    if (ctypes != NULL) {
        for (int i = 0; i < FAMILIES; i++) {
            Py_VISIT(ctypes->base[i]);
            Py_VISIT(ctypes->from_buffer_copy[i]);
        }
        Py_VISIT(ctypes->size_of);
        Py_VISIT(ctypes->dict_of_type);
        Py_VISIT(ctypes->mro_of_type);
        Py_VISIT(ctypes->plain);
    }
    if (structs != NULL) {
        Py_VISIT(structs->type);
        Py_VISIT(structs->size);
        Py_VISIT(structs->unpack);
        Py_VISIT(structs->pack);
    }
    return 0;
}

void
object_type_clear(module_state *state)
{
    struct foreign_ctypes *ctypes = atomic_exchange(&state->ctypes, NULL);
    struct foreign_struct *structs = atomic_exchange(&state->structs, NULL);
    if (ctypes != NULL) {
        foreign_ctypes_free(ctypes);
    }
    if (structs != NULL) {
        foreign_struct_free(structs);
    }
}
