/* The system calls on mappings. errno is read on the line after the call that
 * sets it. */
#define _GNU_SOURCE
#include "os_map.h"

#include <errno.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
# define MADV_POPULATE_READ 22 /* Linux 5.14; older headers lack it */
#endif

static int
map(int flags, int fd, int64_t offset, size_t size, struct os_mapping *out)
{
    void *addr =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | flags, fd, offset);
    if (addr == MAP_FAILED) {
        return errno;
    }
    *out = (struct os_mapping){addr, size, size, .can_fault = fd >= 0};
    return 0;
}

int
os_map_anonymous(size_t size, struct os_mapping *out)
{
    return map(MAP_ANONYMOUS | MAP_NORESERVE, -1, 0, size, out);
}

int
os_map_fd(int fd, int64_t offset, size_t size, struct os_mapping *out)
{
    struct statfs fs;
    int err = map(0, fd, offset, size, out);
    /* A mapping of hugetlbfs is whole huge pages, and munmap refuses any other
     * length (EINVAL): unmapping by the size that was asked for would leak. */
    if (err == 0 && fstatfs(fd, &fs) == 0 && (uint32_t)fs.f_type == HUGETLBFS_MAGIC) {
        size_t page = (size_t)fs.f_bsize;
        out->length = (size + page - 1) / page * page;
    }
    return err;
}

int
os_map_unmap(const struct os_mapping *mapping)
{
    return munmap(mapping->addr, mapping->length) < 0 ? errno : 0;
}

int
os_map_dont_dump(const struct os_mapping *mapping)
{
    return madvise(mapping->addr, mapping->length, MADV_DONTDUMP) < 0 ? errno : 0;
}

int
os_map_remove(char *addr, size_t length)
{
    return madvise(addr, length, MADV_REMOVE) < 0 ? errno : 0;
}

static bool
faults(char *addr, size_t length, int advice)
{
    /* EFAULT: a touch would be SIGBUS. EHWPOISON: a poisoned page. */
    return madvise(addr, length, advice) < 0 && (errno == EFAULT || errno == EHWPOISON);
}

/* Looking at a page brings it in, so only as much as must be is looked at: step by
 * step, up to the first step that faults. */
#define FAULT_STEP ((size_t)2 << 20)

/* The first page that faults in [first, first + length), of which one does. */
static char *
first_fault(char *first, size_t length, size_t page, int advice)
{
    size_t good = 0, bad = length / page;
    /* The first `good` pages are good, and one of those before `bad` is not. */
    while (bad - good > 1) {
        size_t middle = good + (bad - good) / 2;
        if (faults(first + good * page, (middle - good) * page, advice)) {
            bad = middle;
        }
        else {
            good = middle;
        }
    }
    return first + good * page;
}

bool
os_map_first_fault(char *addr, size_t length, bool to_write, size_t *found)
{
    int advice = to_write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
    size_t page = os_map_page_size();
    char *end = addr + length;
    char *at = addr - (uintptr_t)addr % page;
    if (at < end && madvise(at, page, advice) < 0 && errno == EINVAL) {
        return false;
    }
    while (at < end) {
        size_t left = ((size_t)(end - at) + page - 1) / page * page;
        size_t step = left < FAULT_STEP ? left : FAULT_STEP;
        if (faults(at, step, advice)) {
            char *fault = first_fault(at, step, page, advice);
            *found = fault < addr ? 0 : (size_t)(fault - addr);
            return true;
        }
        at += step;
    }
    *found = length;
    return true;
}

size_t
os_map_page_size(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}
