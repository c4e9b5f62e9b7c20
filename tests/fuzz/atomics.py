"""Atomic refs, memory orders and fences."""

from __future__ import annotations

import operator
import struct
from typing import TYPE_CHECKING, Any

from tests.fuzz.arguments import FAILED, ORDERS, SCALARS
from tests.fuzz.model import Finding, Place, exactly

from guestmem import MemoryMapping, Ordering, Scalar, f32, f64, fence, u8

if TYPE_CHECKING:
    from tests.fuzz.world import World

INTEGERS = [scalar for scalar in SCALARS if scalar.name[0] != "f"]
FETCHES = {
    "exchange": lambda _, value: value,
    "fetch_add": operator.add,
    "fetch_sub": operator.sub,
    "fetch_and": operator.and_,
    "fetch_or": operator.or_,
    "fetch_xor": operator.xor,
}
IMPOSSIBLE: dict[str, list[Ordering]] = {
    "load": [Ordering.RELEASE, Ordering.ACQ_REL],
    "store": [Ordering.ACQUIRE, Ordering.ACQ_REL],
    "fence": [Ordering.RELAXED],
}


def check_order(name: str, order: tuple[Any, ...]) -> None:
    """A call with this order has succeeded."""
    one = order[0] if order else None
    known = one is None or any(one is each for each in ORDERS)
    if not known or any(one is each for each in IMPOSSIBLE.get(name, [])):
        raise Finding(f"{name} took the order {one!r}")


def get_atomic_ref(w: World) -> None:
    place = w.target()
    of = w.choices.pick(list(SCALARS)) if w.choices.byte() % 8 else w.type()
    offset = w.offset(place)
    if type(offset) is int and issubclass(type(of), Scalar) and w.choices.one_in(2):
        offset -= offset % of.size
    made = w.call(place.obj.get_atomic_ref, offset, of)
    if made is not FAILED:
        if of is f32 or of is f64 or made.as_ptr() % made.size:
            raise Finding(f"an atomic ref to {of!r} at {made.as_ptr() % made.size}")
        w.keep(w.atomics, w.derived(place, made, offset))


def atomic(w: World) -> Place:
    if not w.atomics:
        place = w.memory()
        made = w.call(place.obj.get_atomic_ref, 0, w.choices.pick(INTEGERS))
        if made is FAILED:
            mapping = MemoryMapping(64)
            place = w.add_mapping(mapping, w.new_area(64), 0)
            made = mapping.get_atomic_ref(0, u8)
        w.atomics.append(place.derive(made, 0, made.size))
    return w.choices.pick(w.atomics)


def limits(of: Any) -> tuple[int, int]:
    """Return the least and the largest value."""
    bits = 8 * of.size
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if of.name[0] == "i" else (0, (1 << bits) - 1)


def integer(w: World, of: Any) -> Any:
    """Return a value, mostly one that fits, often one at the ends."""
    least, most = limits(of)
    number = w.number(most)
    if type(number) is int and w.choices.byte() % 4:
        return least + number % (most - least + 1)
    return number


def wrapped(of: Any, value: int) -> int:
    least, most = limits(of)
    return least + (value - least) % (most - least + 1)


def atomic_load(w: World) -> None:
    place, order = atomic(w), w.order()
    got = w.call(place.obj.load, *order)
    if got is not FAILED:
        check_order("load", order)
        if w.tame and place.known:
            layout = SCALARS[place.obj.type]
            w.check(got, struct.unpack(layout, place.at(0, place.size))[0])


def atomic_store(w: World) -> None:
    place = atomic(w)
    value, order = integer(w, place.obj.type), w.order()
    done = w.call(place.obj.store, value, *order)
    if done is not FAILED:
        check_order("store", order)
        if w.tame:
            place.put(0, struct.pack(SCALARS[place.obj.type], value))


def atomic_fetch(w: World) -> None:
    place, name = atomic(w), w.choices.pick(list(FETCHES))
    of = place.obj.type
    value, order = integer(w, of), w.order()
    got = w.call(getattr(place.obj, name), value, *order)
    if got is FAILED:
        return
    check_order(name, order)
    if w.tame:
        before = struct.unpack(SCALARS[of], place.at(0, place.size))[0]
        after = wrapped(of, FETCHES[name](before, exactly(value)))
        place.put(0, struct.pack(SCALARS[of], after))
        if place.known:
            w.check(got, before)


def compare_exchange(w: World) -> None:
    place = atomic(w)
    of = place.obj.type
    desired, order = integer(w, of), w.order()
    expected = w.call(place.obj.load) if w.choices.one_in(2) else integer(w, of)
    got = w.call(place.obj.compare_exchange, expected, desired, *order)
    if got is FAILED:
        return
    check_order("compare_exchange", order)
    if w.tame and not place.known:
        if got[0] and place.tracked is not None:
            place.tracked.mark(place.start - place.tracked.start, place.size)
    elif w.tame:
        before = struct.unpack(SCALARS[of], place.at(0, place.size))[0]
        w.check(got, (before == expected, before))
        if got[0]:
            place.put(0, struct.pack(SCALARS[of], desired))


def fences(w: World) -> None:
    order = w.order()
    if w.call(fence, *order) is not FAILED:
        check_order("fence", order)
