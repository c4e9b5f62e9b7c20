/* Raising our own errors. The classes, their fields and their texts are written
 * in errors.py; this file fills in the fields. */
#include "native.h"

#include "args.h"

#include <string.h>

/* PyErr_SetObject with a new instance; args as in PyObject_CallFunction. */
static PyObject *
errors_raise(PyObject *error_class, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    PyObject *args = Py_VaBuildValue(format, list);
    va_end(list);
    if (args == NULL) {
        return NULL;
    }
    PyObject *error = PyObject_CallObject(error_class, args);
    Py_DECREF(args);
    if (error != NULL) {
        PyErr_SetObject(error_class, error);
        Py_DECREF(error);
    }
    return NULL;
}

PyObject *
errors_invalid_address(module_state *state, uint64_t offset, uint64_t count,
                       uint64_t size)
{
    return errors_raise(state->InvalidAddressError, "(KKK)", (unsigned long long)offset,
                        (unsigned long long)count, (unsigned long long)size);
}

PyObject *
errors_invalid_range(module_state *state, uint64_t offset, uint64_t count,
                     uint64_t size)
{
    return errors_raise(state->InvalidRangeError, "(KKK)", (unsigned long long)offset,
                        (unsigned long long)count, (unsigned long long)size);
}

PyObject *
errors_not_removed(module_state *state, uint64_t offset, uint64_t count, uint64_t size,
                   int err)
{
    errors_system_call(state, err, "madvise");
    if (!PyErr_ExceptionMatches(state->SystemCallFailedError)) {
        return NULL; /* there was no memory to make it */
    }
    PyObject *cause = errors_take();
    PyObject *reason = cause == NULL ? NULL : PyObject_Str(cause);
    if (reason != NULL) {
        errors_raise(state->InvalidRangeError, "(KKKN)", (unsigned long long)offset,
                     (unsigned long long)count, (unsigned long long)size, reason);
    }
    errors_set_cause(cause);
    return NULL;
}

PyObject *
errors_out_of_bounds(module_state *state, uint64_t addr, uint64_t size)
{
    return errors_raise(state->OutOfBoundsError, "(KK)", (unsigned long long)addr,
                        (unsigned long long)size);
}

PyObject *
errors_address_overflow(module_state *state, uint64_t base, uint64_t offset)
{
    return errors_raise(state->AddressOverflowError, "(KK)", (unsigned long long)base,
                        (unsigned long long)offset);
}

PyObject *
errors_array_overflow(module_state *state, uint64_t base, uint64_t length,
                      uint64_t element)
{
    PyObject *n = PyLong_FromUnsignedLongLong(length);
    PyObject *size = PyLong_FromUnsignedLongLong(element);
    PyObject *bytes = n == NULL || size == NULL ? NULL : PyNumber_Multiply(n, size);
    Py_XDECREF(n);
    Py_XDECREF(size);
    return bytes == NULL ? NULL
                         : errors_raise(state->AddressOverflowError, "(KN)",
                                        (unsigned long long)base, bytes);
}

PyObject *
errors_invalid_guest_address(module_state *state, uint64_t addr)
{
    return errors_raise(state->InvalidGuestAddressError, "(K)",
                        (unsigned long long)addr);
}

PyObject *
errors_crosses_border(module_state *state, uint64_t addr, uint64_t count,
                      uint64_t border)
{
    PyObject *end = args_sum(addr, count);
    return end == NULL ? NULL
                       : errors_raise(state->OutOfBoundsError, "(NKO)", end,
                                      (unsigned long long)border, Py_True);
}

PyObject *
errors_invalid_region(module_state *state, uint64_t start, uint64_t size,
                      const uint64_t *is)
{
    if (is == NULL) {
        return errors_raise(state->InvalidRegionError, "(KK)",
                            (unsigned long long)start, (unsigned long long)size);
    }
    return errors_raise(state->InvalidRegionError, "(KKK)", (unsigned long long)start,
                        (unsigned long long)size, (unsigned long long)*is);
}

PyObject *
errors_region_overlap(module_state *state, uint64_t start, uint64_t size,
                      uint64_t other_start, uint64_t other_size)
{
    return errors_raise(state->MemoryRegionOverlapError, "(KKKK)",
                        (unsigned long long)start, (unsigned long long)size,
                        (unsigned long long)other_start,
                        (unsigned long long)other_size);
}

PyObject *
errors_misaligned(module_state *state, uint64_t offset, uint64_t alignment)
{
    return errors_raise(state->MisalignedError, "(KK)", (unsigned long long)offset,
                        (unsigned long long)alignment);
}

PyObject *
errors_invalid_offset(module_state *state, PyObject *offset)
{
    return errors_raise(state->InvalidOffsetError, "(O)", offset);
}

