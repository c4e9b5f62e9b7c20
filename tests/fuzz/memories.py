"""Making memory, and giving it back."""

from __future__ import annotations

import gc
import io
import os
from typing import TYPE_CHECKING, Any

from tests.fuzz import hostile
from tests.fuzz.arguments import FAILED, FILE_SIZE, Host
from tests.fuzz.model import PAGE, Area, Place, exactly

from guestmem import MemoryMapping, VolatileSlice

if TYPE_CHECKING:
    from tests.fuzz.world import World


def tracking(w: World) -> dict[str, Any]:
    if w.choices.one_in(16):
        return {"track_dirty": hostile.Hostile(w)}
    return w.choices.pick([{}, {"track_dirty": True}, {"track_dirty": 0}, {"track_dirty": [0]}])


def make_anonymous(w: World) -> None:
    size = hostile.HostileSize(w) if w.choices.one_in(8) else w.mapping_size()
    made = w.call(MemoryMapping, size, **tracking(w))
    if made is not FAILED:
        place = w.add_mapping(made, Area(bytearray(made.size)), 0)
        if place.tracked is not None:
            place.tracked.before = bytes(made.size)
        if w.choices.one_in(2):
            w.write_something(place)


def make_of_file(w: World) -> None:
    shared = [p.area for p in w.memories if p.area.fd >= 0]
    if shared and w.choices.one_in(2):
        area = w.choices.pick(shared)
    else:
        shrinks = w.choices.one_in(2)
        area = Area(bytearray(FILE_SIZE), shrinks=shrinks, fd=w.memfd())
        (w.shrinking_fds if shrinks else w.fds).append(area.fd)
    fd: Any = area.fd
    if w.choices.one_in(4):
        fd = io.FileIO(fd, "r+b", closefd=False)
    elif w.choices.one_in(8):
        w.tame = False
        fd = w.choices.pick([hostile.Hostile(w), w.fd(), w.odd()])
        area = Area(bytearray(FILE_SIZE))
        area.known = False
    size = hostile.HostileSize(w) if w.choices.one_in(8) else w.mapping_size()
    # None that maps what is beyond the end of the file. /dev/zero ends where the size does.
    offsets = [0, 123, 2**63 - 1, 2**63, 2**64, -1, "0", None]
    offset: Any = w.choices.pick([*offsets, PAGE, 2 * PAGE] if area.fd >= 0 else offsets)
    if offset is None:
        made = w.call(MemoryMapping.from_fd, fd, size, **tracking(w))
        offset = 0
    else:
        made = w.call(MemoryMapping.from_fd_offset, fd, size, offset, **tracking(w))
    if made is not FAILED:
        w.add_mapping(made, area, offset)


def truncate(w: World) -> None:
    if w.shrinking_fds:
        os.ftruncate(w.choices.pick(w.shrinking_fds), w.choices.byte() * PAGE // 8)


def get_slice(w: World) -> None:
    place = w.target()
    offset, count = w.offset(place), w.number(place.size)
    made = w.call(place.obj.get_slice, offset, count)
    if made is not FAILED:
        w.check(made.size, exactly(count) if w.tame else 0)
        w.add_memory(w.derived(place, made, offset))


def offset_of_slice(w: World) -> None:
    place = w.slice()
    count = w.number(place.size)
    made = w.call(place.obj.offset, count)
    if made is not FAILED:
        w.check(made.size, place.size - count if w.tame else 0)
        w.add_memory(w.derived(place, made, count))


def from_buffer(w: World) -> None:
    host = w.buffer_or_odd()
    made = w.from_buffer(host.obj)
    if made is not FAILED:
        w.add_memory(Place(made, host.area, host.start, made.size))
        if isinstance(host.obj, Host) and w.choices.one_in(2):
            host.obj.kept = made  # a cycle through the exporter


def close(w: World) -> None:
    obj = w.target().obj
    w.call(obj.release if isinstance(obj, VolatileSlice) else obj.close)


def close_all(w: World) -> None:
    """What memory there is, that of guests, and the guests."""
    places = [*w.memories, *(place for guest in w.guests for _, place in guest.regions)]
    objects = [*(place.obj for place in places), *(guest.obj for guest in w.guests)]
    while objects:
        obj = objects.pop(0)
        w.call(obj.release if isinstance(obj, VolatileSlice) else obj.close)


def leave_with(w: World) -> None:
    memory = w.target().obj

    def block() -> None:
        with memory:
            w.run_some()
            if w.choices.one_in(3):
                raise hostile.planned(w)

    w.call(block)


def exit_by_hand(w: World) -> None:
    w.call(w.target().obj.__exit__, *w.choices.pick([(), (None,) * 3, (1, w.odd(), 3), (1,) * 4]))


def drop(w: World) -> None:
    some: list[Any] = w.choices.pick(
        [
            *(w.memories, w.refs, w.buffers, w.kept, w.ctypes_objects),
            *(w.guests, w.atomics, w.arrays, w.tracked, w.views),
        ]
    )
    if some:
        w.forget(some)


def drop_all_but_one_kind(w: World) -> None:
    """What is left must not need the rest."""
    kinds: list[list[Any]] = [w.guests, w.refs, w.atomics, w.arrays, w.tracked, w.memories]
    kept = w.choices.pick(kinds)
    for kind in kinds:
        while kind and kind is not kept:
            w.forget(kind)


def collect(w: World) -> None:
    gc.collect()


# --- exported buffers ---


def export(w: World) -> None:
    place = w.memory()
    # What is read through an export of memory that a file no longer backs is a bus error.
    if place.area.shrinks:
        return
    view = w.call(memoryview, place.obj)
    if view is FAILED:
        return
    place.lend()
    start, size = place.start, place.size
    if w.choices.one_in(2):
        skipped = w.choices.byte()
        view = view[skipped:]
        start, size = start + min(skipped, size), max(size - skipped, 0)
    w.views.append(view)
    w.add_buffer(view, place.area, start, size)


def release_view(w: World) -> None:
    if w.views:
        w.call(w.choices.pick(w.views).release)


def resize_host(w: World) -> None:
    hosts = [p for p in w.buffers if isinstance(p.obj, bytearray)]
    if not hosts:
        return
    place, to = w.choices.pick(hosts), w.choices.byte() * 5

    def resize() -> None:
        place.obj[:] = bytes(to)

    if w.call(resize) is not FAILED:
        # Nobody has its buffer, so nobody else shows the area.
        place.area.model[:] = bytes(to)
        for other in w.buffers:
            if other.obj is place.obj:
                other.size = to
