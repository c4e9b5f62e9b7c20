/* A transfer between memory and a stream: transfer.c; the methods that make one are in
 * transfer_methods.c. */
#ifndef GUESTMEM_TRANSFER_H
#define GUESTMEM_TRANSFER_H

#include "native.h"

#include "between.h"
#include "volatile_memory.h"

enum by { BY_FD, BY_READINTO, BY_READ, BY_WRITE };

/* One transfer: between count bytes at mem_offset and a stream. The call is inside the
 * memory for as long as it goes on. Of a guest's memory it is one for each region. */
struct transfer {
    module_state *state;
    memory_object *memory;
    bool reading; /* from the stream into memory */
    uint64_t mem_offset;
    uint64_t count;
    size_t done;
    size_t before;  /* bytes of the regions before this one */
    bool once;      /* one step: it may be short, and the end is no error */
    bool ended;     /* that step met the end */
    unsigned tries; /* since something moved last: of a fault that was gone again */
    enum by by;
    int fd;
    bool positioned; /* pread and pwrite, from position on */
    uint64_t position;
    PyObject *method; /* strong; NULL for an fd */
    struct between between;
};

/* What the stream is, and how it is asked: fills in what says so. -1 with an exception;
 * self->method is the caller's to give back in any case. position may be NULL. */
int transfer_open(struct transfer *self, PyObject *stream, PyObject *position);

/* All of it, or one step, by a caller who is inside the memory and has checked the range.
 * -1 with an exception. */
int transfer_run(struct transfer *self);

/* The same; enters and leaves the memory, and checks the range. */
int transfer_in_memory(struct transfer *self);

#endif
