/* class AtomicRef(Generic[T]):
 *     type: Scalar[T]
 *     size: int
 *     def load(self, order=None): ...
 *     def store(self, val, order=None): ...
 *     def exchange(self, val, order=None): ...
 *     def compare_exchange(self, expected, desired, order=None): ...
 *     def fetch_add(self, val, order=None): ...      # sub, and, or, xor
 *     def to_slice(self): ...
 *     def as_ptr(self): ...
 *
 * One integer in memory, accessed by atomic instructions. As a ref it cannot be
 * released, and lasts as long as its borrow.
 */
#include "native.h"

#include "access_atomic.h"
#include "args.h"
#include "order.h"
#include "ref.h"
#include "scalar.h"
#include "volatile_memory.h"

PyObject *
atomic_ref_new(const struct span *memory, size_t offset, size_t size, PyObject *type)
{
    return ref_made(
        ref_make(memory->state->atomic_type, memory, offset, size, type, size));
}

static PyObject *
atomic_ref_repr(PyObject *op)
{
    return PyUnicode_FromFormat("<guestmem.AtomicRef type=%R>",
                                ref_of(op)->element.type);
}

PyDoc_STRVAR(
    atomic_ref_load_doc,
    "load($self, order=None, /)\n--\n\n"
    "Return the integer: one atomic load.\n"
    "\n"
    "order is RELAXED, ACQUIRE, or SEQ_CST, which None is too; for another one\n"
    "ValueError.");

static PyObject *
atomic_ref_load(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    const ref_object *self = ref_of(op);
    const scalar_object *scalar = self->element.scalar;
    struct atomic_call call = {
        .op = ATOMIC_LOAD, .order = memory_order_seq_cst, .width = scalar->width};
    uint64_t bits;
    if (nargs != 0
        && (args_count(nargs, 0, 1, "load", "order=None") < 0
            || order_from_object(self->span.state, args[0], ORDER_LOAD, "a load",
                                 &call.order)
                   < 0)) {
        return NULL;
    }
    if (!self->span.can_fault) { /* half of what it costs otherwise */
        bits = access_atomic_load(self->span.addr, scalar->width, call.order);
        return scalar_to_object(scalar, bits);
    }
    return span_atomic(&self->span, 0, &call, &bits) < 0
               ? NULL
               : scalar_to_object(scalar, bits);
}

/* All that take one value: what they return is what was there, or None. */
static PyObject *
atomic_ref_call_method(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                       const char *name, enum atomic_op operation)
{
    const ref_object *self = ref_of(op);
    const scalar_object *scalar = self->element.scalar;
    bool is_store = operation == ATOMIC_STORE;
    struct atomic_call call = {.op = operation,
                               .order = memory_order_seq_cst,
                               .width = scalar->width,
                               .swapped = scalar->swapped};
    uint64_t before;
    if (args_count(nargs, 1, 2, name, "val, order=None") < 0
        || (nargs == 2
            && order_from_object(self->span.state, args[1],
                                 is_store ? ORDER_STORE : ORDER_BOTH, "a store",
                                 &call.order)
                   < 0)
        || scalar_from_object(scalar, args[0], &call.operand) < 0
        || span_atomic(&self->span, 0, &call, &before) < 0) {
        return NULL;
    }
    return is_store ? Py_NewRef(Py_None) : scalar_to_object(scalar, before);
}

