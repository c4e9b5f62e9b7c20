"""The errors: their tree, fields, texts, causes; and what closed memory answers to everything."""

import copy
import ctypes
import errno
import inspect
import os
import pickle
import re
import weakref
from collections.abc import Callable
from struct import Struct
from typing import Any

import numpy as np
import pytest

import guestmem
from guestmem import MemoryMapping, VolatileMemory, VolatileSlice, errors, u8

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PAGE = os.sysconf("SC_PAGESIZE")
TOP = 2**64 - 1

# The tree: every class, and its bases. A base that is private stands for its own bases.
TREE: dict[str, tuple[str, ...]] = {
    "GuestMemoryError": ("Exception",),
    "MmapError": ("GuestMemoryError",),
    "InvalidAddressError": ("MmapError", "IndexError"),
    "InvalidOffsetError": ("MmapError", "ValueError"),
    "InvalidRangeError": ("MmapError", "IndexError"),
    "SystemCallFailedError": ("MmapError", "OSError"),
    "ReadFromSourceError": ("MmapError", "OSError"),
    "WriteToDestinationError": ("MmapError", "OSError"),
    "ReadFromMemoryError": ("MmapError", "OSError"),
    "WriteToMemoryError": ("MmapError", "OSError"),
    "ClosedError": ("MmapError", "ValueError"),
    "VolatileMemoryError": ("GuestMemoryError",),
    "OutOfBoundsError": ("VolatileMemoryError", "IndexError"),
    "AddressOverflowError": ("VolatileMemoryError", "OverflowError"),
    "MisalignedError": ("VolatileMemoryError", "ValueError"),
    "InvalidGuestAddressError": ("VolatileMemoryError", "IndexError"),
    "InvalidRegionError": ("VolatileMemoryError", "ValueError"),
    "MemoryRegionOverlapError": ("VolatileMemoryError", "ValueError"),
    "CoreDumpWarning": ("RuntimeWarning",),
}


def public_bases(cls: type) -> tuple[str, ...]:
    bases: list[str] = []
    for base in cls.__bases__:
        bases += public_bases(base) if base.__name__.startswith("_") else [base.__name__]
    return tuple(bases)


@pytest.mark.parametrize(("name", "bases"), TREE.items(), ids=TREE)
def test_tree(name: str, bases: tuple[str, ...]) -> None:
    cls = getattr(guestmem, name)
    assert public_bases(cls) == bases
    assert cls is getattr(errors, name)
    assert issubclass(cls, Exception)


def test_there_are_no_other_errors() -> None:
    for module in (guestmem, errors):
        classes = [
            v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Exception)
        ]
        public = [c.__name__ for c in classes if not c.__name__.startswith("_")]
        assert sorted(public) == sorted(TREE)
    assert sorted(errors.__all__) == sorted(TREE)


# Every error as it is raised: what raises it, its fields, and all of its text.


def mapping() -> MemoryMapping:
    return MemoryMapping(0x1388)


def closed() -> MemoryMapping:
    m = mapping()
    m.close()
    return m


def released() -> VolatileSlice:
    s = mapping().get_slice(0, 1)
    s.release()
    return s


