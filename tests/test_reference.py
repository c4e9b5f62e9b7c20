"""The tests of the reference, by their names there, and the examples of its documentation."""

import errno
from pathlib import Path

import pytest

import guestmem
from guestmem import MemoryMapping, u16, u32, u64

MAX_OFF_T = 2**63 - 1


# Its tests


def test_basic_map() -> None:
    m = MemoryMapping(1024)
    assert m.size == 1024


def test_map_invalid_size() -> None:
    with pytest.raises(guestmem.SystemCallFailedError) as caught:
        MemoryMapping(0)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.syscall == "mmap"


def test_map_invalid_fd() -> None:
    with pytest.raises(guestmem.SystemCallFailedError) as caught:
        MemoryMapping.from_fd(-1, 1024)
    assert caught.value.errno == errno.EBADF


def test_write_past_end() -> None:
    m = MemoryMapping(5)
    assert m.write_slice(bytes([1, 2, 3, 4, 5, 6]), 0) == 5
    assert m.read_bytes(0, 5) == bytes([1, 2, 3, 4, 5])


def test_slice_size() -> None:
    m = MemoryMapping(5)
    s = m.get_slice(2, 3)
    assert s.size == 3


def test_slice_addr() -> None:
    m = MemoryMapping(5)
    s = m.get_slice(2, 3)
    assert s.as_ptr() == m.as_ptr() + 2


def test_slice_store() -> None:
    m = MemoryMapping(5)
    r = m.get_ref(2, u16)
    r.store(9)
    assert m.read_obj(2, u16) == 9


def test_slice_overflow_error() -> None:
    m = MemoryMapping(5)
    with pytest.raises(guestmem.AddressOverflowError) as caught:
        m.get_slice(2**64 - 1, 3)
    assert caught.value.base == 2**64 - 1
    assert caught.value.offset == 3


def test_slice_oob_error() -> None:
    m = MemoryMapping(5)
    with pytest.raises(guestmem.OutOfBoundsError) as caught:
        m.get_slice(3, 3)
    assert caught.value.addr == 6


def test_from_fd_offset_invalid() -> None:
    with pytest.raises(guestmem.InvalidOffsetError) as caught:
        MemoryMapping.from_fd_offset(-1, 4096, MAX_OFF_T + 1)
    assert caught.value.offset == MAX_OFF_T + 1


# Its examples


def test_write_a_slice_at_256() -> None:
    m = MemoryMapping(1024)
    assert m.write_slice(bytes([1, 2, 3, 4, 5]), 256) == 5
    assert m.read_bytes(255, 7) == bytes([0, 1, 2, 3, 4, 5, 0])


def test_read_a_slice_of_16_at_256() -> None:
    m = MemoryMapping(1024)
    m.write_all(bytes(range(1, 17)), 256)
    buf = bytearray(16)
    assert m.read_slice(buf, 256) == 16
    assert buf == bytes(range(1, 17))


def test_write_a_u64_at_16() -> None:
    m = MemoryMapping(1024)
    m.write_obj(55, 16, u64)
    assert m.read_bytes(0, 32).count(0) == 31


def test_read_a_u64_written_to_32() -> None:
    m = MemoryMapping(1024)
    m.write_obj(55, 32, u64)
    assert m.read_obj(32, u64) == 55


def test_read_from_urandom() -> None:
    m = MemoryMapping(1024)
    with Path("/dev/urandom").open("rb", buffering=0) as file:
        m.read_to_memory(32, file, 128)
    assert m.read_obj(40, u32) == int.from_bytes(m.read_bytes(40, 4), "little")
    assert any(m.read_bytes(32, 128))  # all zeros: once in 2**1024
    assert not any(m.read_bytes(0, 32))
    assert not any(m.read_bytes(160, 1024 - 160))


def test_write_to_null() -> None:
    m = MemoryMapping(1024)
    with Path("/dev/null").open("wb", buffering=0) as file:
        m.write_from_memory(32, file, 128)
