/* What the state holds of ctypes once somebody uses it: for plain_class.c, which
 * loads it, and plain_check.c. */
#ifndef GUESTMEM_FOREIGN_CTYPES_H
#define GUESTMEM_FOREIGN_CTYPES_H

#include "object_type.h"

enum { FAMILY_STRUCTURE, FAMILY_UNION, FAMILY_ARRAY, FAMILY_SIMPLE, FAMILIES };

/* How many classes are remembered. */
#define KNOWN 64

struct known {
    PyObject *weak; /* reference to the class; NULL where the place is free */
    struct object_type type;
};

struct foreign_ctypes {
    /* The four families of plain data. Every other ctypes class (pointers,
     * functions) is refused. */
    PyObject *base[FAMILIES];
    newfunc make[FAMILIES];
    get_buffer_function get_buffer[FAMILIES];
    PyObject *size_of;
    PyObject *field_type;      /* of the descriptors in a Structure or Union */
    PyObject *value_of_simple; /* a descriptor */
    PyObject *reduce;          /* of every ctypes instance */
    ssizeargfunc item_of_array;
    /* type.__dict__, __mro__ and __base__ as they are: a metaclass cannot hide what
     * its classes hold. */
    PyObject *dict_of_type;
    PyObject *mro_of_type;
    PyObject *base_of_type;
    /* Classes that were found to be plain, each in the place that its address gives
     * it. */
    struct known known[KNOWN];
    atomic_flag busy; /* somebody is at the table */
};

/* The family that a class belongs to, or FAMILIES. */
int plain_family(const struct foreign_ctypes *ctypes, PyObject *cls);

/* 0 where every bit pattern is a valid instance of the class of this instance, which
 * is full of zeros; else -1 with a TypeError. */
int plain_check(const struct foreign_ctypes *ctypes, PyObject *instance);

#endif
