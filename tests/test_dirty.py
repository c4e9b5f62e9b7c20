"""DirtyBitmap: what is written through guestmem is marked afterwards, and no mark is lost."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import itertools
import os
import pickle
import random
import socket
import struct
import sys
import threading
import timeit
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from guestmem import (
    AddressOverflowError,
    ClosedError,
    DirtyBitmap,
    GuestMemory,
    InvalidAddressError,
    InvalidGuestAddressError,
    InvalidRangeError,
    MemoryMapping,
    MisalignedError,
    ReadFromMemoryError,
    ReadFromSourceError,
    WriteToMemoryError,
    be32,
    preadv,
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


def test_remove_range_that_is_refused() -> None:
    """The kernel goes part by part, and says no once it comes to a locked page."""
    memory = MemoryMapping(4 * PAGE, track_dirty=True)
    memory.fill(1)
    bitmap(memory).take()
    libc = ctypes.CDLL(None, use_errno=True)
    # Not mlock: a sanitizer makes nothing of that.
    if libc.mlock2(ctypes.c_void_p(memory.as_ptr() + 2 * PAGE), ctypes.c_size_t(PAGE), 0) != 0:
        pytest.skip("no page may be locked here")
    with pytest.raises(InvalidRangeError, match="cannot be removed"):
        memory.remove_range(0, 4 * PAGE)
    assert (memory.read_obj(0, u8), memory.read_obj(3 * PAGE, u8)) == (0, 1)
    assert (0, PAGE) in [(start, min(count, PAGE)) for start, count in bitmap(memory).ranges()]


def from_a_pipe() -> int:
    reading, writing = os.pipe()
    files.extend((reading, writing))
    os.write(writing, b"x" * 8)
    return reading


def from_an_eventfd() -> int:
    files.append(os.eventfd(0))
    os.write(files[-1], b"x" * 8)
    return files[-1]


def from_a_socket(kind: socket.SocketKind) -> int:
    ends = [end.detach() for end in socket.socketpair(type=kind)]
    files.extend(ends)
    os.write(ends[0], b"x" * 8)
    return ends[1]


# They copy up to the missing page, and then fail as a whole.
SOURCES: dict[str, Callable[[], int]] = {
    "pipe": from_a_pipe,
    "eventfd": from_an_eventfd,
    "stream socket": partial(from_a_socket, socket.SOCK_STREAM),
    "datagram socket": partial(from_a_socket, socket.SOCK_DGRAM),
}
# Each reads into the last 4 bytes of a page that is there, and into one that is not.
READERS: dict[str, Callable[[MemoryMapping, int], object]] = {
    "read_to_memory": lambda m, fd: m.read_to_memory(PAGE - 4, fd, 8),
    "of a guest": lambda m, fd: GuestMemory([(0, m)]).read_to_memory(PAGE - 4, fd, 8),
    "read_from": lambda m, fd: m.get_slice(PAGE - 4, 8).read_from(fd, 8),
    "preadv": lambda m, fd: preadv(fd, [m.get_slice(PAGE - 4, 2), m.get_slice(PAGE - 2, 6)]),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_source_that_fails(source: str, reader: str, backing: Callable[[int], Backing]) -> None:
    file = backing(2 * PAGE)
    memory = MemoryMapping.from_fd(file.fd, 2 * PAGE, track_dirty=True)
    memory.fill(1, 0, PAGE)
    bitmap(memory).take()
    os.ftruncate(file.fd, PAGE)
    with pytest.raises(WriteToMemoryError):
        READERS[reader](memory, SOURCES[source]())
    assert memory.read_bytes(PAGE - 5, 5) == b"\1xxxx"
    assert bitmap(memory).is_dirty(0)


@pytest.mark.parametrize("reader", READERS)
def test_a_source_that_gives_nothing(reader: str, pipe: tuple[int, int]) -> None:
    """It would block, or is none."""
    memory = MemoryMapping(2 * PAGE, track_dirty=True)
    os.set_blocking(pipe[0], False)
    for fd in pipe[0], -1, pipe[1]:
        with pytest.raises(ReadFromSourceError):
            READERS[reader](memory, fd)
    assert bitmap(memory).ranges() == []


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


# Logs that are merged, at an offset, or at a guest address.


def log(pages: set[int], words: int) -> bytes:
    return sum(1 << page for page in pages).to_bytes(8 * words, sys.byteorder)


def merge_at_an_offset(memory: MemoryMapping, page: int, bits: bytes) -> None:
    bitmap(memory).merge(bits, page * PAGE)


def merge_in_a_guest(memory: MemoryMapping, page: int, bits: bytes) -> None:
    GuestMemory([(0, memory)]).merge_dirty(page * PAGE, bits)


def merge_in_regions(memory: MemoryMapping, page: int, bits: bytes) -> None:
    """Three that adjoin: the borders are within a page, and between two."""
    ends = [0, 7 * PAGE + 100, 90 * PAGE, memory.size]
    parts = [(2**32 + a, memory.get_slice(a, b - a)) for a, b in itertools.pairwise(ends)]
    GuestMemory(parts).merge_dirty(2**32 + page * PAGE, bits)


MERGES = [merge_at_an_offset, merge_in_a_guest, merge_in_regions]


@pytest.mark.parametrize("merge", MERGES)
def test_a_log_of_a_part(merge: Callable[[MemoryMapping, int, bytes], None]) -> None:
    choose = random.Random(6)
    memory = MemoryMapping(SIZE - 100, track_dirty=True)
    for page in (0, 1, 63, 64, 65, 128, 150, 191, 192, 199, *choose.sample(range(PAGES), 30)):
        room = (PAGES - page + 63) // 64
        for words in range(room + 1):
            for density in 0, 0.02, 0.5, 1:
                bits = {i for i in range(64 * words) if choose.random() < density}
                merge(memory, page, log(bits, words))
                expected = {page + i for i in bits if page + i < PAGES}
                assert as_pages(bitmap(memory).take()) == expected
        refused(IndexError, merge, memory, page, bytes(8 * room + 8))
        refused(IndexError, merge, memory, page, b"\xff" * (8 * room + 8))
        assert bitmap(memory).count == 0


@pytest.mark.parametrize("merge", MERGES)
def test_logs_that_will_not_do(merge: Callable[[MemoryMapping, int, Any], None]) -> None:
    memory = MemoryMapping(3 * PAGE, track_dirty=True)
    if merge is merge_in_regions:
        memory = MemoryMapping(SIZE, track_dirty=True)
    for size in 1, 7, 9, 15:
        with pytest.raises(ValueError, match=f"a multiple of 8 bytes, not {size}$"):
            merge(memory, 0, b"\xff" * size)
    with pytest.raises(TypeError, match="bitmap"):
        merge(memory, 0, 5)
    with pytest.raises(BufferError, match="bitmap"):
        merge(memory, 0, memoryview(bytes(32))[::2])
    assert bitmap(memory).count == 0


def test_offsets_of_logs() -> None:
    memory = MemoryMapping(3 * PAGE - 5, track_dirty=True)
    dirty = bitmap(memory)
    with pytest.raises(MisalignedError) as misaligned:
        dirty.merge(b"\xff" * 8, PAGE + 8)
    assert (misaligned.value.addr, misaligned.value.alignment) == (PAGE + 8, PAGE)
    with pytest.raises(InvalidAddressError) as past:
        dirty.merge(b"\xff" * 16, PAGE)
    fields = (past.value.offset, past.value.count, past.value.size)
    assert fields == (PAGE, 128 * PAGE, memory.size)
    for offset in 3 * PAGE, 4 * PAGE, 2**63, 2**64 - PAGE:
        for words in 0, 1:
            refused(InvalidAddressError, dirty.merge, b"\xff" * 8 * words, offset)
    for bad in -1, 2**64:
        refused(OverflowError, dirty.merge, bytes(8), bad)
    refused(TypeError, dirty.merge, bytes(8), "0")
    refused(TypeError, dirty.merge, bytes(8), 0, 0)
    refused(TypeError, dirty.merge)
    whole = bitmap(MemoryMapping(64 * PAGE, track_dirty=True))
    whole.merge(b"", 64 * PAGE)  # nothing, at the end
    refused(InvalidAddressError, whole.merge, bytes(8), 64 * PAGE)
    assert dirty.count == whole.count == 0


def test_a_slot_of_a_slice() -> None:
    """What KVM says of the memory above the 32-bit hole, where all of it is one mapping."""
    ram = MemoryMapping(SIZE, track_dirty=True)
    low, high = 120 * PAGE, 80 * PAGE
    guest = GuestMemory([(0, ram.get_slice(0, low)), (1 << 32, ram.get_slice(low, high))])
    bitmap(ram).merge(log({0, 79}, 2), low)
    expected = [(1 << 32, PAGE), ((1 << 32) + 79 * PAGE, PAGE)]
    assert guest.take_dirty() == expected
    guest.merge_dirty(1 << 32, log({0, 79}, 2))
    assert guest.take_dirty() == expected
    guest.merge_dirty(0, log({119, 120, 127}, 2))  # the last two are in the hole
    assert bitmap(ram).take() == [(119 * PAGE, PAGE)]
    with pytest.raises(InvalidGuestAddressError) as hole:
        guest.merge_dirty(0, b"\xff" * 24)  # the third word begins there
    assert hole.value.addr == low
    with pytest.raises(InvalidGuestAddressError) as hole:
        guest.merge_dirty(low, b"\xff" * 8)
    assert hole.value.addr == low
    with pytest.raises(MisalignedError) as misaligned:
        guest.merge_dirty(PAGE - 1, b"\xff" * 8)
    assert (misaligned.value.addr, misaligned.value.alignment) == (PAGE - 1, PAGE)
    guest.merge_dirty(low, b"")  # nothing, at the end of a region
    refused(InvalidGuestAddressError, guest.merge_dirty, low + PAGE, b"")
    assert bitmap(ram).count == 0


def test_mark_by_guest_address() -> None:
    ram, other = MemoryMapping(8 * PAGE, track_dirty=True), MemoryMapping(PAGE)
    guest = GuestMemory(
        [(0, ram.get_slice(4 * PAGE, 4 * PAGE)), (4 * PAGE, ram.get_slice(0, PAGE)), (2**40, other)]
    )
    guest.mark_dirty(4 * PAGE - 1, 2)
    assert bitmap(ram).take() == [(0, PAGE), (7 * PAGE, PAGE)]
    for addr, count in (0, 0), (5 * PAGE, 0), (2**40, PAGE):  # the last one is not tracked
        guest.mark_dirty(addr, count)
    guest.merge_dirty(2**40, b"\xff" * 8)
    with pytest.raises(InvalidGuestAddressError) as hole:
        guest.mark_dirty(PAGE, 4 * PAGE + 1)
    assert hole.value.addr == 5 * PAGE
    refused(InvalidGuestAddressError, guest.mark_dirty, 2**39, 0)
    refused(AddressOverflowError, guest.mark_dirty, 2**40, 2**64 - 1)
    refused(OverflowError, guest.mark_dirty, -1, 0)
    refused(TypeError, guest.mark_dirty, 0)
    refused(TypeError, guest.merge_dirty, 0)
    assert bitmap(ram).count == 0
    guest.close()


def test_ranges_against_a_model() -> None:
    """Regions that begin and end within pages, in any order, with holes between some."""
    choose = random.Random(7)
    ram = MemoryMapping(SIZE, track_dirty=True)
    for _ in range(100):
        cuts = sorted({0, SIZE, *(choose.randrange(1, SIZE) for _ in range(choose.randrange(8)))})
        parts = list(itertools.pairwise(cuts))
        choose.shuffle(parts)
        regions, at = list[tuple[int, int, int]](), 0
        for start, end in parts:
            at += choose.choice([0, 0, 100, PAGE])
            regions.append((at, start, end))
            at += end - start
        guest = GuestMemory([(at, ram.get_slice(a, b - a)) for at, a, b in regions])
        bits = {page for page in range(PAGES) if choose.random() < choose.choice([0.1, 0.9])}
        bitmap(ram).merge(log(bits, (PAGES + 63) // 64))
        expected: list[tuple[int, int]] = []
        for at, start, end in regions:
            for page in range(start // PAGE, (end - 1) // PAGE + 1):
                first, past = max(start, page * PAGE), min(end, page * PAGE + PAGE)
                if page not in bits:
                    continue
                if expected and sum(expected[-1]) == at + first - start:
                    expected[-1] = (expected[-1][0], expected[-1][1] + past - first)
                else:
                    expected.append((at + first - start, past - first))
        assert guest.dirty_ranges() == guest.take_dirty() == expected
        assert bitmap(ram).count == 0


def test_what_is_clean_is_skipped() -> None:
    """By words: both take about as long, where nothing is dirty."""
    memory = MemoryMapping(16 << 30, track_dirty=True)
    guest = GuestMemory([(0, memory)])

    def fastest(take: Callable[[], object]) -> float:
        return min(timeit.repeat(take, number=1, repeat=10))

    assert fastest(guest.take_dirty) < 10 * fastest(bitmap(memory).take)


def test_a_log_at_the_top() -> None:
    """Its word tells of more pages than there are addresses."""
    ram = MemoryMapping(3 * PAGE, track_dirty=True)
    start = 2**64 - 3 * PAGE
    guest = GuestMemory([(start, ram)])
    guest.mark_dirty(2**64 - 1, 1)
    guest.merge_dirty(start, b"\xff" * 8)
    assert guest.take_dirty() == [(start, 3 * PAGE)]
    refused(AddressOverflowError, guest.merge_dirty, start, b"\xff" * 16)
    assert bitmap(ram).count == 0


def test_closed_guests() -> None:
    guest = GuestMemory.from_ranges([(0, PAGE)])
    guest.close()
    refused(ClosedError, guest.mark_dirty, 0, 1)
    refused(ClosedError, guest.merge_dirty, 0, bytes(8))


def test_a_log_in_memory_of_ours(backing: Callable[[int], Backing]) -> None:
    """A vhost-user log is a file that others can truncate: an exception, and no mark."""
    file = backing(2 * PAGE)
    shared = MemoryMapping.from_fd(file.fd, 2 * PAGE)
    pages = 2 * PAGE * 8
    memory = MemoryMapping(pages * PAGE, track_dirty=True)
    shared.write_all(b"\x81", 0)
    shared.write_all(b"\x02", PAGE)
    logs = shared, shared.get_slice(0, 2 * PAGE)
    guest = GuestMemory([(0, memory)])
    merges = [partial(bitmap(memory).merge, each) for each in logs]
    merges += [partial(guest.merge_dirty, 0, each) for each in logs]
    for merge in merges:
        merge()
        expected = {0, 7, PAGE * 8 + 1}
        assert as_pages(bitmap(memory).take()) == expected
    os.ftruncate(file.fd, PAGE)
    for merge in merges:
        with pytest.raises(ReadFromMemoryError) as gone:
            merge()
        assert gone.value.offset == PAGE
        assert bitmap(memory).count == 0
    bitmap(memory).merge(shared.get_slice(1, 8), PAGE)
    part = shared.get_slice(0, 8)
    part.release()
    refused(ClosedError, bitmap(memory).merge, part)
    assert bitmap(memory).count == 0


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
