/* Reaching into ctypes and struct. */
#include "native.h"

#include "foreign.h"

PyObject *
foreign_imported(const char *name)
{
    PyObject *key = PyUnicode_FromString(name);
    PyObject *module = key == NULL ? NULL : PyImport_GetModule(key);
    Py_XDECREF(key);
    if (module != NULL && Py_IsNone(module)) {
        Py_CLEAR(module); /* its import is blocked */
    }
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
    descrgetfunc get = SLOT_OF(Py_TYPE(descriptor), Py_tp_descr_get, descrgetfunc);
    if (get == NULL) {
        errors_wrong_type("what a foreign type has", "a descriptor", descriptor);
        return NULL;
    }
    return get(descriptor, obj, (PyObject *)Py_TYPE(obj));
}
