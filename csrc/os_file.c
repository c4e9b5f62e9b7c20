/* One read or write of a file descriptor. */
#define _GNU_SOURCE
#include "os_file.h"

#include <errno.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == sizeof(int64_t), "off_t has 64 bits");

int
os_file_read(int fd, char *memory, size_t count, int64_t offset, size_t *moved)
{
    ssize_t n = offset == OS_FILE_POSITION ? read(fd, memory, count)
                                           : pread(fd, memory, count, offset);
    if (n < 0) {
        return errno;
    }
    *moved = (size_t)n;
    return 0;
}

int
os_file_write(int fd, const char *memory, size_t count, int64_t offset, size_t *moved)
{
    ssize_t n = offset == OS_FILE_POSITION ? write(fd, memory, count)
                                           : pwrite(fd, memory, count, offset);
    if (n < 0) {
        return errno;
    }
    *moved = (size_t)n;
    return 0;
}

int
os_file_readv(int fd, const struct iovec *pieces, int count, int64_t offset,
              size_t *moved)
{
    ssize_t n = offset == OS_FILE_POSITION ? readv(fd, pieces, count)
                                           : preadv(fd, pieces, count, offset);
    if (n < 0) {
        return errno;
    }
    *moved = (size_t)n;
    return 0;
}

int
os_file_writev(int fd, const struct iovec *pieces, int count, int64_t offset,
               size_t *moved)
{
    ssize_t n = offset == OS_FILE_POSITION ? writev(fd, pieces, count)
                                           : pwritev(fd, pieces, count, offset);
    if (n < 0) {
        return errno;
    }
    *moved = (size_t)n;
    return 0;
}
