/* class VolatileMemory:
 *     size: int
 *     closed: bool
 *     def __len__(self): return self.size
 *     def __enter__(self): return self
 *     def __exit__(self, *exc): close, or leave to the last borrower
 *     def __buffer__(self, flags): ...        # counts as a borrower
 *     ...the accessors of accessors.c
 *
 * The abstract base of MemoryMapping and VolatileSlice: lifetime, the buffer
 * protocol, and what else both share. It has no instances of its own.
 */
#include "native.h"

#include "args.h"
#include "guest.h"
#include "volatile_memory.h"

#include <string.h>

void
memory_say_closed(module_state *state, enum memory_kind kind)
{
    static const char *const texts[] = {
        [A_MAPPING] = "the mapping has been closed",
        [A_SLICE] = "the slice has been released",
        [A_REGION] = "the guest memory has been closed",
    };
    errors_closed(state, texts[kind]);
}

int
memory_refuse(memory_object *self)
{
#ifdef Py_GIL_DISABLED
    if (!hold_is_closed(self->hold)) { /* its close() has been refused meanwhile */
        return memory_enter(self, LONG);
    }
#endif
    memory_say_closed(self->span.state, self->kind);
    return -1;
}

void
memory_vacate(memory_object *self)
{
    switch (self->kind) {
    case A_MAPPING:
        pages_unmap_or_report(&self->span.lender.pages->mapping);
        break;
    case A_SLICE:
        lender_give_back(&self->span.lender, BORROW_SLICE);
        break;
    case A_REGION:
        guest_vacate(self->hold);
        break;
    }
}

/* "1 slice, 2 refs": appends what there is of one kind of holder. */
static void
memory_list_holder(char *text, size_t room, uint64_t count, const char *what)
{
    size_t used = strlen(text);
    if (count != 0) {
        PyOS_snprintf(text + used, room - used, "%s%llu %s%s", used ? ", " : "",
                      (unsigned long long)count, what, count == 1 ? "" : "s");
    }
}

void
memory_holders(const memory_object *self, uint64_t seen, uint64_t own,
               char text[HOLDERS_TEXT])
{
    uint64_t borrowers = (seen & HOLD_ANYONE) / HOLD_BORROW - own;
    uint64_t calls = seen % HOLD_BORROW, slices = 0, refs = 0;
    if (self->kind == A_MAPPING) {
        /* The pages count all who borrow from them together with the mapping's own.
         * Read apart from the word: without a GIL they may be a step ahead. */
        slices = Py_MIN(hold_read(&self->span.lender.pages->slices) - own, borrowers);
        refs = Py_MIN(hold_read(&self->span.lender.pages->refs), borrowers - slices);
    }
    text[0] = '\0';
    memory_list_holder(text, HOLDERS_TEXT, slices, "slice");
    memory_list_holder(text, HOLDERS_TEXT, refs, "ref");
    memory_list_holder(text, HOLDERS_TEXT, borrowers - slices - refs,
                       "exported buffer");
    memory_list_holder(text, HOLDERS_TEXT, calls, "running call");
}

static PyObject *
memory_busy(const memory_object *self, uint64_t seen)
{
    char text[HOLDERS_TEXT];
    memory_holders(self, seen, 0, text);
    PyErr_Format(PyExc_BufferError, "cannot %s: it is held by %s",
                 self->kind == A_MAPPING ? "close the mapping" : "release the slice",
                 text);
    return NULL;
}

PyObject *
memory_close(memory_object *self)
{
    uint64_t seen;
    if (!hold_close(self->hold, &seen)) {
        return seen & HOLD_CLOSED ? Py_NewRef(Py_None) : memory_busy(self, seen);
    }
    if (self->kind != A_MAPPING) {
        lender_give_back(&self->span.lender, BORROW_SLICE);
        Py_RETURN_NONE;
    }
    int err = pages_unmap(&self->span.lender.pages->mapping);
    if (err != 0) {
        return errors_system_call(self->span.state, err, "munmap");
    }
    Py_RETURN_NONE;
}

const char memory_enter_block_doc[] =
    PyDoc_STR("__enter__($self, /)\n--\n\n"
              "Return the object itself; ClosedError once closed.");

PyObject *
memory_enter_block(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    memory_object *self = memory_of(op);
    if (memory_enter(self, SHORT) < 0) {
        return NULL;
    }
    memory_leave(self, SHORT);
    return Py_NewRef(op);
}

const char memory_exit_block_doc[] = PyDoc_STR(
    "__exit__($self, exc_type=None, exc_value=None, traceback=None, /)\n--\n\n"
    "Close or release; BufferError where the memory is borrowed still.\n"
    "\n"
    "When the block ends by an exception, that exception is never replaced: the\n"
    "object is closed at once, those who borrow from it go on, and the last of them\n"
    "gives the memory back.");