class Full:
    """A destination without room, and a source without bytes."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def write(self, data: object) -> int:
        raise self.error

    readinto = write


class Silent:
    def write(self, data: object) -> int:
        return 0

    readinto = write


OUTSIDE = "offset 0x1380 + count 0x9 is not within memory of size 0x1388"
PAST = "offset 0x1380 + count 0x9 passes the end of memory of size 0x1388"
INVALID = os.strerror(errno.EINVAL)
NO_SPACE = os.strerror(errno.ENOSPC)
RAISED: dict[str, tuple[Callable[[], object], str, dict[str, Any], str]] = {
    "address": (
        lambda: mapping().read_bytes(0x1380, 9),
        "InvalidAddressError", {"offset": 0x1380, "count": 9, "size": 0x1388}, OUTSIDE,
    ),
    "range": (
        lambda: mapping().remove_range(0x1380, 9),
        "InvalidRangeError", {"offset": 0x1380, "count": 9, "size": 0x1388}, PAST,
    ),
    "range that cannot be removed": (
        lambda: mapping().remove_range(1, 9),
        "InvalidRangeError", {"offset": 1, "count": 9, "size": 0x1388},
        f"offset 0x1 + count 0x9 cannot be removed: [Errno 22] madvise: {INVALID}",
    ),
    "offset": (
        lambda: MemoryMapping.from_fd_offset(-1, 1, -16),
        "InvalidOffsetError", {"offset": -16},
        "file offset -0x10 is not from 0 to 0x7fffffffffffffff (off_t)",
    ),
    "system call": (
        lambda: MemoryMapping.from_fd(-1, 1),
        "SystemCallFailedError",
        {"errno": errno.EBADF, "strerror": os.strerror(errno.EBADF), "syscall": "mmap"},
        f"[Errno 9] mmap: {os.strerror(errno.EBADF)}",
    ),
    "source": (
        lambda: mapping().read_to_memory(0, Full(OSError(errno.ENOSPC, "x")), 1),
        "ReadFromSourceError", {"errno": errno.ENOSPC, "strerror": NO_SPACE, "transferred": 0},
        f"the source failed after 0 bytes: {NO_SPACE}",
    ),
    "source that ends": (
        lambda: mapping().read_to_memory(0, Silent(), 1),
        "ReadFromSourceError", {"errno": None, "strerror": "it ended early", "transferred": 0},
        "the source failed after 0 bytes: it ended early",
    ),
    "destination": (
        lambda: mapping().write_from_memory(0, Full(OSError(errno.ENOSPC, "x")), 1),
        "WriteToDestinationError", {"errno": errno.ENOSPC, "strerror": NO_SPACE, "transferred": 0},
        f"the destination failed after 0 bytes: {NO_SPACE}",
    ),
    "destination that takes nothing": (
        lambda: mapping().write_from_memory(0, Silent(), 1),
        "WriteToDestinationError",
        {"errno": None, "strerror": "it took no bytes", "transferred": 0},
        "the destination failed after 0 bytes: it took no bytes",
    ),
    "closed": (lambda: closed().as_ptr(), "ClosedError", {}, "the mapping has been closed"),
    "released": (lambda: released().as_ptr(), "ClosedError", {}, "the slice has been released"),
    "bounds": (
        lambda: mapping().get_slice(0x1380, 9),
        "OutOfBoundsError", {"addr": 0x1389},
        "a range that ends at 0x1389 is not within memory of size 0x1388",
    ),
    "hole": (
        lambda: guestmem.GuestMemory([(0x1000, mapping())]).read_bytes(0x2380, 9),
        "InvalidGuestAddressError", {"addr": 0x2388},
        "no region of guest memory holds address 0x2388",
    ),
    "border": (
        lambda: guestmem.GuestMemory([(0, mapping()), (0x1388, mapping())]).get_slice(0x1380, 9),
        "OutOfBoundsError", {"addr": 0x1389, "size": 0x1388, "border": True},
        "a range that ends at 0x1389 crosses into another region at 0x1388",
    ),
    "overlap": (
        lambda: guestmem.GuestMemory([(0, mapping()), (5, mapping())]),
        "MemoryRegionOverlapError",
        {"start": 5, "size": 0x1388, "other_start": 0, "other_size": 0x1388},
        "the region at 0x5 of size 0x1388 overlaps that at 0x0 of size 0x1388",
    ),
    "empty region": (
        lambda: guestmem.GuestMemory([(0x2000, mapping().get_slice(0, 0))]),
        "InvalidRegionError", {"start": 0x2000, "size": 0, "actual": None},
        "a region of guest memory cannot be empty: that at 0x2000 is",
    ),
    "other region": (
        lambda: guestmem.GuestMemory([(0x2000, mapping())]).without_region(0x2000, 5),
        "InvalidRegionError", {"start": 0x2000, "size": 5, "actual": 0x1388},
        "the region at 0x2000 has 0x1388 bytes, not 0x5",
    ),
    "alignment": (
        lambda: mapping().get_atomic_ref(0x13, guestmem.u16),
        "MisalignedError", {"addr": 0x13, "alignment": 2},
        "0x13 is not at a multiple of 2 in memory",
    ),
    "overflow": (
        lambda: mapping().get_slice(TOP, 3),
        "AddressOverflowError", {"base": TOP, "offset": 3},
        "0xffffffffffffffff + 0x3 passes 0xffffffffffffffff",
    ),
}  # fmt: skip

# Those that only a fault raises, made by hand.
BY_HAND: dict[str, tuple[Exception, dict[str, Any], str]] = {
    "fault of a read": (
        guestmem.ReadFromMemoryError(errno.EFAULT, "gone", 0x2000),
        {"errno": errno.EFAULT, "strerror": "gone", "offset": 0x2000, "piece": None},
        "memory faulted while it was read at offset 0x2000: gone",
    ),
    "fault of a write": (
        guestmem.WriteToMemoryError(errno.EFAULT, "gone", 0x2000),
        {"errno": errno.EFAULT, "strerror": "gone", "offset": 0x2000, "piece": None},
        "memory faulted while it was written at offset 0x2000: gone",
    ),
    "fault of a piece that is read": (
        guestmem.ReadFromMemoryError(errno.EFAULT, "gone", 5, 2),
        {"errno": errno.EFAULT, "strerror": "gone", "offset": 5, "piece": 2},
        "memory faulted while it was read at offset 0x5 of piece 2: gone",
    ),
    "fault of a piece that is written": (
        guestmem.WriteToMemoryError(errno.EFAULT, "gone", 0, 0),
        {"errno": errno.EFAULT, "strerror": "gone", "offset": 0, "piece": 0},
        "memory faulted while it was written at offset 0x0 of piece 0: gone",
    ),
}


def raised(call: Callable[[], object]) -> Exception:
    try:
        call()
    except guestmem.GuestMemoryError as error:
        return error
    raise AssertionError("nothing was raised")


def check(error: Exception, name: str, fields: dict[str, Any], text: str) -> None:
    assert type(error) is getattr(guestmem, name)
    assert {field: getattr(error, field) for field in fields} == fields
    assert all(type(getattr(error, field)) is type(value) for field, value in fields.items())
    assert str(error) == text


def copies(error: Exception) -> list[Exception]:
    pickled = [pickle.loads(pickle.dumps(error, protocol)) for protocol in PROTOCOLS]
    return [*pickled, copy.copy(error), copy.deepcopy(error)]


@pytest.mark.parametrize("case", RAISED)
def test_fields_and_text(case: str) -> None:
    call, name, fields, text = RAISED[case]
    check(raised(call), name, fields, text)


@pytest.mark.parametrize("case", RAISED)
def test_pickles_keep_fields_and_text(case: str) -> None:
    call, name, fields, text = RAISED[case]
    error = raised(call)
    error.add_note("a note")
    for twin in copies(error):
        assert twin is not error
        check(twin, name, fields, text)
        assert twin.args == error.args
        assert twin.__notes__ == ["a note"]


@pytest.mark.parametrize("case", BY_HAND)
def test_faults(case: str) -> None:
    error, fields, text = BY_HAND[case]
    for each in (error, *copies(error)):
        check(each, type(error).__name__, fields, text)


def test_a_pickle_of_a_closed_error_keeps_its_text() -> None:
    for twin in copies(guestmem.ClosedError("mine")):
        assert str(twin) == "mine"


def test_errno_means_what_it_means_to_os_error() -> None:
    error = raised(lambda: MemoryMapping(0))
    assert isinstance(error, OSError)
    assert error.args == (errno.EINVAL, os.strerror(errno.EINVAL))
    assert error.filename is None


# Causes


def test_no_cause_where_nothing_was_wrapped() -> None:
    for case in ("address", "range", "offset", "system call", "closed", "bounds", "overflow"):
        error = raised(RAISED[case][0])
        assert error.__cause__ is None
        assert error.__context__ is None


def test_the_cause_of_a_range_that_cannot_be_removed() -> None:
    cause = raised(RAISED["range that cannot be removed"][0]).__cause__
    assert isinstance(cause, guestmem.SystemCallFailedError)
    assert (cause.errno, cause.syscall) == (errno.EINVAL, "madvise")


@pytest.mark.parametrize("name", ["read_to_memory", "write_from_memory"])
def test_the_cause_of_a_failed_transfer(name: str) -> None:
    for original in (OSError(errno.EIO, "mine"), PermissionError(errno.EPERM, "no"), OSError("x")):
        error = raised(lambda: getattr(mapping(), name)(0, Full(original), 1))  # noqa: B023
        assert isinstance(error, OSError)
        assert error.__cause__ is original
        assert error.errno == original.errno
    assert isinstance(raised(RAISED["source that ends"][0]).__cause__, EOFError)


def test_the_cause_of_a_buffer_error() -> None:
    array = np.zeros(4, dtype="u1")
    array.flags.writeable = False
    with pytest.raises(BufferError) as caught:
        mapping().read_exact(array, 0)
    assert type(caught.value.__cause__) is ValueError
    for bad in (b"1234", memoryview(bytearray(8))[::2], memoryview(b"")):
        with pytest.raises(BufferError, match="writable contiguous buffer"):
            mapping().read_slice(bad, 0)
    with pytest.raises(TypeError, match="contiguous buffer, not 'str'"):
        mapping().write_slice("text", 0)  # type: ignore[arg-type]


def test_no_text_shows_a_host_address() -> None:
    m = mapping()
    s = m.get_slice(8, 64)
    calls: list[Callable[[], object]] = [
        lambda: m.read_bytes(TOP, TOP), lambda: s.read_bytes(65, 0), lambda: s.get_slice(65, 0),
        lambda: s.get_ref(TOP, u8), lambda: s.offset(65), lambda: s.remove_range(0, 1),
        lambda: s.write_from_memory(TOP, 1, TOP), lambda: m.remove_range(8, PAGE),
        lambda: m.read_to_memory(0, -1, 1),
    ]  # fmt: skip
    for call in calls:
        text = f"{raised(call)} {raised(call)!r} {raised(call).__cause__}"
        for address in (m.as_ptr(), s.as_ptr()):
            assert f"{address:x}" not in text.lower()
            assert str(address) not in text


# Closed memory

METHODS: dict[str, Callable[[Any], object]] = {
    "as_ptr": lambda m: m.as_ptr(),
    "get_slice": lambda m: m.get_slice(0, 0),
    "get_ref": lambda m: m.get_ref(0, u8),
    "get_ref Struct": lambda m: m.get_ref(0, Struct("")),
    "get_atomic_ref": lambda m: m.get_atomic_ref(0, u8),
    "get_array_ref": lambda m: m.get_array_ref(0, 1, u8),
    "read_obj": lambda m: m.read_obj(0, u8),
    "read_obj ctypes": lambda m: m.read_obj(0, ctypes.c_int),
    "read_obj Struct": lambda m: m.read_obj(0, Struct("")),
    "write_obj": lambda m: m.write_obj(0, 0, u8),
    "write_obj ctypes": lambda m: m.write_obj(ctypes.c_int(1), 0),
    "read_slice": lambda m: m.read_slice(bytearray(1), 0),
    "write_slice": lambda m: m.write_slice(b"", 0),
    "read_bytes": lambda m: m.read_bytes(0, 0),
    "read_exact": lambda m: m.read_exact(bytearray(), 0),
    "write_all": lambda m: m.write_all(b"", 0),
    "read_to_memory": lambda m: m.read_to_memory(0, 0, 0),
    "write_from_memory": lambda m: m.write_from_memory(0, 1, 0),
    "fill": lambda m: m.fill(0, 0, 0),
    "remove_range": lambda m: m.remove_range(0, 0),
    "__enter__": lambda m: m.__enter__(),
    "__buffer__": memoryview,
    "bytes": bytes,
    "from_buffer": VolatileSlice.from_buffer,
    "used as a buffer": lambda m: mapping().write_slice(m, 0),
}
OF_A_SLICE: dict[str, Callable[[Any], object]] = {
    "read_from": lambda s: s.read_from(0, 0),
    "write_to": lambda s: s.write_to(1, 0),
    "offset": lambda s: s.offset(0),
    "copy_to": lambda s: s.copy_to(bytearray()),
    "copy_from": lambda s: s.copy_from(b""),
    "copy_to_volatile_slice": lambda s: s.copy_to_volatile_slice(mapping().get_slice(0, 0)),
    "copy_to_volatile_slice dst": lambda s: mapping().get_slice(0, 0).copy_to_volatile_slice(s),
}
STILL_ALLOWED = {
    "close",
    "release",
    "size",
    "closed",
    "dirty",
    "from_fd",
    "from_fd_offset",
    "from_buffer",
}


@pytest.mark.parametrize("what", METHODS)
def test_closed_mapping(what: str) -> None:
    with pytest.raises(guestmem.ClosedError, match="^the mapping has been closed$"):
        METHODS[what](closed())


@pytest.mark.parametrize("what", METHODS | OF_A_SLICE)
def test_released_slice(what: str) -> None:
    with pytest.raises(guestmem.ClosedError, match="^the slice has been released$"):
        (METHODS | OF_A_SLICE)[what](released())


@pytest.mark.parametrize("cls", [MemoryMapping, VolatileSlice])
def test_no_method_is_forgotten_here(cls: type[VolatileMemory]) -> None:
    table = METHODS | (OF_A_SLICE if cls is VolatileSlice else {})
    covered = {re.sub(" .*", "", name) for name in table}
    public = {name for name in dir(cls) if not name.startswith("_")}
    assert public - covered - STILL_ALLOWED == set()
    assert {n for n in public & STILL_ALLOWED if inspect.isroutine(getattr(cls, n))} == (
        {"close", "from_fd", "from_fd_offset"}
        if cls is MemoryMapping
        else {"release", "from_buffer"}
    )


@pytest.mark.parametrize("make", [closed, released])
def test_what_closed_memory_still_does(make: Callable[[], Any]) -> None:
    m = make()
    size = 0x1388 if make is closed else 1
    shut = m.close if make is closed else m.release
    assert (m.size, len(m), bool(m)) == (size, size, True)
    assert m.closed is True
    assert repr(m).startswith(f"<guestmem.{type(m).__name__} size={size:#x} ")
    assert ("closed" if make is closed else "released") in repr(m)
    assert shut() is None
    assert shut() is None
    assert m.__exit__(None, None, None) is None
    assert m.__exit__(ValueError, ValueError(), None) is None
    assert weakref.ref(m)() is m
    assert m == m  # noqa: PLR0124
    assert hash(m) == hash(m)
    assert isinstance(m, VolatileMemory)
