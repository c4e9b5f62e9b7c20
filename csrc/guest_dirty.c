/* The dirty pages of a guest's memory, by guest address: those of the mappings that track
 * them, as far as regions lie in them.
 */
#include "native.h"

#include "args.h"
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

/* The pages of a region in its bitmap: [*first, *last]. */
static void
region_pages(const struct region *region, size_t *first, size_t *last)
{
    const struct dirty_map *map = region->part->span.dirty;
    size_t start = region_first_byte(region);
    *first = start >> map->shift;
    *last = (start + (region->size - 1)) >> map->shift;
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
    size_t first, last;
    region_pages(region, &first, &last);
    for (size_t w = first / 64; w <= last / 64; w++) {
        uint64_t mask = UINT64_MAX;
        if (w == first / 64) {
            mask &= UINT64_MAX << first % 64;
        }
        if (w == last / 64) {
            mask &= UINT64_MAX >> (63 - last % 64);
        }
        uint64_t bits = take ? atomic_fetch_and(&found->map->bits[w], ~mask)
                             : atomic_load(&found->map->bits[w]);
        found->words[w] |= bits & mask;
    }
}

static bool
found_has(const struct found *found, size_t page)
{
    return found->words[page / 64] >> page % 64 & 1;
}

/* The range that grows while what is next adjoins; empty at first. */
struct run {
    uint64_t start;
    uint64_t count;
};

static int
run_end(struct run *run, PyObject *list)
{
    if (run->count == 0) {
        return 0;
    }
    PyObject *range = Py_BuildValue("(KK)", (unsigned long long)run->start,
                                    (unsigned long long)run->count);
    int failed = range == NULL ? -1 : PyList_Append(list, range);
    Py_XDECREF(range);
    return failed;
}

static int
run_add(struct run *run, PyObject *list, uint64_t start, uint64_t count)
{
    if (run->count != 0 && start - run->start == run->count) {
        run->count += count;
        return 0;
    }
    if (run_end(run, list) < 0) {
        return -1;
    }
    *run = (struct run){start, count};
    return 0;
}

static int
list_region(PyObject *list, struct run *run, const struct found *found,
            const struct region *region)
{
    size_t first, last, byte = region_first_byte(region);
    region_pages(region, &first, &last);
    for (size_t page = first; page <= last; page++) {
        if (!found_has(found, page)) {
            continue;
        }
        size_t start = page << found->map->shift;
        size_t stop = start + ((size_t)1 << found->map->shift);
        start = Py_MAX(start, byte);
        stop = Py_MIN(stop, byte + region->size);
        if (run_add(run, list, region->start + (start - byte), stop - start) < 0) {
            return -1;
        }
    }
    return 0;
}

static PyObject *
list_all(guest_object *self, struct found *found)
{
    PyObject *list = PyList_New(0);
    struct run run = {0, 0};
    int failed = list == NULL;
    for (size_t i = 0; !failed && i < self->count; i++) {
        const struct region *region = &self->regions[i];
        if (region->part->span.dirty != NULL) {
            failed = list_region(list, &run, found_of(found, region->part->span.dirty),
                                 region);
        }
    }
    if (failed || run_end(&run, list) < 0) {
        Py_CLEAR(list);
    }
    return list;
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
            const struct region *region = &self->regions[i];
            if (region->part->span.dirty != NULL) {
                found_add(found_of(found, region->part->span.dirty), region, take);
            }
        }
        list = list_all(self, found);
    }
    for (struct found *one = found; one->map != NULL; one++) {
        for (size_t w = 0; take && list == NULL && w < one->map->words; w++) {
            atomic_fetch_or(&one->map->bits[w], one->words[w]); /* nothing is lost */
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
