"""Copies between memory and buffers, and between memory and files."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

from tests.fuzz import hostile
from tests.fuzz.arguments import FAILED, FILE_SIZE
from tests.fuzz.model import PAGE, Guest, Place, exactly

from guestmem import ReadFromSourceError, preadv, pwritev

if TYPE_CHECKING:
    from tests.fuzz.world import World


def moved(
    w: World, to: Place | Guest, at: int, come: Place | Guest, since: int, count: int
) -> None:
    """Count bytes went from one place to another, as memmove does it."""
    if w.tame:
        to.put(at, come.at(since, count))
        to.doubt(come.known)


def copy_in_or_out(w: World) -> None:
    place, host = w.target(), w.buffer_or_odd()
    offset, obj = w.offset(place), place.obj
    name = w.choices.pick(["read_slice", "write_slice", "read_exact", "write_all"])
    done = w.call(getattr(obj, name), host.obj, offset)
    if done is FAILED:
        place.half_done()
    if done is FAILED or not w.tame:
        return
    count = min(host.size, place.left(offset)) if name.endswith("slice") else host.size
    w.check(done, count if name.endswith("slice") else None)
    if name.startswith("read"):
        moved(w, host, 0, place, offset, count)
    else:
        moved(w, place, offset, host, 0, count)


def copy_whole(w: World) -> None:
    place, host = w.slice(), w.buffer_or_odd()
    count = min(host.size, place.size)
    if w.choices.one_in(2):
        if w.call(place.obj.copy_to, host.obj) is not FAILED:
            moved(w, host, 0, place, 0, count)
    elif w.call(place.obj.copy_from, host.obj) is not FAILED:
        moved(w, place, 0, host, 0, count)


def copy_between(w: World) -> None:
    place, to = w.slice(), w.slice()
    if w.choices.one_in(20):
        w.call(place.obj.copy_to_volatile_slice, w.choices.pick([w.odd(), w.memory().obj]))
        w.tame = False
        return
    got = w.call(place.obj.copy_to_volatile_slice, to.obj)
    if got is not FAILED:
        w.check(got, min(place.size, to.size))
        moved(w, to, 0, place, 0, min(place.size, to.size))


def read_bytes(w: World) -> None:
    place = w.target()
    offset, count = w.offset(place), w.number(place.size)
    got = w.call(place.obj.read_bytes, offset, count)
    if got is not FAILED and w.tame and place.known:
        w.check(got, place.at(offset, count))


def fill(w: World) -> None:
    place = w.target()
    arguments = [w.number(256), w.offset(place), w.choices.pick([None, w.number(place.size)])]
    arguments = arguments[: 1 + w.choices.byte() % 3]
    done = w.call(place.obj.fill, *arguments)
    if done is FAILED:
        place.half_done()
    elif w.tame:
        byte, offset, count = arguments + [0, None][len(arguments) - 1 :]
        count = place.left(offset) if count is None else count
        place.put(offset, bytes([byte]) * count)


def remove_range(w: World) -> None:
    place = w.target()
    offset = w.choices.pick([0, PAGE, w.offset(place)])
    count = w.choices.pick([PAGE, place.size, w.number(place.size)])
    if w.call(place.obj.remove_range, offset, count) is FAILED:
        place.half_done()
        place.more_is_marked()
    elif w.tame:
        place.put(offset, bytes(count))


# --- files ---


def transfer(w: World) -> None:
    """Any source or destination, in any state."""
    place = w.target()
    name = w.choices.pick(["read_to_memory", "write_from_memory"])
    offset, count = w.offset(place), w.number(place.size)
    if name.startswith("write"):
        place.lend()  # a stream is shown the memory itself
    position = w.choices.pick([(), (), (None,), (w.number(FILE_SIZE),)])
    w.call(getattr(place.obj, name), offset, w.stream(), count, *position)


def read_known(w: World) -> None:
    """A source whose content is known: what came is in memory, even where it failed."""
    place, data = w.target(), bytes(range(7, 7 + w.choices.byte() % 200)) * 3
    offset, count = w.offset(place), w.number(len(data))
    fd, position = -1, w.choices.pick([(), (7,)])
    source: Any
    if w.choices.one_in(2):
        source, position = io.BytesIO(data), ()
    else:
        fd = source = os.memfd_create("guestmem-fuzz-source")
        os.pwrite(fd, b"skipped" + data, 0)
        os.lseek(fd, 7, os.SEEK_SET)
    arrived: int | None = None

    def read() -> None:
        nonlocal arrived
        try:
            place.obj.read_to_memory(offset, source, count, *position)
            arrived = count
        except ReadFromSourceError as error:
            arrived = error.transferred
            raise

    w.call(read)
    if fd >= 0:
        os.close(fd)
    if arrived is None:
        place.half_done()
    elif w.tame:
        place.put(offset, data[:arrived])
        w.check(arrived, min(count, len(data)))


def write_known(w: World) -> None:
    place, sink = w.target(), io.BytesIO()
    offset, count = w.offset(place), w.number(place.size)
    done = w.call(place.obj.write_from_memory, offset, sink, count)
    if done is not FAILED and w.tame and place.known:
        w.check(sink.getvalue(), place.at(offset, count))


# --- one system call, or one call of an object ---


def once(w: World) -> None:
    """Any source or destination, in any state."""
    place = w.slice()
    name = w.choices.pick(["read_from", "write_to"])
    if name == "write_to":
        place.lend()
    w.call(getattr(place.obj, name), w.stream(), w.number(place.size))


def source(w: World) -> tuple[int, bytes]:
    """Return a file and its content; the file is at its beginning."""
    data = bytes(range(9, 9 + w.choices.byte() % 200)) * w.choices.pick([1, 5, 30])
    fd = os.memfd_create("guestmem-fuzz-source")
    os.pwrite(fd, data, 0)
    return fd, data


def read_once(w: World) -> None:
    place, (fd, data) = w.slice(), source(w)
    count = w.number(place.size)
    stream: Any = fd if w.choices.one_in(2) else io.BytesIO(data)
    got = w.call(place.obj.read_from, stream, count)
    os.close(fd)
    if got is FAILED and place.tracked is not None:
        place.tracked.exact &= not place.area.shrinks
    elif got is not FAILED and w.tame:
        w.check(got, exactly(min(count, len(data))))
        place.put(0, data[:got])


def write_once(w: World) -> None:
    place, sink = w.slice(), io.BytesIO()
    count = w.number(place.size)
    got = w.call(place.obj.write_to, sink, count)
    if got is not FAILED and w.tame and place.known:
        w.check(sink.getvalue(), place.at(0, got))


def scattered(w: World) -> tuple[Any, list[Place]]:
    """Return some memory as an argument of preadv() and pwritev(), and its places."""
    if w.choices.one_in(3):
        guest = w.guest()
        addr, count = w.offset(guest), w.number(guest.size)
        made = w.call(guest.obj.slices, addr, count)
        if made is not FAILED:
            slices = list(made)
            if not w.tame:
                return slices, []
            pieces = list(guest.pieces(addr, count))
            w.check([len(one) for one in slices], [step for _, _, step in pieces])
            return iter(slices), [
                place.derive(one, offset, step)
                for one, (place, offset, step) in zip(slices, pieces, strict=True)
            ]
    places = [w.memory() for _ in range(w.choices.byte() % 5)]
    memories: Any = [place.obj for place in places]
    kind = w.choices.byte() % 8
    if kind == 0:
        memories = hostile.HostileIterable(w, [*memories, *w.choices.pick([[], [w.odd()]])])
    elif kind == 1:  # more than one system call takes
        memories = [memory for memory in memories if len(memory) < PAGE] * 1100
        w.tame = False
    elif kind == 2:
        w.tame = False
        memories = w.odd()
    return memories, places


def read_scattered(w: World) -> None:
    (fd, data), (memories, places) = source(w), scattered(w)
    position = w.choices.pick([(), (None,), (0,), (w.number(len(data)),)])
    got = w.call(preadv, fd, memories, *position)
    os.close(fd)
    if got is FAILED or not w.tame:
        return
    rest = data[position[0] or 0 :] if position else data
    # Missing pages end it early.
    if not any(place.area.shrinks for place in places):
        w.check(got, min(sum(place.size for place in places), len(rest)))
    rest = rest[:got]
    for place in places:
        place.put(0, rest[: place.size])
        rest = rest[place.size :]


def write_scattered(w: World) -> None:
    (fd, _), (memories, places) = source(w), scattered(w)
    os.ftruncate(fd, 0)
    got = w.call(pwritev, fd, memories, *w.choices.pick([(), (None,), (w.choices.byte(),)]))
    content = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    if got is not FAILED and w.tame and all(place.known for place in places):
        wanted = b"".join(place.at(0, place.size) for place in places)[:got]
        w.check(content[len(content) - got :], wanted)


def scatter_anything(w: World) -> None:
    """To or from a descriptor in any state."""
    memories, _ = scattered(w)
    w.tame = False
    fd = w.fd() if w.choices.one_in(2) else w.choices.pick([hostile.Hostile(w), None, "1"])
    position = w.choices.pick([(), (None,), (w.number(FILE_SIZE),)])
    w.call(w.choices.pick([preadv, pwritev]), fd, memories, *position)
