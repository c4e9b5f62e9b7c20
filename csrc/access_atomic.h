/* Atomic operations on aligned integers of guest memory: real instructions, that the
 * guest, devices and other processes see as such. No Python here.
 *
 * An order is a minimum. What reads and writes is always sequentially consistent: on
 * x86-64 there is no weaker instruction, and elsewhere it costs little.
 */
#ifndef GUESTMEM_ACCESS_ATOMIC_H
#define GUESTMEM_ACCESS_ATOMIC_H

#include "access.h"

#include <stdatomic.h>
#include <stdbool.h>

enum atomic_op {
    ATOMIC_LOAD,
    ATOMIC_STORE,
    ATOMIC_EXCHANGE,
    ATOMIC_COMPARE_EXCHANGE,
    ATOMIC_ADD,
    ATOMIC_SUB,
    ATOMIC_AND,
    ATOMIC_OR,
    ATOMIC_XOR,
};

struct atomic_call {
    enum atomic_op op;
    memory_order order; /* of a load or a store */
    size_t width;       /* 1, 2, 4 or 8: the address is a multiple of it */
    bool swapped; /* the integer's bytes are in the other order; so are operands */
    uint64_t operand;
    uint64_t expected; /* by COMPARE_EXCHANGE; afterwards what was there */
};

static inline uint64_t
access_swap(uint64_t bits, size_t width)
{
    return __builtin_bswap64(bits) >> (64 - 8 * width);
}

/* Returns what was there (nothing of use after a STORE). */
uint64_t access_atomic(char *guest, struct atomic_call *call);

static inline ACCESS_RACY uint64_t
access_atomic_load(const char *guest, size_t width, memory_order order)
{
    /* An acquire load is a plain one on x86-64; elsewhere an instruction of its own. */
#define LOAD_AS(type)                                                           \
    (order == memory_order_relaxed                                              \
         ? __atomic_load_n((const type *)(const void *)guest, __ATOMIC_RELAXED) \
     : order == memory_order_acquire                                            \
         ? __atomic_load_n((const type *)(const void *)guest, __ATOMIC_ACQUIRE) \
         : __atomic_load_n((const type *)(const void *)guest, __ATOMIC_SEQ_CST))
    switch (width) {
    case 1:
        return LOAD_AS(uint8_t);
    case 2:
        return LOAD_AS(uint16_t);
    case 4:
        return LOAD_AS(uint32_t);
    default:
        return LOAD_AS(uint64_t);
    }
#undef LOAD_AS
}

#endif
