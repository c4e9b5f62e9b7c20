"""What is mapped: from which file, where, with which flags; and what remove_range gives back."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import mmap
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from guestmem import (
    InvalidOffsetError,
    InvalidRangeError,
    MemoryMapping,
    SystemCallFailedError,
    VolatileMemory,
    VolatileSlice,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Backing

    Backings = Callable[[int], Backing]

PAGE = os.sysconf("SC_PAGESIZE")


def smaps(memory: VolatileMemory) -> tuple[str, set[str]]:
    """Return the permissions and the flags of the mapping that holds the memory's first byte."""
    permissions, inside = "", False
    with open("/proc/self/smaps") as file:
        for line in file:
            head = line.split()
            if "-" in head[0] and not head[0].endswith(":"):
                start, end = (int(part, 16) for part in head[0].split("-"))
                inside = start <= memory.as_ptr() < end
                permissions = head[1] if inside else permissions
            elif inside and line.startswith("VmFlags:"):
                return permissions, set(head[1:])
    pytest.fail("it is not mapped")


def test_anonymous_memory() -> None:
    mapping = MemoryMapping(3 * PAGE)
    permissions, flags = smaps(mapping)
    assert permissions == "rw-s"
    assert {"rd", "wr", "sh", "nr", "dd"} <= flags  # nr: MAP_NORESERVE; dd: not in core dumps
    assert "ex" not in flags
    assert mapping.read_bytes(0, 3 * PAGE) == bytes(3 * PAGE)


def test_memory_of_a_file(backing: Backings) -> None:
    mapping = MemoryMapping.from_fd(backing(PAGE).fd, PAGE)
    permissions, flags = smaps(mapping)
    assert permissions == "rw-s"
    assert {"rd", "wr", "sh", "dd"} <= flags


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 17])
def test_the_size_is_what_was_asked_for(backing: Backings, size: int) -> None:
    file = backing(4 * PAGE)
    for mapping in (
        MemoryMapping(size),
        MemoryMapping(size=size),
        MemoryMapping.from_fd(file.fd, size),
        MemoryMapping.from_fd_offset(file.fd, size, 0),
    ):
        assert mapping.size == len(mapping) == size
        assert repr(mapping) == f"<guestmem.MemoryMapping size={size:#x}>"
        mapping.write_all(b"x", size - 1)
        with pytest.raises(IndexError):
            mapping.write_all(b"x", size)
        assert memoryview(mapping).nbytes == size


def test_sizes_that_cannot_be_mapped(backing: Backings) -> None:
    file = backing(PAGE)
    makers: list[Callable[[int], MemoryMapping]] = [
        MemoryMapping,
        lambda size: MemoryMapping.from_fd(file.fd, size),
    ]
    for make in makers:
        for size, codes in (
            (0, {errno.EINVAL}),
            (2**47, {errno.ENOMEM}),
            (2**63, {errno.ENOMEM, errno.EOVERFLOW}),
            (2**64 - 1, {errno.ENOMEM, errno.EOVERFLOW}),
        ):
            with pytest.raises(SystemCallFailedError) as caught:
                make(size)
            assert caught.value.errno in codes, size
            assert caught.value.syscall == "mmap"
            assert caught.value.strerror == os.strerror(caught.value.errno or 0)
        for bad in (-1, 2**64, -(2**64)):
            with pytest.raises(OverflowError, match="^size must"):
                make(bad)
        for odd in ("4096", 4096.0, None, b""):
            with pytest.raises(TypeError, match="^size must be an int, not"):
                make(odd)  # type: ignore[arg-type]
    assert file.maps() == 0


def test_the_mapping_outlives_the_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * PAGE)
    with path.open("r+b") as opened:
        mapping = MemoryMapping.from_fd(opened, PAGE)
    path.unlink()
    assert mapping.read_bytes(0, 2) == b"aa"
    mapping.fill(0x62)
    assert mapping.read_bytes(PAGE - 2, 2) == b"bb"


