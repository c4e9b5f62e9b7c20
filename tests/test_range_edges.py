"""Every accessor against every edge of a range, in memory whose neighbours are watched."""

import ctypes
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Any

import pytest

from guestmem import (
    AddressOverflowError,
    ClosedError,
    InvalidAddressError,
    InvalidRangeError,
    MemoryMapping,
    OutOfBoundsError,
    SystemCallFailedError,
    VolatileMemory,
    VolatileSlice,
    u8,
    u64,
)

PAGE = os.sysconf("SC_PAGESIZE")
SIZES = [1, 5, PAGE - 1, PAGE, PAGE + 1]
HUGE = 10**5000
TOP = 2**64 - 1
WORD = Struct("<Q")
CELL = ctypes.c_uint8 * 3

BEFORE = bytes(1 + i % 199 for i in range(4 * PAGE))  # the memory; accessors write other bytes
SOURCE = bytes(200 + i % 55 for i in range(2 * PAGE))  # the caller's file


class Host:
    """What belongs to the caller: a buffer, and a file of which an accessor gets the fd."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("host")
        self.reset()

    def reset(self) -> None:
        self.buf = bytearray(b"host")
        os.pwrite(self.fd, SOURCE, 0)
        os.ftruncate(self.fd, len(SOURCE))
        os.lseek(self.fd, 0, os.SEEK_SET)

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self.fd, count, offset)

    def check_untouched(self) -> None:
        assert self.buf == b"host"
        assert self.read(0, 3 * PAGE) == SOURCE
        assert os.lseek(self.fd, 0, os.SEEK_CUR) == 0


class Guest:
    """The memory under test, part of a file that a second mapping watches."""

    def __init__(self, kind: str, size: int) -> None:
        self.fd = os.memfd_create("guest")
        os.truncate(self.fd, len(BEFORE))
        self.watcher = MemoryMapping.from_fd(self.fd, len(BEFORE))
        self.start, self.size = PAGE + 3 * (kind == "odd slice"), size
        self.mapping = MemoryMapping.from_fd_offset(self.fd, 3 * PAGE, PAGE)
        self.m: VolatileMemory
        if kind == "mapping":
            self.m = self.mapping = MemoryMapping.from_fd_offset(self.fd, size, PAGE)
        else:
            self.m = self.mapping.get_slice(self.start - PAGE, size)
        self.addresses = [self.mapping.as_ptr(), self.m.as_ptr()]
        self.reset()

    def reset(self) -> None:
        self.watcher.write_all(BEFORE, 0)

    def bytes_before(self, offset: int, count: int) -> bytes:
        return BEFORE[self.start + offset : self.start + offset + count]

    def check(self, offset: int = 0, written: bytes = b"") -> None:
        """Assert that these bytes are at offset, and that all others are as they were."""
        first = self.start + offset
        expected = BEFORE[:first] + written + BEFORE[first + len(written) :]
        assert self.watcher.read_bytes(0, len(BEFORE)) == expected

    def shut(self) -> None:
        if isinstance(self.m, VolatileSlice):
            self.m.release()
        else:
            self.mapping.close()


@dataclass(frozen=True)
class Accessor:
    """A method, called with an offset and a count (where it does not bring its own)."""

    name: str
    call: Callable[[Any, Any, Any, Host], Any]
    error: type[Exception]
    count: int | None = None
    reads: Callable[[Any, Host, int], bytes] | None = None  # what it read: result, host, count
    writes: Callable[[int], bytes] | None = None  # what it writes, by count


ADDRESS, RANGE, BOUNDS = InvalidAddressError, InvalidRangeError, OutOfBoundsError
A = Accessor
ACCESSORS = [
    A("get_slice", lambda m, o, n, h: m.get_slice(o, n), BOUNDS, None,
      lambda r, h, n: r.read_bytes(0, r.size)),
    A("get_ref u64", lambda m, o, n, h: m.get_ref(o, u64), BOUNDS, 8,
      lambda r, h, n: r.load().to_bytes(8, sys.byteorder)),
    A("get_ref ctypes", lambda m, o, n, h: m.get_ref(o, CELL), BOUNDS, 3,
      lambda r, h, n: bytes(r.load())),
    A("get_ref Struct", lambda m, o, n, h: m.get_ref(o, WORD), BOUNDS, 8,
      lambda r, h, n: WORD.pack(*r.load())),
    A("read_obj u8", lambda m, o, n, h: m.read_obj(o, u8), ADDRESS, 1,
      lambda r, h, n: bytes([r])),
    A("read_obj u64", lambda m, o, n, h: m.read_obj(o, u64), ADDRESS, 8,
      lambda r, h, n: r.to_bytes(8, sys.byteorder)),
    A("read_obj ctypes", lambda m, o, n, h: m.read_obj(o, CELL), ADDRESS, 3,
      lambda r, h, n: bytes(r)),
    A("read_obj Struct", lambda m, o, n, h: m.read_obj(o, WORD), ADDRESS, 8,
      lambda r, h, n: WORD.pack(*r)),
    A("write_obj u8", lambda m, o, n, h: m.write_obj(250, o, u8), ADDRESS, 1,
      writes=lambda n: b"\xfa"),
    A("write_obj u64", lambda m, o, n, h: m.write_obj(2**64 - 1, o, u64), ADDRESS, 8,
      writes=lambda n: b"\xff" * 8),
    A("write_obj ctypes", lambda m, o, n, h: m.write_obj(CELL(201, 202, 203), o), ADDRESS, 3,
      writes=lambda n: bytes([201, 202, 203])),
    A("write_obj Struct", lambda m, o, n, h: m.write_obj((0,), o, WORD), ADDRESS, 8,
      writes=lambda n: bytes(8)),
    A("read_bytes", lambda m, o, n, h: m.read_bytes(o, n), ADDRESS, None,
      lambda r, h, n: bytes(r)),
    A("read_exact", lambda m, o, n, h: m.read_exact(h.buf, o), ADDRESS, 4,
      lambda r, h, n: bytes(h.buf)),
    A("write_all", lambda m, o, n, h: m.write_all(b"\xfe\xfd\xfc\xfb", o), ADDRESS, 4,
      writes=lambda n: b"\xfe\xfd\xfc\xfb"),
    A("fill", lambda m, o, n, h: m.fill(222, o, n), ADDRESS, writes=lambda n: b"\xde" * n),
    A("read", lambda m, o, n, h: m.read_to_memory(o, h.fd, n), RANGE,
      writes=lambda n: SOURCE[:n]),
    A("pread", lambda m, o, n, h: m.read_to_memory(o, h.fd, n, 7), RANGE,
      writes=lambda n: SOURCE[7 : 7 + n]),
    A("write", lambda m, o, n, h: m.write_from_memory(o, h.fd, n), RANGE, None,
      lambda r, h, n: h.read(0, n)),
    A("pwrite", lambda m, o, n, h: m.write_from_memory(o, h.fd, n, 7), RANGE, None,
      lambda r, h, n: h.read(7, n)),
    A("remove_range", lambda m, o, n, h: m.remove_range(o, n), RANGE, writes=bytes),
]  # fmt: skip
COUNTED = [a for a in ACCESSORS if a.count is None]


def named(accessors: list[Accessor]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("accessor", accessors, ids=[a.name for a in accessors])


kinds = pytest.mark.parametrize("kind", ["mapping", "slice", "odd slice"])


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    os.close(host.fd)


@pytest.fixture
def make_guest() -> Iterator[Callable[[str, int], Guest]]:
    guests: list[Guest] = []

    def make(kind: str, size: int) -> Guest:
        guests.append(Guest(kind, size))
        return guests[-1]

    yield make
    for guest in guests:
        os.close(guest.fd)


MakeGuest = Callable[[str, int], Guest]


def check_range_error(accessor: Accessor, error: Exception, o: int, n: int, guest: Guest) -> None:
    """Assert the exact type, the fields, and a text that says them in hex and nothing else."""
    fields: dict[str, int]
    shown: set[int] | None = None
    expected = accessor.error
    if expected is not BOUNDS:
        fields = {"offset": o, "count": n, "size": guest.size}
    elif o + n > TOP:
        expected, fields, shown = AddressOverflowError, {"base": o, "offset": n}, {o, n, TOP}
    else:
        fields = {"addr": o + n, "size": guest.size}
    assert type(error) is expected
    assert {name: getattr(error, name) for name in fields} == fields
    assert {int(x, 16) for x in re.findall("0x[0-9a-f]+", str(error))} == (
        shown or set(fields.values())
    )
    assert not any(f"{a:x}" in str(error) or str(a) in str(error) for a in guest.addresses)
    assert error.__cause__ is None


def check_call(accessor: Accessor, guest: Guest, host: Host, offset: Any, count: Any) -> None:
    """Call it, and assert that it does what it should with this range, or nothing at all."""
    o = int(offset)
    n = int(count) if accessor.count is None else accessor.count
    odd_start = accessor.name == "remove_range" and (guest.start + o) % PAGE and n
    if o + n > guest.size or odd_start:
        with pytest.raises((AddressOverflowError, BOUNDS, ADDRESS, RANGE)) as caught:
            accessor.call(guest.m, offset, count, host)
        if o + n > guest.size:
            check_range_error(accessor, caught.value, o, n, guest)
        else:
            assert isinstance(caught.value.__cause__, SystemCallFailedError)
            assert caught.value.__cause__.errno == errno.EINVAL
        guest.check()
        host.check_untouched()
        return
    result = accessor.call(guest.m, offset, count, host)
    if accessor.reads:
        assert accessor.reads(result, host, n) == guest.bytes_before(o, n)
        guest.check()
    if accessor.writes:
        assert result is None
        guest.check(o, accessor.writes(n))
        guest.reset()
    host.reset()


def edges(size: int) -> list[int]:
    near = {0, 1, 2, size - 1, size, size + 1, PAGE, 2 * PAGE}
    far = {p + d for p in (2**31, 2**32, 2**63) for d in (-1, 0, 1)}
    return sorted(near | far | {TOP - size, TOP - size + 1, TOP - 1, TOP})


@named(ACCESSORS)
@kinds
@pytest.mark.parametrize("size", SIZES)
def test_edges(accessor: Accessor, kind: str, size: int, make_guest: MakeGuest, host: Host) -> None:
    guest = make_guest(kind, size)
    offsets, counts = edges(size), edges(size)
    if accessor.count is not None:
        counts = [accessor.count]
        last = size - accessor.count
        offsets += [o for o in range(last - 2, last + 3) if o >= 0]
    for offset in offsets:
        for count in counts:
            check_call(accessor, guest, host, offset, count)


@kinds
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [0, 1, 4, 3 * PAGE])
def test_what_fits(kind: str, size: int, length: int, make_guest: MakeGuest) -> None:
    guest = make_guest(kind, size)
    for offset in edges(size):
        data, buf = b"\xee" * length, bytearray(b"\xdd" * length)
        for method, given in ((guest.m.write_slice, data), (guest.m.read_slice, buf)):
            if offset >= size:  # for an empty buffer too
                with pytest.raises(InvalidAddressError) as caught:
                    method(given, offset)
                check_range_error(
                    A("", lambda *_: None, ADDRESS), caught.value, offset, length, guest
                )
                guest.check()
                assert buf == b"\xdd" * length
                continue
            count = min(length, size - offset)
            assert method(given, offset) == count
            if given is data:
                guest.check(offset, b"\xee" * count)
                guest.reset()
            else:
                guest.check()
                assert buf[:count] == guest.bytes_before(offset, count)
                assert buf[count:] == b"\xdd" * (length - count)


@kinds
@pytest.mark.parametrize("size", SIZES)
def test_fill_to_the_end(kind: str, size: int, make_guest: MakeGuest) -> None:
    guest = make_guest(kind, size)
    m = guest.m
    calls: list[tuple[Callable[[int], None], bytes]] = [
        (lambda o: m.fill(0, o), b"\0"),
        (lambda o: m.fill(255, o, None), b"\xff"),
    ]
    m.fill(210)
    guest.check(0, b"\xd2" * size)
    guest.reset()
    for offset in edges(size):
        for call, byte in calls:
            if offset <= size:
                call(offset)
                guest.check(offset, byte * (size - offset))
                guest.reset()
            else:
                with pytest.raises(InvalidAddressError) as caught:
                    call(offset)
                assert (caught.value.offset, caught.value.size) == (offset, size)
                guest.check()


@pytest.mark.parametrize("size", SIZES)
def test_offset_of_a_slice(size: int, make_guest: MakeGuest) -> None:
    guest = make_guest("odd slice", size)
    assert isinstance(guest.m, VolatileSlice)
    for count in edges(size):
        if count <= size:
            rest = guest.m.offset(count)
            assert rest.as_ptr() == guest.m.as_ptr() + count
            assert rest.read_bytes(0, rest.size) == guest.bytes_before(count, size - count)
        else:
            with pytest.raises(OutOfBoundsError) as caught:
                guest.m.offset(count)
            assert caught.value.addr == count
            assert {int(x, 16) for x in re.findall("0x[0-9a-f]+", str(caught.value))} == {
                count,
                size,
            }


@named(ACCESSORS)
@kinds
def test_closed_before_out_of_range(
    accessor: Accessor, kind: str, make_guest: MakeGuest, host: Host
) -> None:
    guest = make_guest(kind, 64)
    guest.shut()
    for offset in (0, 64, 65, TOP):
        with pytest.raises(ClosedError):
            accessor.call(guest.m, offset, TOP, host)
    guest.check()
    host.check_untouched()
