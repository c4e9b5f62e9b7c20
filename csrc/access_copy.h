/* The loops of copies and fills, for access.c and access_wide.c alone. See access.h
 * for what they promise.
 *
 * One idea: the guest's address alone chooses the widths. Narrow moves (1, 2, 4
 * ... bytes) bring it up to the alignment of the widest move, wide moves follow,
 * narrow ones finish. So every move on the guest's side is naturally aligned,
 * which is what keeps its fields from being torn; the other side takes whatever
 * alignment it has. A field that lies wholly in the range is never cut: a move
 * of w bytes is left out only where fewer than w bytes remain.
 *
 * Vectors count as whole because their 8-byte lanes do not tear: a vector that
 * is aligned to its size lies in one cache line on x86-64, and is two 64-bit
 * single-copy atomic accesses on aarch64. rep movs and libc's memcpy promise
 * nothing of the kind (memcpy also copies its head and tail twice).
 */
#ifndef GUESTMEM_ACCESS_COPY_H
#define GUESTMEM_ACCESS_COPY_H

#include "access.h"

#include <stdbool.h>

#define INLINE static inline __attribute__((always_inline)) ACCESS_RACY

/* own_N is naturally aligned, any_N is not. Every access to one is volatile, so
 * that the compiler does not repeat, merge or invent it. (Stores past the caches are
 * not, but an intrinsic of its own each: access_wide.c.) */
typedef uint8_t own_1 __attribute__((may_alias));
typedef uint16_t own_2 __attribute__((may_alias));
typedef uint32_t own_4 __attribute__((may_alias));
typedef uint64_t own_8 __attribute__((may_alias));
typedef uint64_t own_16 __attribute__((may_alias, vector_size(16)));
typedef uint64_t own_32 __attribute__((may_alias, vector_size(32)));

typedef uint8_t any_1 __attribute__((may_alias));
typedef uint16_t any_2 __attribute__((may_alias, aligned(1)));
typedef uint32_t any_4 __attribute__((may_alias, aligned(1)));
typedef uint64_t any_8 __attribute__((may_alias, aligned(1)));
typedef uint64_t any_16 __attribute__((may_alias, vector_size(16), aligned(1)));
typedef uint64_t any_32 __attribute__((may_alias, vector_size(32), aligned(1)));

/* Which side's address chooses the widths. Where both are guest memory it is
 * the destination's. */
enum chooser { SOURCE, DESTINATION };

