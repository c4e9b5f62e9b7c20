"""The pages that were written: what DirtyBitmap tells of them, and what it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.fuzz.arguments import FAILED
from tests.fuzz.model import PAGE, Finding, Tracked, exactly

from guestmem import MemoryMapping

if TYPE_CHECKING:
    from tests.fuzz.model import Guest
    from tests.fuzz.world import World


def bitmap(w: World) -> tuple[Any, Tracked]:
    """Return one, and what it should have."""
    if not w.tracked:
        size = 65 * PAGE + 1  # more than one word of bits
        made = w.call(MemoryMapping, size, track_dirty=True)
        place = w.add_mapping(made, w.new_area(size), 0)
        if place.tracked is None:
            raise Finding(f"{made!r} tracks nothing")
        place.tracked.before = bytes(size)
        place.tracked.obj = made.dirty
        w.tracked[:] = [place.tracked]
    tracked = w.choices.pick(w.tracked)
    return tracked.obj, tracked


def mark(w: World) -> None:
    obj, tracked = bitmap(w)
    offset, count = w.number(tracked.size), w.number(tracked.size)
    done = w.call(obj.mark, offset, count)
    if done is not FAILED and w.tame:
        if offset + count > tracked.size:
            raise Finding(f"{offset:#x} + {count:#x} was marked of {tracked.size:#x}")
        tracked.mark(offset, count)


def is_dirty(w: World) -> None:
    obj, tracked = bitmap(w)
    offset = w.number(tracked.size)
    got = w.call(obj.is_dirty, offset)
    if got is FAILED or not w.tame:
        return
    page = offset // PAGE
    if offset >= tracked.size or (page in tracked.pages and not got):
        raise Finding(f"is_dirty({offset:#x}) of {tracked.size:#x} is {got}")
    if tracked.exact:
        w.check(got, page in tracked.pages)


def look_at_pages(w: World) -> None:
    obj, tracked = bitmap(w)
    got = w.call(obj.ranges)
    if got is not FAILED and tracked.exact:
        w.check(got, tracked.ranges(tracked.pages))
    if w.choices.one_in(2):
        view = w.call(memoryview, obj)
        if view is not FAILED:
            w.views.append(view)
            if not view.readonly or len(view) != (obj.num_pages + 63) // 64 * 8:
                raise Finding(f"{obj!r} exports {len(view)} bytes")


def seen(w: World, some: list[Tracked]) -> None:
    """Their marks were taken: from what there is now on, what differs is marked."""
    for tracked in some:
        places = [p for p in w.memories if p.tracked is tracked]
        mapping = next((p.obj for p in places if isinstance(p.obj, MemoryMapping)), None)
        if tracked.before is not None:
            tracked.before = None
            if mapping is not None and not mapping.closed:
                tracked.before = mapping.read_bytes(0, tracked.size)


def take(w: World) -> None:
    obj, tracked = bitmap(w)
    got = w.call(obj.take)
    if got is FAILED:
        return
    seen(w, [tracked])
    if w.tame:
        if tracked.exact:
            w.check(got, tracked.ranges(tracked.pages))
        tracked.pages.clear()


def merge(w: World) -> None:
    """As from KVM: also bits of pages that are none, and buffers of any other size."""
    obj, tracked = bitmap(w)
    size = (obj.num_pages + 63) // 64 * 8
    bits: Any = bytes([w.choices.byte(), w.choices.byte()]) * (size // 2)
    given: Any = bits
    if w.choices.one_in(4):
        given = w.choices.pick([obj, w.buffer_or_odd().obj, bits[1:], bits * 2, ""])
        w.tame = False
    elif w.choices.one_in(4):
        given = memoryview(bytearray(bits))[:: w.choices.pick([1, -1])]
    offset = w.choices.pick([(), (), (0,), (PAGE,), (w.number(tracked.size),)])
    done = w.call(obj.merge, given, *offset)
    if done is not FAILED and w.tame:
        first = exactly(offset[0]) // PAGE if offset else 0
        marked = int.from_bytes(bytes(given), "little") << first
        for page in range(obj.num_pages):
            if marked >> page & 1:
                tracked.pages.add(page)


def mark_guest(w: World) -> None:
    guest: Guest = w.guest()
    addr, count = w.offset(guest), w.number(guest.size)
    if w.call(guest.obj.mark_dirty, addr, count) is not FAILED and w.tame:
        for place, offset, step in guest.pieces(addr, count):
            if place.tracked is not None:
                place.tracked.mark(place.start + offset - place.tracked.start, step)


def merge_guest(w: World) -> None:
    guest: Guest = w.guest()
    bits = bytes([w.choices.byte(), w.choices.byte()]) * w.choices.pick([4, 8, 3, 0, 4 * 65])
    addr = w.offset(guest)
    if type(addr) is int and not w.choices.one_in(4):
        addr = addr // PAGE * PAGE
    if w.call(guest.obj.merge_dirty, addr, bits) is FAILED or not w.tame:
        return
    for page in range(8 * len(bits)):
        if bits[page // 8] >> page % 8 & 1:
            for place, offset, step in guest.pieces(addr + page * PAGE, PAGE):
                if place.tracked is not None:
                    place.tracked.mark(place.start + offset - place.tracked.start, step)


def guest_dirty(w: World) -> None:
    guest: Guest = w.guest()
    tracked = [p.tracked for _, p in guest.regions if p.tracked is not None]
    if w.choices.one_in(2):
        for one in w.tracked:  # so that it shows which pages are taken, and which are not
            if w.call(one.obj.mark, 0, one.size) is not FAILED and w.tame:
                one.mark(0, one.size)
    taken = w.choices.one_in(2)
    got = w.call(guest.obj.take_dirty if taken else guest.obj.dirty_ranges)
    if got is FAILED:
        return
    if all(one.exact for one in tracked):
        w.check(got, guest.dirty() if w.tame else [])
    if taken:
        seen(w, tracked)
        guest.clean()
