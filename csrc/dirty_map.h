/* Which pages of a mapping were written: one bit for each, changed by atomic
 * operations, so that whoever takes them misses none. No Python here.
 *
 * The layout is that of KVM_GET_DIRTY_LOG: words of 64 bits in host order, bit i of
 * word w is page 64 * w + i; bits past the last page stay 0.
 */
#ifndef GUESTMEM_DIRTY_MAP_H
#define GUESTMEM_DIRTY_MAP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct dirty_map {
    const char *base; /* the first byte of the memory: an address, never followed */
    size_t size;      /* its bytes */
    unsigned shift;   /* 1 << shift is the size of a page */
    size_t pages;
    size_t words;
    _Atomic uint64_t *bits;
};

/* Sets what does not depend on where the memory is; bits are the caller's. */
void dirty_map_init(struct dirty_map *self, size_t size, size_t page);

/* Marks the pages of [offset, offset + count), which lies in the memory, *after* they
 * were written. The operation is sequentially consistent also where the bit is set
 * already: who takes it has then waited for what was written. */
void dirty_map_mark(struct dirty_map *self, size_t offset, size_t count);

static inline bool
dirty_map_get(const struct dirty_map *self, size_t page)
{
    return atomic_load(&self->bits[page / 64]) >> page % 64 & 1;
}

/* Marks the pages from `first` on whose bit is set: of `pages` bits of words, the lowest
 * one is that of the first. All of these pages are there. */
void dirty_map_merge(struct dirty_map *self, size_t first, const uint64_t *words,
                     size_t pages);

/* Adds the bits of the pages [first, past) to words, which lie as those of the map do
 * and are the caller's alone. With `clear` they are 0 in the map from the same moment
 * on, each word by itself. */
void dirty_map_collect(struct dirty_map *self, size_t first, size_t past, bool clear,
                       uint64_t *words);

/* Gives back what was collected. */
void dirty_map_restore(struct dirty_map *self, const uint64_t *words);

/* Pages [first, past) side by side, whose bits are set. */
struct dirty_run {
    size_t first;
    size_t past;
};

/* The next run: of the pages from run->past on, and before `end`. False: there is none.
 * It skips words without such a bit. */
bool dirty_run_next(const uint64_t *words, size_t end, struct dirty_run *run);

#endif
