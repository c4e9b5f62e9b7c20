"""The end of a GuestMemory: one moment for all of its regions, whoever is inside."""

from __future__ import annotations

import gc
import io
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from guestmem import (
    ClosedError,
    GuestMemory,
    MemoryMapping,
    VolatileSlice,
    u16,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = os.sysconf("SC_PAGESIZE")
SECONDS = float(os.environ.get("GUESTMEM_RACE_SECONDS", "0.3"))


def ranges(count: int) -> list[tuple[int, int]]:
    return [(i * PAGE, PAGE) for i in range(count)]


CALLS: dict[str, Callable[[GuestMemory], object]] = {
    "read_bytes": lambda g: g.read_bytes(0, 0),
    "a hole": lambda g: g.read_bytes(1 << 40, 1),
    "past the end": lambda g: g.read_bytes(2**64 - 1, 5),
    "read_obj in a hole": lambda g: g.read_obj(1 << 40, u64),
    "write_obj in a hole": lambda g: g.write_obj(1, 1 << 40, u64),
    "read_slice": lambda g: g.read_slice(bytearray(0), 0),
    "write_all": lambda g: g.write_all(b"", 0),
    "fill": lambda g: g.fill(0, 0, 0),
    "fill to the end": lambda g: g.fill(0),
    "slices": lambda g: g.slices(0, 0),
    "get_slice": lambda g: g.get_slice(1 << 40, 5),
    "get_ref": lambda g: g.get_ref(1 << 40, u64),
    "get_host_address": lambda g: g.get_host_address(0),
    "read_to_memory": lambda g: g.read_to_memory(0, io.BytesIO(), 0),
    "write_from_memory": lambda g: g.write_from_memory(1 << 40, io.BytesIO(), 5),
    "dirty_ranges": lambda g: g.dirty_ranges(),
    "take_dirty": lambda g: g.take_dirty(),
    "mark_dirty": lambda g: g.mark_dirty(0, 0),
    "merge_dirty": lambda g: g.merge_dirty(0, b""),
    "remove_range": lambda g: g.remove_range(0, 0),
    "regions": lambda g: g.regions,
    "find_region": lambda g: g.find_region(1 << 40),
    "with_region": lambda g: g.with_region(1 << 40, MemoryMapping(1)),
    "without_region": lambda g: g.without_region(0, PAGE),
    "with": lambda g: g.__enter__(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("count", [0, 2])
def test_closed_comes_first(name: str, count: int) -> None:
    guest = GuestMemory.from_ranges(ranges(count))
    guest.close()
    assert guest.closed
    if count or name != "get_host_address":
        with pytest.raises(ClosedError, match="^the guest memory has been closed$"):
            CALLS[name](guest)
    assert guest.check_range(0, 5) == guest.address_in_range(0) == (count > 0)  # goes on
    assert (guest.size, guest.num_regions) == (count * PAGE, count)


def test_the_bitmap_of_a_mapping_that_is_gone() -> None:
    """A guest that is closed holds nothing, and looks at nothing."""
    mapping = MemoryMapping(PAGE, track_dirty=True)
    part = mapping.get_slice(0, PAGE)
    guest = GuestMemory([(0, part)])
    part.release()
    del part, mapping
    guest.fill(1)
    assert guest.dirty_ranges() == [(0, PAGE)]
    guest.close()
    others = [MemoryMapping(PAGE, track_dirty=True) for _ in range(50)]
    with pytest.raises(ClosedError):
        guest.take_dirty()
    assert not any(other.dirty and other.dirty.count for other in others)


def test_tracked_ranges() -> None:
    guest = GuestMemory.from_ranges(ranges(2), track_dirty=True)
    guest.fill(1, PAGE - 1, 2)
    assert guest.take_dirty() == [(0, 2 * PAGE)]
    plain = GuestMemory.from_ranges(ranges(1))
    plain.fill(1)
    assert plain.dirty_ranges() == []
    with pytest.raises(TypeError, match="at most 1 positional"):
        GuestMemory.from_ranges([], True)  # type: ignore[call-arg]


def test_hot_plug_needs_no_more_than_the_guest() -> None:
    """What its regions were made from may be gone: it has borrowed for itself."""
    mapping = MemoryMapping(2 * PAGE)
    with mapping.get_slice(0, PAGE) as part:
        guest = GuestMemory([(0, part)])
    more = guest.with_region(PAGE, mapping.get_slice(PAGE, PAGE))
    more.write_all(b"across", PAGE - 3)
    assert guest.read_bytes(PAGE - 3, 3) == b"acr"
    guest.close()
    assert more.without_region(PAGE, PAGE).read_bytes(PAGE - 3, 3) == b"acr"


def test_closed_it_keeps_nothing() -> None:
    """Not even the slice that it was made from."""
    with MemoryMapping(2 * PAGE) as mapping, GuestMemory([(0, mapping.get_slice(0, PAGE))]) as g:
        g.fill(1)
    assert mapping.closed
    other = MemoryMapping(2 * PAGE)
    with pytest.raises(ZeroDivisionError):
        with GuestMemory([(0, other.get_slice(0, PAGE))]):
            raise ZeroDivisionError
    other.close()


def test_nobody_finds_what_its_regions_borrow_by() -> None:
    """It is no object: not for the collector, and not while the guest is made."""
    host = bytearray(64)
    part = VolatileSlice.from_buffer(host)

    def tracked() -> set[int]:
        return {id(one) for one in gc.get_objects() if type(one) is VolatileSlice}

    before, found = tracked(), set[int]()

    class Address:
        def __index__(self) -> int:
            found.update(tracked() - before)
            return 1 << 20

    addresses: Any = [(0, part), (Address(), MemoryMapping(PAGE).get_slice(0, 8))]
    guest = GuestMemory(addresses)
    kept = [o for o in gc.get_referents(guest) if type(o) is VolatileSlice]
    assert kept == [addresses[1][1], part] or kept == [part, addresses[1][1]]
    assert found == set()


def test_a_tuple_that_is_half_made() -> None:
    guest = GuestMemory.from_ranges(ranges(50))
    seen = 0

    def look(phase: str, info: dict[str, int]) -> None:
        nonlocal seen
        for each in gc.get_objects():
            if type(each) is tuple and len(each) == 50:
                seen += len(list(each))

    threshold = gc.get_threshold()
    gc.callbacks.append(look)
    gc.set_threshold(1)
    try:
        for _ in range(20):
            assert len(guest.regions) == 50
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(look)


def test_what_was_refused_has_changed_nothing() -> None:
    guest = GuestMemory.from_ranges(ranges(5))
    held: list[Any] = [
        guest.get_slice(3 * PAGE, 8),
        guest.get_ref(3 * PAGE, u64),
        guest.get_atomic_ref(3 * PAGE, u16),
        memoryview(guest.regions[3].memory),
    ]
    with pytest.raises(
        BufferError,
        match="^cannot close the guest memory: its region at 0x3000 is held by "
        "1 slice, 2 refs, 1 exported buffer$",
    ):
        guest.close()
    assert not guest.closed
    regions = guest.regions
    assert not any(region.memory.closed for region in regions)
    guest.fill(7)
    assert guest.with_region(9 * PAGE, MemoryMapping(1)).read_obj(0, u16) == 0x0707
    held.pop().release()
    held.clear()
    guest.close()
    assert all(region.memory.closed for region in regions)


def test_a_running_call_is_named() -> None:
    guest = GuestMemory.from_ranges(ranges(2))

    class Source(io.RawIOBase):
        def readinto(self, buffer: Any) -> int:
            with pytest.raises(BufferError, match="memory: it is held by 1 running call"):
                guest.close()
            return len(buffer)

    guest.read_to_memory(0, Source(), 2 * PAGE)
    guest.close()


def test_a_mapping_that_was_left_by_an_exception() -> None:
    guest = GuestMemory.from_ranges(ranges(3))
    with pytest.raises(ZeroDivisionError):
        with guest.regions[1].memory:
            raise ZeroDivisionError
    guest.fill(1)  # it borrows still
    part = guest.get_slice(2 * PAGE, 1)
    with pytest.raises(BufferError):
        guest.close()
    assert guest.read_bytes(PAGE, 1) == b"\1"
    part.release()
    guest.close()


def test_a_call_that_is_inside_goes_on() -> None:
    """A block is left by an exception: a transfer over two regions is not cut in two."""
    guest = GuestMemory.from_ranges(ranges(2))
    source, sink = os.pipe()
    failed: list[BaseException] = []

    def read() -> None:
        try:
            guest.read_to_memory(0, source, 2 * PAGE)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    os.write(sink, bytes(PAGE // 2))
    time.sleep(0.02)
    part: VolatileSlice = guest.get_slice(PAGE, PAGE)
    first = guest.regions[0].memory
    with pytest.raises(ZeroDivisionError):
        with guest:
            raise ZeroDivisionError
    assert guest.closed
    os.write(sink, b"x" * (PAGE + PAGE // 2))
    thread.join()
    assert failed == []
    assert part.read_bytes(0, PAGE) == b"x" * PAGE
    part.release()
    assert first.closed
    os.close(source)
    os.close(sink)


def test_close_against_those_who_borrow() -> None:
    """Refused, it has changed nothing; else all regions are closed at one moment."""
    end = time.monotonic() + SECONDS
    wrong: list[object] = []
    while time.monotonic() < end and not wrong:
        guest = GuestMemory.from_ranges(ranges(8))
        memories = [region.memory for region in guest.regions]
        done = threading.Event()

        def borrow(memory: Any = memories[7], done: threading.Event = done) -> None:
            while not done.is_set():
                try:
                    memory.get_slice(0, 8).release()
                except ClosedError:
                    return

        def read(guest: Any = guest, done: threading.Event = done) -> None:
            """Nobody sees it closed who sees it open later."""
            seen = False
            while not done.is_set():
                try:
                    guest.read_bytes(0, 8 * PAGE)
                    if seen:
                        wrong.append("open after it was closed")
                except ClosedError:
                    seen = True

        threads = [threading.Thread(target=borrow), threading.Thread(target=read)]
        for thread in threads:
            thread.start()
        for _ in range(200):
            try:
                guest.close()
            except BufferError:
                if guest.closed or any(memory.closed for memory in memories):
                    wrong.append("closed, and refused")
            else:
                if not all(memory.closed for memory in memories):
                    wrong.append("closed in part")
                break
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []
