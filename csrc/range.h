/* Checked arithmetic on ranges of bytes: the one place that decides whether a
 * range fits. No Python here. */
#ifndef GUESTMEM_RANGE_H
#define GUESTMEM_RANGE_H

#include <stdbool.h>
#include <stdint.h>

/* offset + count, or false where it passes 2**64 - 1. */
static inline bool
range_end(uint64_t offset, uint64_t count, uint64_t *end)
{
    return !__builtin_add_overflow(offset, count, end);
}

/* Whether [offset, offset + count) lies in [0, size). A count of 0 fits at the
 * end. Written without a sum, so that it cannot overflow. */
static inline bool
range_fits(uint64_t offset, uint64_t count, uint64_t size)
{
    return offset <= size && count <= size - offset;
}

/* How many of count bytes fit from offset on, which must be below size. */
static inline uint64_t
range_clamp(uint64_t offset, uint64_t count, uint64_t size)
{
    uint64_t room = size - offset;
    return count < room ? count : room;
}

#endif
