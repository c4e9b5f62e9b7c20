/* Loads, stores and copies in memory that others change at any moment. No
 * Python here.
 *
 * What every function in this file promises (design: guarantees 1 and 2):
 *  - each byte of guest memory in the range is accessed exactly once, and no
 *    byte outside of it;
 *  - an aligned field of 1, 2, 4 or 8 bytes of guest memory is never torn,
 *    whatever the alignment of the host's side;
 *  - nothing is ordered between processors beyond what the architecture does.
 */
#ifndef GUESTMEM_ACCESS_H
#define GUESTMEM_ACCESS_H

#include <stddef.h>
#include <stdint.h>

#if UINTPTR_MAX < UINT64_MAX
# error "guestmem needs a 64-bit system: a u64 must be one access"
#endif

/* Guest memory is racy by design: ThreadSanitizer must not look at its
 * accesses, and at nothing else may it look away. */
#define ACCESS_RACY __attribute__((no_sanitize("thread")))

/* Decides once, before any copy, which vectors this processor has. */
void access_init(void);

/* Copies; all behave as memmove where the two sides overlap. */
void access_read(void *host, const char *guest, size_t count);
void access_write(char *guest, const void *host, size_t count);
/* Both sides are guest memory: the destination is never torn, and the source
 * neither where the two addresses agree modulo 8. */
void access_copy(char *dst, const char *src, size_t count);
void access_fill(char *guest, unsigned char byte, size_t count);

/* After a copy or fill that was cut short: orders the stores that it had made as its
 * end would have. */
void access_settle(void);

/* A scalar as its bytes lie in memory, and as a number in host order. */
union access_bytes {
    uint8_t u8;
    uint16_t u16;
    uint32_t u32;
    uint64_t u64;
};

static inline uint64_t
access_bits(const union access_bytes *bytes, size_t width)
{
    switch (width) {
    case 1:
        return bytes->u8;
    case 2:
        return bytes->u16;
    case 4:
        return bytes->u32;
    default:
        return bytes->u64;
    }
}

static inline union access_bytes
access_bytes_of(uint64_t bits, size_t width)
{
    switch (width) {
    case 1:
        return (union access_bytes){.u8 = (uint8_t)bits};
    case 2:
        return (union access_bytes){.u16 = (uint16_t)bits};
    case 4:
        return (union access_bytes){.u32 = (uint32_t)bits};
    default:
        return (union access_bytes){.u64 = bits};
    }
}

/* A scalar of 1, 2, 4 or 8 bytes, zero-extended, in host order. One instruction
 * where the address is a multiple of the width, else an untorn copy. */
static inline ACCESS_RACY uint64_t
access_load(const char *guest, size_t width)
{
    if (((uintptr_t)guest & (width - 1)) == 0) {
        switch (width) {
        case 1:
            return *(const volatile uint8_t *)guest;
        case 2:
            return *(const volatile uint16_t *)(const void *)guest;
        case 4:
            return *(const volatile uint32_t *)(const void *)guest;
        default:
            return *(const volatile uint64_t *)(const void *)guest;
        }
    }
    union access_bytes bytes = {.u64 = 0};
    access_read(&bytes, guest, width);
    return access_bits(&bytes, width);
}

static inline ACCESS_RACY void
access_store(char *guest, uint64_t bits, size_t width)
{
    if (((uintptr_t)guest & (width - 1)) == 0) {
        switch (width) {
        case 1:
            *(volatile uint8_t *)guest = (uint8_t)bits;
            return;
        case 2:
            *(volatile uint16_t *)(void *)guest = (uint16_t)bits;
            return;
        case 4:
            *(volatile uint32_t *)(void *)guest = (uint32_t)bits;
            return;
        default:
            *(volatile uint64_t *)(void *)guest = bits;
            return;
        }
    }
    union access_bytes bytes = access_bytes_of(bits, width);
    access_write(guest, &bytes, width);
}

#endif