INLINE void
move(char *dst, const char *src, size_t width, enum chooser chooser)
{
#define MOVE(N)                                           \
case N:                                                   \
    if (chooser == SOURCE) {                              \
        *(volatile any_##N *)(void *)dst =                \
            *(const volatile own_##N *)(const void *)src; \
    }                                                     \
    else {                                                \
        *(volatile own_##N *)(void *)dst =                \
            *(const volatile any_##N *)(const void *)src; \
    }                                                     \
    break
    switch (width) {
        MOVE(1);
        MOVE(2);
        MOVE(4);
        MOVE(8);
        MOVE(16);
        MOVE(32);
    }
#undef MOVE
}

/* Four of them, of neighbours: all are loaded before any is stored. */
INLINE void
move_four(char *dst, const char *src, size_t width, enum chooser chooser)
{
#define MOVE_FOUR(N)                                                    \
case N: {                                                               \
    own_##N value[4];                                                   \
    for (int i = 0; i < 4; i++) {                                       \
        const void *from = src + i * (N);                               \
        value[i] = chooser == SOURCE ? *(const volatile own_##N *)from  \
                                     : *(const volatile any_##N *)from; \
    }                                                                   \
    for (int i = 0; i < 4; i++) {                                       \
        void *to = dst + i * (N);                                       \
        if (chooser == SOURCE) {                                        \
            *(volatile any_##N *)to = value[i];                         \
        }                                                               \
        else {                                                          \
            *(volatile own_##N *)to = value[i];                         \
        }                                                               \
    }                                                                   \
    break;                                                              \
}
    switch (width) {
        MOVE_FOUR(8)
        MOVE_FOUR(16)
        MOVE_FOUR(32)
    }
#undef MOVE_FOUR
}

/* What is left of a copy. It goes up from the lowest address (dst and src are
 * the next bytes) or down from the highest (they are the ends). */
struct rest {
    char *dst;
    const char *src;
    size_t count;
};

INLINE void
step(struct rest *rest, size_t width, bool down, enum chooser chooser)
{
    if (down) {
        rest->dst -= width, rest->src -= width;
        move(rest->dst, rest->src, width, chooser);
    }
    else {
        move(rest->dst, rest->src, width, chooser);
        rest->dst += width, rest->src += width;
    }
    rest->count -= width;
}

/* One narrow move where the chooser is not aligned to the next width yet. */
INLINE void
step_to_alignment(struct rest *rest, size_t width, bool down, enum chooser chooser)
{
    uintptr_t at = chooser == SOURCE ? (uintptr_t)rest->src : (uintptr_t)rest->dst;
    if ((at & width) && rest->count >= width) {
        step(rest, width, down, chooser);
    }
}

/* Four wide moves: four loads, then four stores. Measured at 4 KiB, that is 1.7
 * times as fast as load, store, load, store. ahead is 0, or how many bytes on the
 * source is asked for already: a hint, that reads nothing and cannot fault. */
INLINE void
step_four(struct rest *rest, size_t widest, bool down, enum chooser chooser,
          size_t ahead)
{
    if (down) {
        rest->dst -= 4 * widest, rest->src -= 4 * widest;
    }
    for (size_t line = 0; ahead && line < 4 * widest; line += 64) {
        uintptr_t at = (uintptr_t)rest->src + line;
        __builtin_prefetch((const void *)(down ? at - ahead : at + ahead));
    }
    move_four(rest->dst, rest->src, widest, chooser);
    if (!down) {
        rest->dst += 4 * widest, rest->src += 4 * widest;
    }
    rest->count -= 4 * widest;
}

/* Up to the alignment of the widest move. widest is 8, 16 or 32. It, down and
 * chooser are constants in every caller, so that their tests vanish. */
INLINE void
copy_head(struct rest *rest, size_t widest, bool down, enum chooser chooser)
{
    step_to_alignment(rest, 1, down, chooser);
    step_to_alignment(rest, 2, down, chooser);
    step_to_alignment(rest, 4, down, chooser);
    if (widest > 8) {
        step_to_alignment(rest, 8, down, chooser);
    }
    if (widest > 16) {
        step_to_alignment(rest, 16, down, chooser);
    }
}

INLINE void
copy_rest(struct rest *rest, size_t widest, bool down, enum chooser chooser,
          size_t ahead)
{
    while (rest->count >= 4 * widest) {
        step_four(rest, widest, down, chooser, ahead);
    }
    while (rest->count >= widest) {
        step(rest, widest, down, chooser);
    }
    /* Fewer than widest bytes are left: its binary digits name the moves. */
    if (rest->count & 16) {
        step(rest, 16, down, chooser);
    }
    if (rest->count & 8) {
        step(rest, 8, down, chooser);
    }
    if (rest->count & 4) {
        step(rest, 4, down, chooser);
    }
    if (rest->count & 2) {
        step(rest, 2, down, chooser);
    }
    if (rest->count & 1) {
        step(rest, 1, down, chooser);
    }
}

INLINE void
copy_towards(struct rest rest, size_t widest, bool down, enum chooser chooser,
             size_t ahead)
{
    copy_head(&rest, widest, down, chooser);
    copy_rest(&rest, widest, down, chooser, ahead);
}

INLINE void
copy_ahead(char *dst, const char *src, size_t count, size_t widest,
           enum chooser chooser, size_t ahead)
{
    /* Upwards is safe unless dst lies inside [src, src + count). */
    if ((uintptr_t)dst - (uintptr_t)src >= count) {
        copy_towards((struct rest){dst, src, count}, widest, false, chooser, ahead);
    }
    else {
        copy_towards((struct rest){dst + count, src + count, count}, widest, true,
                     chooser, ahead);
    }
}

INLINE void
copy(char *dst, const char *src, size_t count, size_t widest, enum chooser chooser)
{
    copy_ahead(dst, src, count, widest, chooser, 0);
}

/* A fill is a copy, upwards, whose source is one word. */
INLINE char *
put(char *dst, uint64_t word, size_t width)
{
    switch (width) {
    case 1:
        *(volatile own_1 *)(void *)dst = (uint8_t)word;
        break;
    case 2:
        *(volatile own_2 *)(void *)dst = (uint16_t)word;
        break;
    case 4:
        *(volatile own_4 *)(void *)dst = (uint32_t)word;
        break;
    case 8:
        *(volatile own_8 *)(void *)dst = word;
        break;
    case 16:
        *(volatile own_16 *)(void *)dst = (own_16){word, word};
        break;
    case 32:
        *(volatile own_32 *)(void *)dst = (own_32){word, word, word, word};
        break;
    }
    return dst + width;
}

INLINE void
fill(char *dst, unsigned char byte, size_t count, size_t widest)
{
    const uint64_t word = byte * UINT64_C(0x0101010101010101);

    for (size_t width = 1; width < widest; width *= 2) {
        if (((uintptr_t)dst & width) && count >= width) {
            dst = put(dst, word, width);
            count -= width;
        }
    }
    for (; count >= widest; count -= widest) {
        dst = put(dst, word, widest);
    }
    for (size_t width = widest / 2; width; width /= 2) {
        if (count & width) {
            dst = put(dst, word, width);
        }
    }
}

/* access_wide.c: the same with 32-byte vectors, from WIDE_FROM bytes on where the
 * processor has them. Measured against 16-byte ones they pay from 128 bytes on. */
#define WIDE_FROM 128

bool wide_is_there(void);
void wide_read(char *host, const char *guest, size_t count);
void wide_write(char *guest, const char *host, size_t count);
/* Between guest addresses that agree modulo 8, but not modulo 32. */
void wide_copy_words(char *dst, const char *src, size_t count);
void wide_fill(char *guest, unsigned char byte, size_t count);
/* Ends stores past the caches, which are ordered with no others. */
void wide_settle(void);

#endif
