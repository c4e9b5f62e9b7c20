/* guestmem.Ordering (src/guestmem/ordering.py) as C knows it. */
#ifndef GUESTMEM_ORDER_H
#define GUESTMEM_ORDER_H

#include "native.h"

/* Which orders an operation may have, as a set. */
enum {
    ORDER_LOAD = 1 << memory_order_relaxed | 1 << memory_order_acquire
        | 1 << memory_order_seq_cst,
    ORDER_STORE = 1 << memory_order_relaxed | 1 << memory_order_release
        | 1 << memory_order_seq_cst,
    ORDER_BOTH = ORDER_LOAD | ORDER_STORE | 1 << memory_order_acq_rel,
    ORDER_FENCE = ORDER_BOTH & ~(1 << memory_order_relaxed),
};

/* None is SEQ_CST. -1 with TypeError where arg is no Ordering, ValueError where the
 * operation, whose name is given, cannot have it. */
int order_from_object(const module_state *state, PyObject *arg, int possible,
                      const char *operation, memory_order *out);

#endif
