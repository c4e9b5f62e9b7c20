/* The accessors of GuestMemory: those of VolatileMemory, region by region. */
#include "native.h"

#include "accessors.h"
#include "args.h"
#include "borrow.h"
#include "element.h"
#include "guest.h"
#include "object_type.h"

/* Bytes between buf and a range that guest_reach() has found, region by region. */
static int
guest_exchange(guest_object *self, uint64_t addr, PyObject *buf, const Py_buffer *view,
               uint64_t count, enum direction direction)
{
    for (uint64_t done = 0; done < count;) {
        struct piece piece = guest_piece(self, addr + done, count - done);
        if (memory_copy(&piece.part->span, piece.offset, buf, view, done, piece.count,
                        direction == INTO_MEMORY)
            < 0) {
            return -1;
        }
        done += piece.count;
    }
    return 0;
}

/* The same for a bytes object of count bytes, which nobody else has. */
static int
guest_exchange_bytes(guest_object *self, uint64_t addr, PyObject *bytes, uint64_t count,
                     enum direction direction)
{
    enum stay stay = memory_stay_of_copy(count);
    const Py_buffer view = {.buf = PyBytes_AsString(bytes)};
    if (guest_begin(self, stay) < 0) {
        return -1;
    }
    int failed = guest_exchange(self, addr, bytes, &view, count, direction);
    guest_end(self, stay);
    return failed;
}

/* --- Objects ------------------------------------------------------------------------- */

/* An object that lies in more than one region, or nowhere: by its bytes. */
static PyObject *
guest_read_across(guest_object *self, uint64_t addr, PyObject *kind)
{
    struct borrower what;
    if (borrow_want_ref(self->state, kind, &what) < 0
        || guest_reach_all(self, addr, what.count) < 0) {
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)what.count);
    if (bytes == NULL) {
        return NULL;
    }
    PyObject *result = NULL;
    char *host = PyBytes_AsString(bytes);
    if (guest_exchange_bytes(self, addr, bytes, what.count, INTO_BUFFER) == 0) {
        struct span span = {.state = self->state, .addr = host, .size = what.count};
        struct element element = element_of(self->state, kind, what.count);
        result = element_load(&element, &span, 0);
        Py_DECREF(element.type);
    }
    Py_DECREF(bytes);
    return result;
}

PyDoc_STRVAR(
    guest_read_obj_doc,
    "read_obj($self, addr, type, /)\n--\n\n"
    "Return the object of this type at a guest address.\n"
    "\n"
    "As VolatileMemory.read_obj(). One that crosses into another region is\n"
    "read region by region. InvalidGuestAddressError where a byte of it is in a\n"
    "hole, AddressOverflowError beyond 2**64.");

static PyObject *
guest_read_obj(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    uint64_t addr;
    if (args_count(nargs, 2, 2, "read_obj", "addr, type") < 0
        || args_u64(args[0], "addr", &addr) < 0) {
        return NULL;
    }
    if (scalar_check(self->state, args[1])) {
        size_t width = ((scalar_object *)args[1])->width;
        struct region *region = guest_find_all(self, addr, width);
        if (region != NULL) {
            return accessor_read_object(&region->part, addr - region->start, args[1]);
        }
    }
    struct borrower what;
    if (borrow_want_ref(self->state, args[1], &what) < 0) {
        return NULL;
    }
    struct region *region = guest_find_all(self, addr, what.count);
    return region != NULL
               ? accessor_read_object(&region->part, addr - region->start, args[1])
               : guest_read_across(self, addr, args[1]);
}

static int
guest_write_across(guest_object *self, PyObject *value, uint64_t addr, PyObject *kind)
{
    struct borrower what;
    if (borrow_want_ref(self->state, kind, &what) < 0
        || guest_reach_all(self, addr, what.count) < 0) {
        return -1;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)what.count);
    if (bytes == NULL) {
        return -1;
    }
    char *host = PyBytes_AsString(bytes);
    struct span span = {
        .state = self->state, .addr = host, .size = what.count, .is_plain = true};
    struct element element = element_of(self->state, kind, what.count);
    int failed = element_store(&element, &span, 0, value);
    Py_DECREF(element.type);
    if (!failed) {
        failed = guest_exchange_bytes(self, addr, bytes, what.count, INTO_MEMORY);
    }
    Py_DECREF(bytes);
    return failed;
}

