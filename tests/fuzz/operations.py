"""The calls: each operation draws its arguments, makes its call, and keeps the model."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
import struct
import sys
import weakref
from typing import TYPE_CHECKING, Any

from tests.fuzz import hostile
from tests.fuzz.world import (
    FAILED,
    FILE_SIZE,
    MOST,
    PAGE,
    SCALARS,
    Area,
    Finding,
    Host,
    Place,
    World,
)

from guestmem import (
    MemoryMapping,
    ReadFromSourceError,
    Scalar,
    VolatileMemory,
    VolatileRef,
    VolatileSlice,
    u8,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# --- making memory, and giving it back ---


def make_anonymous(w: World) -> None:
    size = hostile.HostileSize(w) if w.choices.one_in(8) else w.mapping_size()
    made = w.call(MemoryMapping, size)
    if made is not FAILED:
        w.add_mapping(made, Area(bytearray(made.size)), 0)


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
        made = w.call(MemoryMapping.from_fd, fd, size)
        offset = 0
    else:
        made = w.call(MemoryMapping.from_fd_offset, fd, size, offset)
    if made is not FAILED:
        w.add_mapping(made, area, offset)


def truncate(w: World) -> None:
    if w.shrinking_fds:
        os.ftruncate(w.choices.pick(w.shrinking_fds), w.choices.byte() * PAGE // 8)


def get_slice(w: World) -> None:
    place = w.memory()
    offset, count = w.number(place.size), w.number(place.size)
    made = w.call(place.obj.get_slice, offset, count)
    if made is not FAILED:
        if w.tame:
            place.at(offset, count)
        start = place.start + (offset if w.tame else 0)
        w.add_memory(Place(made, place.area, start, made.size))


def offset_of_slice(w: World) -> None:
    place = w.slice()
    count = w.number(place.size)
    made = w.call(place.obj.offset, count)
    if made is not FAILED:
        start = place.start + (count if w.tame else 0)
        w.check(made.size, place.size - count if w.tame else 0)
        w.add_memory(Place(made, place.area, start, made.size))


def from_buffer(w: World) -> None:
    host = w.buffer_or_odd()
    made = w.from_buffer(host.obj)
    if made is not FAILED:
        w.add_memory(Place(made, host.area, host.start, made.size))
        if isinstance(host.obj, Host) and w.choices.one_in(2):
            host.obj.kept = made  # a cycle through the exporter


def close(w: World) -> None:
    obj = w.memory().obj
    w.call(obj.close if isinstance(obj, MemoryMapping) else obj.release)


def leave_with(w: World) -> None:
    memory = w.memory().obj

    def block() -> None:
        with memory:
            w.run_some()
            if w.choices.one_in(3):
                raise hostile.planned(w)

    w.call(block)


def exit_by_hand(w: World) -> None:
    w.call(w.memory().obj.__exit__, *w.choices.pick([(), (None,) * 3, (1, w.odd(), 3), (1,) * 4]))


def drop(w: World) -> None:
    some = w.choices.pick([w.memories, w.refs, w.buffers, w.kept, w.ctypes_objects])
    if some:
        some.pop(w.choices.byte() % len(some))


def collect(w: World) -> None:
    gc.collect()


# --- objects ---


def packed(of: Any, value: Any) -> bytes | None:
    """Return what a value of that type is in memory; None where nobody can say."""
    if issubclass(type(of), Scalar):
        return struct.pack(SCALARS[of], value)
    if issubclass(type(of), struct.Struct):
        return struct.Struct.pack(of, *value)
    return bytes(value)[: hostile.size_of(of)]


def loaded(w: World, got: Any, of: Any, content: bytes) -> None:
    if not w.tame:
        return
    if issubclass(type(of), Scalar):
        w.check(got, struct.unpack(SCALARS[of], content)[0])
    elif issubclass(type(of), struct.Struct):
        w.check(got, struct.Struct.unpack(of, content))
    elif issubclass(type(of), type):
        w.check(bytes(got), content)


def size_of(of: Any) -> int:
    if issubclass(type(of), Scalar):
        return int(of.size)
    if issubclass(type(of), struct.Struct):
        return hostile.struct_size(of)
    return hostile.size_of(of)


def check_plain(of: Any) -> None:
    if any(of is cls for cls in hostile.REFUSED):
        raise Finding(f"{of} was accepted")


def read_obj(w: World) -> None:
    place, of = w.memory(), w.type()
    offset = w.number(place.size)
    got = w.call(place.obj.read_obj, offset, of)
    if got is not FAILED:
        check_plain(of)
    if got is not FAILED and w.tame and place.area.known:
        loaded(w, got, of, place.at(offset, size_of(of)))


def write_obj(w: World) -> None:
    place, of = w.memory(), w.type()
    offset, value = w.number(place.size), w.value(of)
    if w.choices.one_in(4):
        of = type(value)
        done = w.call(place.obj.write_obj, value, offset)
    elif w.choices.one_in(2):
        done = w.call(place.obj.write_obj, value, offset, type=of)
    else:
        done = w.call(place.obj.write_obj, value, offset, of)
    if done is not FAILED and w.tame and (content := packed(of, value)) is not None:
        place.put(offset, content)


def get_ref(w: World) -> None:
    place, of = w.memory(), w.type()
    offset = w.number(place.size)
    made = w.call(place.obj.get_ref, offset, of)
    if made is not FAILED:
        check_plain(of)
        start = place.start + (offset if w.tame else 0)
        if len(w.refs) >= MOST:
            w.refs.pop(w.choices.byte() % MOST)
        w.refs.append(Place(made, place.area, start, made.size))


def ref(w: World) -> Place:
    if not w.refs:
        place = w.memory()
        made = w.call(place.obj.get_ref, 0, u8)
        if made is FAILED:
            place = w.slice()
            host = Host(b"12345678")
            made = VolatileSlice.from_buffer(host).get_ref(0, u8)
            place = Place(host, Area(bytearray(host)), 0, 8)
        w.refs.append(Place(made, place.area, place.start, 1))
    return w.choices.pick(w.refs)


def load(w: World) -> None:
    place = ref(w)
    got = w.call(place.obj.load)
    if got is not FAILED and w.tame and place.area.known:
        loaded(w, got, place.obj.type, place.at(0, size_of(place.obj.type)))


def store(w: World) -> None:
    place = ref(w)
    value = w.value(place.obj.type)
    done = w.call(place.obj.store, value)
    if done is not FAILED and w.tame and (content := packed(place.obj.type, value)) is not None:
        place.put(0, content)


def to_slice(w: World) -> None:
    place = ref(w)
    made = w.call(place.obj.to_slice)
    if made is not FAILED:
        w.add_memory(Place(made, place.area, place.start, made.size))


# --- copies ---


def moved(w: World, to: Place, at: int, come: Place, since: int, count: int) -> None:
    """Count bytes went from one place to another, as memmove does it."""
    if w.tame:
        to.put(at, come.at(since, count))
        to.area.known &= come.area.known


def copy_in_or_out(w: World) -> None:
    place, host = w.memory(), w.buffer_or_odd()
    offset, obj = w.number(place.size), place.obj
    name = w.choices.pick(["read_slice", "write_slice", "read_exact", "write_all"])
    done = w.call(getattr(obj, name), host.obj, offset)
    if done is FAILED or not w.tame:
        return
    count = min(host.size, place.size - offset) if name.endswith("slice") else host.size
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
    place = w.memory()
    offset, count = w.number(place.size), w.number(place.size)
    got = w.call(place.obj.read_bytes, offset, count)
    if got is not FAILED and w.tame and place.area.known:
        w.check(got, place.at(offset, count))


def fill(w: World) -> None:
    place = w.memory()
    arguments = [w.number(256), w.number(place.size), w.choices.pick([None, w.number(place.size)])]
    arguments = arguments[: 1 + w.choices.byte() % 3]
    if w.call(place.obj.fill, *arguments) is not FAILED and w.tame:
        byte, offset, count = arguments + [0, None][len(arguments) - 1 :]
        count = place.size - offset if count is None else count
        place.put(offset, bytes([byte]) * count)


def remove_range(w: World) -> None:
    place = w.memory()
    offset = w.choices.pick([0, PAGE, w.number(place.size)])
    count = w.choices.pick([PAGE, place.size, w.number(place.size)])
    if w.call(place.obj.remove_range, offset, count) is not FAILED and w.tame:
        place.put(offset, bytes(count))


# --- files ---


def transfer(w: World) -> None:
    """Any source or destination, in any state."""
    place = w.memory()
    name = w.choices.pick(["read_to_memory", "write_from_memory"])
    offset, count = w.number(place.size), w.number(place.size)
    position = w.choices.pick([(), (), (None,), (w.number(FILE_SIZE),)])
    w.call(getattr(place.obj, name), offset, w.stream(), count, *position)


def read_known(w: World) -> None:
    """A source whose content is known: what came is in memory, even where it failed."""
    place, data = w.memory(), bytes(range(7, 7 + w.choices.byte() % 200)) * 3
    offset, count = w.number(place.size), w.number(len(data))
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
    if arrived is not None and w.tame:
        place.put(offset, data[:arrived])
        w.check(arrived, min(count, len(data)))


def write_known(w: World) -> None:
    place, sink = w.memory(), io.BytesIO()
    offset, count = w.number(place.size), w.number(place.size)
    done = w.call(place.obj.write_from_memory, offset, sink, count)
    if done is not FAILED and w.tame and place.area.known:
        w.check(sink.getvalue(), place.at(offset, count))


# --- exported buffers ---


def export(w: World) -> None:
    place = w.memory()
    # What is read through an export of memory that a file no longer backs is a bus error.
    if place.area.shrinks:
        return
    view = w.call(memoryview, place.obj)
    if view is FAILED:
        return
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


# --- what any object has ---


def any_object(w: World) -> Any:
    kind = w.choices.byte() % 3
    return (w.memory() if kind == 0 else w.slice() if kind == 1 else ref(w)).obj


def look(w: World) -> None:
    obj = w.choices.pick(list(SCALARS)) if w.choices.one_in(8) else any_object(w)
    # None of them is looked up before it is called: a ref has not all of it.
    looks: list[Any] = [
        lambda: repr(obj),
        lambda: copy.copy(obj),
        lambda: copy.deepcopy(obj),
        lambda: pickle.dumps(obj),
        lambda: obj.__reduce_ex__(w.choices.byte() % 6),
        lambda: (hash(obj), obj == obj, obj != None, obj < obj),  # noqa: E711, PLR0124
        lambda: (obj.size, sys.getsizeof(obj), dir(obj)),
        lambda: obj.as_ptr(*w.choices.pick([(), (1,)])),
        lambda: obj[w.number()],
        lambda: (len(obj), bool(obj), obj.closed),
        lambda: w.kept.append(weakref.ref(obj, lambda _: hostile.Hostile(w).strike())),
        lambda: setattr(obj, w.choices.pick(["size", "__class__", "new"]), w.odd(VolatileSlice)),
        lambda: (VolatileRef[int], Scalar.__class_getitem__(w.odd())),
        lambda: type(obj).__enter__(obj),
        lambda: obj.__release_buffer__(memoryview(b"not of it")),
    ]
    with contextlib.suppress(AttributeError):
        w.call(w.choices.pick(looks))


def of_subclass(cls: Any, *arguments: Any) -> Any:
    return type("Sub", (cls,), {})(*arguments)


def construct(w: World) -> None:
    """Nobody makes one but by the documented ways."""
    cls = w.choices.pick([VolatileMemory, VolatileSlice, VolatileRef, Scalar])
    ways: list[Any] = [
        cls,
        lambda: object.__new__(cls),
        lambda: cls.__new__(cls),
        lambda: MemoryMapping.__new__(cls, 8),  # type: ignore[type-var]
        lambda: of_subclass(cls),
        lambda: of_subclass(MemoryMapping, 8),
        lambda: setattr(cls, "size", 1),
    ]
    if w.call(w.choices.pick(ways)) is not FAILED:
        raise Finding(f"{cls} was made, or changed")


def wrong_count(w: World) -> None:
    """Any method, with any number of any arguments, and with keywords."""
    obj = any_object(w)
    names = [n for n in dir(obj) if not n.startswith("_") and callable(getattr(obj, n))]
    name = w.choices.pick(names)
    if name.startswith("from_"):
        return  # not of any file, nor of any buffer: see the operations for them
    w.tame = False
    arguments: list[Any] = []
    for _ in range(w.choices.byte() % 6):
        some = [w.odd, w.number, w.type, w.buffer, w.memory]
        one = w.choices.pick(some)()
        arguments.append(one.obj if type(one) is Place else one)
    # The second of read_to_memory could be somebody else's fd.
    if len(arguments) > 1 and "memory" in name and issubclass(type(arguments[1]), int):
        arguments[1] = w.stream()
    keywords = [{}, {}, {"type": w.type()}, {"src": w.stream()}, {"x": 1}]
    got = w.call(getattr(obj, name), *arguments, **w.choices.pick(keywords))
    if got is not FAILED and w.choices.one_in(2):
        w.kept.append(got)


def plant(w: World) -> None:
    """Garbage that strikes when it is collected, and that holds what others use."""
    kept = w.choices.pick([w.memory, w.slice, w.buffer])().obj
    hostile.Dying(w, kept)


def init_struct_again(w: World) -> None:
    """Between calls only: in the middle of its own unpack, Struct itself crashes."""
    some = w.choices.pick(w.structs)
    if w.depth == 0 and some is not None:
        w.call(struct.Struct.__init__, some, w.choices.pick(hostile.FORMATS))


OPERATIONS: list[Callable[[World], None]] = [
    *(make_anonymous, make_of_file, truncate, get_slice, offset_of_slice, from_buffer),
    *(close, leave_with, exit_by_hand, drop, collect),
    *(read_obj, write_obj, get_ref, load, store, to_slice),
    *(copy_in_or_out, copy_whole, copy_between, read_bytes, fill, remove_range),
    *(transfer, read_known, write_known),
    *(export, release_view, resize_host, look, construct, wrong_count, plant, init_struct_again),
]
