/* The dirty pages of a guest's memory, by guest address: those of the mappings that track
 * them, as far as regions lie in them.
 */
#include "native.h"

#include "args.h"
#include "bitmap.h"
#include "guest.h"

/* What was found in one bitmap; several regions may lie in it, and share a page. */
struct found {
    struct dirty_map *map;
    uint64_t *words;
};

static size_t
region_first_byte(struct region *region)
{
    return (size_t)(region->part.span.addr - region->part.span.dirty->base);
}

static struct found *
found_of(struct found *found, const struct dirty_map *map)
{
    while (found->map != map) {
        found++;
    }
    return found;
}

/* Adds the bits of a region's pages, and clears them if they are taken. */
static void
found_add(struct found *found, struct region *region, bool take)
{
    size_t start = region_first_byte(region);
    size_t last = (start + (region->size - 1)) >> found->map->shift;
    dirty_map_collect(found->map, start >> found->map->shift, last + 1, take,
                      found->words);
}

static PyObject *
list_all(guest_object *self, struct found *found)
{
    struct ranges ranges = {.list = PyList_New(0)};
    bool failed = ranges.list == NULL;
    for (size_t i = 0; !failed && i < self->count; i++) {
        struct region *region = &self->regions[i];
        if (region->part.span.dirty != NULL) {
            const struct found *in = found_of(found, region->part.span.dirty);
            failed = bitmap_add_ranges(&ranges, in->map, in->words,
                                       region_first_byte(region), region->size,
                                       region->start)
                     < 0;
        }
    }
    return bitmap_end_ranges(&ranges, failed);
}

