/* The bits of written pages. See dirty_map.h. */
#include "dirty_map.h"

/* The bits of word w that stand for pages of [first, past), which has some there. */
static inline uint64_t
word_mask(size_t w, size_t first, size_t past)
{
    uint64_t mask = UINT64_MAX;
    if (w == first / 64) {
        mask &= UINT64_MAX << first % 64;
    }
    if (w == (past - 1) / 64) {
        mask &= UINT64_MAX >> (63 - (past - 1) % 64);
    }
    return mask;
}

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
    size_t first = offset >> self->shift;
    size_t past = ((offset + count - 1) >> self->shift) + 1;
    for (size_t w = first / 64; 64 * w < past; w++) {
        atomic_fetch_or(&self->bits[w], word_mask(w, first, past));
    }
}

void
dirty_map_merge(struct dirty_map *self, size_t first, const uint64_t *words,
                size_t pages)
{
    for (size_t i = 0; 64 * i < pages; i++) {
        uint64_t bits = words[i] & word_mask(i, 0, pages);
        size_t page = first + 64 * i, shift = page % 64;
        if (bits << shift != 0) {
            atomic_fetch_or(&self->bits[page / 64], bits << shift);
        }
        if (shift != 0 && bits >> (64 - shift) != 0) {
            atomic_fetch_or(&self->bits[page / 64 + 1], bits >> (64 - shift));
        }
    }
}

void
dirty_map_collect(struct dirty_map *self, size_t first, size_t past, bool clear,
                  uint64_t *words)
{
    for (size_t w = first / 64; 64 * w < past; w++) {
        uint64_t bits = atomic_load(&self->bits[w]);
        if (bits == 0) { /* as most are: a load is all that they cost */
            continue;
        }
        uint64_t mask = word_mask(w, first, past);
        if (clear && (bits & mask) != 0) {
            bits = atomic_fetch_and(&self->bits[w], ~mask);
        }
        words[w] |= bits & mask;
    }
}

void
dirty_map_restore(struct dirty_map *self, const uint64_t *words)
{
    for (size_t w = 0; w < self->words; w++) {
        if (words[w] != 0) {
            atomic_fetch_or(&self->bits[w], words[w]);
        }
    }
}

/* The first page of [page, end) whose bit is `set`; end where there is none. */
static size_t
next_page(const uint64_t *words, size_t page, size_t end, bool set)
{
    for (size_t w = page / 64; 64 * w < end; w++) {
        uint64_t bits = set ? words[w] : ~words[w];
        if (w == page / 64) {
            bits &= UINT64_MAX << page % 64;
        }
        if (bits != 0) {
            size_t found = 64 * w + (size_t)__builtin_ctzll(bits);
            return found < end ? found : end;
        }
    }
    return end;
}

bool
dirty_run_next(const uint64_t *words, size_t end, struct dirty_run *run)
{
    run->first = next_page(words, run->past, end, true);
    run->past = next_page(words, run->first, end, false);
    return run->first < end;
}
