"""DirtyBitmap: what is written through guestmem is marked afterwards, and no mark is lost."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import os
import pickle
import random
import struct
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from guestmem import (
    DirtyBitmap,
    GuestMemory,
    InvalidAddressError,
    MemoryMapping,
    ReadFromSourceError,
    WriteToMemoryError,
    be32,
    u8,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Backing

PAGE = os.sysconf("SC_PAGESIZE")
PAGES = 200
SIZE = PAGES * PAGE
AT = 3 * PAGE  # where the writes below begin


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint64 * 4),)


@pytest.fixture(params=["anonymous", "file"])
def memory(request: pytest.FixtureRequest, backing: Callable[[int], Backing]) -> MemoryMapping:
    if request.param == "file":
        return MemoryMapping.from_fd(backing(SIZE).fd, SIZE, track_dirty=True)
    return MemoryMapping(SIZE, track_dirty=True)


def bitmap(memory: MemoryMapping) -> DirtyBitmap:
    assert memory.dirty is not None
    return memory.dirty


files: list[int] = []


def zeros() -> int:
    files.append(os.open("/dev/zero", os.O_RDONLY))
    return files[-1]


@pytest.fixture(autouse=True)
def close_files() -> Iterator[None]:
    yield
    while files:
        os.close(files.pop())


def refused(error: type[Exception], call: Callable[..., object], *args: object) -> None:
    with pytest.raises(error):
        call(*args)


# Each writes [AT - 8, AT + 8) of the memory: two pages.
WRITES: dict[str, Callable[[MemoryMapping], object]] = {
    "write_obj, ctypes": lambda m: m.write_obj((ctypes.c_uint8 * 16)(), AT - 8),
    "write_obj, Struct": lambda m: m.write_obj((1, 2), AT - 8, struct.Struct("<QQ")),
    "write_slice": lambda m: m.write_slice(bytes(16), AT - 8),
    "write_slice of memory": lambda m: m.write_slice(MemoryMapping(16), AT - 8),
    "write_all": lambda m: m.write_all(bytes(16), AT - 8),
    "fill": lambda m: m.fill(1, AT - 8, 16),
    "slice": lambda m: m.get_slice(AT - 16, 64).fill(1, 8, 16),
    "slice of slice": lambda m: m.get_slice(5, SIZE - 5).get_slice(AT - 20, 99).fill(1, 7, 16),
    "copy_from": lambda m: m.get_slice(AT - 8, 16).copy_from(bytes(20)),
    "copy_to": lambda m: MemoryMapping(16).get_slice(0, 16).copy_to(m.get_slice(AT - 8, 16)),
    "read_slice": lambda m: MemoryMapping(16).read_slice(m.get_slice(AT - 8, 16), 0),
    "copy_to_volatile_slice": lambda m: (
        MemoryMapping(16).get_slice(0, 16).copy_to_volatile_slice(m.get_slice(AT - 8, 90))
    ),
    "ref": lambda m: m.get_ref(AT - 8, Point).store(Point()),
    "scalar across the border": lambda m: [m.write_obj(1, AT - 4, u64), m.write_obj(1, AT - 8, u8)],
    "ref across the border": lambda m: m.get_ref(AT - 1, be32).store(1),
    "array": lambda m: m.get_array_ref(AT - 8, 2, u64).copy_from([1, 2]),
    "array from a buffer": lambda m: m.get_array_ref(AT - 8, 2, u64).copy_from(bytes(16)),
    "array elements": lambda m: [m.get_array_ref(AT - 8, 2, u64).store(i, 1) for i in (0, 1)],
    "atomics": lambda m: [m.get_atomic_ref(at, u64).fetch_add(1) for at in (AT - 8, AT)],
    "read_to_memory, fd": lambda m: m.read_to_memory(AT - 8, zeros(), 16),
    "read_to_memory, readinto": lambda m: m.read_to_memory(AT - 8, io.BytesIO(bytes(16)), 16),
    "read_to_memory, FileIO": lambda m: m.read_to_memory(
        AT - 8, io.FileIO(zeros(), closefd=False), 16
    ),
}
READS: dict[str, Callable[[MemoryMapping], object]] = {
    "read_obj": lambda m: m.read_obj(AT, u64),
    "read_bytes": lambda m: m.read_bytes(0, SIZE),
    "read_slice": lambda m: m.read_slice(bytearray(100), AT),
    "ref": lambda m: m.get_ref(AT, u64).load(),
    "atomic load": lambda m: m.get_atomic_ref(AT, u64).load(),
    "compare_exchange that fails": lambda m: m.get_atomic_ref(AT, u64).compare_exchange(9, 1),
    "array": lambda m: m.get_array_ref(AT, 100, u64).tolist(),
    "write_from_memory": lambda m: m.write_from_memory(AT, io.BytesIO(), 100),
    "copy_to": lambda m: m.get_slice(AT, 100).copy_to(bytearray(100)),
    "out of range": lambda m: refused(InvalidAddressError, m.write_all, b"12", SIZE - 1),
    "does not fit": lambda m: refused(OverflowError, m.write_obj, 256, AT, u8),
    "fill nothing": lambda m: m.fill(1, AT, 0),
    "write nothing": lambda m: m.write_slice(b"", AT),
    "remove nothing": lambda m: m.remove_range(AT, 0),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_writes_marks(memory: MemoryMapping, name: str) -> None:
    assert bitmap(memory).ranges() == []
    WRITES[name](memory)
    assert bitmap(memory).ranges() == [(AT - PAGE, 2 * PAGE)]
    assert [bitmap(memory).is_dirty(at) for at in (AT - PAGE - 1, AT - PAGE, AT + PAGE - 1)] == [
        *(False, True, True)
    ]
    assert not bitmap(memory).is_dirty(AT + PAGE)
    assert bitmap(memory).count == 2


@pytest.mark.parametrize("name", READS)
def test_what_reads_does_not(memory: MemoryMapping, name: str) -> None:
    READS[name](memory)
    assert bitmap(memory).ranges() == []


def test_remove_range(memory: MemoryMapping) -> None:
    memory.remove_range(PAGE, 2 * PAGE + 5)
    assert bitmap(memory).ranges() == [(PAGE, 3 * PAGE)]


def test_writes_that_fail_half_way(backing: Callable[[int], Backing]) -> None:
    file = backing(SIZE)
    memory = MemoryMapping.from_fd(file.fd, SIZE, track_dirty=True)
    with pytest.raises(ReadFromSourceError):
        memory.read_to_memory(PAGE, io.BytesIO(bytes(PAGE + 1)), 5 * PAGE)
    assert bitmap(memory).take() == [(PAGE, 2 * PAGE)]
    os.ftruncate(file.fd, 4 * PAGE)
    for call in (
        lambda: memory.write_slice(bytes(4 * PAGE), 2 * PAGE),
        lambda: memory.fill(1, 2 * PAGE, 4 * PAGE),
        lambda: memory.read_to_memory(2 * PAGE, zeros(), 4 * PAGE),
    ):
        with pytest.raises(WriteToMemoryError):
            call()
        (start, count), *more = bitmap(memory).take()
        assert (start, more) == (2 * PAGE, [])
        assert count >= 2 * PAGE  # what was written; perhaps what was to be


def test_what_is_not_tracked() -> None:
    assert MemoryMapping(PAGE).dirty is None
    for flag in (0, False, None, ""):
        assert MemoryMapping(PAGE, track_dirty=flag).dirty is None
    memory = MemoryMapping(PAGE, track_dirty=1)
    memoryview(memory)[0] = 1  # an exported buffer
    assert bitmap(memory).count == 0


def test_arguments(backing: Callable[[int], Backing]) -> None:
    fd = backing(SIZE).fd
    mapping: Any = MemoryMapping
    calls: list[tuple[Any, str]] = [
        (partial(mapping, PAGE), "MemoryMapping"),
        (partial(mapping.from_fd, fd, PAGE), "from_fd"),
        (partial(mapping.from_fd_offset, fd, PAGE, 0), "from_fd_offset"),
    ]
    for call, names in calls:
        with pytest.raises(TypeError, match=names):
            call(True)
        with pytest.raises(ZeroDivisionError):
            call(track_dirty=Bad())
        assert call(track_dirty=[1]).dirty.num_pages == 1


class Bad:
    def __bool__(self) -> bool:
        raise ZeroDivisionError


@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, 63 * PAGE, 64 * PAGE, 65 * PAGE - 1])
def test_sizes(size: int) -> None:
    memory = MemoryMapping(size, track_dirty=True)
    dirty = bitmap(memory)
    pages = (size + PAGE - 1) // PAGE
    assert (dirty.page_size, dirty.num_pages, dirty.count) == (PAGE, pages, 0)
    assert len(bytes(dirty)) == (pages + 63) // 64 * 8
    memory.fill(1)
    assert (dirty.ranges(), dirty.count) == ([(0, size)], pages)
    assert repr(dirty) == f"<guestmem.DirtyBitmap {pages} of {pages} pages dirty>"
    assert dirty.is_dirty(size - 1)
    with pytest.raises(InvalidAddressError):
        dirty.is_dirty(size)
    with pytest.raises(InvalidAddressError):
        dirty.mark(size, 1)
    dirty.mark(size, 0)
    assert dirty.take() == [(0, size)]
    assert dirty.take() == []
    dirty.merge(b"\xff" * len(bytes(dirty)))
    assert (dirty.take(), dirty.count) == ([(0, size)], 0)  # bits past the end are ignored


def test_against_a_model() -> None:
    choose = random.Random(5)
    memory = MemoryMapping(SIZE - 100, track_dirty=True)
    dirty, model = bitmap(memory), set[int]()
    for _ in range(2000):
        at, count = choose.randrange(SIZE - 100), choose.choice([0, 1, 8, PAGE, 70 * PAGE])
        count = min(count, SIZE - 100 - at)
        pages = set(range(at // PAGE, (at + count - 1) // PAGE + 1)) if count else set()
        action = choose.randrange(4)
        if action == 0:
            memory.fill(1, at, count)
            model |= pages
        elif action == 1:
            dirty.mark(at, count)
            model |= pages
        elif action == 2:
            words = bytearray(len(bytes(dirty)))
            for page in pages:
                words[page // 8] |= 1 << page % 8
            dirty.merge(words)
            model |= pages
        elif choose.randrange(10) == 0:
            assert as_pages(dirty.take()) == model
            model.clear()
        assert as_pages(dirty.ranges()) == model
        assert dirty.count == len(model)
        shown = int.from_bytes(bytes(dirty), "little")
        assert {page for page in range(PAGES) if shown >> page & 1} == model


def as_pages(ranges: list[tuple[int, int]]) -> set[int]:
    ends = [end for start, count in ranges for end in (start, start + count)]
    assert sorted(set(ends)) == ends, "ranges that touch, or are out of order"
    return {
        page
        for start, count in ranges
        for page in range(start // PAGE, -(-(start + count) // PAGE))
    }


def test_the_buffer() -> None:
    memory = MemoryMapping(3 * PAGE, track_dirty=True)
    view = memoryview(bitmap(memory))
    assert (view.readonly, view.nbytes) == (True, 8)
    memory.fill(1, PAGE, 1)
    assert bytes(view) == b"\x02" + bytes(7)
    for bad in b"", bytes(7), bytes(16):
        with pytest.raises(ValueError, match=f"bitmap must have 8 bytes, not {len(bad)}"):
            bitmap(memory).merge(bad)
    with pytest.raises(TypeError, match="bitmap"):
        bitmap(memory).merge(5)  # type: ignore[arg-type]


def test_lifetime() -> None:
    memory = MemoryMapping(PAGE, track_dirty=True)
    dirty = bitmap(memory)
    assert memory.dirty is dirty
    part = memory.get_slice(0, 8)
    del memory
    gc.collect()
    part.fill(1)
    assert dirty.ranges() == [(0, PAGE)]
    part.release()
    assert dirty.take() == [(0, PAGE)]
    for bad in copy.copy, copy.deepcopy, pickle.dumps:
        with pytest.raises(TypeError, match="cannot copy or pickle"):
            bad(dirty)
    with pytest.raises(TypeError, match="cannot create"):
        DirtyBitmap()
    memory = MemoryMapping(PAGE, track_dirty=True)
    memory.close()
    assert bitmap(memory).ranges() == []


def test_marks_of_memory_that_is_gone() -> None:
    """A guest's regions know theirs after all who held the pages have let go."""
    memory = MemoryMapping(300 * PAGE, track_dirty=True)
    part = memory.get_slice(PAGE, 299 * PAGE)
    guest = GuestMemory([(0, part)])
    guest.fill(1, 5, 1)
    del memory
    part.release()
    guest.close()
    gc.collect()
    others = [bytearray(b"\xff" * size) for size in range(16, 400, 8)]  # where it has been
    assert guest.dirty_ranges() == [(0, PAGE)]
    assert guest.take_dirty() == [(0, PAGE)]
    assert guest.take_dirty() == []
    del others


def test_no_mark_is_lost() -> None:
    """Every page that is written is seen by the one who takes, with what was written."""
    memory = MemoryMapping(64 * PAGE, track_dirty=True)
    copied = bytearray(64 * PAGE)
    stop = threading.Event()

    def write(seed: int) -> None:
        choose = random.Random(seed)
        slots = [memory.get_ref(page * PAGE + 8 * seed, u64) for page in range(64)]
        for n in range(1, 20_000):
            slots[choose.randrange(64)].store(n)

    def take() -> None:
        while True:
            last = stop.is_set()
            for start, count in bitmap(memory).take():
                memory.read_exact(memoryview(copied)[start : start + count], start)
            if last:
                return

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    taker = threading.Thread(target=take)
    for thread in (taker, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    taker.join()
    assert copied == memory.read_bytes(0, 64 * PAGE)
