"""Arguments that are no plain int, or not one that fits: every integer argument of every method."""

import ctypes
import enum
import errno
import os
import re
from collections.abc import Callable, Iterator
from struct import Struct
from typing import Any

import numpy as np
import pytest

from guestmem import (
    ClosedError,
    InvalidOffsetError,
    MemoryMapping,
    SystemCallFailedError,
    VolatileMemory,
    VolatileSlice,
    u8,
)

SIZE = 64
PAGE = os.sysconf("SC_PAGESIZE")
HUGE = 10**5000
BEFORE = bytes(range(1, SIZE + 1))
FILE = b"twelve bytes"
PAIR = Struct("<BB")

# (method, argument) -> a call with that argument; everything else in it is right.
Call = Callable[[Any, Any, bytearray, int], object]
CALLS: dict[tuple[str, str], Call] = {
    ("get_slice", "offset"): lambda m, x, buf, fd: m.get_slice(x, 1),
    ("get_slice", "count"): lambda m, x, buf, fd: m.get_slice(1, x),
    ("get_ref", "offset"): lambda m, x, buf, fd: m.get_ref(x, u8),
    ("get_ref ctypes", "offset"): lambda m, x, buf, fd: m.get_ref(x, ctypes.c_int16),
    ("read_obj", "offset"): lambda m, x, buf, fd: m.read_obj(x, u8),
    ("read_obj ctypes", "offset"): lambda m, x, buf, fd: m.read_obj(x, ctypes.c_int16),
    ("read_obj Struct", "offset"): lambda m, x, buf, fd: m.read_obj(x, PAIR),
    ("write_obj", "offset"): lambda m, x, buf, fd: m.write_obj(0, x, u8),
    ("write_obj", "guestmem.u8"): lambda m, x, buf, fd: m.write_obj(x, 1, u8),
    ("write_obj ctypes", "offset"): lambda m, x, buf, fd: m.write_obj(ctypes.c_int16(0), x),
    ("write_obj Struct", "offset"): lambda m, x, buf, fd: m.write_obj((0, 0), x, type=PAIR),
    ("read_slice", "offset"): lambda m, x, buf, fd: m.read_slice(buf, x),
    ("write_slice", "offset"): lambda m, x, buf, fd: m.write_slice(b"\0\0", x),
    ("read_bytes", "offset"): lambda m, x, buf, fd: m.read_bytes(x, 1),
    ("read_bytes", "count"): lambda m, x, buf, fd: m.read_bytes(1, x),
    ("read_exact", "offset"): lambda m, x, buf, fd: m.read_exact(buf, x),
    ("write_all", "offset"): lambda m, x, buf, fd: m.write_all(b"\0\0", x),
    ("fill", "byte"): lambda m, x, buf, fd: m.fill(x, 1, 1),
    ("fill", "offset"): lambda m, x, buf, fd: m.fill(0, x, 1),
    ("fill", "count"): lambda m, x, buf, fd: m.fill(0, 1, x),
    ("read_to_memory", "mem_offset"): lambda m, x, buf, fd: m.read_to_memory(x, fd, 1),
    ("read_to_memory", "count"): lambda m, x, buf, fd: m.read_to_memory(1, fd, x),
    ("read_to_memory", "src_offset"): lambda m, x, buf, fd: m.read_to_memory(1, fd, 1, x),
    ("write_from_memory", "mem_offset"): lambda m, x, buf, fd: m.write_from_memory(x, fd, 1),
    ("write_from_memory", "count"): lambda m, x, buf, fd: m.write_from_memory(1, fd, x),
    ("write_from_memory", "dst_offset"): lambda m, x, buf, fd: m.write_from_memory(1, fd, 1, x),
    ("remove_range", "mem_offset"): lambda m, x, buf, fd: m.remove_range(x, 0),
    ("remove_range", "count"): lambda m, x, buf, fd: m.remove_range(0, x),
}
# None means the default there.
OPTIONAL = {
    ("fill", "count"),
    ("read_to_memory", "src_offset"),
    ("write_from_memory", "dst_offset"),
}
each_call = pytest.mark.parametrize("what", CALLS, ids=" ".join)


class Fixture:
    """Memory, a buffer and a file, of which nothing may change."""

    def __init__(self, kind: str) -> None:
        self.watched = os.memfd_create("guest")
        self.file = os.memfd_create("file")
        os.ftruncate(self.watched, PAGE)
        os.write(self.file, FILE)
        os.lseek(self.file, 0, os.SEEK_SET)
        self.buf = bytearray(b"xx")
        self.mapping = MemoryMapping.from_fd(self.watched, SIZE)
        self.m: VolatileMemory = self.mapping
        if kind == "slice":
            self.m = self.mapping.get_slice(0, SIZE)
        self.m.write_all(BEFORE, 0)

    def check_untouched(self) -> None:
        assert os.pread(self.watched, SIZE + 1, 0) == BEFORE + b"\0"
        assert os.pread(self.file, SIZE, 0) == FILE
        assert os.lseek(self.file, 0, os.SEEK_CUR) == 0
        assert self.buf == b"xx"

    def state(self) -> tuple[bytes, bytes, int, bytes]:
        position = os.lseek(self.file, 0, os.SEEK_CUR)
        return (
            os.pread(self.watched, SIZE, 0), os.pread(self.file, SIZE, 0), position, bytes(self.buf)
        )  # fmt: skip

    def call(self, what: tuple[str, str], value: object) -> object:
        return CALLS[what](self.m, value, self.buf, self.file)

    def shut(self) -> None:
        if isinstance(self.m, VolatileSlice):
            self.m.release()
        else:
            self.mapping.close()


