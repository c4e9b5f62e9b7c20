/* Copies and fills with 32-byte vectors, and past the caches where they are large.
 * x86-64 with AVX2; no other processor gets here.
 */
#include "access.h"

#include "access_copy.h"

#if defined(__x86_64__)

# include <immintrin.h>

# define WIDE        __attribute__((target("avx2"))) ACCESS_RACY
# define WIDE_INLINE static inline __attribute__((always_inline)) WIDE

/* From here on stores go past the caches, which have no room for so much and would
 * read each line before they own it. Measured: 27 against 20 GB/s; at 1 MiB, what
 * the caches hold, 42 against 56. */
# define STREAM_FROM ((size_t)16 << 20)
# define LINE        ((size_t)64) /* bytes of a cache line */

/* And from here on the source is asked for ahead of time, so many bytes. Measured at
 * 1 MiB: 60 against 52 GB/s; at 256 KiB and below, where the second cache holds it
 * all, nothing is gained and up to a tenth lost. */
# define AHEAD_FROM ((size_t)512 << 10)
# define AHEAD      ((size_t)1 << 10)

bool
wide_is_there(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") != 0;
}

WIDE void
wide_settle(void)
{
    _mm_sfence();
    _mm256_zeroupper(); /* a copy that is cut short leaves them dirty */
}

static inline bool
overlaps_upwards(const char *dst, const char *src, size_t count)
{
    return (uintptr_t)dst - (uintptr_t)src < count;
}

/* Whole vectors of *rest, to a destination that is aligned to them. */
WIDE_INLINE void
stream(struct rest *rest)
{
    while (rest->count >= 4 * 32) {
        for (int i = 0; i < 4; i++) {
            any_32 value = *(const volatile any_32 *)(const void *)(rest->src + 32 * i);
            _mm256_stream_si256((void *)(rest->dst + 32 * i), (__m256i)value);
        }
        rest->dst += 4 * 32, rest->src += 4 * 32, rest->count -= 4 * 32;
    }
}

static WIDE void
stream_write(char *guest, const char *host, size_t count)
{
    struct rest rest = {guest, host, count};
    copy_head(&rest, 32, false, DESTINATION);
    stream(&rest);
    copy_rest(&rest, 32, false, DESTINATION, 0);
    wide_settle();
}

/* The guest's side chooses the widths, and only whole lines of the host's are worth
 * streaming: so blocks of guest memory are read to where the first cache holds them,
 * and lines written from there. What does not fill a line waits for the next block. */
static WIDE void
stream_read(char *host, const char *guest, size_t count)
{
    char block[2 * LINE + 16 * LINE] __attribute__((aligned(64)));
    size_t head = -(uintptr_t)guest % LINE;
    copy(host, guest, head, 32, SOURCE);
    host += head, guest += head, count -= head;

    size_t lead = -(uintptr_t)host % LINE, waiting = 0;
    for (; count >= 16 * LINE; count -= 16 * LINE, guest += 16 * LINE) {
        copy(block + waiting, guest, 16 * LINE, 32, SOURCE);
        copy(host, block, lead, 32, DESTINATION);
        struct rest rest = {host + lead, block + lead, waiting + 16 * LINE - lead};
        waiting = rest.count % (4 * 32);
        stream(&rest);
        copy(block, rest.src, waiting, 32, DESTINATION);
        host = rest.dst;
        lead = 0;
    }
    copy(host, block, waiting, 32, DESTINATION);
    copy(host + waiting, guest, count, 32, SOURCE);
    wide_settle();
}

WIDE void
wide_read(char *host, const char *guest, size_t count)
{
    if (count >= STREAM_FROM && !overlaps_upwards(host, guest, count)
        && !overlaps_upwards(guest, host, count)) {
        stream_read(host, guest, count);
    }
    else if (count >= AHEAD_FROM) {
        copy_ahead(host, guest, count, 32, SOURCE, AHEAD);
    }
    else {
        copy(host, guest, count, 32, SOURCE);
    }
}

WIDE void
wide_write(char *guest, const char *host, size_t count)
{
    if (count >= STREAM_FROM && !overlaps_upwards(guest, host, count)) {
        stream_write(guest, host, count);
    }
    else if (count >= AHEAD_FROM) {
        copy_ahead(guest, host, count, 32, DESTINATION, AHEAD);
    }
    else {
        copy(guest, host, count, 32, DESTINATION);
    }
}

