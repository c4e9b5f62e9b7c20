/* Copies and fills, with vectors of the size that the processor has. See access.h
 * for what they promise, and access_copy.h for how.
 */
#include "access.h"

#include "access_copy.h"

static bool have_wide; /* decided once, by access_init */

void
access_init(void)
{
    have_wide = wide_is_there();
}

ACCESS_RACY void
access_read(void *host, const char *guest, size_t count)
{
    if (count >= WIDE_FROM && have_wide) {
        wide_read(host, guest, count);
    }
    else {
        copy(host, guest, count, 16, SOURCE);
    }
}

ACCESS_RACY void
access_write(char *guest, const void *host, size_t count)
{
    if (count >= WIDE_FROM && have_wide) {
        wide_write(guest, host, count);
    }
    else {
        copy(guest, host, count, 16, DESTINATION);
    }
}

ACCESS_RACY void
access_copy(char *dst, const char *src, size_t count)
{
    uintptr_t apart = (uintptr_t)dst - (uintptr_t)src;

    /* A vector that is aligned on one side only could tear a field of the other.
     * Where the two agree modulo 8 but not modulo the vector's size, words keep
     * both sides whole; where they do not agree modulo 8, only the destination is
     * promised. */
    if (apart % 8 != 0 || apart % 32 == 0) {
        access_write(dst, src, count);
    }
    else if (count >= WIDE_FROM && have_wide) {
        wide_copy_words(dst, src, count);
    }
    else if (apart % 16 == 0) {
        copy(dst, src, count, 16, DESTINATION);
    }
    else {
        copy(dst, src, count, 8, DESTINATION);
    }
}

ACCESS_RACY void
access_fill(char *guest, unsigned char byte, size_t count)
{
    if (count >= WIDE_FROM && have_wide) {
        wide_fill(guest, byte, count);
    }
    else {
        fill(guest, byte, count, 16);
    }
}

void
access_settle(void)
{
    if (have_wide) {
        wide_settle();
    }
}