PyObject *
errors_invalid_offset_u64(module_state *state, uint64_t offset, uint64_t count)
{
    return errors_raise(state->InvalidOffsetError, "(KK)", (unsigned long long)offset,
                        (unsigned long long)count);
}

PyObject *
errors_wrong_type(const char *what, const char *expected, PyObject *given)
{
    bool is_class = PyType_Check(given);
    PyObject *name = PyType_GetName(is_class ? (PyTypeObject *)given : Py_TYPE(given));
    if (name != NULL) {
        PyErr_Format(PyExc_TypeError, "%s must be %s, not %s'%U'", what, expected,
                     is_class ? "the class " : "", name);
        Py_DECREF(name);
    }
    return NULL;
}

PyObject *
errors_int_text(PyObject *number)
{
    int overflow;
    (void)PyLong_AsLongLongAndOverflow(number, &overflow);
    if (overflow == 0) {
        return PyObject_Repr(number);
    }
    PyObject *length = PyObject_CallMethod(number, "bit_length", NULL);
    PyObject *text =
        length == NULL
            ? NULL
            : PyUnicode_FromFormat("%s int of %S bits",
                                   overflow < 0 ? "a negative" : "an", length);
    Py_XDECREF(length);
    return text;
}

const char errors_not_copied_doc[] = PyDoc_STR(
    "__reduce__($self)\n--\n\n"
    "Raise TypeError: memory, and what tells of it, is not copied or pickled.");

PyObject *
errors_not_copied(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PyObject *name = PyType_GetName(Py_TYPE(op));
    if (name != NULL) {
        PyErr_Format(PyExc_TypeError, "cannot copy or pickle %U objects", name);
        Py_DECREF(name);
    }
    return NULL;
}

PyObject *
errors_closed(module_state *state, const char *text)
{
    PyErr_SetString(state->ClosedError, text);
    return NULL;
}

PyObject *
errors_strerror(int err)
{
    return PyUnicode_DecodeLocale(strerror(err), "surrogateescape");
}

PyObject *
errors_system_call(module_state *state, int err, const char *syscall)
{
    return errors_raise(state->SystemCallFailedError, "(iNs)", err,
                        errors_strerror(err), syscall);
}

int
errors_transfer(PyObject *error_class, int err, const char *text, size_t transferred,
                PyObject *cause)
{
    PyObject *number = err != 0 ? PyLong_FromLong(err) : Py_NewRef(Py_None);
    errors_raise(error_class, "(NNn)", number,
                 text != NULL ? PyUnicode_FromString(text) : errors_strerror(err),
                 (Py_ssize_t)transferred);
    errors_set_cause(cause);
    return -1;
}

int
errors_memory_fault(PyObject *error_class, int err, uint64_t offset, Py_ssize_t piece)
{
    errors_raise(error_class, "(iNKN)", err, errors_strerror(err),
                 (unsigned long long)offset,
                 piece < 0 ? Py_NewRef(Py_None) : PyLong_FromSsize_t(piece));
    return -1;
}

/* PyErr_GetRaisedException came with 3.12; the older calls are deprecated since. */
#if defined(Py_LIMITED_API)
# define API_VERSION Py_LIMITED_API
#else
# define API_VERSION PY_VERSION_HEX
#endif
#if API_VERSION >= 0x030C0000
PyObject *
errors_take(void)
{
    return PyErr_GetRaisedException();
}

void
errors_put_back(PyObject *exception)
{
    PyErr_SetRaisedException(exception);
}
#else
PyObject *
errors_take(void)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (type == NULL) {
        return NULL;
    }
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL) {
        PyException_SetTraceback(value, traceback);
        Py_DECREF(traceback);
    }
    Py_DECREF(type);
    return value;
}

void
errors_put_back(PyObject *exception)
{
    if (exception == NULL) {
        PyErr_Clear();
        return;
    }
    PyErr_Restore(Py_NewRef((PyObject *)Py_TYPE(exception)), exception,
                  PyException_GetTraceback(exception));
}
#endif

void
errors_set_cause(PyObject *cause)
{
    if (cause == NULL) {
        return;
    }
    PyObject *error = errors_take();
    if (error == NULL || error == cause) {
        Py_DECREF(cause);
    }
    else {
        PyException_SetContext(error, Py_NewRef(cause));
        PyException_SetCause(error, cause); /* steals */
    }
    errors_put_back(error);
}

int
errors_init(PyObject *module, module_state *state)
{
    (void)module;
    PyObject *errors = PyImport_ImportModule("guestmem.errors");
    if (errors == NULL) {
        return -1;
    }
    int result = 0;
#define ERROR_LOAD(name)                                     \
    if (result == 0) {                                       \
        state->name = PyObject_GetAttrString(errors, #name); \
        result = state->name == NULL ? -1 : 0;               \
    }
    ERROR_CLASSES(ERROR_LOAD)
#undef ERROR_LOAD
    Py_DECREF(errors);
    return result;
}
