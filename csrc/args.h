/* Arguments into C values. PyArg_ParseTuple costs three times a whole load, so
 * METH_FASTCALL arguments are taken by hand: the common case inline, the rest
 * and the wording of the errors in args.c. Every function sets the exception
 * and returns -1 where the argument will not do. */
#ifndef GUESTMEM_ARGS_H
#define GUESTMEM_ARGS_H

#include "native.h"

/* 0, or -1 with TypeError "name() takes ...". wanted lists the arguments. */
int args_wrong_count(const char *function, const char *wanted, Py_ssize_t given);

static inline int
args_count(Py_ssize_t given, Py_ssize_t least, Py_ssize_t most, const char *function,
           const char *wanted)
{
    if (given >= least && given <= most) {
        return 0;
    }
    return args_wrong_count(function, wanted, given);
}

/* Arguments that may be given by position or keyword. names lists them all, the
 * first `positional` by position only; out gets borrowed references, NULL where
 * one was not given. The first `required` must be there. */
struct args_spec {
    const char *function;
    const char *const *names; /* NULL-terminated */
    Py_ssize_t positional;
    Py_ssize_t required;
    Py_ssize_t keywords; /* how many of the last ones are by keyword only */
};

int args_named(const struct args_spec *spec, PyObject *const *args, Py_ssize_t given,
               PyObject *kwnames, PyObject **out);
int args_named_tuple(const struct args_spec *spec, PyObject *args, PyObject *kwargs,
                     PyObject **out);

/* Turns anything with __index__ into an int: may run Python code. NULL with a
 * TypeError that names the argument. */
PyObject *args_index(PyObject *arg, const char *name);
/* From 0 to most, which the OverflowError calls limit. */
int args_unsigned(PyObject *arg, const char *name, uint64_t most, const char *limit,
                  uint64_t *out);

/* An offset, count or size: 0 to 2**64 - 1. Others: OverflowError. */
static inline int
args_u64(PyObject *arg, const char *name, uint64_t *out)
{
    if (PyLong_CheckExact(arg)) {
        Py_ssize_t value = PyLong_AsSsize_t(arg);
        if (value >= 0) {
            *out = (uint64_t)value;
            return 0;
        }
        PyErr_Clear(); /* it has more than 63 bits, or is negative */
    }
    return args_unsigned(arg, name, UINT64_MAX, "2**64 - 1", out);
}

/* The int fd, or that of an object with fileno(). Other objects: TypeError. */
int args_fd(PyObject *arg, const char *name, int *out);

/* Any C-contiguous buffer; the caller releases it. BufferError where obj has a
 * buffer that will not do, TypeError where it has none. */
int args_buffer(PyObject *obj, const char *name, Py_buffer *view, bool writable);

/* a + b as an int, which may pass 2**64 - 1. NULL with MemoryError. */
PyObject *args_sum(uint64_t a, uint64_t b);

#endif
