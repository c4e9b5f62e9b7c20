"""GuestMemory: memory by guest address, across regions and up to holes."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import os
import pickle
import random
import struct
import weakref
from typing import TYPE_CHECKING, Any

import pytest

import guestmem
from guestmem import (
    AddressOverflowError,
    ClosedError,
    GuestMemory,
    GuestRegion,
    InvalidGuestAddressError,
    InvalidRegionError,
    MemoryMapping,
    MemoryRegionOverlapError,
    MisalignedError,
    OutOfBoundsError,
    ReadFromMemoryError,
    ReadFromSourceError,
    VolatileSlice,
    WriteToDestinationError,
    WriteToMemoryError,
    be32,
    le16,
    u8,
    u32,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Backing

PAGE = 4096
TOP = 2**64
LOW, HIGH = 0x1000, 0x8000  # three regions: [LOW, MIDDLE), [MIDDLE, HOLE), [HIGH, END)
MIDDLE, HOLE, END = LOW + 100, LOW + 100 + 57, HIGH + PAGE
LAYOUT = struct.Struct("<QIH")


class Point(ctypes.LittleEndianStructure):
    _fields_ = (("x", ctypes.c_uint64), ("y", ctypes.c_uint32))


@pytest.fixture
def guest() -> GuestMemory:
    """Two regions that adjoin, one after a hole; in no order, and not aligned in memory."""
    ram = MemoryMapping(3 * PAGE)
    return GuestMemory(
        [
            (HIGH, MemoryMapping(PAGE)),
            (LOW, ram.get_slice(5, MIDDLE - LOW)),
            (MIDDLE, ram.get_slice(2 * PAGE, HOLE - MIDDLE)),
        ]
    )


def test_regions(guest: GuestMemory) -> None:
    assert [region[:3] for region in guest.regions] == [
        (LOW, 100, MIDDLE - 1),
        (MIDDLE, 57, HOLE - 1),
        (HIGH, PAGE, END - 1),
    ]
    assert (guest.num_regions, guest.size, guest.last_addr) == (3, 157 + PAGE, END - 1)
    region = guest.find_region(MIDDLE)
    assert isinstance(region, GuestRegion)
    assert (region.start, region.size, region.last_addr) == (MIDDLE, 57, HOLE - 1)
    assert isinstance(region.memory, VolatileSlice)
    assert region.memory is guest.regions[1].memory
    assert repr(guest) == "<guestmem.GuestMemory regions=3 size=0x109d>"
    for addr, found in (
        *((0, None), (LOW - 1, None), (LOW, LOW), (MIDDLE - 1, LOW), (MIDDLE, MIDDLE)),
        *((HOLE - 1, MIDDLE), (HOLE, None), (HIGH - 1, None), (HIGH, HIGH), (END - 1, HIGH)),
        *((END, None), (TOP - 1, None)),
    ):
        region = guest.find_region(addr)
        assert (region and region.start) == found
        assert guest.address_in_range(addr) == (found is not None)
        assert guest.checked_offset(0, addr) == (addr if found is not None else None)
    assert guest.checked_offset(LOW, HIGH - LOW) == HIGH
    assert guest.checked_offset(TOP - 1, LOW + 1) is None  # it does not wrap around


def test_no_regions() -> None:
    empty = GuestMemory([])
    assert (empty.regions, empty.size, empty.last_addr, empty.num_regions) == ((), 0, None, 0)
    assert empty.find_region(0) is None
    with pytest.raises(InvalidGuestAddressError):
        empty.read_bytes(0, 1)
    grown = empty.with_region(5, MemoryMapping(1))
    assert grown.read_obj(5, u8) == 0
    empty.close()


def test_what_is_refused() -> None:
    one = MemoryMapping(PAGE)
    for first, second in ((0, PAGE - 1), (PAGE - 1, 0), (0, 0), (5, 5)):
        with pytest.raises(MemoryRegionOverlapError) as caught:
            GuestMemory([(first, one), (second, MemoryMapping(PAGE))])
        assert {caught.value.start, caught.value.other_start} == {first, second}
        assert caught.value.size == caught.value.other_size == PAGE
    with pytest.raises(AddressOverflowError) as over:
        GuestMemory([(TOP - PAGE + 1, one)])
    assert (over.value.base, over.value.offset) == (TOP - PAGE + 1, PAGE)
    GuestMemory([(TOP - PAGE, one)])
    with pytest.raises(InvalidRegionError, match="cannot be empty"):
        GuestMemory([(0, one.get_slice(0, 0))])
    for bad in -1, TOP:
        with pytest.raises(OverflowError, match="the address of a region must be from 0"):
            GuestMemory([(bad, one)])
    for wrong in [(0, b"12")], [(0,)], [5], [(0, one, 1)], ["ab"], [("0", one)]:
        with pytest.raises(TypeError):
            GuestMemory(wrong)  # type: ignore[arg-type]
    for pairs in 5, None:
        with pytest.raises(TypeError):
            GuestMemory(pairs)  # type: ignore[arg-type]
    one.close()  # nothing of it is held
    with pytest.raises(ClosedError):
        GuestMemory([(0, one)])
    with pytest.raises(guestmem.SystemCallFailedError):
        GuestMemory.from_ranges([(0, PAGE), (PAGE, 0)])
    with pytest.raises(MemoryRegionOverlapError):
        GuestMemory.from_ranges([(0, PAGE), (1, 1)])


def test_all_addresses() -> None:
    """The same memory again and again: 2**64 bytes."""
    try:
        one = MemoryMapping(1 << 46)
    except guestmem.SystemCallFailedError as error:  # a sanitizer's shadow is in the way
        pytest.skip(f"64 TiB cannot be mapped: {error.strerror}")
    guest = GuestMemory((i << 46, one) for i in range(1 << 18))
    assert (guest.size, guest.last_addr) == (TOP, TOP - 1)
    assert guest.check_range(0, TOP - 1)
    assert guest.check_range(1, TOP - 1)
    assert not guest.check_range(2, TOP - 1)
    guest.write_obj(7, TOP - 8, u64)
    assert guest.read_obj(5 * (1 << 46) - 8, u64) == 7
    for count in 2**63 - 1, 2**63, TOP - 1:
        with pytest.raises(MemoryError):
            guest.read_bytes(0, count)


def test_a_cycle_through_a_region_goes() -> None:
    cycle = type("Cycle", (bytearray,), {})(64)
    guest = GuestMemory([(0, VolatileSlice.from_buffer(cycle))])
    cycle.regions = guest.regions
    gone = weakref.ref(cycle)
    del cycle, guest
    gc.collect()
    assert gone() is None


def test_of_a_generator_that_fails() -> None:
    memory = MemoryMapping(PAGE)

    def pairs() -> Any:
        yield 0, memory
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        GuestMemory(pairs())
    memory.close()


# Objects.


@pytest.mark.parametrize("addr", [LOW, MIDDLE - 8, MIDDLE - 3, MIDDLE, HOLE - 16, HIGH])
def test_objects(guest: GuestMemory, addr: int) -> None:
    """In one region, and across the border."""
    guest.write_obj(0x1122334455667788, addr, u64)
    assert guest.read_obj(addr, u64) == 0x1122334455667788
    assert guest.read_bytes(addr, 8) == struct.pack("<Q", 0x1122334455667788)
    guest.write_obj(5, addr, type=be32)
    assert guest.read_obj(addr, be32) == 5
    guest.write_obj(Point(7, 8), addr)
    assert (guest.read_obj(addr, Point).x, guest.read_obj(addr, Point).y) == (7, 8)
    guest.write_obj((1, 2, 3), addr, LAYOUT)
    assert guest.read_obj(addr, LAYOUT) == (1, 2, 3)
    guest.write_obj(1.5, addr, guestmem.f64)
    assert guest.read_obj(addr, guestmem.f64) == 1.5


CALLS: dict[str, Callable[[GuestMemory, int, int], object]] = {
    "read_bytes": lambda g, addr, n: g.read_bytes(addr, n),
    "read_exact": lambda g, addr, n: g.read_exact(bytearray(n), addr),
    "write_all": lambda g, addr, n: g.write_all(b"x" * n, addr),
    "fill": lambda g, addr, n: g.fill(1, addr, n),
    "read_obj": lambda g, addr, n: g.read_obj(addr, ctypes.c_char * n),
    "write_obj": lambda g, addr, n: g.write_obj((ctypes.c_char * n)(), addr),
    "slices": lambda g, addr, n: list(g.slices(addr, n)),
    "get_slice": lambda g, addr, n: g.get_slice(addr, n),
    "get_ref": lambda g, addr, n: g.get_ref(addr, ctypes.c_char * n),
    "get_array_ref": lambda g, addr, n: g.get_array_ref(addr, n, u8),
    "read_to_memory": lambda g, addr, n: g.read_to_memory(addr, io.BytesIO(b"x" * n), n),
    "write_from_memory": lambda g, addr, n: g.write_from_memory(addr, io.BytesIO(), n),
}
BORROWS = {"get_slice", "get_ref", "get_array_ref"}


@pytest.mark.parametrize("name", CALLS)
def test_holes_and_ends(guest: GuestMemory, name: str) -> None:
    call = CALLS[name]
    for addr, count, hole in (
        *((0, 1, 0), (LOW - 1, 2, LOW - 1), (HOLE, 1, HOLE), (END, 8, END)),
        *((HOLE - 1, 2, HOLE), (MIDDLE, 58, HOLE), (LOW, 158, HOLE), (END - 4, 5, END)),
        *((LOW, HIGH - LOW, HOLE), (TOP - 8, 8, TOP - 8)),
    ):
        before = guest.read_bytes(LOW, HOLE - LOW)
        with pytest.raises(InvalidGuestAddressError) as caught:
            call(guest, addr, count)
        assert caught.value.addr == hole
        assert guest.read_bytes(LOW, HOLE - LOW) == before
    for addr, count in (TOP - 1, 2), (TOP - 8, 2**30), (LOW, 0) if name == "" else (TOP - 4, 5):
        with pytest.raises(AddressOverflowError) as over:
            call(guest, addr, count)
        assert (over.value.base, over.value.offset) == (addr, count)
    for addr, count in (LOW, 100), (MIDDLE, 57), (HIGH, PAGE), (END - 1, 1), (LOW, 157):
        if name in BORROWS and addr + count > MIDDLE > addr:
            with pytest.raises(OutOfBoundsError, match="crosses into another region") as border:
                call(guest, addr, count)
            assert (border.value.addr, border.value.size) == (addr + count, MIDDLE)
            assert pickle.loads(pickle.dumps(border.value)).border
        else:
            call(guest, addr, count)
    for addr in LOW, MIDDLE, HOLE, END:  # nothing fits at the end of a region, too
        call(guest, addr, 0)
    for addr in 0, LOW - 1, HOLE + 1:
        with pytest.raises(InvalidGuestAddressError):
            call(guest, addr, 0)


def test_what_copies_what_fits(guest: GuestMemory) -> None:
    assert guest.write_slice(bytes(range(200)), LOW) == 157
    buffer = bytearray(b"\xee" * 200)
    assert guest.read_slice(buffer, LOW + 7) == 150
    assert buffer == bytes(range(7, 157)) + b"\xee" * 50
    assert guest.read_slice(bytearray(5), HOLE - 2) == 2
    assert guest.read_slice(bytearray(0), LOW) == 0
    assert guest.write_slice(bytes(PAGE), HIGH) == PAGE
    for call in guest.read_slice, guest.write_slice:
        with pytest.raises(InvalidGuestAddressError) as caught:
            call(bytearray(5), HOLE)
        assert caught.value.addr == HOLE
        with pytest.raises(AddressOverflowError):
            call(bytearray(5), TOP - 4)


def test_up_to_the_last_address() -> None:
    guest = GuestMemory.from_ranges([(TOP - PAGE, PAGE), (TOP - 2 * PAGE, PAGE)])
    start = TOP - 2 * PAGE
    guest.write_all(bytes(range(256)) * 32, start)
    assert guest.read_bytes(TOP - 5, 5) == bytes(range(251, 256))
    assert guest.read_obj(TOP - 8, u64) == int.from_bytes(bytes(range(248, 256)), "little")
    assert guest.check_range(start, 2 * PAGE)
    assert not guest.check_range(start, 2 * PAGE + 1)
    assert not guest.check_range(start - 1, 1)
    assert guest.get_slice(TOP - 1, 1).size == 1
    assert guest.last_addr == TOP - 1
    assert guest.checked_offset(TOP - 1, 1) is None
    with pytest.raises(OutOfBoundsError) as border:
        guest.get_slice(TOP - PAGE - 1, PAGE + 1)
    assert (border.value.addr, border.value.size) == (TOP, TOP - PAGE)
    guest.fill(7, TOP - PAGE - 2)  # to the end
    assert guest.read_bytes(TOP - PAGE - 3, 4)[1:] == b"\7" * 3
    assert guest.read_bytes(TOP - 1, 1) == b"\7"
    for addr, count in (TOP - 4, 5), (start, 2 * PAGE + 1):
        with pytest.raises(AddressOverflowError):
            guest.read_bytes(addr, count)
        with pytest.raises(AddressOverflowError):
            guest.fill(0, addr, count)


# I/O across the border.


def test_transfers(guest: GuestMemory, backing: Callable[[int], Backing]) -> None:
    data = bytes(range(150))
    file = backing(4096)
    os.pwrite(file.fd, data, 100)
    for source, offset in ((io.BytesIO(data), None), (file.fd, 100)):
        guest.fill(0, LOW, 157)
        guest.read_to_memory(LOW + 3, source, 150, offset)
        assert guest.read_bytes(LOW, 157) == bytes(3) + data + bytes(4)
    sink = io.BytesIO()
    guest.write_from_memory(LOW + 3, sink, 150)
    assert sink.getvalue() == data
    guest.write_from_memory(LOW + 3, file.fd, 150, dst_offset=1000)
    assert os.pread(file.fd, 150, 1000) == data
    guest.write_from_memory(addr=LOW, dst=io.BytesIO(), count=5)


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 120, 149])
def test_a_source_that_ends_early_counts_exactly(guest: GuestMemory, count: int) -> None:
    """Also in the middle of the second region; what arrived is in memory, without a gap."""
    data = bytes(range(1, count + 1))
    source, sink = os.pipe()
    os.write(sink, data)
    os.close(sink)
    for src in (source, io.BytesIO(data)):
        guest.fill(0xEE, LOW, 157)
        with pytest.raises(ReadFromSourceError) as caught:
            guest.read_to_memory(LOW, src, 150)
        assert caught.value.transferred == count
        assert isinstance(caught.value.__cause__, EOFError)
        assert guest.read_bytes(LOW, 157) == data + b"\xee" * (157 - count)
    os.close(source)


def test_a_destination_that_stops_counts_exactly(guest: GuestMemory) -> None:
    class Full(io.RawIOBase):
        def __init__(self) -> None:
            self.room = 120

        def write(self, data: Any) -> int:
            taken = min(self.room, len(data), 50)
            self.room -= taken
            return taken

    with pytest.raises(WriteToDestinationError) as caught:
        guest.write_from_memory(LOW, Full(), 150)
    assert caught.value.transferred == 120
    with pytest.raises(guestmem.InvalidOffsetError):
        guest.read_to_memory(LOW, 0, 150, 2**63 - 149)


# Borrowing, and lifetime.


def test_slices(guest: GuestMemory) -> None:
    parts = list(guest.slices(LOW + 90, 20))
    assert [part.size for part in parts] == [10, 10]
    parts[0].fill(1)
    parts[1].fill(2)
    assert guest.read_bytes(LOW + 89, 22) == b"\0" + b"\1" * 10 + b"\2" * 10 + b"\0"
    assert list(guest.slices(LOW, 0)) == []
    assert iter(guest.slices(LOW, 5)) is not None


def test_refs(guest: GuestMemory) -> None:
    guest.get_ref(LOW + 1, le16).store(0x1234)
    assert guest.read_obj(LOW + 1, le16) == 0x1234
    ref = guest.get_atomic_ref(HIGH + 8, u64)
    assert (ref.fetch_add(5), guest.read_obj(HIGH + 8, u64)) == (0, 5)
    with pytest.raises(MisalignedError) as caught:  # the region begins at an odd address
        guest.get_atomic_ref(LOW + 1, u32)
    assert (caught.value.addr, caught.value.alignment) == (LOW + 1, 4)
    array = guest.get_array_ref(HIGH, 3, u64)
    assert array.tolist() == [0, 5, 0]
    address = guest.get_host_address(HIGH + 8)
    assert address == guest.regions[2].memory.as_ptr() + 8
    with pytest.raises(InvalidGuestAddressError):
        guest.get_host_address(HOLE)


def test_it_borrows() -> None:
    ram = MemoryMapping(2 * PAGE)
    guest = GuestMemory([(0, ram)])
    with pytest.raises(BufferError, match="held by 1 slice"):
        ram.close()
    part = guest.get_slice(0, 8)
    guest.close()
    guest.close()
    assert guest.closed
    assert repr(guest).endswith(" closed>")
    part.fill(1)  # it borrows from the mapping
    for call in (
        lambda: guest.read_obj(0, u64),
        lambda: guest.write_obj(1, 0, u64),
        lambda: guest.read_bytes(0, 5),
        lambda: guest.fill(1, 0, 5),
        lambda: guest.get_slice(0, 5),
        lambda: guest.write_slice(b"1", 0),
        lambda: guest.get_host_address(0),
        lambda: guest.read_to_memory(0, io.BytesIO(b"1"), 1),
        guest.__enter__,
    ):
        with pytest.raises(ClosedError, match="^the guest memory has been closed$"):
            call()
    part.release()
    ram.close()


def test_mappings_that_it_made() -> None:
    guest = GuestMemory.from_ranges([(0, PAGE), (PAGE, PAGE)])
    memories = [region.memory for region in guest.regions]
    part = guest.get_slice(PAGE, 5)
    with pytest.raises(BufferError, match="its region at 0x1000 is held by 1 slice$"):
        guest.close()
    assert not guest.closed
    guest.fill(1, 0, 2 * PAGE)  # nothing has changed
    view = memoryview(part)
    with pytest.raises(BufferError):
        guest.close()
    view.release()
    part.release()
    with guest as same:
        assert same is guest
    assert guest.closed
    assert [memory.closed for memory in memories] == [True, True]
    other = GuestMemory.from_ranges([(0, PAGE)])
    region = other.regions[0]
    del other
    gc.collect()
    assert region.memory.read_obj(0, u8) == 0  # who has the mapping keeps it


def test_leaving_by_an_exception() -> None:
    with pytest.raises(ZeroDivisionError):
        with GuestMemory.from_ranges([(0, PAGE)]) as guest:
            part, (region,) = guest.get_slice(0, 8), guest.regions
            raise ZeroDivisionError
    assert guest.closed
    part.fill(1)
    part.release()
    assert region.memory.closed


def test_hot_plug() -> None:
    first = GuestMemory.from_ranges([(0, PAGE)])
    more = MemoryMapping(PAGE)
    second = first.with_region(PAGE, more)
    assert (first.num_regions, second.num_regions) == (1, 2)
    second.write_all(b"across the border", PAGE - 7)
    assert first.read_bytes(PAGE - 7, 7) == b"across "
    third = second.without_region(0, PAGE)
    assert third.read_bytes(PAGE, 10) == b"the border"
    with pytest.raises(MemoryRegionOverlapError):
        second.with_region(5, MemoryMapping(1))
    with pytest.raises(InvalidGuestAddressError):
        second.without_region(1, PAGE)
    with pytest.raises(InvalidRegionError, match="the region at 0x1000 has 0x1000 bytes, not 0x5"):
        second.without_region(PAGE, 5)
    with pytest.raises(TypeError, match="the memory of a region must be a VolatileMemory"):
        second.with_region(9 * PAGE, b"")  # type: ignore[arg-type]
    with pytest.raises(BufferError):  # the second one has it still
        first.close()
    second.close()
    third.close()
    first.close()
    more.close()


def test_protocols(guest: GuestMemory) -> None:
    for bad in copy.copy, copy.deepcopy, pickle.dumps:
        with pytest.raises(TypeError, match="cannot copy or pickle GuestMemory objects"):
            bad(guest)
    dead = weakref.ref(guest)
    assert dead() is guest
    with pytest.raises(TypeError):
        type("Mine", (GuestMemory,), {})
    holder: list[Any] = [MemoryMapping(5)]
    cycle = type("Cycle", (bytearray,), {})(64)
    cycle.memory = GuestMemory([(0, VolatileSlice.from_buffer(cycle))])
    gone = weakref.ref(cycle)
    del cycle, holder
    gc.collect()
    assert gone() is None


def test_faults(backing: Callable[[int], Backing]) -> None:
    """The offset is the guest address."""
    file = backing(2 * PAGE)
    guest = GuestMemory([(HIGH, MemoryMapping.from_fd(file.fd, 2 * PAGE))])
    os.ftruncate(file.fd, PAGE)
    for call in (
        lambda: guest.read_obj(HIGH + PAGE, u64),
        lambda: guest.read_bytes(HIGH, 2 * PAGE),
        lambda: guest.read_slice(bytearray(PAGE), HIGH + 9),
        lambda: guest.write_from_memory(HIGH, io.BytesIO(), 2 * PAGE),
    ):
        with pytest.raises(ReadFromMemoryError) as read:
            call()
        assert read.value.offset == HIGH + PAGE
    for call in (
        lambda: guest.write_obj(1, HIGH + PAGE, u64),
        lambda: guest.fill(1, HIGH + 5, PAGE),
        lambda: guest.write_all(bytes(2 * PAGE), HIGH),
        lambda: guest.read_to_memory(HIGH, io.BytesIO(bytes(2 * PAGE)), 2 * PAGE),
        lambda: guest.read_to_memory(HIGH + PAGE, os.open("/dev/zero", os.O_RDONLY), 5),
    ):
        with pytest.raises(WriteToMemoryError) as write:
            call()
        assert write.value.offset == HIGH + PAGE


def test_against_a_model() -> None:
    """Random regions, random accesses; the model is a dict of bytes."""
    choose = random.Random(9)
    for _ in range(30):
        base = choose.choice([0, 2**32 - 500, 2**64 - 4000])
        regions: list[tuple[int, VolatileSlice]] = []
        model, at = dict[int, int](), base
        while len(regions) < choose.randrange(1, 12) and at < min(base + 3500, TOP - 300):
            at += choose.choice([0, 0, 1, 40])
            size = choose.randrange(1, 200)
            memory = MemoryMapping(size + 7).get_slice(choose.randrange(8), size)
            regions.append((at, memory))
            model.update(dict.fromkeys(range(at, at + size), 0))
            at += size
        choose.shuffle(regions)
        guest = GuestMemory(regions)
        for _ in range(150):
            addr, count = base + choose.randrange(-5 if base else 0, 1500), choose.randrange(1, 300)
            if addr + count > TOP:
                continue
            reach = next((i for i in range(count) if addr + i not in model), count)
            data = choose.randbytes(count)
            if reach == 0:
                with pytest.raises(InvalidGuestAddressError):
                    guest.write_slice(data, addr)
                assert not guest.address_in_range(addr)
                continue
            assert guest.write_slice(data, addr) == reach
            model.update(zip(range(addr, addr + reach), data, strict=False))
            assert guest.check_range(addr, count) == (reach == count)
            assert guest.read_bytes(addr, reach) == data[:reach]
        for addr, value in model.items():
            assert guest.read_obj(addr, u8) == value


# Dirty pages, by guest address.


def test_dirty_ranges() -> None:
    page = os.sysconf("SC_PAGESIZE")
    ram, other = MemoryMapping(8 * page, track_dirty=True), MemoryMapping(page)
    low = ram.get_slice(0, 3 * page + 100)  # one page belongs to both
    high = ram.get_slice(3 * page + 100, 5 * page - 100)
    top = MemoryMapping(2 * page, track_dirty=True)
    guest = GuestMemory([(0x10000, low), (0x80000, high), (TOP - 2 * page, top), (0, other)])
    assert guest.dirty_ranges() == []
    guest.fill(1, 0, 5)  # not tracked
    guest.write_obj(1, 0x10000 + page, u64)
    guest.write_obj(1, 0x10000 + 3 * page + 8, u64)
    guest.fill(1, TOP - 1, 1)
    expected = [
        *((0x10000 + page, page), (0x10000 + 3 * page, 100), (0x80000, page - 100)),
        (TOP - page, page),
    ]
    assert guest.dirty_ranges() == guest.take_dirty() == expected
    assert guest.take_dirty() == []
    assert ram.dirty is not None
    assert ram.dirty.count == 0
    guest.fill(1, 0x80000, 5 * page - 100)
    assert guest.take_dirty() == [(0x10000 + 3 * page, 100), (0x80000, 5 * page - 100)]
    adjoining = GuestMemory([(0, low), (3 * page + 100, high)])
    ram.fill(1)
    assert adjoining.take_dirty() == [(0, 8 * page)]
    part = GuestMemory([(0, ram.get_slice(page, page))])
    ram.fill(1)
    assert part.take_dirty() == [(0, page)]
    assert ram.dirty.ranges() == [(0, page), (2 * page, 6 * page)]  # the others' stay