PyObject *
memory_exit_block(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    memory_object *self = memory_of(op);
    if (args_count(nargs, 0, 3, "__exit__", "exc_type, exc_value, traceback") < 0) {
        return NULL;
    }
    if (nargs == 0 || Py_IsNone(args[0])) {
        return memory_close(self);
    }
    memory_abandon(self);
    Py_RETURN_NONE;
}

static PyObject *
memory_get_size(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(memory_of(op)->span.size);
}

static PyObject *
memory_get_closed(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(hold_is_closed(memory_of(op)->hold));
}

static Py_ssize_t
memory_length(PyObject *op)
{
    return (Py_ssize_t)memory_of(op)->span.size;
}

static PyObject *
memory_repr(PyObject *op)
{
    memory_object *self = memory_of(op);
    char size[32];
    PyOS_snprintf(size, sizeof(size), "%#zx", self->span.size);
    return PyUnicode_FromFormat(
        "<guestmem.%s size=%s%s>",
        self->kind == A_MAPPING ? "MemoryMapping" : "VolatileSlice", size,
        !hold_is_closed(self->hold) ? ""
        : self->kind == A_MAPPING   ? " closed"
                                    : " released");
}

/* The exported buffer is a borrower until it is released. What is done through
 * it is no volatile access, and no fault guard covers it. */
static int
memory_getbuffer(PyObject *op, Py_buffer *view, int flags)
{
    memory_object *self = memory_of(op);
    view->obj = NULL;
    if (memory_enter(self, SHORT) < 0) {
        return -1;
    }
    int result = PyBuffer_FillInfo(view, op, self->span.addr,
                                   (Py_ssize_t)self->span.size, 0, flags);
    if (result == 0) {
        hold_add(self->hold, HOLD_BORROW);
    }
    memory_leave(self, SHORT);
    return result;
}

static void
memory_releasebuffer(PyObject *op, Py_buffer *Py_UNUSED(view))
{
    memory_object *self = memory_of(op);
    if (hold_leave(self->hold, HOLD_BORROW)) {
        memory_vacate(self);
    }
}

static PyGetSetDef memory_getset[] = {
    {"size", memory_get_size, NULL,
     PyDoc_STR("The size in bytes, as it was asked for: not rounded to pages."), NULL},
    {"closed", memory_get_closed, NULL,
     PyDoc_STR("Whether it has been closed or released: every access is then a\n"
               "ClosedError."),
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef memory_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(memory_object, weakrefs), READONLY,
     NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(
    memory_doc,
    "Memory that a guest, another process or a device may change at any moment.\n"
    "\n"
    "The base type of MemoryMapping, which owns its pages, and VolatileSlice, which\n"
    "borrows a range of another; it has no instances of its own. Offsets and counts\n"
    "are in bytes, from 0 to 2**64 - 1; any other int is an OverflowError.\n"
    "\n"
    "A scalar at an address that is a multiple of its size is accessed by exactly\n"
    "one instruction. A copy of any length never tears an aligned field of 1, 2, 4\n"
    "or 8 bytes of this memory, and accesses each byte once. No access orders\n"
    "others between processors beyond what the architecture does.\n"
    "\n"
    "Where a page cannot be brought in (a truncated file, a full tmpfs), a method\n"
    "raises ReadFromMemoryError or WriteToMemoryError with the offset of the first\n"
    "byte that faulted. What a write had written before it stays written.\n"
    "\n"
    "It exports its bytes by the buffer protocol: memoryview(m), numpy.frombuffer(m),\n"
    "os.preadv(fd, [m], 0). What others do through such a buffer has none of these\n"
    "guarantees, and where a page cannot be brought in it ends the process with\n"
    "SIGBUS.");

static PyType_Slot memory_slots[] = {
    {Py_tp_doc, SLOT(memory_doc)},
    {Py_tp_repr, SLOT(memory_repr)},
    {Py_tp_methods, memory_methods},
    {Py_tp_getset, memory_getset},
    {Py_tp_members, memory_members},
    {Py_mp_length, SLOT(memory_length)},
    {Py_bf_getbuffer, SLOT(memory_getbuffer)},
    {Py_bf_releasebuffer, SLOT(memory_releasebuffer)},
    {0, NULL},
};

/* BASETYPE for our own two subtypes. A Python class can derive from it as well,
 * but has no way to make an instance. */
static PyType_Spec memory_spec = {
    .name = "guestmem.VolatileMemory",
    .basicsize = sizeof(memory_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = memory_slots,
};

int
volatile_memory_init(PyObject *module, module_state *state)
{
    state->memory_type = native_add_type(module, &memory_spec, NULL, true);
    return state->memory_type == NULL ? -1 : 0;
}