WIDE void
wide_fill(char *guest, unsigned char byte, size_t count)
{
    fill(guest, byte, count, 32);
}

/* The last `words` words of low, then the first words of high: 32 bytes. */
WIDE_INLINE own_32
join(own_32 low, own_32 high, int words)
{
    __m256i middle = _mm256_permute2x128_si256((__m256i)low, (__m256i)high, 0x21);
    switch (words) {
    case 1:
        return (own_32)_mm256_alignr_epi8((__m256i)high, middle, 8);
    case 2:
        return (own_32)middle;
    default:
        return (own_32)_mm256_alignr_epi8(middle, (__m256i)low, 8);
    }
}

/* Upwards: the destination is aligned to 32, the source `words` words short of it.
 * Aligned vectors are loaded, and joined to what aligned vectors take. So many words
 * are always loaded and not stored yet: the last ones of low. */
WIDE_INLINE void
joined_up(struct rest *rest, int words)
{
    const size_t ahead = 8 * (size_t)words;
    own_32 low = {0};
    for (int i = 0; i < words; i++) {
        low[4 - words + i] = *(const volatile own_8 *)(const void *)(rest->src + 8 * i);
    }
    const char *src = rest->src + ahead;
    for (; rest->count >= 32 + ahead; rest->count -= 32) {
        own_32 high = *(const volatile own_32 *)(const void *)src;
        *(volatile own_32 *)(void *)rest->dst = join(low, high, words);
        low = high;
        src += 32, rest->dst += 32;
    }
    for (int i = 0; i < words; i++) {
        *(volatile own_8 *)(void *)(rest->dst + 8 * i) = low[4 - words + i];
    }
    rest->dst += ahead, rest->count -= ahead;
    rest->src = src;
}

/* Downwards: the ends; the source's is `words` words past an aligned one, and these
 * are the first ones of high. */
WIDE_INLINE void
joined_down(struct rest *rest, int words)
{
    const size_t ahead = 8 * (size_t)words;
    own_32 high = {0};
    const char *src = rest->src - ahead;
    for (int i = words - 1; i >= 0; i--) {
        high[i] = *(const volatile own_8 *)(const void *)(src + 8 * i);
    }
    for (; rest->count >= 32 + ahead; rest->count -= 32) {
        src -= 32, rest->dst -= 32;
        own_32 low = *(const volatile own_32 *)(const void *)src;
        *(volatile own_32 *)(void *)rest->dst = join(low, high, 4 - words);
        high = low;
    }
    rest->dst -= ahead, rest->count -= ahead;
    rest->src = src;
    for (int i = words - 1; i >= 0; i--) {
        *(volatile own_8 *)(void *)(rest->dst + 8 * i) = high[i];
    }
}

WIDE void
wide_copy_words(char *dst, const char *src, size_t count)
{
    bool down = overlaps_upwards(dst, src, count);
    struct rest rest = down ? (struct rest){dst + count, src + count, count}
                            : (struct rest){dst, src, count};
    copy_head(&rest, 8, down, DESTINATION);
    while ((uintptr_t)rest.dst % 32 != 0) {
        step(&rest, 8, down, DESTINATION);
    }
    uintptr_t past = (uintptr_t)rest.src % 32 / 8;
    if (down) {
        switch (past) {
        case 1:
            joined_down(&rest, 1);
            break;
        case 2:
            joined_down(&rest, 2);
            break;
        case 3:
            joined_down(&rest, 3);
            break;
        }
    }
    else {
        switch (past) {
        case 1:
            joined_up(&rest, 3);
            break;
        case 2:
            joined_up(&rest, 2);
            break;
        case 3:
            joined_up(&rest, 1);
            break;
        }
    }
    copy_rest(&rest, 8, down, DESTINATION, 0);
}

#else

bool
wide_is_there(void)
{
    return false;
}

void
wide_settle(void)
{
}

void
wide_read(char *host, const char *guest, size_t count)
{
    copy(host, guest, count, 16, SOURCE);
}

void
wide_write(char *guest, const char *host, size_t count)
{
    copy(guest, host, count, 16, DESTINATION);
}

void
wide_copy_words(char *dst, const char *src, size_t count)
{
    copy(dst, src, count, 8, DESTINATION);
}

void
wide_fill(char *guest, unsigned char byte, size_t count)
{
    fill(guest, byte, count, 16);
}

#endif
