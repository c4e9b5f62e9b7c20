/* def fence(order=None, /): ...
 *
 * And the orders that it and atomic accesses take.
 */
#include "native.h"

#include "args.h"
#include "order.h"

/* As ordering.py counts them. */
static const memory_order orders[ORDERINGS] = {
    memory_order_relaxed, memory_order_acquire, memory_order_release,
    memory_order_acq_rel, memory_order_seq_cst};

int
order_from_object(const module_state *state, PyObject *arg, int possible,
                  const char *operation, memory_order *out)
{
    if (Py_IsNone(arg)) {
        *out = memory_order_seq_cst;
        return 0;
    }
    for (int i = 0; i < ORDERINGS; i++) {
        if (arg != state->orderings[i]) {
            continue;
        }
        if (possible & 1 << orders[i]) {
            *out = orders[i];
            return 0;
        }
        PyErr_Format(PyExc_ValueError, "%s cannot be %R", operation, arg);
        return -1;
    }
    errors_wrong_type("order", "a guestmem.Ordering or None", arg);
    return -1;
}

PyDoc_STRVAR(
    order_fence_doc,
    "fence($module, order=None, /)\n--\n\n"
    "Order the accesses before it and after it between processors.\n"
    "\n"
    "As atomic_thread_fence() of C11: ACQUIRE, RELEASE, ACQ_REL or SEQ_CST, which\n"
    "None is too. On x86-64 only SEQ_CST is an instruction. ValueError for\n"
    "RELAXED, which would do nothing.");

static PyObject *
order_fence(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const module_state *state = PyModule_GetState(module);
    memory_order order = memory_order_seq_cst;
    if (args_count(nargs, 0, 1, "fence", "order=None") < 0
        || (nargs == 1
            && order_from_object(state, args[0], ORDER_FENCE, "fence()", &order) < 0)) {
        return NULL;
    }
    switch (order) { /* each a constant: a variable one would be the strongest */
    case memory_order_acquire:
        atomic_thread_fence(memory_order_acquire);
        break;
    case memory_order_release:
        atomic_thread_fence(memory_order_release);
        break;
    case memory_order_acq_rel:
        atomic_thread_fence(memory_order_acq_rel);
        break;
    default:
        atomic_thread_fence(memory_order_seq_cst);
        break;
    }
    Py_RETURN_NONE;
}

static PyMethodDef order_functions[] = {
    {"fence", FASTCALL(order_fence), order_fence_doc},
    {NULL, NULL, 0, NULL},
};

int
order_init(PyObject *module, module_state *state)
{
    PyObject *all = NULL, *python = PyImport_ImportModule("guestmem.ordering");
    if (python != NULL) {
        all = PyObject_GetAttrString(python, "_ALL");
        Py_DECREF(python);
    }
    for (Py_ssize_t i = 0; all != NULL && i < ORDERINGS; i++) {
        state->orderings[i] = PySequence_GetItem(all, i);
        if (state->orderings[i] == NULL) {
            Py_CLEAR(all);
        }
    }
    if (all == NULL) {
        return -1;
    }
    Py_DECREF(all);
    return PyModule_AddFunctions(module, order_functions);
}