#define ATOMIC_METHOD(name, operation)                                      \
    static PyObject *atomic_ref_##name(PyObject *op, PyObject *const *args, \
                                       Py_ssize_t nargs)                    \
    {                                                                       \
        return atomic_ref_call_method(op, args, nargs, #name, operation);   \
    }
ATOMIC_METHOD(store, ATOMIC_STORE)
ATOMIC_METHOD(exchange, ATOMIC_EXCHANGE)
ATOMIC_METHOD(fetch_add, ATOMIC_ADD)
ATOMIC_METHOD(fetch_sub, ATOMIC_SUB)
ATOMIC_METHOD(fetch_and, ATOMIC_AND)
ATOMIC_METHOD(fetch_or, ATOMIC_OR)
ATOMIC_METHOD(fetch_xor, ATOMIC_XOR)
#undef ATOMIC_METHOD

PyDoc_STRVAR(
    atomic_ref_store_doc,
    "store($self, val, order=None, /)\n--\n\n"
    "Store val: one atomic store.\n"
    "\n"
    "order is RELAXED, RELEASE, or SEQ_CST, which None is too; for another one\n"
    "ValueError. OverflowError where val does not fit the type.");
PyDoc_STRVAR(
    atomic_ref_exchange_doc,
    "exchange($self, val, order=None, /)\n--\n\n"
    "Store val, and return what was there before.\n"
    "\n"
    "One atomic operation. order is a minimum: it is SEQ_CST, whatever is asked\n"
    "for. OverflowError where val does not fit the type.");
#define FETCH_DOC(name, verb)                                                  \
    PyDoc_STRVAR(                                                              \
        atomic_ref_fetch_##name##_doc,                                         \
        "fetch_" #name "($self, val, order=None, /)\n--\n\n" verb              \
        ", and return what was there before.\n"                                \
        "\n"                                                                   \
        "One atomic operation, modulo 2**bits of the type; a type in the\n"    \
        "other byte order than the host's is right too. order is a minimum:\n" \
        "it is SEQ_CST, whatever is asked for. OverflowError where val does\n" \
        "not fit the type.")
FETCH_DOC(add, "Add val");
FETCH_DOC(sub, "Subtract val");
FETCH_DOC(and, "Keep the bits that val has");
FETCH_DOC(or, "Set the bits that val has");
FETCH_DOC(xor, "Flip the bits that val has");
#undef FETCH_DOC

PyDoc_STRVAR(
    atomic_ref_compare_exchange_doc,
    "compare_exchange($self, expected, desired, order=None, /)\n--\n\n"
    "Store desired where expected is; return (whether it was, what was there).\n"
    "\n"
    "One atomic operation, which never fails without a reason (\"strong\"). order\n"
    "is a minimum: it is SEQ_CST, whatever is asked for. OverflowError where\n"
    "expected or desired does not fit the type.");

static PyObject *
atomic_ref_compare_exchange(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    const ref_object *self = ref_of(op);
    const scalar_object *scalar = self->element.scalar;
    struct atomic_call call = {.op = ATOMIC_COMPARE_EXCHANGE, .width = scalar->width};
    uint64_t expected, before;
    if (args_count(nargs, 2, 3, "compare_exchange", "expected, desired, order=None") < 0
        || (nargs == 3
            && order_from_object(self->span.state, args[2], ORDER_BOTH,
                                 "compare_exchange()", &call.order)
                   < 0)
        || scalar_from_object(scalar, args[0], &expected) < 0
        || scalar_from_object(scalar, args[1], &call.operand) < 0) {
        return NULL;
    }
    /* The bits of a signed value go on above its width; those of memory do not. */
    expected &= UINT64_MAX >> (64 - 8 * scalar->width);
    call.expected = expected;
    if (span_atomic(&self->span, 0, &call, &before) < 0) {
        return NULL;
    }
    PyObject *found = scalar_to_object(scalar, before);
    return found == NULL
               ? NULL
               : Py_BuildValue("(NN)", PyBool_FromLong(before == expected), found);
}

static PyMethodDef atomic_ref_methods[] = {
    {"load", FASTCALL(atomic_ref_load), atomic_ref_load_doc},
    {"store", FASTCALL(atomic_ref_store), atomic_ref_store_doc},
    {"exchange", FASTCALL(atomic_ref_exchange), atomic_ref_exchange_doc},
    {"compare_exchange", FASTCALL(atomic_ref_compare_exchange),
     atomic_ref_compare_exchange_doc},
    {"fetch_add", FASTCALL(atomic_ref_fetch_add), atomic_ref_fetch_add_doc},
    {"fetch_sub", FASTCALL(atomic_ref_fetch_sub), atomic_ref_fetch_sub_doc},
    {"fetch_and", FASTCALL(atomic_ref_fetch_and), atomic_ref_fetch_and_doc},
    {"fetch_or", FASTCALL(atomic_ref_fetch_or), atomic_ref_fetch_or_doc},
    {"fetch_xor", FASTCALL(atomic_ref_fetch_xor), atomic_ref_fetch_xor_doc},
    {"to_slice", FASTCALL(ref_to_slice), ref_to_slice_doc},
    {"as_ptr", FASTCALL(ref_as_ptr), ref_as_ptr_doc},
    {"__reduce__", errors_not_copied, METH_NOARGS, errors_not_copied_doc},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS,
     PyDoc_STR("__class_getitem__($type, item, /)\n--\n\n"
               "AtomicRef[int], for annotations.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef atomic_ref_getset[] = {
    {"type", ref_get_type, NULL,
     PyDoc_STR("The Scalar that get_atomic_ref() was given."), NULL},
    {"size", ref_get_size, NULL, PyDoc_STR("The integer's size in bytes."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(
    atomic_ref_doc,
    "One integer in memory, for atomic access, made by get_atomic_ref().\n"
    "\n"
    "Every operation is one atomic instruction (where the processor has none, a\n"
    "loop that compares and swaps), which the guest, other processes and devices\n"
    "see as such. It keeps the memory mapped for as long as it lives.");

static PyType_Slot atomic_ref_slots[] = {
    {Py_tp_doc, SLOT(atomic_ref_doc)},
    {Py_tp_dealloc, SLOT(ref_dealloc)},
    {Py_tp_traverse, SLOT(ref_traverse)},
    {Py_tp_repr, SLOT(atomic_ref_repr)},
    {Py_tp_methods, atomic_ref_methods},
    {Py_tp_getset, atomic_ref_getset},
    {0, NULL},
};

static PyType_Spec atomic_ref_spec = {
    .name = "guestmem.AtomicRef",
    .basicsize = sizeof(ref_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = atomic_ref_slots,
};

int
atomic_ref_init(PyObject *module, module_state *state)
{
    state->atomic_type = native_add_type(module, &atomic_ref_spec, NULL, true);
    return state->atomic_type == NULL ? -1 : 0;
}
