/* The system calls on mappings. No Python here: every function returns 0 or an
 * errno, and is called without the GIL where it may take long. */
#ifndef GUESTMEM_OS_MAP_H
#define GUESTMEM_OS_MAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What mmap gave: size bytes were asked for; length bytes are what munmap takes,
 * which is more where the file has huge pages. */
struct os_mapping {
    char *addr;
    size_t size;
    size_t length;
    bool can_fault; /* a page may turn out to be missing: SIGBUS */
};

/* Anonymous, shared, zero-filled, without reserving swap. */
int os_map_anonymous(size_t size, struct os_mapping *out);

/* size bytes of fd from offset on, shared. The mapping outlives the fd. */
int os_map_fd(int fd, int64_t offset, size_t size, struct os_mapping *out);

int os_map_unmap(const struct os_mapping *mapping);

/* Keeps the pages out of core dumps (MADV_DONTDUMP). */
int os_map_dont_dump(const struct os_mapping *mapping);

/* Gives pages back: they read as zeros (MADV_REMOVE). addr must be page-aligned, or
 * it is EINVAL; the kernel rounds a length UP to whole pages. */
int os_map_remove(char *addr, size_t length);

/* *at: the first byte of [addr, addr + length) that cannot be brought in to be read, or
 * to be written, as an offset from addr; length where all can. False where the kernel
 * cannot tell (before Linux 5.14, or a device's memory). */
bool os_map_first_fault(char *addr, size_t length, bool to_write, size_t *at);

size_t os_map_page_size(void);

#endif
