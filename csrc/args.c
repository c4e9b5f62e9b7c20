/* The slow paths of args.h, and the wording of its errors. */
#include "native.h"

#include "args.h"

#include <limits.h>

int
args_wrong_count(const char *function, const char *wanted, Py_ssize_t given)
{
    PyErr_Format(PyExc_TypeError, "%s() takes %s%s%s, got %zd positional argument%s",
                 function, *wanted ? "(" : "no arguments", wanted, *wanted ? ")" : "",
                 given, given == 1 ? "" : "s");
    return -1;
}

static Py_ssize_t
args_find(const struct args_spec *spec, PyObject *name)
{
    for (Py_ssize_t i = spec->positional; spec->names[i] != NULL; i++) {
        if (PyUnicode_CompareWithASCIIString(name, spec->names[i]) == 0) {
            return i;
        }
    }
    return -1;
}

/* Puts one keyword argument in its place. */
static int
args_place(const struct args_spec *spec, PyObject *name, PyObject *value,
           PyObject **out)
{
    Py_ssize_t i = PyUnicode_Check(name) ? args_find(spec, name) : -1;
    if (i < 0) {
        PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument %R",
                     spec->function, name);
        return -1;
    }
    if (out[i] != NULL) {
        PyErr_Format(PyExc_TypeError, "%s() got two values for argument '%s'",
                     spec->function, spec->names[i]);
        return -1;
    }
    out[i] = value;
    return 0;
}

static int
args_begin(const struct args_spec *spec, Py_ssize_t given, PyObject **out)
{
    Py_ssize_t most = 0;
    for (; spec->names[most] != NULL; most++) {
        out[most] = NULL;
    }
    most -= spec->keywords;
    if (given > most) {
        PyErr_Format(PyExc_TypeError,
                     "%s() takes at most %zd positional arguments, got %zd",
                     spec->function, most, given);
        return -1;
    }
    return 0;
}

static int
args_end(const struct args_spec *spec, PyObject **out)
{
    for (Py_ssize_t i = 0; i < spec->required; i++) {
        if (out[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() misses its argument '%s'",
                         spec->function, spec->names[i]);
            return -1;
        }
    }
    return 0;
}

int
args_named(const struct args_spec *spec, PyObject *const *args, Py_ssize_t given,
           PyObject *kwnames, PyObject **out)
{
    if (args_begin(spec, given, out) < 0) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < given; i++) {
        out[i] = args[i];
    }
    Py_ssize_t named = kwnames == NULL ? 0 : PyTuple_Size(kwnames);
    for (Py_ssize_t i = 0; i < named; i++) {
        PyObject *name = PyTuple_GetItem(kwnames, i);
        if (args_place(spec, name, args[given + i], out) < 0) {
            return -1;
        }
    }
    return args_end(spec, out);
}

int
args_named_tuple(const struct args_spec *spec, PyObject *args, PyObject *kwargs,
                 PyObject **out)
{
    Py_ssize_t given = PyTuple_Size(args);
    if (args_begin(spec, given, out) < 0) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < given; i++) {
        out[i] = PyTuple_GetItem(args, i);
    }
    PyObject *name, *value;
    Py_ssize_t position = 0;
    while (kwargs != NULL && PyDict_Next(kwargs, &position, &name, &value)) {
        if (args_place(spec, name, value, out) < 0) {
            return -1;
        }
    }
    return args_end(spec, out);
}

PyObject *
args_index(PyObject *arg, const char *name)
{
    if (!PyIndex_Check(arg)) {
        return errors_wrong_type(name, "an int", arg);
    }
    return PyNumber_Index(arg);
}

int
args_unsigned(PyObject *arg, const char *name, uint64_t most, const char *limit,
              uint64_t *out)
{
    PyObject *number = args_index(arg, name);
    if (number == NULL) {
        return -1;
    }
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    bool fits = overflow == 0 && value >= 0;
    *out = (uint64_t)value;
    if (overflow > 0) {
        *out = PyLong_AsUnsignedLongLong(number);
        fits = !PyErr_Occurred();
        PyErr_Clear();
    }
    fits = fits && *out <= most;
    PyObject *text = fits ? NULL : errors_int_text(number);
    if (text != NULL) {
        PyErr_Format(PyExc_OverflowError, "%s must be from 0 to %s, not %U", name,
                     limit, text);
        Py_DECREF(text);
    }
    Py_DECREF(number);
    return fits ? 0 : -1;
}

/* fileno() of an object, as an int object. */
static PyObject *
args_fileno(PyObject *arg, const char *name)
{
    PyObject *method = PyObject_GetAttrString(arg, "fileno");
    PyObject *number = method == NULL ? NULL : PyObject_CallNoArgs(method);
    /* io.UnsupportedOperation, which is both, says that there is no descriptor. */
    bool has_none = method == NULL
                        ? PyErr_ExceptionMatches(PyExc_AttributeError)
                        : number == NULL && PyErr_ExceptionMatches(PyExc_OSError)
                              && PyErr_ExceptionMatches(PyExc_ValueError);
    Py_XDECREF(method);
    if (has_none) {
        PyObject *cause = errors_take();
        errors_wrong_type(name, "an int or an object with fileno()", arg);
        errors_set_cause(cause);
    }
    if (number != NULL && !PyLong_Check(number)) {
        errors_wrong_type("what fileno() returns", "an int", number);
        Py_CLEAR(number);
    }
    return number;
}

int
args_fd(PyObject *arg, const char *name, int *out)
{
    PyObject *number = PyLong_Check(arg) ? Py_NewRef(arg) : args_fileno(arg, name);
    if (number == NULL) {
        return -1;
    }
    int overflow;
    long value = PyLong_AsLongAndOverflow(number, &overflow);
    bool fits = overflow == 0 && value >= INT_MIN && value <= INT_MAX;
    PyObject *text = fits ? NULL : errors_int_text(number);
    if (text != NULL) {
        PyErr_Format(PyExc_OverflowError,
                     "%s must be a file descriptor, a C int, not %U", name, text);
        Py_DECREF(text);
    }
    Py_DECREF(number);
    *out = (int)value;
    return fits ? 0 : -1;
}

int
args_buffer(PyObject *obj, const char *name, Py_buffer *view, bool writable)
{
    const char *wanted =
        writable ? "a writable contiguous buffer" : "a contiguous buffer";
    if (PyObject_GetBuffer(obj, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) == 0) {
        return 0;
    }
    if (!PyObject_CheckBuffer(obj)) {
        PyErr_Clear();
        errors_wrong_type(name, wanted, obj);
        return -1;
    }
    /* CPython's own types say BufferError, NumPy says ValueError. Ours says what
     * was wanted, and theirs stays as its cause. A subclass of ValueError, such
     * as our ClosedError, says something else. */
    if (PyErr_ExceptionMatches(PyExc_BufferError)
        || PyErr_Occurred() == PyExc_ValueError) {
        PyObject *cause = errors_take();
        PyErr_Format(PyExc_BufferError, "%s must be %s, not a %s one", name, wanted,
                     writable ? "read-only or non-contiguous" : "non-contiguous");
        errors_set_cause(cause);
    }
    return -1;
}

PyObject *
args_sum(uint64_t a, uint64_t b)
{
    PyObject *first = PyLong_FromUnsignedLongLong(a);
    PyObject *second = PyLong_FromUnsignedLongLong(b);
    PyObject *sum =
        first == NULL || second == NULL ? NULL : PyNumber_Add(first, second);
    Py_XDECREF(first);
    Py_XDECREF(second);
    return sum;
}
