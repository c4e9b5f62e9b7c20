/* The state word: who is inside a piece of memory or borrows from it, and
 * whether it has been closed.
 *
 *   bit 63  CLOSED   nobody may enter any more; whoever is inside goes on
 *   bit 62  DONE     somebody has taken on giving the memory back
 *   bit 61  OWNED    the object that made it still exists
 *   bit 60  CLOSING  CLOSED is not decided yet: who closes several words at once may
 *                    undo it, in a moment; nobody sees that with a GIL
 *   24..59  borrowers (slices, refs, exported buffers)
 *    0..23  calls that are inside
 *
 * The memory is given back exactly once: by the one who moves the word from
 * "closed and nobody there" to DONE.
 *
 * With a GIL every use of the word is under it, so plain loads and stores do,
 * and short calls that cannot lose the GIL do not enter at all (see
 * memory_enter). Without one every change is an atomic operation.
 */
#ifndef GUESTMEM_HOLD_H
#define GUESTMEM_HOLD_H

#include "native.h"

#include <sched.h>

typedef _Atomic uint64_t hold;

#define HOLD_CLOSED  (UINT64_C(1) << 63)
#define HOLD_DONE    (UINT64_C(1) << 62)
#define HOLD_OWNED   (UINT64_C(1) << 61)
#define HOLD_CLOSING (UINT64_C(1) << 60)
#define HOLD_BORROW  (UINT64_C(1) << 24)
#define HOLD_CALL    UINT64_C(1)
#define HOLD_ANYONE  (HOLD_CLOSING - 1)

static inline uint64_t
hold_read(const hold *self)
{
#ifdef Py_GIL_DISABLED
    return atomic_load_explicit(self, memory_order_acquire);
#else
    return atomic_load_explicit(self, memory_order_relaxed);
#endif
}

/* The word once it is decided whether it is closed. */
static inline uint64_t
hold_settled(const hold *self)
{
    uint64_t word = hold_read(self);
#ifdef Py_GIL_DISABLED
    while (word & HOLD_CLOSING) {
        sched_yield();
        word = hold_read(self);
    }
#endif
    return word;
}

static inline bool
hold_is_closed(const hold *self)
{
    return (hold_settled(self) & HOLD_CLOSED) != 0;
}

/* Both return the word as it was before. */
static inline uint64_t
hold_add(hold *self, uint64_t unit)
{
#ifdef Py_GIL_DISABLED
    return atomic_fetch_add_explicit(self, unit, memory_order_acq_rel);
#else
    uint64_t old = hold_read(self);
    atomic_store_explicit(self, old + unit, memory_order_relaxed);
    return old;
#endif
}

static inline bool
hold_swap(hold *self, uint64_t *expected, uint64_t desired)
{
#ifdef Py_GIL_DISABLED
    return atomic_compare_exchange_weak_explicit(
        self, expected, desired, memory_order_acq_rel, memory_order_acquire);
#else
    (void)expected;
    atomic_store_explicit(self, desired, memory_order_relaxed);
    return true;
#endif
}

/* Takes unit away and sets bits in the same step. True: it is for the caller to
 * give the memory back, now. *after is the word that it leaves behind; once it
 * shows that nobody is there and nobody owns it, nobody else touches it again. */
static inline bool
hold_change(hold *self, uint64_t set, uint64_t clear, uint64_t unit, uint64_t *after)
{
    uint64_t old = hold_read(self), new;
    bool mine;
    do {
        if (set & old & HOLD_CLOSED) {
            old = hold_settled(self); /* it may be open again */
        }
        new = ((old | set) & ~clear) - unit;
        mine = (new & HOLD_CLOSED) && !(new & HOLD_DONE) && !(new & HOLD_ANYONE);
        if (mine) {
            new |= HOLD_DONE;
        }
    } while (!hold_swap(self, &old, new));
    *after = new;
    return mine;
}

/* The other side of hold_add, for a word that is sure to outlive the step: one
 * atomic operation but for the last one out of closed memory. True as above. */
static inline bool
hold_leave(hold *self, uint64_t unit)
{
    uint64_t left = hold_add(self, -unit) - unit, after;
    return (left & (HOLD_CLOSED | HOLD_DONE | HOLD_ANYONE)) == HOLD_CLOSED
           && hold_change(self, 0, 0, 0, &after);
}

/* Nobody enters any more. True: nobody is inside either, and it is for the
 * caller to give the memory back. */
static inline bool
hold_abandon(hold *self)
{
    uint64_t after;
    return hold_change(self, HOLD_CLOSED, 0, 0, &after);
}

/* From "nobody but `own`" to CLOSED, DONE and `more`, in one step. False: somebody
 * else is there (*seen says who) or it is closed, and nothing has changed. */
static inline bool
hold_close_over(hold *self, uint64_t own, uint64_t more, uint64_t *seen)
{
    *seen = hold_settled(self);
    while ((*seen & (HOLD_ANYONE | HOLD_CLOSED)) == own) {
        if (hold_swap(self, seen, *seen | HOLD_CLOSED | HOLD_DONE | more)) {
            return true;
        }
        *seen = hold_settled(self);
    }
    return false;
}

static inline bool
hold_close(hold *self, uint64_t *seen)
{
    return hold_close_over(self, 0, 0, seen);
}

/* Of several words at once: each begins, and then all of them stay closed or open. */
static inline bool
hold_begin_close(hold *self, uint64_t own, uint64_t *seen)
{
    return hold_close_over(self, own, HOLD_CLOSING, seen);
}

static inline void
hold_end_close(hold *self, bool closed)
{
    uint64_t after;
    hold_change(self, 0, HOLD_CLOSING | (closed ? 0 : HOLD_CLOSED | HOLD_DONE), 0,
                &after);
}

#endif
