/* Included before everything else in each C file of the test-only build
 * (../test_injection.py makes it): what the extension calls and what can fail, by
 * macros that make it fail when inject.c says so.
 *
 * A macro names itself in its own expansion, and is not expanded again there. The
 * headers that declare what it stands for must have been read before it.
 */
#ifndef GUESTMEM_INJECT_H
#define GUESTMEM_INJECT_H

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

/* Whether the call that is about to be made is to fail: counts it. */
bool inject_memory(const char *function);
/* The same, and the exception is set: MemoryError. */
bool inject_python(const char *function);
/* The same for a system call, with errno. */
bool inject_system(const char *function);
/* Gives a new reference up and leaves MemoryError, as a call that failed does with
 * the arguments that it was to steal. Returns NULL. */
PyObject *inject_drop(PyObject *arguments);
/* munmap and then a failure: really failing, it would leave the pages behind. */
int inject_munmap(void *addr, size_t length);

#define INJECT(failure, function, ...) \
    (inject_python(#function) ? (failure) : (function)(__VA_ARGS__))

/* What returns a new reference, and what returns 0 or -1. */
#define PyBytes_FromStringAndSize(...) \
    INJECT(NULL, PyBytes_FromStringAndSize, __VA_ARGS__)
#define PyFloat_FromDouble(...)    INJECT(NULL, PyFloat_FromDouble, __VA_ARGS__)
#define PyImport_GetModule(...)    INJECT(NULL, PyImport_GetModule, __VA_ARGS__)
#define PyImport_ImportModule(...) INJECT(NULL, PyImport_ImportModule, __VA_ARGS__)
#define PyList_Append(...)         INJECT(-1, PyList_Append, __VA_ARGS__)
#define PyList_New(...)            INJECT(NULL, PyList_New, __VA_ARGS__)
#define PyLong_FromLong(...)       INJECT(NULL, PyLong_FromLong, __VA_ARGS__)
#define PyLong_FromLongLong(...)   INJECT(NULL, PyLong_FromLongLong, __VA_ARGS__)
#define PyLong_FromSize_t(...)     INJECT(NULL, PyLong_FromSize_t, __VA_ARGS__)
#define PyLong_FromSsize_t(...)    INJECT(NULL, PyLong_FromSsize_t, __VA_ARGS__)
#define PyLong_FromUnsignedLongLong(...) \
    INJECT(NULL, PyLong_FromUnsignedLongLong, __VA_ARGS__)
#define PyLong_FromVoidPtr(...) INJECT(NULL, PyLong_FromVoidPtr, __VA_ARGS__)
#define PyList_SetItem(list, i, item)                        \
    (inject_python("PyList_SetItem") ? (Py_DECREF(item), -1) \
                                     : (PyList_SetItem)(list, i, item))
#define PyModule_AddFunctions(...) INJECT(-1, PyModule_AddFunctions, __VA_ARGS__)
#define PyNumber_Multiply(...)     INJECT(NULL, PyNumber_Multiply, __VA_ARGS__)
#define PySequence_GetItem(...)    INJECT(NULL, PySequence_GetItem, __VA_ARGS__)
#define PySequence_Size(...)       INJECT(-1, PySequence_Size, __VA_ARGS__)
#define PySeqIter_New(...)         INJECT(NULL, PySeqIter_New, __VA_ARGS__)
#define PySequence_Tuple(...)      INJECT(NULL, PySequence_Tuple, __VA_ARGS__)
#define PyStructSequence_New(...)  INJECT(NULL, PyStructSequence_New, __VA_ARGS__)
#define PyStructSequence_NewType(...) \
    INJECT(NULL, PyStructSequence_NewType, __VA_ARGS__)
#define PySlice_Unpack(...)          INJECT(-1, PySlice_Unpack, __VA_ARGS__)
#define PyMapping_GetItemString(...) INJECT(NULL, PyMapping_GetItemString, __VA_ARGS__)
#define PyMapping_Values(...)        INJECT(NULL, PyMapping_Values, __VA_ARGS__)
#define PyMemoryView_FromObject(...) INJECT(NULL, PyMemoryView_FromObject, __VA_ARGS__)
#define PyModule_AddObjectRef(...)   INJECT(-1, PyModule_AddObjectRef, __VA_ARGS__)
#define PyModule_AddType(...)        INJECT(-1, PyModule_AddType, __VA_ARGS__)
#define PyNumber_Add(...)            INJECT(NULL, PyNumber_Add, __VA_ARGS__)
#define PyNumber_Index(...)          INJECT(NULL, PyNumber_Index, __VA_ARGS__)
#define PyObject_Call(...)           INJECT(NULL, PyObject_Call, __VA_ARGS__)
#define PyObject_CallFunctionObjArgs(...) \
    INJECT(NULL, PyObject_CallFunctionObjArgs, __VA_ARGS__)
#define PyObject_CallNoArgs(...)    INJECT(NULL, PyObject_CallNoArgs, __VA_ARGS__)
#define PyObject_CallObject(...)    INJECT(NULL, PyObject_CallObject, __VA_ARGS__)
#define PyObject_GetIter(...)       INJECT(NULL, PyObject_GetIter, __VA_ARGS__)
#define PyObject_GetAttrString(...) INJECT(NULL, PyObject_GetAttrString, __VA_ARGS__)
#define PyObject_GetBuffer(...)     INJECT(-1, PyObject_GetBuffer, __VA_ARGS__)
#define PyObject_IsTrue(...)        INJECT(-1, PyObject_IsTrue, __VA_ARGS__)
#define PyObject_Repr(...)          INJECT(NULL, PyObject_Repr, __VA_ARGS__)
#define PyObject_Str(...)           INJECT(NULL, PyObject_Str, __VA_ARGS__)
#define PySequence_GetSlice(...)    INJECT(NULL, PySequence_GetSlice, __VA_ARGS__)
#define PyTuple_New(...)            INJECT(NULL, PyTuple_New, __VA_ARGS__)
#define PyType_FromModuleAndSpec(...) \
    INJECT(NULL, PyType_FromModuleAndSpec, __VA_ARGS__)
#define PyType_GetName(...)          INJECT(NULL, PyType_GetName, __VA_ARGS__)
#define PyUnicode_AsUTF8AndSize(...) INJECT(NULL, PyUnicode_AsUTF8AndSize, __VA_ARGS__)
#define PyUnicode_DecodeLocale(...)  INJECT(NULL, PyUnicode_DecodeLocale, __VA_ARGS__)
#define PyUnicode_FromFormat(...)    INJECT(NULL, PyUnicode_FromFormat, __VA_ARGS__)
#define PyUnicode_FromString(...)    INJECT(NULL, PyUnicode_FromString, __VA_ARGS__)
#define PyWeakref_NewRef(...)        INJECT(NULL, PyWeakref_NewRef, __VA_ARGS__)
#define Py_EnterRecursiveCall(...)   INJECT(-1, Py_EnterRecursiveCall, __VA_ARGS__)
/* PyObject_New and PyObject_GC_New are macros that call these. */
#define _PyObject_New(...)           INJECT(NULL, _PyObject_New, __VA_ARGS__)
#define _PyObject_GC_New(...)        INJECT(NULL, _PyObject_GC_New, __VA_ARGS__)

/* Those may run Python code, which may raise anything. */
#define PyErr_CheckSignals(...) \
    (inject_python("PyErr_CheckSignals") ? -1 : (PyErr_CheckSignals)())
#define PyFloat_AsDouble(...)   INJECT(-1.0, PyFloat_AsDouble, __VA_ARGS__)
#define PyNumber_AsSsize_t(...) INJECT(-1, PyNumber_AsSsize_t, __VA_ARGS__)

/* To raise takes memory, too: MemoryError comes instead. */
#define PyErr_Format(...)       INJECT(NULL, PyErr_Format, __VA_ARGS__)
#define PyErr_SetFromErrno(...) INJECT(NULL, PyErr_SetFromErrno, __VA_ARGS__)
#define PyErr_SetObject(...)    INJECT((void)0, PyErr_SetObject, __VA_ARGS__)
#define PyErr_SetString(...)    INJECT((void)0, PyErr_SetString, __VA_ARGS__)
#define PyErr_WarnFormat(...)   INJECT(-1, PyErr_WarnFormat, __VA_ARGS__)

/* The format may say that an argument is stolen, and then it is by a call that fails. */
#define INJECT_VALUES(build, function, ...)                       \
    (inject_python(#function) ? inject_drop((build)(__VA_ARGS__)) \
                              : (function)(__VA_ARGS__))
#define INJECT_CALL(build, function, callable, ...)               \
    (inject_python(#function) ? inject_drop((build)(__VA_ARGS__)) \
                              : (function)(callable, __VA_ARGS__))
#if PY_VERSION_HEX < 0x030D0000 /* the usual names are macros for these */
# define _Py_BuildValue_SizeT(...) \
     INJECT_VALUES(_Py_BuildValue_SizeT, _Py_BuildValue_SizeT, __VA_ARGS__)
# define _Py_VaBuildValue_SizeT(...) \
     INJECT_VALUES(_Py_VaBuildValue_SizeT, _Py_VaBuildValue_SizeT, __VA_ARGS__)
# define _PyObject_CallFunction_SizeT(...) \
     INJECT_CALL(_Py_BuildValue_SizeT, _PyObject_CallFunction_SizeT, __VA_ARGS__)
# define _PyObject_CallMethod_SizeT(...) \
     INJECT(NULL, _PyObject_CallMethod_SizeT, __VA_ARGS__)
#else
# define Py_BuildValue(...) INJECT_VALUES(Py_BuildValue, Py_BuildValue, __VA_ARGS__)
# define Py_VaBuildValue(...) \
     INJECT_VALUES(Py_VaBuildValue, Py_VaBuildValue, __VA_ARGS__)
# define PyObject_CallFunction(...) \
     INJECT_CALL(Py_BuildValue, PyObject_CallFunction, __VA_ARGS__)
# define PyObject_CallMethod(...) INJECT(NULL, PyObject_CallMethod, __VA_ARGS__)
#endif

/* NULL without an exception. */
#define PyMem_Malloc(...) \
    (inject_memory("PyMem_Malloc") ? NULL : (PyMem_Malloc)(__VA_ARGS__))
#define PyMem_Calloc(...) \
    (inject_memory("PyMem_Calloc") ? NULL : (PyMem_Calloc)(__VA_ARGS__))

#define malloc(...) (inject_memory("malloc") ? NULL : (malloc)(__VA_ARGS__))

#define INJECT_SYSTEM(failure, function, ...) \
    (inject_system(#function) ? (failure) : (function)(__VA_ARGS__))
#define fstatfs(...)   INJECT_SYSTEM(-1, fstatfs, __VA_ARGS__)
#define madvise(...)   INJECT_SYSTEM(-1, madvise, __VA_ARGS__)
#define mmap(...)      INJECT_SYSTEM(MAP_FAILED, mmap, __VA_ARGS__)
#define munmap(...)    inject_munmap(__VA_ARGS__)
#define preadv(...)    INJECT_SYSTEM(-1, preadv, __VA_ARGS__)
#define pwritev(...)   INJECT_SYSTEM(-1, pwritev, __VA_ARGS__)
#define readv(...)     INJECT_SYSTEM(-1, readv, __VA_ARGS__)
#define writev(...)    INJECT_SYSTEM(-1, writev, __VA_ARGS__)
#define pread(...)     INJECT_SYSTEM(-1, pread, __VA_ARGS__)
#define pwrite(...)    INJECT_SYSTEM(-1, pwrite, __VA_ARGS__)
#define read(...)      INJECT_SYSTEM(-1, read, __VA_ARGS__)
#define sigaction(...) INJECT_SYSTEM(-1, sigaction, __VA_ARGS__)
#define write(...)     INJECT_SYSTEM(-1, write, __VA_ARGS__)

#endif
