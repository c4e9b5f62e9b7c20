/* One read or write of a file descriptor. No Python here. */
#ifndef GUESTMEM_OS_FILE_H
#define GUESTMEM_OS_FILE_H

#include <stddef.h>
#include <stdint.h>

enum { OS_FILE_POSITION = -1 }; /* at the file's own position, which moves */

/* One system call: 0 and *moved (0 is the end of the file), or an errno. At
 * most 0x7ffff000 bytes move at once (read(2), NOTES). */
int os_file_read(int fd, char *memory, size_t count, int64_t offset, size_t *moved);
int os_file_write(int fd, const char *memory, size_t count, int64_t offset,
                  size_t *moved);

/* The same of several pieces; count is at most 1024 (IOV_MAX). */
struct iovec;
int os_file_readv(int fd, const struct iovec *pieces, int count, int64_t offset,
                  size_t *moved);
int os_file_writev(int fd, const struct iovec *pieces, int count, int64_t offset,
                   size_t *moved);

#endif