def test_what_is_written_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE + 10))
    with path.open("r+b") as opened:
        mapping = MemoryMapping.from_fd_offset(opened.fileno(), PAGE + 10, PAGE)
        mapping.write_all(b"first", 0)
        mapping.write_all(b"last", PAGE + 6)
        mapping.close()
    assert path.read_bytes() == (
        bytes(PAGE) + b"first".ljust(PAGE, b"\0") + b"last".rjust(10, b"\0")
    )


def test_two_mappings_of_one_file_see_each_other(backing: Backings) -> None:
    file = backing(4 * PAGE)
    whole = MemoryMapping.from_fd(file.fd, 4 * PAGE)
    part = MemoryMapping.from_fd_offset(fd=file.fd, size=PAGE, offset=2 * PAGE)
    whole.write_obj(2**64 - 2, 2 * PAGE + 8, u64)
    assert part.read_obj(8, u64) == 2**64 - 2
    ref = whole.get_ref(3 * PAGE - 8, u64)
    part.write_obj(5, PAGE - 8, u64)
    assert ref.load() == 5
    assert file.maps() == 2


def test_file_offsets(backing: Backings) -> None:
    file = backing(PAGE)
    for offset in (1, PAGE - 1, PAGE + 1, 2**63 - 1):
        with pytest.raises(SystemCallFailedError) as caught:
            MemoryMapping.from_fd_offset(file.fd, PAGE, offset)
        assert (caught.value.errno, caught.value.syscall) == (errno.EINVAL, "mmap")
    MemoryMapping.from_fd_offset(file.fd, PAGE, 1 << 40)  # beyond the file: nobody has touched it
    asked: list[int] = []

    class Asked:
        def fileno(self) -> int:
            asked.append(1)
            return file.fd

    for offset in (2**63, 2**64 - PAGE, 2**64, 2**80, -1, -PAGE, -(2**80)):
        for fd in (file.fd, -1, Asked()):
            with pytest.raises(InvalidOffsetError) as refused:
                MemoryMapping.from_fd_offset(fd, PAGE, offset)
            assert refused.value.offset == offset
    assert asked == []
    with pytest.raises(TypeError, match="^offset must be an int, not 'float'$"):
        MemoryMapping.from_fd_offset(file.fd, PAGE, 0.0)  # type: ignore[arg-type]
    MemoryMapping.from_fd_offset(Asked(), PAGE, 0)
    assert asked == [1]


def test_descriptors_that_cannot_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    read_only, write_only = os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY)
    directory = os.open(tmp_path, os.O_RDONLY)
    closed = fcntl.fcntl(directory, fcntl.F_DUPFD_CLOEXEC, 500)  # which nobody opens meanwhile
    os.close(closed)
    left, right = socket.socketpair()
    with left, right:
        for fd, code in (
            (-1, errno.EBADF),
            (closed, errno.EBADF),
            (2**31 - 1, errno.EBADF),
            (read_only, errno.EACCES),
            (write_only, errno.EACCES),
            (directory, errno.EACCES),
            (left, errno.ENODEV),
        ):
            with pytest.raises(SystemCallFailedError) as caught:
                MemoryMapping.from_fd(fd, PAGE)
            assert (caught.value.errno, caught.value.syscall) == (code, "mmap"), fd
    for fd in (read_only, write_only, directory):
        os.close(fd)
    assert path.read_bytes() == bytes(PAGE)