PyDoc_STRVAR(
    guest_write_obj_doc,
    "write_obj($self, val, addr, /, type=None)\n--\n\n"
    "Write val, an object of this type, at a guest address.\n"
    "\n"
    "As VolatileMemory.write_obj(). One that crosses into another region is\n"
    "written region by region. InvalidGuestAddressError where a byte of it is\n"
    "in a hole, AddressOverflowError beyond 2**64: nothing is written then.");

static PyObject *
guest_write_obj(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                PyObject *kwnames)
{
    static const char *const names[] = {"val", "addr", "type", NULL};
    static const struct args_spec spec = {
        .function = "write_obj", .names = names, .positional = 2, .required = 2};
    guest_object *self = guest_of(op);
    PyObject *given[3];
    uint64_t addr;
    struct borrower what;
    if (kwnames != NULL || nargs != 3) {
        if (args_named(&spec, args, nargs, kwnames, given) < 0) {
            return NULL;
        }
        args = given;
    }
    if (args_u64(args[1], "addr", &addr) < 0) {
        return NULL;
    }
    PyObject *value = args[0], *kind = args[2];
    if (kind == NULL || Py_IsNone(kind)) {
        struct object_type type;
        if (object_type_of_value(self->state, value, &type) < 0) {
            return NULL;
        }
        kind = (PyObject *)Py_TYPE(value);
    }
    if (borrow_want_ref(self->state, kind, &what) < 0) {
        return NULL;
    }
    struct region *region = guest_find_all(self, addr, what.count);
    if (region != NULL) {
        return accessor_write_object(&region->part, value, addr - region->start, kind);
    }
    return guest_write_across(self, value, addr, kind) < 0 ? NULL : Py_NewRef(Py_None);
}

/* --- Copies and fills ----------------------------------------------------------------- */

PyDoc_STRVAR(guest_read_bytes_doc,
             "read_bytes($self, addr, count, /)\n--\n\n"
             "Return exactly count bytes from a guest address on, as bytes.\n"
             "\n"
             "InvalidGuestAddressError where one is in a hole, AddressOverflowError\n"
             "beyond 2**64.");

static PyObject *
guest_read_bytes(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    uint64_t addr, count;
    if (args_count(nargs, 2, 2, "read_bytes", "addr, count") < 0
        || args_u64(args[0], "addr", &addr) < 0
        || args_u64(args[1], "count", &count) < 0
        || guest_reach_all(self, addr, count) < 0) {
        return NULL;
    }
    if (count > PY_SSIZE_T_MAX / 2) { /* regions of the same memory can be as many */
        return PyErr_NoMemory();
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)count);
    if (bytes != NULL
        && guest_exchange_bytes(self, addr, bytes, count, INTO_BUFFER) < 0) {
        Py_CLEAR(bytes);
    }
    return bytes;
}

/* Whether buf's bytes are in the memory of a range that lies in more than one region:
 * a piece that is copied could then be the source of the next one. */
static bool
guest_overlaps(guest_object *self, uint64_t addr, const Py_buffer *view, uint64_t count)
{
    uintptr_t host = (uintptr_t)view->buf;
    for (uint64_t done = 0; done < count;) {
        struct piece piece = guest_piece(self, addr + done, count - done);
        uintptr_t at = (uintptr_t)piece.part->span.addr + piece.offset;
        if (piece.count != count && host < at + piece.count && at < host + count) {
            return true;
        }
        done += piece.count;
    }
    return false;
}

/* As memmove: by a copy of its own in between. */
static int
guest_copy_overlapping(guest_object *self, uint64_t addr, PyObject *buf,
                       const Py_buffer *view, uint64_t count, enum direction direction)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)count);
    if (bytes == NULL) {
        return -1;
    }
    char *between = PyBytes_AsString(bytes);
    const Py_buffer bytes_view = {.buf = between};
    struct span host = {
        .state = self->state, .addr = view->buf, .size = count, .is_plain = true};
    const struct span *ours = memory_span_of(self->state, buf);
    if (ours != NULL) {
        host = *ours;
    }
    int failed;
    if (direction == INTO_MEMORY) {
        failed =
            span_read(&host, 0, between, count) < 0
            || guest_exchange(self, addr, bytes, &bytes_view, count, direction) < 0;
    }
    else {
        failed = guest_exchange(self, addr, bytes, &bytes_view, count, direction) < 0
                 || span_write(&host, 0, between, count) < 0;
    }
    Py_DECREF(bytes);
    return failed ? -1 : 0;
}

