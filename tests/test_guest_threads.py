"""Threads: guest addresses, atomics, arrays and dirty pages, used by all at once."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from guestmem import (
    ClosedError,
    GuestMemory,
    MemoryMapping,
    le16,
    preadv,
    pwritev,
    u8,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Backing

    Backings = Callable[[int], Backing]
    Race = Callable[..., None]

PAGE = 4096
LARGE = 1 << 20
BORDER, END = LARGE, 2 * LARGE  # two regions that adjoin


def made_maps() -> int:
    """Count the mappings of anonymous shared memory in this process that somebody has."""
    gc.collect()
    with open("/proc/self/maps") as file:
        return sum("/dev/zero (deleted)" in line for line in file)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


# Closing


def read_zeros(guest: GuestMemory) -> None:
    with open("/dev/zero", "rb", buffering=0) as zero:
        guest.read_to_memory(BORDER - 9, zero, 1 << 16)
        preadv(zero, guest.slices(BORDER - 9, 1 << 16))


def write_away(guest: GuestMemory) -> None:
    with open(os.devnull, "wb", buffering=0) as null:
        guest.write_from_memory(BORDER - 9, null, 1 << 16)
        pwritev(null, guest.slices(BORDER - 9, 1 << 16))


def plug(guest: GuestMemory) -> None:
    with guest.with_region(END, MemoryMapping(PAGE)) as more:
        more.write_all(bytes(16), END - 8)
    with guest.without_region(0, LARGE) as less:
        assert less.regions[0].start == BORDER


USES: dict[str, Callable[[GuestMemory], object]] = {
    "objects": lambda guest: (guest.write_obj(1, 64, u64), guest.read_obj(BORDER + 64, u64)),
    "across": lambda guest: guest.write_obj(2, BORDER - 3, u64),
    "struct": lambda guest: guest.read_obj(BORDER - 3, struct.Struct("<QI")),
    "read_slice": lambda guest: guest.read_slice(bytearray(LARGE), BORDER // 2),
    "write_all": lambda guest: guest.write_all(bytes(LARGE), BORDER // 2),
    "read_bytes": lambda guest: guest.read_bytes(0, END),
    "fill": lambda guest: guest.fill(1, 5, END - 5),
    "small": lambda guest: guest.fill(1, BORDER - 5, 9),
    "from file": lambda guest: guest.read_to_memory(BORDER - 5, io.BytesIO(bytes(64)), 64),
    "from fd": read_zeros,
    "to fd": write_away,
    "slices": lambda guest: [part.write_slice(b"1", 0) for part in guest.slices(BORDER - 64, 128)],
    "ref": lambda guest: guest.get_ref(BORDER, u64).store(5),
    "atomic": lambda guest: guest.get_atomic_ref(BORDER, u64).fetch_add(5),
    "array": lambda guest: guest.get_array_ref(0, 100, le16).copy_from(range(100)),
    "dirty": lambda guest: (guest.take_dirty(), guest.dirty_ranges()),
    "regions": lambda guest: (guest.find_region(BORDER), guest.regions, repr(guest)),
    "address": lambda guest: guest.get_host_address(BORDER),
    "plug": plug,
}


def everything_fails(guest: GuestMemory) -> None:
    for addr in 0, BORDER - 4, BORDER:
        with pytest.raises(ClosedError):
            guest.read_obj(addr, u64)
        with pytest.raises(ClosedError):
            guest.fill(1, addr, LARGE)
        with pytest.raises(ClosedError):
            guest.get_slice(BORDER if addr else 0, 8)


@pytest.mark.parametrize("kind", ["borrows", "made"])
def test_close_against_everything_else(backing: Backings, race: Race, kind: str) -> None:
    """Each use works or says that all is closed; close() closes all regions, or none."""
    file = backing(END)
    before = made_maps()
    shared: list[GuestMemory] = []
    made = used = refused = 0

    def renew() -> None:
        nonlocal made
        if kind == "made":
            guest = GuestMemory.from_ranges([(0, LARGE), (BORDER, LARGE)])
        else:
            low = MemoryMapping.from_fd(file.fd, LARGE, track_dirty=True)
            high = MemoryMapping.from_fd_offset(file.fd, LARGE, LARGE, track_dirty=True)
            guest = GuestMemory([(0, low), (BORDER, high)])
        shared[:] = [guest]
        made += 1

    def use() -> None:
        nonlocal used
        try:
            USES[random.choice(names)](shared[0])
            used += 1
        except ClosedError:
            pass
        except BufferError as error:  # plug() leaves a with block while another is inside
            assert "cannot close the guest memory" in str(error)  # noqa: PT017

    def close() -> None:
        nonlocal refused
        guest = shared[0]
        try:
            guest.close()
        except BufferError as error:
            assert "cannot close the guest memory" in str(error)  # noqa: PT017
            refused += 1
            assert not guest.closed
            guest.write_obj(1, BORDER - 4, u64)
            assert guest.get_slice(BORDER, 8).size == 8
        else:
            assert guest.closed
            everything_fails(guest)
            renew()
            time.sleep(random.random() * 0.002)  # or hardly anybody meets open memory

    names = list(USES)
    renew()
    race(use, use, close, enough=lambda: made > 3 and used > 3 and refused > 0)
    shared.clear()
    gc.collect()
    assert file.maps() == 0
    assert made_maps() <= before


@pytest.mark.parametrize("kind", ["borrows", "made"])
def test_leaving_by_an_exception_against_everything_else(
    backing: Backings, race: Race, kind: str
) -> None:
    file = backing(END)
    before = made_maps()

    def make() -> GuestMemory:
        if kind == "made":
            return GuestMemory.from_ranges([(0, LARGE), (BORDER, LARGE)])
        whole = MemoryMapping.from_fd(file.fd, END)
        return GuestMemory(
            [(0, whole.get_slice(0, LARGE)), (BORDER, whole.get_slice(LARGE, LARGE))]
        )

    shared = [make()]
    names = [name for name in USES if name != "plug"]

    def use() -> None:
        with contextlib.suppress(ClosedError):
            USES[random.choice(names)](shared[0])

    def leave() -> None:
        guest = shared[0]
        try:
            with guest:
                shared[0] = make()
                time.sleep(random.random() * 0.002)
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert guest.closed
        everything_fails(guest)

    race(use, use, leave)
    shared.clear()
    gc.collect()
    assert file.maps() == 0
    assert made_maps() <= before


def test_only_one_of_many_closes() -> None:
    before = made_maps()
    for _ in range(50):
        guest = GuestMemory.from_ranges([(n * PAGE, PAGE) for n in range(5)])
        regions = guest.regions
        start = threading.Barrier(3)
        errors: list[BaseException] = []

        def close(
            guest: GuestMemory = guest,
            start: threading.Barrier = start,
            errors: list[BaseException] = errors,
        ) -> None:
            start.wait()
            try:
                guest.close()
                assert guest.closed
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=close) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert all(region.memory.closed for region in regions)
        del regions
    assert made_maps() <= before


def test_a_waiting_call_keeps_all_regions_open(pipe: tuple[int, int]) -> None:
    guest = GuestMemory.from_ranges([(0, PAGE), (PAGE, PAGE), (8 * PAGE, PAGE)])
    thread = threading.Thread(target=guest.read_to_memory, args=(PAGE - 4, pipe[0], 8))
    thread.start()
    os.write(pipe[1], b"1234")
    wait_for(lambda: guest.read_bytes(PAGE - 4, 4) == b"1234")  # so it waits for the rest
    with pytest.raises(BufferError):
        guest.close()
    assert not guest.closed
    guest.fill(7, 8 * PAGE, PAGE)
    guest.fill(7, 0, 8)
    os.write(pipe[1], b"5678")
    thread.join()
    assert guest.read_bytes(PAGE - 4, 8) == b"12345678"
    guest.close()


def test_a_waiting_preadv_keeps_its_pieces(pipe: tuple[int, int]) -> None:
    guest = GuestMemory.from_ranges([(0, PAGE), (PAGE, PAGE)])
    parts = list(guest.slices(PAGE - 4, 8))

    def is_inside() -> bool:
        with memoryview(parts[1]), pytest.raises(BufferError) as caught:
            parts[1].release()
        return "running call" in str(caught.value)

    thread = threading.Thread(target=preadv, args=(pipe[0], parts))
    thread.start()
    wait_for(is_inside)
    for part in parts:
        with pytest.raises(BufferError, match="held by 1 running call"):
            part.release()
    with pytest.raises(BufferError):
        guest.close()
    os.write(pipe[1], b"12345678")
    thread.join()
    assert guest.read_bytes(PAGE - 4, 8) == b"12345678"
    for part in parts:
        part.release()
    guest.close()


# Finding regions


def test_each_finds_its_own_region(race: Race) -> None:
    """The region of the last hit is remembered for all: another's is never taken for one's own."""
    count = 64
    guest = GuestMemory.from_ranges([(n * 2 * PAGE, PAGE) for n in range(count)])
    for n in range(count):
        guest.fill(n, n * 2 * PAGE, PAGE)

    def look() -> None:
        for n in random.sample(range(count), 8):
            addr = n * 2 * PAGE
            assert guest.read_obj(addr + 8, u8) == n
            assert guest.read_bytes(addr, 16) == bytes([n]) * 16
            region = guest.find_region(addr + 5)
            assert region is not None
            assert region.start == addr
            assert guest.find_region(addr + PAGE) is None
            assert guest.get_ref(addr + 8, u8).load() == n

    race(look, look, look)


def test_hot_plug_against_readers(race: Race) -> None:
    """Whoever has the old guest goes on with it."""
    first = GuestMemory.from_ranges([(0, PAGE)])
    first.fill(1, 0, PAGE)
    shared = [first]

    def look() -> None:
        guest = shared[0]
        assert guest.read_bytes(0, PAGE) == b"\1" * PAGE
        assert sum(region.size for region in guest.regions) == guest.size
        assert [part.size for part in guest.slices(0, guest.size)] == [PAGE] * guest.num_regions

    def replug() -> None:
        more = shared[0].with_region(PAGE, MemoryMapping(PAGE))
        shared[0] = more
        shared[0] = more.without_region(PAGE, PAGE)

    race(look, look, replug)


# Files


def test_vectored_calls_in_many_threads(backing: Backings, race: Race) -> None:
    """Each has its own pieces, on both sides of a border, and its own part of the file."""
    file = backing(4 * 8 * PAGE)
    guest = GuestMemory.from_ranges([(0, 16 * PAGE), (16 * PAGE, 16 * PAGE)])

    def transfer(number: int) -> Callable[[], None]:
        parts: list[Any] = []
        for n in range(4):  # pages 4 * n + number, a little less than one each
            parts += guest.slices((12 + number + 2 * n) * PAGE - 100 + 200 * number, 150)
        size = sum(part.size for part in parts)
        content = bytes([number + 1]) * size

        def transfer() -> None:
            for part in parts:
                part.fill(number + 1)
            assert pwritev(file.fd, parts, number * PAGE) == size
            for part in parts:
                part.fill(0)
            assert preadv(file.fd, parts, number * PAGE) == size
            assert b"".join(bytes(part) for part in parts) == content

        return transfer

    race(transfer(0), transfer(1))