class Answering:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def fileno(self) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def test_fileno_that_answers_nonsense() -> None:
    for answer in ("3", None, 3.0, [3]):
        with pytest.raises(TypeError, match=r"^what fileno\(\) returns must be an int, not"):
            MemoryMapping.from_fd(Answering(answer), PAGE)
    for answer in (2**31, -(2**31) - 1, 2**80):
        with pytest.raises(OverflowError, match="^fd must be a file descriptor, a C int, not"):
            MemoryMapping.from_fd(Answering(answer), PAGE)
    for raised in (OSError(5, "no"), ZeroDivisionError(), AttributeError("inside")):
        with pytest.raises(type(raised)) as caught:
            MemoryMapping.from_fd(Answering(raised), PAGE)
        assert caught.value is raised
    for thing in ("3", None, 3.0, object(), b"/dev/zero", io.BytesIO()):
        with pytest.raises(
            TypeError, match=r"^fd must be an int or an object with fileno\(\), not"
        ):
            MemoryMapping.from_fd(thing, PAGE)  # type: ignore[arg-type]


def test_huge_mappings_are_not_backed_until_touched() -> None:
    size = 1 << 38  # more than any test machine has
    mapping = MemoryMapping(size)
    mapping.write_obj(7, size - 8, u64)
    assert mapping.read_obj(size - 8, u64) == 7
    assert mapping.read_obj(size // 2, u64) == 0


# remove_range


def filled(file: Backing) -> MemoryMapping:
    mapping = MemoryMapping.from_fd(file.fd, file.size)
    mapping.fill(0xAA)
    return mapping


@pytest.mark.parametrize(
    ("start", "count"),
    [
        (0, PAGE), (0, 4 * PAGE), (PAGE, 2 * PAGE), (3 * PAGE, PAGE),
        (0, 1), (PAGE, 100), (PAGE, PAGE - 1), (PAGE, PAGE + 1), (PAGE, 2 * PAGE + 77),
        (0, 4 * PAGE - 1), (2 * PAGE, 0), (4 * PAGE, 0), (5, 0),
    ],
)  # fmt: skip
def test_remove_range(backing: Backings, start: int, count: int) -> None:
    file = backing(4 * PAGE)
    mapping = filled(file)
    assert mapping.remove_range(start, count) is None  # type: ignore[func-returns-value]
    expected = b"\xaa" * start + bytes(count) + b"\xaa" * (4 * PAGE - start - count)
    assert mapping.read_bytes(0, 4 * PAGE) == expected
    assert file.read() == expected


def test_remove_range_gives_whole_pages_back(backing: Backings) -> None:
    file = backing(64 * PAGE)
    mapping = filled(file)
    full = file.blocks()
    assert full == 64 * PAGE
    mapping.remove_range(0, 10 * PAGE)
    assert file.blocks() == full - 10 * PAGE
    mapping.remove_range(32 * PAGE, 5 * PAGE + 1)  # the sixth page is in use still
    assert file.blocks() == full - 15 * PAGE
    mapping.remove_range(50 * PAGE, PAGE - 1)
    assert file.blocks() == full - 15 * PAGE
    mapping.fill(1)
    assert file.blocks() == full
    mapping.remove_range(0, 64 * PAGE)
    assert file.blocks() == 0
    assert mapping.read_bytes(0, 64 * PAGE) == bytes(64 * PAGE)


def test_remove_range_of_anonymous_memory_and_slices() -> None:
    mapping = MemoryMapping(4 * PAGE + 10)
    mapping.fill(0xAA)
    part = mapping.get_slice(PAGE, 3 * PAGE + 10)
    part.remove_range(PAGE, 2 * PAGE + 10)
    assert mapping.read_bytes(0, 4 * PAGE + 10) == b"\xaa" * 2 * PAGE + bytes(2 * PAGE + 10)
    mapping.remove_range(0, 1)
    assert mapping.read_bytes(0, 3) == b"\0\xaa\xaa"


def refused(memory: VolatileMemory, start: int, count: int, code: int) -> None:
    before = memory.read_bytes(0, memory.size)
    with pytest.raises(InvalidRangeError) as caught:
        memory.remove_range(start, count)
    error = caught.value
    assert (error.offset, error.count, error.size) == (start, count, memory.size)
    cause = error.__cause__
    assert isinstance(cause, SystemCallFailedError)
    assert (cause.errno, cause.syscall) == (code, "madvise")
    assert str(cause) in str(error)
    assert memory.read_bytes(0, memory.size) == before


def test_remove_range_refuses_a_start_inside_a_page(backing: Backings) -> None:
    mapping = filled(backing(4 * PAGE))
    for start, count in ((1, 1), (1, PAGE), (PAGE - 1, 1), (PAGE + 8, 2 * PAGE), (8, PAGE - 8)):
        refused(mapping, start, count, errno.EINVAL)
    part = mapping.get_slice(100, 3 * PAGE)
    refused(part, 0, 2 * PAGE, errno.EINVAL)
    refused(part, 0, 1, errno.EINVAL)
    part.remove_range(PAGE - 100, PAGE)  # aligned in memory, and that is what counts
    assert mapping.read_bytes(PAGE - 1, PAGE + 2) == b"\xaa" + bytes(PAGE) + b"\xaa"


def test_remove_range_out_of_range(backing: Backings) -> None:
    mapping = filled(backing(2 * PAGE))
    for start, count in (
        (0, 2 * PAGE + 1), (2 * PAGE, 1), (PAGE, PAGE + 1), (3, 2**64 - 1), (2**64 - 1, 0),
        (2**63, 2**63),
    ):  # fmt: skip
        with pytest.raises(InvalidRangeError) as caught:
            mapping.remove_range(start, count)
        assert caught.value.__cause__ is None
        assert (caught.value.offset, caught.value.count) == (start, count)
    assert mapping.read_bytes(0, 2 * PAGE) == b"\xaa" * 2 * PAGE


@pytest.mark.parametrize("kind", ["anonymous", "file"])
def test_remove_range_of_private_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PAGE))
    with path.open("r+b") as opened:
        private = mmap.mmap(
            -1 if kind == "anonymous" else opened.fileno(), 3 * PAGE, flags=mmap.MAP_PRIVATE
        )
    part = VolatileSlice.from_buffer(private)
    part.fill(0xAA)
    code = errno.EINVAL if kind == "anonymous" else errno.EACCES
    refused(part, 0, PAGE, code)
    refused(part, PAGE, 2 * PAGE, code)
    refused(part, PAGE, PAGE + 5, code)  # the part of a page neither
    part.remove_range(PAGE, PAGE - 1)  # no whole page: any memory will do
    assert private[:] == b"\xaa" * PAGE + bytes(PAGE - 1) + b"\xaa" * (PAGE + 1)
    part.release()
    private.close()


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer makes mlock do nothing"
)
def test_remove_range_of_locked_memory(backing: Backings) -> None:
    mapping = filled(backing(2 * PAGE))
    libc = ctypes.CDLL(None)
    libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    if libc.mlock(mapping.as_ptr(), 2 * PAGE) != 0:
        pytest.skip("mlock(2) is not allowed here")
    refused(mapping, 0, PAGE, errno.EINVAL)


# Huge pages


def huge_page_size() -> int:
    with open("/proc/meminfo") as file:
        values = {line.split(":")[0]: int(line.split()[1]) for line in file}
    if values.get("HugePages_Free", 0) < 2:
        pytest.skip("fewer than two huge pages are free: see /proc/sys/vm/nr_hugepages")
    return values["Hugepagesize"] * 1024


def test_huge_pages() -> None:
    huge = huge_page_size()
    fd = os.memfd_create("guestmem-huge", os.MFD_HUGETLB)
    try:
        os.ftruncate(fd, 2 * huge)
        mapping = MemoryMapping.from_fd(fd, huge + 5)  # munmap wants whole pages
        assert mapping.size == huge + 5
        mapping.fill(0xAA)
        mapping.remove_range(0, huge)
        assert mapping.read_bytes(0, huge + 5) == bytes(huge) + b"\xaa" * 5
        mapping.close()
        with open("/proc/self/maps") as file:
            assert "guestmem-huge" not in file.read()
    finally:
        os.close(fd)