static int
guest_copy(guest_object *self, uint64_t addr, PyObject *buf, const Py_buffer *view,
           uint64_t count, enum direction direction)
{
    struct region *region = guest_find_all(self, addr, count);
    if (region != NULL && count == (uint64_t)view->len) {
        return accessor_copy(&region->part, addr - region->start, buf, view, direction,
                             true)
                       < 0
                   ? -1
                   : 0;
    }
    enum stay stay = memory_stay_of_copy(count);
    if (guest_begin(self, stay) < 0) {
        return -1;
    }
    int failed = guest_overlaps(self, addr, view, count)
                     ? guest_copy_overlapping(self, addr, buf, view, count, direction)
                     : guest_exchange(self, addr, buf, view, count, direction);
    guest_end(self, stay);
    return failed;
}

static PyObject *
guest_copy_method(PyObject *op, PyObject *const *args, Py_ssize_t nargs,
                  const char *name, enum direction direction, bool exact)
{
    guest_object *self = guest_of(op);
    uint64_t addr, count;
    Py_buffer view;
    if (args_count(nargs, 2, 2, name, "buf, addr") < 0
        || args_u64(args[1], "addr", &addr) < 0
        || args_buffer(args[0], "buf", &view, direction == INTO_BUFFER) < 0) {
        return NULL;
    }
    count = (uint64_t)view.len;
    int failed = exact ? guest_reach_all(self, addr, count)
                       : guest_reach(self, addr, count, &count);
    if (!failed) {
        failed = guest_copy(self, addr, args[0], &view, count, direction);
    }
    PyBuffer_Release(&view);
    if (failed) {
        return NULL;
    }
    return exact ? Py_NewRef(Py_None) : PyLong_FromUnsignedLongLong(count);
}

PyDoc_STRVAR(guest_read_slice_doc,
             "read_slice($self, buf, addr, /)\n--\n\n"
             "Copy from a guest address on into a writable buffer; return the count.\n"
             "\n"
             "Copies up to the first hole: the count says how many bytes.\n"
             "InvalidGuestAddressError where addr itself is in a hole,\n"
             "AddressOverflowError where len(buf) bytes would pass 2**64.");

static PyObject *
guest_read_slice(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return guest_copy_method(op, args, nargs, "read_slice", INTO_BUFFER, false);
}

PyDoc_STRVAR(guest_write_slice_doc,
             "write_slice($self, buf, addr, /)\n--\n\n"
             "Copy a buffer to a guest address and on; return the count of bytes.\n"
             "\n"
             "Copies up to the first hole: the count says how many bytes.\n"
             "InvalidGuestAddressError where addr itself is in a hole,\n"
             "AddressOverflowError where len(buf) bytes would pass 2**64.");

static PyObject *
guest_write_slice(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return guest_copy_method(op, args, nargs, "write_slice", INTO_MEMORY, false);
}

PyDoc_STRVAR(
    guest_read_exact_doc,
    "read_exact($self, buf, addr, /)\n--\n\n"
    "Fill the whole writable buffer from a guest address on.\n"
    "\n"
    "InvalidGuestAddressError where a byte is in a hole, AddressOverflowError\n"
    "beyond 2**64: buf is untouched then.");

static PyObject *
guest_read_exact(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return guest_copy_method(op, args, nargs, "read_exact", INTO_BUFFER, true);
}

PyDoc_STRVAR(
    guest_write_all_doc,
    "write_all($self, buf, addr, /)\n--\n\n"
    "Write the whole buffer at a guest address.\n"
    "\n"
    "InvalidGuestAddressError where a byte is in a hole, AddressOverflowError\n"
    "beyond 2**64: nothing is written then.");

static PyObject *
guest_write_all(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return guest_copy_method(op, args, nargs, "write_all", INTO_MEMORY, true);
}

PyDoc_STRVAR(
    guest_fill_doc,
    "fill($self, byte, addr=0, count=None, /)\n--\n\n"
    "Set count bytes from a guest address on (up to the first hole where count is\n"
    "None) to byte.\n"
    "\n"
    "byte is an int from 0 to 255, else OverflowError. InvalidGuestAddressError\n"
    "where a byte is in a hole, AddressOverflowError beyond 2**64: nothing is\n"
    "written then.");