@pytest.fixture(params=["mapping", "slice"])
def fixture(request: pytest.FixtureRequest) -> Iterator[Fixture]:
    fixture = Fixture(request.param)
    yield fixture
    os.close(fixture.watched)
    os.close(fixture.file)


class Index:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> int:
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value  # type: ignore[no-any-return]


class SubInt(int):
    def __index__(self) -> int:
        raise AssertionError("an int is taken for what it is")


class Five(enum.IntEnum):
    FIVE = 5


NUMPY = [getattr(np, f"{u}int{bits}") for u in ("", "u") for bits in (8, 16, 32, 64)]
FIVES = [SubInt(5), Five.FIVE, Index(5), *(t(5) for t in NUMPY)]
ONES = [True, np.array(1), Index(True and 1), SubInt(1)]


@each_call
def test_whatever_has_an_index(what: tuple[str, str], fixture: Fixture) -> None:
    for plain, others in ((5, FIVES), (1, ONES)):
        twin = Fixture("slice" if isinstance(fixture.m, VolatileSlice) else "mapping")
        expected = twin.call(what, plain)
        after = twin.state()
        os.close(twin.watched)
        os.close(twin.file)
        for value in others:
            other = Fixture("slice" if isinstance(fixture.m, VolatileSlice) else "mapping")
            result = other.call(what, value)
            assert other.state() == after, repr(value)
            assert type(result) is type(expected)
            if isinstance(result, int | bytes | tuple):
                assert result == expected
            elif result is not None and not isinstance(result, ctypes.c_int16):
                assert result.size == expected.size  # type: ignore[attr-defined]
            del result
            os.close(other.watched)
            os.close(other.file)


NO_OFFSETS = [-1, -(2**31), -(2**63), -(2**63) - 1, -(2**64), -HUGE, 2**64, 2**64 + 1, HUGE]


@each_call
def test_ints_that_cannot_be(what: tuple[str, str], fixture: Fixture) -> None:
    for number in NO_OFFSETS:
        for value in (number, Index(number)):
            with pytest.raises(OverflowError) as caught:
                fixture.call(what, value)
            assert type(caught.value) is OverflowError
            assert what[1] in str(caught.value)
            assert len(str(caught.value)) < 100
            fixture.check_untouched()


@each_call
def test_other_types(what: tuple[str, str], fixture: Fixture) -> None:
    values: list[object] = ["1", b"1", 1.0, np.float64(1), 1j, [1], object(), int, Ellipsis]
    for value in values if what in OPTIONAL else [*values, None]:
        with pytest.raises(TypeError) as caught:
            fixture.call(what, value)
        came = f"the class '{value.__name__}'" if isinstance(value, type) else type(value).__name__
        assert re.search(f"must be an int, not '?{came}", str(caught.value))
        assert what[1] in str(caught.value) or what[1] == "guestmem.u8"
        fixture.check_untouched()


@each_call
@pytest.mark.parametrize("answer", ["1", 1.0, None, NotImplemented])
def test_index_that_returns_nonsense(
    what: tuple[str, str], fixture: Fixture, answer: object
) -> None:
    with pytest.raises(TypeError, match="__index__ returned non-int"):
        fixture.call(what, Index(answer))
    fixture.check_untouched()


