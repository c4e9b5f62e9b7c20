/* The bits of written pages. See dirty_map.h. */
#include "dirty_map.h"

void
dirty_map_init(struct dirty_map *self, size_t size, size_t page)
{
    self->size = size;
    self->shift = (unsigned)__builtin_ctzll(page);
    self->pages = size / page + (size % page != 0);
    self->words = self->pages / 64 + (self->pages % 64 != 0);
}

void
dirty_map_mark(struct dirty_map *self, size_t offset, size_t count)
{
    if (count == 0) {
        return;
    }
    size_t first = offset >> self->shift, last = (offset + count - 1) >> self->shift;
    for (size_t w = first / 64; w <= last / 64; w++) {
        uint64_t bits = UINT64_MAX;
        if (w == first / 64) {
            bits &= UINT64_MAX << first % 64;
        }
        if (w == last / 64) {
            bits &= UINT64_MAX >> (63 - last % 64);
        }
        atomic_fetch_or(&self->bits[w], bits);
    }
}