static PyObject *
guest_fill(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    uint64_t byte, addr = 0, count = 0;
    bool to_the_hole = nargs < 3 || Py_IsNone(args[2]);
    if (args_count(nargs, 1, 3, "fill", "byte, addr=0, count=None") < 0
        || args_unsigned(args[0], "byte", UINT8_MAX, "255", &byte) < 0
        || (nargs > 1 && args_u64(args[1], "addr", &addr) < 0)
        || (!to_the_hole && args_u64(args[2], "count", &count) < 0)
        || (to_the_hole ? guest_reach_on(self, addr, &count)
                        : guest_reach_all(self, addr, count))
               < 0) {
        return NULL;
    }
    enum stay stay = memory_stay_of_copy(count);
    if (guest_begin(self, stay) < 0) {
        return NULL;
    }
    int failed = 0;
    while (!failed && count > 0) {
        struct piece piece = guest_piece(self, addr, count);
        failed = span_fill(&piece.part->span, piece.offset, (unsigned char)byte,
                           piece.count);
        addr += piece.count;
        count -= piece.count;
    }
    guest_end(self, stay);
    return failed ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(
    guest_read_to_memory_doc,
    "read_to_memory($self, addr, src, count, src_offset=None)\n--\n\n"
    "Read exactly count bytes from src into memory at a guest address.\n"
    "\n"
    "As VolatileMemory.read_to_memory(), across regions that adjoin; transferred\n"
    "counts from addr on. InvalidGuestAddressError where a byte is in a hole,\n"
    "AddressOverflowError beyond 2**64: nothing is read then.");

PyDoc_STRVAR(
    guest_write_from_memory_doc,
    "write_from_memory($self, addr, dst, count, dst_offset=None)\n--\n\n"
    "Write exactly count bytes of memory from a guest address on to dst.\n"
    "\n"
    "As VolatileMemory.write_from_memory(), across regions that adjoin; transferred\n"
    "counts from addr on. InvalidGuestAddressError where a byte is in a hole,\n"
    "AddressOverflowError beyond 2**64: nothing is written then.");

PyMethodDef guest_methods[] = {
    {"from_ranges", (PyCFunction)(void (*)(void))guest_from_ranges,
     METH_FASTCALL | METH_KEYWORDS | METH_CLASS, guest_from_ranges_doc},
    {"find_region", FASTCALL(guest_find_region), guest_find_region_doc},
    {"address_in_range", FASTCALL(guest_address_in_range), guest_address_in_range_doc},
    {"check_range", FASTCALL(guest_check_range), guest_check_range_doc},
    {"checked_offset", FASTCALL(guest_checked_offset), guest_checked_offset_doc},
    {"get_host_address", FASTCALL(guest_get_host_address), guest_get_host_address_doc},
    {"get_slice", FASTCALL(guest_get_slice), guest_get_slice_doc},
    {"slices", FASTCALL(guest_slices), guest_slices_doc},
    {"get_ref", FASTCALL(guest_get_ref), guest_get_ref_doc},
    {"get_atomic_ref", FASTCALL(guest_get_atomic_ref), guest_get_atomic_ref_doc},
    {"get_array_ref", FASTCALL(guest_get_array_ref), guest_get_array_ref_doc},
    {"read_obj", FASTCALL(guest_read_obj), guest_read_obj_doc},
    {"write_obj", KEYWORDS(guest_write_obj), guest_write_obj_doc},
    {"read_slice", FASTCALL(guest_read_slice), guest_read_slice_doc},
    {"write_slice", FASTCALL(guest_write_slice), guest_write_slice_doc},
    {"read_bytes", FASTCALL(guest_read_bytes), guest_read_bytes_doc},
    {"read_exact", FASTCALL(guest_read_exact), guest_read_exact_doc},
    {"write_all", FASTCALL(guest_write_all), guest_write_all_doc},
    {"fill", FASTCALL(guest_fill), guest_fill_doc},
    {"read_to_memory", KEYWORDS(transfer_read_to_guest), guest_read_to_memory_doc},
    {"write_from_memory", KEYWORDS(transfer_write_from_guest),
     guest_write_from_memory_doc},
    {"remove_range", FASTCALL(guest_remove_range), guest_remove_range_doc},
    {"with_region", FASTCALL(guest_with_region), guest_with_region_doc},
    {"without_region", FASTCALL(guest_without_region), guest_without_region_doc},
    {"dirty_ranges", FASTCALL(guest_dirty_ranges), guest_dirty_ranges_doc},
    {"take_dirty", FASTCALL(guest_take_dirty), guest_take_dirty_doc},
    {"mark_dirty", FASTCALL(guest_mark_dirty), guest_mark_dirty_doc},
    {"merge_dirty", FASTCALL(guest_merge_dirty), guest_merge_dirty_doc},
    {"close", FASTCALL(guest_close), guest_close_doc},
    {"__enter__", guest_enter, METH_NOARGS, guest_enter_doc},
    {"__exit__", FASTCALL(guest_exit), guest_exit_doc},
    {"__reduce__", errors_not_copied, METH_NOARGS, errors_not_copied_doc},
    {NULL, NULL, 0, NULL},
};
