/* Reaching into ctypes and struct. */
#include "native.h"

#include "foreign.h"

PyObject *
foreign_imported(const char *name)
{
    PyObject *key = PyUnicode_FromString(name);
    PyObject *module = key == NULL ? NULL : PyImport_GetModule(key);
    Py_XDECREF(key);
    return module;
}

PyObject *
foreign_type(PyObject *module, const char *name)
{
    PyObject *type = PyObject_GetAttrString(module, name);
    if (type != NULL && !PyType_Check(type)) {
        PyErr_Format(PyExc_ImportError, "%R has no type %s", module, name);
        Py_CLEAR(type);
    }
    return type;
}

PyObject *
foreign_describe(PyObject *descriptor, PyObject *obj)
{
    return PyObject_CallMethod(descriptor, "__get__", "OO", obj,
                               (PyObject *)Py_TYPE(obj));
}
