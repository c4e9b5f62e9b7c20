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
region_first_byte(const struct region *region)
{
    return (size_t)(region->part->span.addr - region->part->span.dirty->base);
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
found_add(struct found *found, const struct region *region, bool take)
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
        const struct region *region = &self->regions[i];
        if (region->part->span.dirty != NULL) {
            const struct found *in = found_of(found, region->part->span.dirty);
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
        struct dirty_map *map = self->regions[i].part->span.dirty;
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
    struct found *found = PyMem_Calloc(self->count + 1, sizeof(*found));
    PyObject *list = NULL;
    if (found == NULL) {
        return PyErr_NoMemory();
    }
    if (found_make(self, found) == 0) {
        for (size_t i = 0; i < self->count; i++) {
            const struct region *region = &self->regions[i];
            if (region->part->span.dirty != NULL) {
                found_add(found_of(found, region->part->span.dirty), region, take);
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
