"""Copies between a guest's memory and guestmem's own objects, across the border of two regions:
guarded on both sides, as memmove, and marked.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from guestmem import (
    GuestMemory,
    InvalidGuestAddressError,
    InvalidRangeError,
    MemoryMapping,
    ReadFromMemoryError,
    VolatileMemory,
    WriteToMemoryError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Backing

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 4 * PAGE
START = 0x10000


def two_regions(ram: VolatileMemory) -> GuestMemory:
    """Two regions that adjoin, made of the middle of ram and then its start; a hole after them."""
    return GuestMemory(
        [(START, ram.get_slice(2 * PAGE, PAGE)), (START + PAGE, ram.get_slice(0, PAGE))]
    )


def test_a_page_of_the_other_side_is_missing(backing: Callable[[int], Backing]) -> None:
    """Its own offset is in the error; and the process lives."""
    file = backing(SIZE)
    other = MemoryMapping.from_fd(file.fd, SIZE)
    os.ftruncate(file.fd, PAGE)
    for guest in two_regions(MemoryMapping(SIZE)), GuestMemory([(START, MemoryMapping(2 * PAGE))]):
        for buf in other.get_slice(0, 2 * PAGE), other:
            for write in guest.write_all, guest.write_slice:
                if buf is other and write == guest.write_all:
                    continue
                with pytest.raises(ReadFromMemoryError) as read:
                    write(buf, START)
                assert read.value.offset == PAGE
            for into in guest.read_exact, guest.read_slice:
                if buf is other and into == guest.read_exact:
                    continue
                with pytest.raises(WriteToMemoryError) as written:
                    into(buf, START)
                assert written.value.offset == PAGE


def test_a_page_of_the_guest_is_missing(backing: Callable[[int], Backing]) -> None:
    file = backing(SIZE)
    guest = two_regions(MemoryMapping.from_fd(file.fd, SIZE))
    os.ftruncate(file.fd, PAGE)
    other = MemoryMapping(2 * PAGE - 9)
    with pytest.raises(WriteToMemoryError) as written:
        guest.write_all(other, START + 9)
    assert written.value.offset == START + 9
    with pytest.raises(InvalidGuestAddressError):
        guest.write_all(other, START + 10)
    with pytest.raises(ReadFromMemoryError) as read:
        guest.read_slice(other, START + 9)
    assert read.value.offset == START + 9


def test_what_is_read_into_is_marked() -> None:
    guest = two_regions(MemoryMapping(SIZE))
    for read in guest.read_exact, guest.read_slice:
        other = MemoryMapping(2 * PAGE, track_dirty=True)
        assert other.dirty is not None
        read(other, START)
        assert other.dirty.take() == [(0, 2 * PAGE)]
        if read == guest.read_slice:
            read(other, START + 2 * PAGE - 5)
            assert other.dirty.take() == [(0, PAGE)]


@pytest.mark.parametrize("by", ["slice", "memoryview"])
@pytest.mark.parametrize("order", [(0, PAGE), (PAGE, 0), (2 * PAGE, PAGE)])
@pytest.mark.parametrize("start", [0, 1, 8, 100, PAGE - 1, PAGE, PAGE + 3])
@pytest.mark.parametrize("count", [16, PAGE, PAGE + 1000])
def test_overlapping(by: str, order: tuple[int, int], start: int, count: int) -> None:
    """As memmove, whichever region lies first in the host's memory."""
    for addr in START, START + 5, START + PAGE - 7:
        for reading in False, True:
            ram = MemoryMapping(SIZE)
            guest = GuestMemory(
                (START + i * PAGE, ram.get_slice(at, PAGE)) for i, at in enumerate(order)
            )
            ram.write_all(bytes(os.urandom(PAGE)) * 4, 0)
            part = ram.get_slice(start, count)
            expected = bytearray(ram.read_bytes(0, SIZE))
            room = min(count, START + 2 * PAGE - addr)
            moved = guest.read_bytes(addr, room) if reading else part.get_slice(0, room)
            data = moved if isinstance(moved, bytes) else moved.read_bytes(0, room)
            buf: VolatileMemory | memoryview = part if by == "slice" else memoryview(part)
            if reading:
                expected[start : start + room] = data
                assert guest.read_slice(buf, addr) == room
            else:
                for i, byte in enumerate(data):
                    at = addr - START + i
                    expected[order[at // PAGE] + at % PAGE] = byte
                assert guest.write_slice(buf, addr) == room
            assert ram.read_bytes(0, SIZE) == expected


def test_an_object_that_reads_memory_that_is_missing(backing: Callable[[int], Backing]) -> None:
    """What read() returns is guarded, too, if it is guestmem's own."""
    file = backing(2 * PAGE)
    gone = MemoryMapping.from_fd(file.fd, 2 * PAGE)
    os.ftruncate(file.fd, PAGE)

    class Source:
        def read(self, count: int) -> Any:
            return gone.get_slice(PAGE - 8, 16)

    for memory in MemoryMapping(PAGE), two_regions(MemoryMapping(SIZE)):
        start = 0 if isinstance(memory, MemoryMapping) else START
        with pytest.raises(ReadFromMemoryError) as caught:
            memory.read_to_memory(start, Source(), 16)
        assert caught.value.offset == 8


def test_remove_range() -> None:
    ram = MemoryMapping(SIZE, track_dirty=True)
    assert ram.dirty is not None
    guest = two_regions(ram)
    guest.fill(7, START)
    ram.dirty.take()
    guest.remove_range(START + PAGE, 100)
    assert guest.read_bytes(START + PAGE - 1, 102) == b"\7" + bytes(100) + b"\7"
    assert ram.dirty.take() == [(0, PAGE)]
    guest.fill(7, START)
    ram.dirty.take()
    guest.remove_range(START, PAGE + 5)
    assert ram.read_bytes(2 * PAGE, PAGE) == bytes(PAGE)
    assert ram.read_bytes(0, 6) == bytes(5) + b"\7"
    assert guest.take_dirty() == [(START, 2 * PAGE)]
    guest.remove_range(START + 2 * PAGE, 0)
    for addr, count in (START + 2 * PAGE, 1), (START + PAGE, PAGE + 1):
        with pytest.raises(InvalidGuestAddressError):
            guest.remove_range(addr, count)
    uneven = GuestMemory([(START, ram.get_slice(0, PAGE)), (START + PAGE, ram.get_slice(5, PAGE))])
    ram.fill(7)
    with pytest.raises(InvalidRangeError, match="cannot be removed") as refused:
        uneven.remove_range(START, PAGE + 1)
    assert (refused.value.offset, refused.value.count) == (START + PAGE, 1)
    assert ram.read_bytes(0, SIZE) == b"\7" * SIZE  # nothing was touched
    uneven.remove_range(START, PAGE)
