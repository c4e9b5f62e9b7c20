"""Copies move exactly the right bytes: every alignment of both sides, every head and tail."""

from __future__ import annotations

import random

import pytest

from guestmem import MemoryMapping, VolatileSlice

LENGTHS = range(141)
GUEST = range(34)
HOST = range(9)
LARGE = [
    (1 << 18) - 1, 1 << 18, (1 << 18) + 1, (1 << 18) + 77, (1 << 20) + 31, (17 << 20) + 5,
]  # fmt: skip

random.seed(1)
DATA = random.randbytes(512)
BACKGROUND = random.randbytes(512)


@pytest.fixture(scope="module")
def mapping() -> MemoryMapping:
    return MemoryMapping(4096)


@pytest.mark.parametrize("guest", GUEST)
def test_writes(mapping: MemoryMapping, guest: int) -> None:
    part = mapping.get_slice(guest, 256)
    for host in HOST:
        for length in LENGTHS:
            mapping.write_all(BACKGROUND, 0)
            source = memoryview(DATA)[host : host + length]
            expected = BACKGROUND[:guest] + source + BACKGROUND[guest + length :]
            if (host + length) % 3 == 0:
                mapping.write_all(source, guest)
            elif (host + length) % 3 == 1:
                assert mapping.write_slice(source, guest) == length
            else:
                assert part.copy_from(source) == length
            assert mapping.read_bytes(0, 512) == expected, (host, length)


@pytest.mark.parametrize("guest", GUEST)
def test_reads(mapping: MemoryMapping, guest: int) -> None:
    mapping.write_all(DATA, 0)
    part = mapping.get_slice(guest, 256)
    for length in LENGTHS:
        assert mapping.read_bytes(guest, length) == DATA[guest : guest + length]
        for host in HOST:
            target = bytearray(BACKGROUND)
            view = memoryview(target)[host : host + length]
            expected = (
                BACKGROUND[:host] + DATA[guest : guest + length] + BACKGROUND[host + length :]
            )
            if (host + length) % 3 == 0:
                mapping.read_exact(view, guest)
            elif (host + length) % 3 == 1:
                assert mapping.read_slice(view, guest) == length
            else:
                assert part.copy_to(view) == length
            assert target == expected, (host, length)


@pytest.mark.parametrize("guest", GUEST)
def test_fills(mapping: MemoryMapping, guest: int) -> None:
    for length in LENGTHS:
        mapping.write_all(BACKGROUND, 0)
        mapping.fill(length, guest, length)
        expected = BACKGROUND[:guest] + bytes([length]) * length + BACKGROUND[guest + length :]
        assert mapping.read_bytes(0, 512) == expected, length


@pytest.mark.parametrize("shift", range(-40, 41))
def test_overlapping_copies_behave_as_memmove(mapping: MemoryMapping, shift: int) -> None:
    """Forwards and backwards, between guest and guest, and where the host's side is the guest's."""
    view = memoryview(mapping)
    for start in (64, 65, 68, 95):
        for length in (*range(0, 141, 7), 1, 2, 3, 4, 8, 16, 31, 32, 33, 127, 128, 129, 255):
            target = start + shift
            expected = bytearray(DATA)
            expected[target : target + length] = DATA[start : start + length]
            for way in range(3):
                mapping.write_all(DATA, 0)
                if way == 0:
                    mapping.write_all(view[start : start + length], target)
                elif way == 1:
                    mapping.read_exact(view[target : target + length], start)
                else:
                    source = mapping.get_slice(start, length)
                    into = mapping.get_slice(target, length)
                    assert source.copy_to_volatile_slice(into) == length
                assert mapping.read_bytes(0, 512) == expected, (start, length, way)


def test_slices_of_two_memories(mapping: MemoryMapping) -> None:
    host = bytearray(512)
    with VolatileSlice.from_buffer(host) as other:
        for guest in range(0, 34, 3):
            for start in HOST:
                for length in LENGTHS:
                    mapping.write_all(BACKGROUND, 0)
                    host[:] = DATA
                    source = other.get_slice(start, length)
                    target = mapping.get_slice(guest, length + 5)  # the smaller size counts
                    assert source.copy_to_volatile_slice(target) == length
                    expected = BACKGROUND[:guest] + DATA[start : start + length]
                    assert mapping.read_bytes(0, 512) == expected + BACKGROUND[len(expected) :]
                    assert host == DATA


@pytest.mark.parametrize("length", LARGE)
def test_large_copies(length: int) -> None:
    """Above 256 KiB, where the GIL is given away, and where vectors may be wider."""
    mapping = MemoryMapping(length + 128)
    data = random.randbytes(4099) * (length // 4099 + 1)
    alignments = [(0, 0), (1, 3)] if length > 1 << 21 else [(0, 0), (0, 3), (1, 0), (8, 8), (31, 5)]
    for guest, host in alignments:
        source = memoryview(data)[host : host + length]
        mapping.fill(0)
        mapping.write_all(source, guest)
        assert mapping.read_bytes(guest, length) == source
        rest = 128 - guest
        assert mapping.read_bytes(0, guest) + mapping.read_bytes(guest + length, rest) == bytes(128)

        back = bytearray(length + 16)
        mapping.read_exact(memoryview(back)[host : host + length], guest)
        assert memoryview(back)[host : host + length] == source
        assert back[:host] + back[host + length :] == bytes(16)

        for shift in (5, 8, 24, 64, -guest):  # overlapping, up and down
            mapping.write_all(source, guest)
            part = mapping.get_slice(guest, length)
            target = mapping.get_slice(guest + shift, length)
            assert part.copy_to_volatile_slice(target) == length
            assert target.read_bytes(0, length) == source

        mapping.write_all(b"edge", guest + length)
        mapping.fill(0x77, guest, length)
        assert mapping.read_bytes(guest, length + 4) == b"\x77" * length + b"edge"
