/* Atomic operations. See access_atomic.h. */
#include "access_atomic.h"

/* What adds to or takes from an integer in the other byte order is no instruction:
 * compare and swap until nobody came in between. */
static ACCESS_RACY uint64_t
add_swapped(char *guest, const struct atomic_call *call)
{
    struct atomic_call swap = {
        .op = ATOMIC_COMPARE_EXCHANGE,
        .width = call->width,
        .expected = access_atomic_load(guest, call->width, memory_order_seq_cst)};
    uint64_t operand = access_swap(call->operand, call->width), before;
    do {
        before = swap.expected;
        uint64_t value = access_swap(before, call->width);
        value = call->op == ATOMIC_ADD ? value + operand : value - operand;
        swap.operand = access_swap(value, call->width);
        access_atomic(guest, &swap);
    } while (swap.expected != before);
    return before;
}

#define RUN_AS(type)                                                                   \
    do {                                                                               \
        __typeof__((type)0) *at = (void *)guest, value = (type)call->operand;          \
        type expected = (type)call->expected;                                          \
        switch (call->op) {                                                            \
        case ATOMIC_STORE:                                                             \
            if (call->order == memory_order_relaxed) {                                 \
                __atomic_store_n(at, value, __ATOMIC_RELAXED);                         \
            }                                                                          \
            else if (call->order == memory_order_release) {                            \
                __atomic_store_n(at, value, __ATOMIC_RELEASE);                         \
            }                                                                          \
            else {                                                                     \
                __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                         \
            }                                                                          \
            return 0;                                                                  \
        case ATOMIC_EXCHANGE:                                                          \
            return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                   \
        case ATOMIC_COMPARE_EXCHANGE:                                                  \
            __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_SEQ_CST, \
                                        __ATOMIC_SEQ_CST);                             \
            return call->expected = expected;                                          \
        case ATOMIC_ADD:                                                               \
            return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                    \
        case ATOMIC_SUB:                                                               \
            return __atomic_fetch_sub(at, value, __ATOMIC_SEQ_CST);                    \
        case ATOMIC_AND:                                                               \
            return __atomic_fetch_and(at, value, __ATOMIC_SEQ_CST);                    \
        case ATOMIC_OR:                                                                \
            return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);                     \
        case ATOMIC_XOR:                                                               \
            return __atomic_fetch_xor(at, value, __ATOMIC_SEQ_CST);                    \
        default:                                                                       \
            return access_atomic_load(guest, sizeof(type), call->order);               \
        }                                                                              \
    } while (0)

ACCESS_RACY uint64_t
access_atomic(char *guest, struct atomic_call *call)
{
    if (call->swapped && (call->op == ATOMIC_ADD || call->op == ATOMIC_SUB)) {
        return add_swapped(guest, call);
    }
    switch (call->width) {
    case 1:
        RUN_AS(uint8_t);
    case 2:
        RUN_AS(uint16_t);
    case 4:
        RUN_AS(uint32_t);
    default:
        RUN_AS(uint64_t);
    }
}
