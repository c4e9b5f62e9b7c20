/* Whether a ctypes class is plain data: that it holds no host pointer and no Python
 * object at any depth. */
#include "native.h"

#include "foreign.h"
#include "foreign_ctypes.h"

int
plain_family(const struct foreign_ctypes *ctypes, PyObject *cls)
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
    switch (plain_family(ctypes, cls)) {
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

int
plain_check(const struct foreign_ctypes *ctypes, PyObject *instance)
{
    PyObject *seen = PyList_New(0);
    int result = seen == NULL ? -1 : check_instance(ctypes, instance, seen);
    Py_XDECREF(seen);
    return result < 0 ? -1
                      : check_pickles(ctypes, (PyObject *)Py_TYPE(instance), instance);
}