@each_call
@pytest.mark.parametrize("error", [LookupError("mine"), OverflowError("mine"), KeyboardInterrupt()])
def test_index_that_raises(what: tuple[str, str], fixture: Fixture, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        fixture.call(what, Index(error))
    assert caught.value is error
    fixture.check_untouched()


@each_call
@pytest.mark.parametrize("answer", [0, 1, SIZE, 2**63 - 1])
def test_index_that_closes(what: tuple[str, str], fixture: Fixture, answer: int) -> None:
    if what[1] in ("byte", "guestmem.u8"):
        answer = min(answer, 255)

    class Hostile:
        def __index__(self) -> int:
            fixture.shut()
            return answer

    with pytest.raises(ClosedError):
        fixture.call(what, Hostile())
    assert fixture.m.closed
    fixture.check_untouched()


def test_index_that_closes_under_offset(fixture: Fixture) -> None:
    s = fixture.mapping.get_slice(0, SIZE)

    class Hostile:
        def __index__(self) -> int:
            s.release()
            return 1

    with pytest.raises(ClosedError):
        s.offset(Hostile())


def test_offset_of_a_slice() -> None:
    s = MemoryMapping(SIZE).get_slice(0, SIZE)
    for good in (*FIVES, *ONES):
        assert s.offset(good).size == SIZE - int(good.__index__() if type(good) is Index else good)
    for number in NO_OFFSETS:
        with pytest.raises(OverflowError, match="count"):
            s.offset(number)
    with pytest.raises(TypeError, match="count must be an int, not 'str'"):
        s.offset("1")  # type: ignore[arg-type]


@pytest.mark.parametrize("byte", [256, 257, 2**16, 2**63, 2**64 - 1])
def test_byte_of_fill(fixture: Fixture, byte: int) -> None:
    with pytest.raises(OverflowError, match="byte must be from 0 to 255"):
        fixture.m.fill(byte)
    fixture.check_untouched()


# Constructors


class Fd:
    """Fails the test where it is asked for its fd."""

    def fileno(self) -> int:
        raise AssertionError("the fd was touched")


def test_size_of_a_mapping() -> None:
    fd = os.memfd_create("file")
    makers: list[Callable[[Any], MemoryMapping]] = [
        MemoryMapping,
        lambda size: MemoryMapping(size=size),
        lambda size: MemoryMapping.from_fd(fd, size),
        lambda size: MemoryMapping.from_fd_offset(fd, size=size, offset=PAGE),
    ]
    for make in makers:
        for good in (*FIVES, *ONES):
            m = make(good)
            assert m.size == len(m) == int(m.get_slice(0, good).size)
        for number in NO_OFFSETS:
            with pytest.raises(OverflowError, match="^size "):
                make(number)
        for value in ("1", 1.0, None):
            with pytest.raises(TypeError, match="^size must be an int, not "):
                make(value)
        for number, code in ((0, errno.EINVAL), (2**63, errno.ENOMEM), (2**64 - 1, errno.ENOMEM)):
            with pytest.raises(SystemCallFailedError) as caught:
                make(number)
            assert (caught.value.errno, caught.value.syscall) == (code, "mmap")
    os.close(fd)


def test_offset_in_a_file() -> None:
    for offset in (-1, -(2**64), -HUGE, 2**63, 2**63 + PAGE, 2**64, HUGE):
        for value in (offset, Index(offset)):
            with pytest.raises(InvalidOffsetError) as caught:
                MemoryMapping.from_fd_offset(Fd(), PAGE, value)
            assert type(caught.value.offset) is int
            assert caught.value.offset == offset
            assert f"{offset:#x}" in str(caught.value)


def test_offset_in_a_file_that_the_kernel_refuses() -> None:
    fd = os.memfd_create("file")
    for offset in (1, PAGE - 1, PAGE + 1, 2**63 - 1):
        with pytest.raises(SystemCallFailedError) as caught:
            MemoryMapping.from_fd_offset(fd, PAGE, offset)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(TypeError, match="^offset must be an int, not 'float'"):
        MemoryMapping.from_fd_offset(Fd(), PAGE, 1.0)  # type: ignore[arg-type]
    os.close(fd)


@pytest.mark.parametrize("name", ["read_to_memory", "write_from_memory"])
def test_offset_of_a_transfer(name: str, fixture: Fixture) -> None:
    transfer = getattr(fixture.m, name)
    for offset in (2**63, 2**64 - 1):
        for value in (offset, Index(offset), np.uint64(offset)):
            with pytest.raises(InvalidOffsetError) as caught:
                transfer(0, fixture.file, 1, value)
            assert type(caught.value.offset) is int
            assert caught.value.offset == offset
            assert f"{offset:#x}" in str(caught.value)
    with pytest.raises(InvalidOffsetError):  # the last byte would be past the largest off_t
        transfer(0, fixture.file, 2, 2**63 - 2)
    fixture.check_untouched()


@pytest.mark.parametrize("fd", [-1, 10**6, 2**31 - 1, -(2**31)])
def test_fds_that_are_not_open(fd: int) -> None:
    for make in (MemoryMapping.from_fd, lambda f, n: MemoryMapping.from_fd_offset(f, n, PAGE)):
        with pytest.raises(SystemCallFailedError) as caught:
            make(fd, PAGE)
        assert caught.value.errno == errno.EBADF


def test_fds_that_are_none() -> None:
    for number in (2**31, -(2**31) - 1, 2**64, HUGE):
        with pytest.raises(OverflowError, match="^fd "):
            MemoryMapping.from_fd(number, PAGE)
    for value in ("0", 1.0, None, b""):
        with pytest.raises(TypeError, match="^fd must be an int or an object with fileno"):
            MemoryMapping.from_fd(value, PAGE)  # type: ignore[arg-type]


# How many, and by which name


@pytest.mark.parametrize("name", sorted({what[0] for what in CALLS if " " not in what[0]}))
def test_wrong_number_of_arguments(name: str, fixture: Fixture) -> None:
    method = getattr(fixture.m, name)
    for args in ((), (1,) * 5, (1,) * 50):
        with pytest.raises(TypeError, match=name):
            method(*args)
    with pytest.raises(TypeError, match=name):
        method(0, 0, nonsense=1)
    fixture.check_untouched()
