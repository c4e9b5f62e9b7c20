/* Included first by every file that knows Python: feature macros, Python.h, and
 * the state of one module object (one for each interpreter). */
#ifndef GUESTMEM_NATIVE_H
#define GUESTMEM_NATIVE_H

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* The classes of src/guestmem/errors.py that C raises. */
#define ERROR_CLASSES(X)        \
    X(InvalidAddressError)      \
    X(InvalidOffsetError)       \
    X(InvalidRangeError)        \
    X(SystemCallFailedError)    \
    X(ReadFromSourceError)      \
    X(WriteToDestinationError)  \
    X(ReadFromMemoryError)      \
    X(WriteToMemoryError)       \
    X(ClosedError)              \
    X(OutOfBoundsError)         \
    X(AddressOverflowError)     \
    X(MisalignedError)          \
    X(InvalidGuestAddressError) \
    X(InvalidRegionError)       \
    X(MemoryRegionOverlapError) \
    X(CoreDumpWarning)

#define ORDERINGS 5 /* of guestmem.Ordering */

typedef struct {
    PyObject *module; /* whose state this is; not a reference */
    PyTypeObject *memory_type;
    PyTypeObject *mapping_type;
    PyTypeObject *slice_type;
    PyTypeObject *ref_type;
    PyTypeObject *atomic_type;
    PyTypeObject *array_type;
    PyTypeObject *bitmap_type;
    PyTypeObject *guest_type;
    PyTypeObject *guest_region_type;
    PyTypeObject *scalar_type;
    PyTypeObject *buffer_owner_type;

#define ERROR_FIELD(name) PyObject *name;
    ERROR_CLASSES(ERROR_FIELD)
#undef ERROR_FIELD

    PyObject *file_io; /* io.FileIO */
    PyObject *orderings[ORDERINGS];

    /* What ctypes and struct offer, once somebody uses them: object_type.c. */
    struct foreign_ctypes *_Atomic ctypes;
    struct foreign_struct *_Atomic structs;
#ifndef Py_GIL_DISABLED
    PyObject *scratch; /* bytes that Struct.unpack reads from, between two calls */
#endif
} module_state;

/* Each adds what its file defines to the module: 0, or -1 with an exception. */
int errors_init(PyObject *module, module_state *state);
int volatile_memory_init(PyObject *module, module_state *state);
int mapping_init(PyObject *module, module_state *state);
int buffer_owner_init(PyObject *module, module_state *state);
int slice_init(PyObject *module, module_state *state);
int ref_init(PyObject *module, module_state *state);
int atomic_ref_init(PyObject *module, module_state *state);
int array_init(PyObject *module, module_state *state);
int bitmap_init(PyObject *module, module_state *state);
int guest_init(PyObject *module, module_state *state);
int vectored_init(PyObject *module, module_state *state);
int order_init(PyObject *module, module_state *state);
int scalar_init(PyObject *module, module_state *state);
int transfer_init(PyObject *module, module_state *state);

/* Creates a type from its spec, and adds it to the module if it is public. */
PyTypeObject *native_add_type(PyObject *module, PyType_Spec *spec, PyTypeObject *base,
                              bool is_public);

/* Method table entries: the function and its calling convention. */
#define FASTCALL(name) (PyCFunction)(void (*)(void))(name), METH_FASTCALL
#define KEYWORDS(name) \
    (PyCFunction)(void (*)(void))(name), METH_FASTCALL | METH_KEYWORDS

/* A slot's value: ISO C has no conversion from a function pointer to void *. */
#define SLOT(value) ((void *)(uintptr_t)(value))

/* And a type's slot, as the function that it is. */
#define SLOT_OF(type, slot, function_type) \
    ((function_type)(uintptr_t)PyType_GetSlot(type, slot))

#include "errors.h"

#endif
