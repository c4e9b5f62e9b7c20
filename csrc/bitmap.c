/* class DirtyBitmap:
 *     page_size: int
 *     num_pages: int
 *     count: int                                  # of dirty pages
 *     def mark(self, offset, count): ...
 *     def is_dirty(self, offset): ...
 *     def ranges(self): ...
 *     def take(self): ...
 *     def merge(self, bitmap, offset=0): ...
 *     def __buffer__(self, flags): ...            # read-only, as KVM lays it out
 *
 * The pages of a mapping that were written. It outlives the mapping, and refers to
 * nothing: the memory it tells of is an address that is never followed.
 */
#include "native.h"

#include "args.h"
#include "bitmap.h"
#include "os_map.h"
#include "range.h"
#include "volatile_memory.h"

typedef struct {
    PyObject_HEAD
    module_state *state; /* alive as long as the type is */
    struct dirty_map map;
} bitmap_object;

static inline bitmap_object *
bitmap_of(PyObject *op)
{
    return (bitmap_object *)op;
}

struct dirty_map *
bitmap_map(PyObject *op)
{
    return &bitmap_of(op)->map;
}

PyObject *
bitmap_new(module_state *state, const char *addr, size_t size)
{
    bitmap_object *self = PyObject_New(bitmap_object, state->bitmap_type);
    if (self == NULL) {
        return NULL;
    }
    self->state = state;
    self->map.base = addr;
    dirty_map_init(&self->map, size, os_map_page_size());
    self->map.bits = PyMem_Calloc(self->map.words, sizeof(*self->map.bits));
    if (self->map.bits == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void
bitmap_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyMem_Free((void *)(uintptr_t)bitmap_of(op)->map.bits);
    PyObject_Free(op);
    Py_DECREF(type);
}

static size_t
bitmap_count(const struct dirty_map *map)
{
    size_t count = 0;
    for (size_t w = 0; w < map->words; w++) {
        count += (size_t)__builtin_popcountll(atomic_load(&map->bits[w]));
    }
    return count;
}

static PyObject *
bitmap_repr(PyObject *op)
{
    const struct dirty_map *map = &bitmap_of(op)->map;
    return PyUnicode_FromFormat("<guestmem.DirtyBitmap %zu of %zu pages dirty>",
                                bitmap_count(map), map->pages);
}

/* The words as they are now; with `clear` they are 0 from the same moment on, each by
 * itself. NULL with MemoryError, and nothing is cleared. */
static uint64_t *
bitmap_snapshot(struct dirty_map *map, bool clear)
{
    uint64_t *words = PyMem_Calloc(map->words, sizeof(*words));
    if (words == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    dirty_map_collect(map, 0, map->pages, clear, words);
    return words;
}

static int
ranges_put(const struct ranges *self)
{
    if (self->count == 0) {
        return 0;
    }
    PyObject *range = Py_BuildValue("(KK)", (unsigned long long)self->start,
                                    (unsigned long long)self->count);
    int failed = range == NULL ? -1 : PyList_Append(self->list, range);
    Py_XDECREF(range);
    return failed;
}

int
bitmap_add_ranges(struct ranges *self, const struct dirty_map *map,
                  const uint64_t *words, size_t offset, size_t count, uint64_t start)
{
    size_t end = ((offset + (count - 1)) >> map->shift) + 1;
    struct dirty_run run = {.past = offset >> map->shift};
    while (dirty_run_next(words, end, &run)) {
        size_t from = Py_MAX(run.first << map->shift, offset);
        size_t to = Py_MIN(run.past << map->shift, offset + count);
        uint64_t at = start + (from - offset);
        if (self->count != 0 && at - self->start == self->count) {
            self->count += to - from;
            continue;
        }
        if (ranges_put(self) < 0) {
            return -1;
        }
        self->start = at;
        self->count = to - from;
    }
    return 0;
}

PyObject *
bitmap_end_ranges(struct ranges *self, bool failed)
{
    if (self->list != NULL && (failed || ranges_put(self) < 0)) {
        Py_CLEAR(self->list);
    }
    return self->list;
}

/* [(offset, count), ...] in bytes: runs of dirty pages, the last one up to the end. */
static PyObject *
bitmap_list(const struct dirty_map *map, const uint64_t *words)
{
    struct ranges ranges = {.list = PyList_New(0)};
    bool failed = ranges.list == NULL
                  || bitmap_add_ranges(&ranges, map, words, 0, map->size, 0) < 0;
    return bitmap_end_ranges(&ranges, failed);
}

PyDoc_STRVAR(
    bitmap_mark_doc,
    "mark($self, offset, count, /)\n--\n\n"
    "Mark the pages of [offset, offset + count) as written.\n"
    "\n"
    "For what guestmem does not see: a device, a guest, an exported buffer. A\n"
    "count of 0 marks nothing. InvalidAddressError where the range passes the\n"
    "end of the memory: nothing is marked then.");

static PyObject *
bitmap_mark(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    bitmap_object *self = bitmap_of(op);
    uint64_t offset, count;
    if (args_count(nargs, 2, 2, "mark", "offset, count") < 0
        || args_u64(args[0], "offset", &offset) < 0
        || args_u64(args[1], "count", &count) < 0) {
        return NULL;
    }
    if (!range_fits(offset, count, self->map.size)) {
        return errors_invalid_address(self->state, offset, count, self->map.size);
    }
    dirty_map_mark(&self->map, offset, count);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(bitmap_is_dirty_doc,
             "is_dirty($self, offset, /)\n--\n\n"
             "Return whether the page that holds the byte at offset is marked.\n"
             "\n"
             "InvalidAddressError where offset is not below the size of the memory.");

static PyObject *
bitmap_is_dirty(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    bitmap_object *self = bitmap_of(op);
    uint64_t offset;
    if (args_count(nargs, 1, 1, "is_dirty", "offset") < 0
        || args_u64(args[0], "offset", &offset) < 0) {
        return NULL;
    }
    if (offset >= self->map.size) {
        return errors_invalid_address(self->state, offset, 1, self->map.size);
    }
    return PyBool_FromLong(dirty_map_get(&self->map, offset >> self->map.shift));
}

PyDoc_STRVAR(bitmap_ranges_doc,
             "ranges($self, /)\n--\n\n"
             "Return the dirty ranges as a list of (offset, count), in bytes.\n"
             "\n"
             "Pages side by side are one range; the last one ends with the memory.");

static PyObject *
bitmap_ranges(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    struct dirty_map *map = &bitmap_of(op)->map;
    if (args_count(nargs, 0, 0, "ranges", "") < 0) {
        return NULL;
    }
    uint64_t *words = bitmap_snapshot(map, false);
    PyObject *list = words == NULL ? NULL : bitmap_list(map, words);
    PyMem_Free(words);
    return list;
}

PyDoc_STRVAR(
    bitmap_take_doc,
    "take($self, /)\n--\n\n"
    "Return the dirty ranges as ranges() does, and make them clean.\n"
    "\n"
    "A page that is marked meanwhile is in this list or in the next one. What was\n"
    "written before a page was marked can be read once it has been taken. Where\n"
    "there is no memory for the list, nothing becomes clean.");

static PyObject *
bitmap_take(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    struct dirty_map *map = &bitmap_of(op)->map;
    if (args_count(nargs, 0, 0, "take", "") < 0) {
        return NULL;
    }
    uint64_t *words = bitmap_snapshot(map, true);
    if (words == NULL) {
        return NULL;
    }
    PyObject *list = bitmap_list(map, words);
    if (list == NULL) {
        dirty_map_restore(map, words);
    }
    PyMem_Free(words);
    return list;
}

int
bitmap_open_log(PyObject *obj, Py_buffer *view, size_t *words)
{
    if (args_buffer(obj, "bitmap", view, false) < 0) {
        return -1;
    }
    *words = (size_t)view->len / sizeof(uint64_t);
    if ((size_t)view->len % sizeof(uint64_t) != 0) {
        PyErr_Format(PyExc_ValueError,
                     "bitmap must have a multiple of 8 bytes, not %zd", view->len);
        PyBuffer_Release(view);
        return -1;
    }
    return 0;
}

uint64_t *
bitmap_copy_log(const module_state *state, PyObject *obj, const Py_buffer *view)
{
    size_t size = (size_t)view->len;
    uint64_t *words = PyMem_Malloc(size);
    if (words == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    const struct span *span = memory_span_of(state, obj);
    if (span == NULL) {
        access_read(words, view->buf, size); /* others may write there: a shared log */
    }
    else if (span_read(span, 0, words, size) < 0) {
        PyMem_Free(words);
        return NULL;
    }
    return words;
}

PyDoc_STRVAR(
    bitmap_merge_doc,
    "merge($self, bitmap, offset=0, /)\n--\n\n"
    "Mark the pages whose bit is set in a buffer.\n"
    "\n"
    "Its layout is that of KVM_GET_DIRTY_LOG: one bit for each page of page_size, the\n"
    "lowest bit of the first byte is the page at offset (bytes). So a slot's log is\n"
    "merged where the slot's memory begins, and may end before the memory does. Its\n"
    "size is a multiple of 8 bytes, else ValueError. Bits past the last page of the\n"
    "memory are ignored, but only in the last word of 8 bytes: InvalidAddressError\n"
    "where a word begins there, or offset is past the end. MisalignedError where\n"
    "offset is no multiple of page_size, ReadFromMemoryError where the buffer is\n"
    "memory of which a page is missing. Nothing is marked then.");

/* The pages from offset on that so many words tell of. -1 with an exception. */
static int
bitmap_log_pages(const bitmap_object *self, uint64_t offset, size_t words,
                 size_t *pages)
{
    const struct dirty_map *map = &self->map;
    size_t page = (size_t)1 << map->shift, left = map->pages - (offset >> map->shift);
    if (offset % page != 0) {
        errors_misaligned(self->state, offset, page);
        return -1;
    }
    if (offset > map->size || words > left / 64 + (left % 64 != 0)) {
        errors_invalid_address(self->state, offset, bitmap_log_size(words, map->shift),
                               map->size);
        return -1;
    }
    *pages = Py_MIN(64 * words, left);
    return 0;
}

static PyObject *
bitmap_merge(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    bitmap_object *self = bitmap_of(op);
    Py_buffer view;
    uint64_t offset = 0;
    size_t count, pages;
    if (args_count(nargs, 1, 2, "merge", "bitmap, offset=0") < 0
        || (nargs > 1 && args_u64(args[1], "offset", &offset) < 0)
        || bitmap_open_log(args[0], &view, &count) < 0) {
        return NULL;
    }
    uint64_t *words = NULL;
    if (bitmap_log_pages(self, offset, count, &pages) == 0) {
        words = bitmap_copy_log(self->state, args[0], &view);
    }
    PyBuffer_Release(&view);
    if (words == NULL) {
        return NULL;
    }
    dirty_map_merge(&self->map, offset >> self->map.shift, words, pages);
    PyMem_Free(words);
    Py_RETURN_NONE;
}

static PyObject *
bitmap_get_page_size(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t((size_t)1 << bitmap_of(op)->map.shift);
}

static PyObject *
bitmap_get_num_pages(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(bitmap_of(op)->map.pages);
}

static PyObject *
bitmap_get_count(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(bitmap_count(&bitmap_of(op)->map));
}

static int
bitmap_getbuffer(PyObject *op, Py_buffer *view, int flags)
{
    struct dirty_map *map = &bitmap_of(op)->map;
    return PyBuffer_FillInfo(view, op, (void *)(uintptr_t)map->bits,
                             (Py_ssize_t)(map->words * sizeof(*map->bits)), 1, flags);
}

static PyMethodDef bitmap_methods[] = {
    {"mark", FASTCALL(bitmap_mark), bitmap_mark_doc},
    {"is_dirty", FASTCALL(bitmap_is_dirty), bitmap_is_dirty_doc},
    {"ranges", FASTCALL(bitmap_ranges), bitmap_ranges_doc},
    {"take", FASTCALL(bitmap_take), bitmap_take_doc},
    {"merge", FASTCALL(bitmap_merge), bitmap_merge_doc},
    {"__reduce__", errors_not_copied, METH_NOARGS, errors_not_copied_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef bitmap_getset[] = {
    {"page_size", bitmap_get_page_size, NULL,
     PyDoc_STR("The bytes that one bit stands for: the system's page size."), NULL},
    {"num_pages", bitmap_get_num_pages, NULL,
     PyDoc_STR("How many pages the memory has; the last one may be cut off."), NULL},
    {"count", bitmap_get_count, NULL, PyDoc_STR("How many pages are dirty now."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(
    bitmap_doc,
    "The pages of a mapping that were written: MemoryMapping.dirty.\n"
    "\n"
    "What is written through guestmem marks its pages after it was written: by the\n"
    "mapping, its slices and refs of every kind, fills, and reads from files, also\n"
    "where they fail half-way. What others write is not seen: a guest, a device,\n"
    "who has an address or an exported buffer (mark(), and merge() for KVM's log).\n"
    "\n"
    "Its buffer is read-only, and lies as KVM_GET_DIRTY_LOG lays it out.");

static PyType_Slot bitmap_slots[] = {
    {Py_tp_doc, SLOT(bitmap_doc)},
    {Py_tp_dealloc, SLOT(bitmap_dealloc)},
    {Py_tp_repr, SLOT(bitmap_repr)},
    {Py_tp_methods, bitmap_methods},
    {Py_tp_getset, bitmap_getset},
    {Py_bf_getbuffer, SLOT(bitmap_getbuffer)},
    {0, NULL},
};

static PyType_Spec bitmap_spec = {
    .name = "guestmem.DirtyBitmap",
    .basicsize = sizeof(bitmap_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE
             | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = bitmap_slots,
};

int
bitmap_init(PyObject *module, module_state *state)
{
    state->bitmap_type = native_add_type(module, &bitmap_spec, NULL, true);
    return state->bitmap_type == NULL ? -1 : 0;
}