/* One entry for each bitmap. -1 with MemoryError. */
static int
found_make(guest_object *self, struct found *found)
{
    size_t count = 0;
    for (size_t i = 0; i < self->count; i++) {
        struct dirty_map *map = self->regions[i].part.span.dirty;
        size_t known = 0;
        while (known < count && found[known].map != map) {
            known++;
        }
        if (map == NULL || known < count) {
            continue;
        }
        found[count].words = PyMem_Calloc(map->words, sizeof(uint64_t));
        if (found[count].words == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        found[count++].map = map;
    }
    return 0;
}

static PyObject *
guest_dirty(guest_object *self, bool take)
{
    if (guest_begin(self, LONG) < 0) {
        return NULL;
    }
    struct found *found = PyMem_Calloc(self->count + 1, sizeof(*found));
    PyObject *list = NULL;
    if (found == NULL) {
        guest_end(self, LONG);
        return PyErr_NoMemory();
    }
    if (found_make(self, found) == 0) {
        for (size_t i = 0; i < self->count; i++) {
            struct region *region = &self->regions[i];
            if (region->part.span.dirty != NULL) {
                found_add(found_of(found, region->part.span.dirty), region, take);
            }
        }
        list = list_all(self, found);
    }
    for (struct found *one = found; one->map != NULL; one++) {
        if (take && list == NULL) {
            dirty_map_restore(one->map, one->words); /* nothing is lost */
        }
        PyMem_Free(one->words);
    }
    PyMem_Free(found);
    guest_end(self, LONG);
    return list;
}

const char guest_dirty_ranges_doc[] =
    PyDoc_STR("dirty_ranges($self, /)\n--\n\n"
              "Return the dirty ranges as a list of (guest address, count).\n"
              "\n"
              "As DirtyBitmap.ranges(), of all regions whose mappings track what is\n"
              "written, in the order of their addresses.");

PyObject *
guest_dirty_ranges(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    return args_count(nargs, 0, 0, "dirty_ranges", "") < 0
               ? NULL
               : guest_dirty(guest_of(op), false);
}

const char guest_take_dirty_doc[] = PyDoc_STR(
    "take_dirty($self, /)\n--\n\n"
    "Return the dirty ranges as dirty_ranges() does, and make them clean.\n"
    "\n"
    "As DirtyBitmap.take(), of the pages that regions lie in: a page that is\n"
    "marked meanwhile is in this list or in the next one.");

PyObject *
guest_take_dirty(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
    return args_count(nargs, 0, 0, "take_dirty", "") < 0
               ? NULL
               : guest_dirty(guest_of(op), true);
}

/* --- Marking -------------------------------------------------------------------------- */

/* [offset, offset + count) of a log that says of each page whether it was written (NULL:
 * each was), in the memory that the piece is of. By bytes: neither side need begin with a
 * page. */
static void
piece_mark(const struct piece *piece, const uint64_t *log, uint64_t offset)
{
    const struct span *span = &piece->part->span;
    uint64_t end = offset + piece->count;
    if (log == NULL || span->dirty == NULL) {
        span_wrote(span, piece->offset, piece->count);
        return;
    }
    unsigned shift = span->dirty->shift;
    struct dirty_run run = {.past = offset >> shift};
    while (dirty_run_next(log, ((end - 1) >> shift) + 1, &run)) {
        uint64_t from = Py_MAX((uint64_t)run.first << shift, offset);
        uint64_t to = Py_MIN((uint64_t)run.past << shift, end);
        span_wrote(span, piece->offset + (from - offset), to - from);
    }
}

/* A range that guest_reach() has found. -1 with ClosedError. */
static int
guest_mark(guest_object *self, uint64_t addr, uint64_t count, const uint64_t *log)
{
    if (guest_begin(self, SHORT) < 0) {
        return -1;
    }
    for (uint64_t done = 0; done < count;) {
        struct piece piece = guest_piece(self, addr + done, count - done);
        piece_mark(&piece, log, done);
        done += piece.count;
    }
    guest_end(self, SHORT);
    return 0;
}

const char guest_mark_dirty_doc[] = PyDoc_STR(
    "mark_dirty($self, addr, count, /)\n--\n\n"
    "Mark the pages of [addr, addr + count) as written, by guest address.\n"
    "\n"
    "As DirtyBitmap.mark(), across regions that adjoin; of regions whose\n"
    "mappings do not track what is written nothing is marked.\n"
    "InvalidGuestAddressError where a byte is in a hole, AddressOverflowError\n"
    "beyond 2**64: nothing is marked then.");

PyObject *
guest_mark_dirty(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t addr, count;
    if (args_count(nargs, 2, 2, "mark_dirty", "addr, count") < 0
        || args_u64(args[0], "addr", &addr) < 0
        || args_u64(args[1], "count", &count) < 0
        || guest_reach_all(guest_of(op), addr, count) < 0) {
        return NULL;
    }
    return guest_mark(guest_of(op), addr, count, NULL) < 0 ? NULL : Py_NewRef(Py_None);
}

/* How many bytes from addr on a log of so many words tells of: up to the first hole, which
 * may begin within the last word, if not with it. -1 with an exception. */
static int
guest_log_reach(guest_object *self, uint64_t addr, size_t words, size_t page,
                uint64_t *reach)
{
    unsigned shift = (unsigned)__builtin_ctzll(page);
    uint64_t size = bitmap_log_size(words, shift), to_the_end = 0 - addr;
    if (addr % page != 0) {
        errors_misaligned(self->state, addr, page);
        return -1;
    }
    /* Of the last word only the first page must be there. */
    uint64_t least = words == 0 ? 0 : bitmap_log_size(words - 1, shift);
    least += words != 0 && least != UINT64_MAX;
    if (guest_reach_all(self, addr, least) < 0) {
        return -1;
    }
    if (to_the_end != 0) { /* at 0 nothing passes the end */
        size = Py_MIN(size, to_the_end);
    }
    return guest_reach(self, addr, size, reach);
}

const char guest_merge_dirty_doc[] = PyDoc_STR(
    "merge_dirty($self, addr, bitmap, /)\n--\n\n"
    "Mark the pages whose bit is set in a buffer, from a guest address on.\n"
    "\n"
    "As DirtyBitmap.merge(): bitmap is what KVM_GET_DIRTY_LOG gives of a slot that\n"
    "begins at addr. It may go on into regions that adjoin; of its last word of 8\n"
    "bytes what comes after a hole, or the end, is ignored. What is not tracked is\n"
    "not marked. MisalignedError where addr is no multiple of the page size,\n"
    "InvalidGuestAddressError where a page is in a hole before the last word's\n"
    "second, AddressOverflowError where one is beyond 2**64, ValueError where bitmap\n"
    "has no multiple of 8 bytes, ReadFromMemoryError where it is memory of which a\n"
    "page is missing: nothing is marked then.");

PyObject *
guest_merge_dirty(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    guest_object *self = guest_of(op);
    Py_buffer view;
    uint64_t addr, reach, *words = NULL;
    size_t count, page = os_map_page_size();
    if (args_count(nargs, 2, 2, "merge_dirty", "addr, bitmap") < 0
        || args_u64(args[0], "addr", &addr) < 0
        || bitmap_open_log(args[1], &view, &count) < 0) {
        return NULL;
    }
    if (guest_log_reach(self, addr, count, page, &reach) == 0) {
        words = bitmap_copy_log(self->state, args[1], &view);
    }
    PyBuffer_Release(&view);
    if (words == NULL) {
        return NULL;
    }
    int failed = guest_mark(self, addr, reach, words);
    PyMem_Free(words);
    return failed ? NULL : Py_NewRef(Py_None);
}
