"""A guest's address space: making one, its regions, and what it knows of addresses.

Its accessors are run by the operations that run those of memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.fuzz import hostile
from tests.fuzz.arguments import FAILED, NO_SIZES, SIZES
from tests.fuzz.model import PAGE, TOP, Finding, Place

from guestmem import GuestMemory

if TYPE_CHECKING:
    from tests.fuzz.model import Guest
    from tests.fuzz.world import World


def address(w: World, taken: list[tuple[int, int]], size: int) -> Any:
    """Return where a region could begin: after another one, at the end of all, or anywhere."""
    choices = w.choices
    if choices.one_in(10):
        return w.number()
    ends = [start + count for start, count in taken]
    return choices.pick([*ends, *ends, 0, PAGE, 2**32, TOP - size, TOP - size + 1, 2**63 - 5])


def iterable(w: World, items: list[Any]) -> Any:
    kind = w.choices.byte() % 16
    if kind < 10:
        return [list, tuple, iter][kind % 3](items)  # type: ignore[operator]
    if kind < 13:
        return hostile.HostileIterable(w, items)
    w.tame = False
    if kind == 13:
        return hostile.HostileSequence(w, items)
    return w.odd({1: 2}, "text")


def pair(w: World, one: Any, other: Any) -> Any:
    if not w.choices.one_in(12):
        return (one, other)
    odd = [[one, other], (one,), (one, other, 0), hostile.HostilePair((one, other)), w.odd()]
    return w.choices.pick(odd)


def make_guest(w: World) -> None:
    places: list[Place] = []
    pairs: list[Any] = []
    taken: list[tuple[int, int]] = []
    for _ in range(w.choices.byte() % 6):
        place = w.memory()
        start = address(w, taken, place.size)
        if type(start) is int:
            taken.append((start, place.size))
        memory = w.odd() if w.choices.one_in(20) else place.obj
        pairs.append(pair(w, start, memory))
        places.append(place)
    made = w.call(GuestMemory, iterable(w, pairs))
    if made is not FAILED:
        w.add_guest(made, places)


def make_of_ranges(w: World) -> None:
    pairs: list[Any] = []
    taken: list[tuple[int, int]] = []
    for _ in range(w.choices.byte() % 4):
        size = w.choices.pick([*SIZES, *SIZES, *NO_SIZES])
        start = address(w, taken, size)
        if type(start) is int:
            taken.append((start, size))
        one_size = hostile.HostileSize(w) if w.choices.one_in(12) else size
        pairs.append(pair(w, start, one_size))
    options: dict[str, Any] = w.choices.pick([{}, {"track_dirty": True}, {"track_dirty": 0}])
    made = w.call(GuestMemory.from_ranges, iterable(w, pairs), **options)
    if made is not FAILED:
        sizes = [region.size for region in made.regions]
        places = [w.mapped(r.memory, w.new_area(r.size), 0) for r in made.regions]
        w.add_guest(made, places)
        for place, size in zip(places, sizes, strict=True):
            w.check(len(place.obj), size)
            if w.choices.one_in(2):
                w.add_memory(place)


def with_region(w: World) -> None:
    guest, place = w.guest(), w.memory()
    taken = [(start, one.size) for start, one in guest.regions]
    memory = w.odd() if w.choices.one_in(16) else place.obj
    made = w.call(guest.obj.with_region, address(w, taken, place.size), memory)
    if made is not FAILED:
        w.check(made.num_regions, len(guest.regions) + 1)
        w.add_guest(made, [*(p for _, p in guest.regions), place])


def without_region(w: World) -> None:
    guest = w.guest()
    start, size = w.number(), w.number()
    if guest.regions and not w.choices.one_in(4):
        start, place = w.choices.pick(guest.regions)
        size = place.size + w.choices.pick([0, 0, 0, 1])
    made = w.call(guest.obj.without_region, start, size)
    if made is not FAILED:
        w.check(made.num_regions, len(guest.regions) - 1)
        w.add_guest(made, [p for _, p in guest.regions])


def find(w: World) -> None:
    """What only looks is right for any address, also of a guest that has been closed."""
    guest = w.guest()
    addr, count = w.offset(guest), w.number(guest.size)
    name = w.choices.pick(["find_region", "address_in_range", "check_range", "checked_offset"])
    arguments = (addr,) if name in {"find_region", "address_in_range"} else (addr, count)
    got = w.call(getattr(guest.obj, name), *arguments)
    if got is FAILED or not w.tame:
        return
    found = guest.find(addr)
    if name == "find_region":
        if (got is None) != (found is None):
            raise Finding(f"find_region({addr:#x}) is {got!r}")
        if found is not None and (got.start, got.memory) != (found[0], found[1].obj):
            raise Finding(f"find_region({addr:#x}) is {got!r}")
    elif name == "address_in_range":
        w.check(got, found is not None)
    elif name == "check_range":
        w.check(got, guest.has(addr, count))
    else:
        w.check(got, addr + count if guest.find(addr + count) is not None else None)


def look_at_guest(w: World) -> None:
    guest = w.guest()
    last = max((start + place.size - 1 for start, place in guest.regions), default=None)
    w.check((guest.obj.size, guest.obj.last_addr), (guest.size, last))
    addr = w.offset(guest)
    got = w.call(guest.obj.get_host_address, addr)
    if got is FAILED or not w.tame:
        return
    found = guest.find(addr)
    if found is None:
        raise Finding(f"get_host_address({addr:#x}) in a hole")
    base = w.call(found[1].obj.as_ptr)
    if base is not FAILED:
        w.check(got - base, addr - found[0])


def slices(w: World) -> None:
    """The slices that cover a range, and while they are iterated over, other calls."""
    guest: Guest = w.guest()
    addr, count = w.offset(guest), w.number(guest.size)
    made = w.call(guest.obj.slices, addr, count)
    if made is FAILED:
        return
    if w.choices.one_in(4):
        w.kept.append(made)
        w.run_some()
        w.tame = False
    some = list(made)
    if not w.tame:
        for one in some:
            w.add_memory(w.derived(guest, one, addr))
        return
    pieces = list(guest.pieces(addr, count))
    w.check([one.size for one in some], [step for _, _, step in pieces])
    for one, (place, offset, step) in zip(some, pieces, strict=True):
        w.add_memory(place.derive(one, offset, step))


def memory_of_region(w: World) -> None:
    """A mapping that from_ranges() made is one that others can use, and close."""
    guest = w.guest()
    if guest.regions:
        w.add_memory(w.choices.pick(guest.regions)[1])
