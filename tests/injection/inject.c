/* Which call fails: the n-th of this thread's while inject_call runs. What this file
 * exports is for ctypes.
 */
#include <string.h>

#undef malloc /* the allocators' */

#define EXPORT __attribute__((visibility("default")))

enum {
    PYTHON = 1,    /* calls of the C-API that can fail */
    SYSTEM = 2,    /* system calls */
    ALLOCATOR = 4, /* what Python's allocators are asked for, whoever asks */
};

static _Thread_local struct {
    int kinds;
    long count; /* of the calls so far */
    long first, last;
    int err;
    const char *broken;  /* a system call that always fails */
    const char *reached; /* the first that failed */
} now;

static bool
due(int kind, const char *function)
{
    if (!(now.kinds & kind) || ++now.count < now.first || now.count > now.last) {
        return false;
    }
    if (now.reached == NULL) {
        now.reached = function;
    }
    return true;
}

bool
inject_memory(const char *function)
{
    return due(PYTHON, function);
}

bool
inject_python(const char *function)
{
    bool failed = due(PYTHON, function);
    if (failed) {
        PyErr_NoMemory();
    }
    return failed;
}

bool
inject_system(const char *function)
{
    bool failed = now.broken != NULL && strcmp(now.broken, function) == 0;
    if (due(SYSTEM, function) || failed) {
        failed = true;
        errno = now.err;
    }
    return failed;
}

PyObject *
inject_drop(PyObject *arguments)
{
    Py_XDECREF(arguments);
    return PyErr_NoMemory();
}

int
inject_munmap(void *addr, size_t length)
{
    int result = (munmap)(addr, length);
    return inject_system("munmap") ? -1 : result;
}

#ifdef Py_LIMITED_API /* which leaves them out */
typedef struct {
    void *ctx;
    void *(*malloc)(void *ctx, size_t size);
    void *(*calloc)(void *ctx, size_t nelem, size_t elsize);
    void *(*realloc)(void *ctx, void *ptr, size_t new_size);
    void (*free)(void *ctx, void *ptr);
} PyMemAllocatorEx;
typedef enum {
    PYMEM_DOMAIN_RAW,
    PYMEM_DOMAIN_MEM,
    PYMEM_DOMAIN_OBJ,
} PyMemAllocatorDomain;
void PyMem_GetAllocator(PyMemAllocatorDomain, PyMemAllocatorEx *);
void PyMem_SetAllocator(PyMemAllocatorDomain, PyMemAllocatorEx *);
#endif

static void *
failing_malloc(void *ctx, size_t size)
{
    const PyMemAllocatorEx *real = ctx;
    return due(ALLOCATOR, "malloc") ? NULL : real->malloc(real->ctx, size);
}

static void *
failing_calloc(void *ctx, size_t count, size_t size)
{
    const PyMemAllocatorEx *real = ctx;
    return due(ALLOCATOR, "calloc") ? NULL : real->calloc(real->ctx, count, size);
}

static void *
failing_realloc(void *ctx, void *memory, size_t size)
{
    const PyMemAllocatorEx *real = ctx;
    return due(ALLOCATOR, "realloc") ? NULL : real->realloc(real->ctx, memory, size);
}

static void
passing_free(void *ctx, void *memory)
{
    const PyMemAllocatorEx *real = ctx;
    real->free(real->ctx, memory);
}

/* callable(), in which the first to the last call of these kinds fail, and the system
 * call `broken` (NULL: none) whenever it is made; with err where there is an errno. */
EXPORT PyObject *
inject_call(PyObject *callable, int kinds, long first, long last, int err,
            const char *broken)
{
    PyMemAllocatorEx real[PYMEM_DOMAIN_OBJ + 1];
    if (kinds & ALLOCATOR) {
        for (int i = 0; i <= PYMEM_DOMAIN_OBJ; i++) {
            PyMem_GetAllocator((PyMemAllocatorDomain)i, &real[i]);
            PyMemAllocatorEx failing = {&real[i], failing_malloc, failing_calloc,
                                        failing_realloc, passing_free};
            PyMem_SetAllocator((PyMemAllocatorDomain)i, &failing);
        }
    }
    now.count = 0;
    now.first = first;
    now.last = last;
    now.err = err;
    now.broken = broken;
    now.reached = NULL;
    now.kinds = kinds;
    PyObject *result = (PyObject_CallNoArgs)(callable);
    now.kinds = 0;
    now.broken = NULL;
    if (kinds & ALLOCATOR) {
        for (int i = 0; i <= PYMEM_DOMAIN_OBJ; i++) {
            PyMem_SetAllocator((PyMemAllocatorDomain)i, &real[i]);
        }
    }
    return result;
}

/* The function that failed in the last inject_call; NULL where it made fewer calls. */
EXPORT const char *
inject_reached(void)
{
    return now.reached;
}
