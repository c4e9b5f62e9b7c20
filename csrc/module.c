/* guestmem._native: init, module state and registration. The only symbol that
 * the extension exports is PyInit__native.
 */
#include "native.h"

#include "access.h"
#include "object_type.h"

PyTypeObject *
native_add_type(PyObject *module, PyType_Spec *spec, PyTypeObject *base, bool is_public)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, (PyObject *)base);
    if (type != NULL && is_public
        && PyModule_AddType(module, (PyTypeObject *)type) < 0) {
        Py_CLEAR(type);
    }
    return (PyTypeObject *)type;
}

/* What fails half-way is cleaned up by native_free. */
static int
native_exec(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    state->module = module;
    if (errors_init(module, state) < 0 || scalar_init(module, state) < 0
        || volatile_memory_init(module, state) < 0 || mapping_init(module, state) < 0
        || buffer_owner_init(module, state) < 0 || slice_init(module, state) < 0
        || ref_init(module, state) < 0 || atomic_ref_init(module, state) < 0
        || array_init(module, state) < 0 || bitmap_init(module, state) < 0
        || guest_init(module, state) < 0 || vectored_init(module, state) < 0
        || order_init(module, state) < 0 || transfer_init(module, state) < 0) {
        return -1;
    }
    return 0;
}

static int
native_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = PyModule_GetState(module);
    Py_VISIT(state->memory_type);
    Py_VISIT(state->mapping_type);
    Py_VISIT(state->slice_type);
    Py_VISIT(state->ref_type);
    Py_VISIT(state->atomic_type);
    Py_VISIT(state->array_type);
    Py_VISIT(state->bitmap_type);
    Py_VISIT(state->guest_type);
    Py_VISIT(state->guest_region_type);
    Py_VISIT(state->scalar_type);
    Py_VISIT(state->buffer_owner_type);
#define ERROR_VISIT(name) Py_VISIT(state->name);
    ERROR_CLASSES(ERROR_VISIT)
#undef ERROR_VISIT
    Py_VISIT(state->file_io);
    for (int i = 0; i < ORDERINGS; i++) {
        Py_VISIT(state->orderings[i]);
    }
    return object_type_traverse(state, visit, arg);
}

/* There is no m_clear: what the types use of the state must not go before they do. A
 * cycle through the module is broken by its types, which hold it. A type that is
 * garbage lets go of the module early, while instances may still run code: those
 * that can be garbage together with their type hold the module themselves. They are
 * the ones that the collector tracks; any other keeps its type from being garbage. */
static void
native_free(void *op)
{
    module_state *state = PyModule_GetState(op);
    Py_CLEAR(state->memory_type);
    Py_CLEAR(state->mapping_type);
    Py_CLEAR(state->slice_type);
    Py_CLEAR(state->ref_type);
    Py_CLEAR(state->atomic_type);
    Py_CLEAR(state->array_type);
    Py_CLEAR(state->bitmap_type);
    Py_CLEAR(state->guest_type);
    Py_CLEAR(state->guest_region_type);
    Py_CLEAR(state->scalar_type);
    Py_CLEAR(state->buffer_owner_type);
#define ERROR_CLEAR(name) Py_CLEAR(state->name);
    ERROR_CLASSES(ERROR_CLEAR)
#undef ERROR_CLEAR
    Py_CLEAR(state->file_io);
    for (int i = 0; i < ORDERINGS; i++) {
        Py_CLEAR(state->orderings[i]);
    }
    object_type_clear(state);
}

/* One build runs on every CPython from 3.11 on, and each refuses the slots that it
 * does not know. So they are chosen by the version that runs; the headers of 3.11
 * have no names for the newer ones. */
#define SLOT_MULTIPLE_INTERPRETERS 3 /* Py_mod_multiple_interpreters, 3.12 */
#define SLOT_GIL                   4 /* Py_mod_gil, 3.13 */
#define PER_INTERPRETER_GIL        ((void *)2)
#define GIL_NOT_USED               ((void *)1)

static PyModuleDef_Slot slots_3_11[] = {
    {Py_mod_exec, SLOT(native_exec)},
    {0, NULL},
};

static PyModuleDef_Slot slots_3_12[] = {
    {Py_mod_exec, SLOT(native_exec)},
    {SLOT_MULTIPLE_INTERPRETERS, PER_INTERPRETER_GIL},
    {0, NULL},
};

static PyModuleDef_Slot slots_3_13[] = {
    {Py_mod_exec, SLOT(native_exec)},
    {SLOT_MULTIPLE_INTERPRETERS, PER_INTERPRETER_GIL},
    {SLOT_GIL, GIL_NOT_USED},
    {0, NULL},
};

static PyModuleDef native_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "guestmem._native",
    .m_doc = PyDoc_STR("The extension behind guestmem: import that instead."),
    .m_size = sizeof(module_state),
    .m_traverse = native_traverse,
    .m_free = native_free,
};

/* Python looks for it. NOLINTNEXTLINE(misc-use-internal-linkage) */
PyMODINIT_FUNC PyInit__native(void);

PyMODINIT_FUNC
PyInit__native(void)
{
    access_init();
    native_module.m_slots = Py_Version >= 0x030D0000   ? slots_3_13
                            : Py_Version >= 0x030C0000 ? slots_3_12
                                                       : slots_3_11;
    return PyModuleDef_Init(&native_module);
}
