"""Transfers that must not begin, or that hit a page that is gone: ranges, offsets, faults."""

from __future__ import annotations

import errno
import io
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from guestmem import (
    ClosedError,
    InvalidOffsetError,
    InvalidRangeError,
    MemoryMapping,
    ReadFromMemoryError,
    ReadFromSourceError,
    WriteToDestinationError,
    WriteToMemoryError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 1000


class Counting(io.BytesIO):
    """Counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(bytes(SIZE))
        self.calls = 0

    def readinto(self, buffer: Any) -> int:
        self.calls += 1
        return super().readinto(buffer)

    def write(self, data: Any) -> int:
        self.calls += 1
        return super().write(data)


@pytest.fixture
def memory() -> MemoryMapping:
    mapping = MemoryMapping(SIZE)
    mapping.fill(0xEE)
    return mapping


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789" * 1000)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


OUT_OF_RANGE = [
    (0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0), (SIZE - 1, 2), (2**63, 1), (1, 2**63), (2**64 - 1, 1),
    (2**64 - 1, 2**64 - 1), (SIZE, 2**64 - SIZE), (1, 2**64 - 1), (2**64 - 1, 0),
]  # fmt: skip


@pytest.mark.parametrize(("offset", "count"), OUT_OF_RANGE)
def test_the_range_comes_first(memory: MemoryMapping, file: int, offset: int, count: int) -> None:
    left, right = socket.socketpair()
    counting = Counting()
    with left, right:
        right.sendall(b"waiting")
        for stream in (counting, file, left.fileno(), -1):
            for call in (memory.read_to_memory, memory.write_from_memory):
                with pytest.raises(InvalidRangeError) as caught:
                    call(offset, stream, count)
                error = caught.value
                assert (error.offset, error.count, error.size) == (offset, count, SIZE)
                assert error.__cause__ is None
        assert left.recv(100) == b"waiting"
        right.setblocking(False)
        with pytest.raises(BlockingIOError):
            right.recv(1)
    assert counting.calls == 0
    assert os.lseek(file, 0, os.SEEK_CUR) == 0
    assert memory.read_bytes(0, SIZE) == b"\xee" * SIZE


def test_ranges_of_slices_count_from_the_slice(memory: MemoryMapping) -> None:
    part = memory.get_slice(100, 50)
    part.read_to_memory(45, io.BytesIO(b"12345678"), 5)
    assert memory.read_bytes(144, 7) == b"\xee12345\xee"
    with pytest.raises(InvalidRangeError) as caught:
        part.read_to_memory(45, io.BytesIO(b"12345678"), 6)
    assert (caught.value.offset, caught.value.count, caught.value.size) == (45, 6, 50)


def test_nothing_asked_is_no_io(memory: MemoryMapping) -> None:
    counting = Counting()
    for stream in (counting, -1, os.sysconf("SC_OPEN_MAX") + 5):
        for offset in (0, SIZE):
            memory.read_to_memory(offset, stream, 0)
            memory.write_from_memory(offset, stream, 0)
            memory.get_slice(5, 0).read_to_memory(0, stream, 0)
    memory.read_to_memory(0, -1, 0, 2**63 - 1)
    assert counting.calls == 0


@pytest.mark.parametrize("name", ["mem_offset", "count", "src_offset"])
def test_numbers_that_cannot_be_offsets(memory: MemoryMapping, name: str) -> None:
    counting = Counting()
    none: Any = None
    for bad, error in ((-1, OverflowError), (-(2**64), OverflowError), (2**64, OverflowError),
                       (2**200, OverflowError), (1.0, TypeError), ("1", TypeError)):  # fmt: skip
        arguments: dict[str, Any] = {"mem_offset": 0, "src": counting, "count": 1, name: bad}
        with pytest.raises(error, match=f"^{name} must") as caught:
            memory.read_to_memory(**arguments)
        assert type(caught.value) is error
        arguments["dst"] = arguments.pop("src")
        if name == "src_offset":
            arguments["dst_offset"] = arguments.pop("src_offset")
        with pytest.raises(error):
            memory.write_from_memory(**arguments)
    assert counting.calls == 0
    with pytest.raises(TypeError, match="^count must be an int, not 'NoneType'$"):
        memory.read_to_memory(0, counting, none)


def test_file_offsets_beyond_off_t(memory: MemoryMapping, file: int) -> None:
    for offset, count in ((2**63, 1), (2**64 - 1, 1), (2**63, 0), (2**63 - 1, 2), (2**63 - 5, 10)):
        for call in (memory.read_to_memory, memory.write_from_memory):
            with pytest.raises(InvalidOffsetError) as caught:
                call(0, file, count, offset)
            assert caught.value.offset == offset
    with pytest.raises(ReadFromSourceError) as early:
        memory.read_to_memory(0, file, 1, 2**63 - 2)
    assert type(early.value.__cause__) is EOFError


def test_offsets_need_a_descriptor(memory: MemoryMapping) -> None:
    class Nothing:
        def readinto(self, buffer: Any) -> int:
            raise AssertionError

        write = readinto

    counting = Counting()
    nothing: Any = Nothing()
    for call in (memory.read_to_memory, memory.write_from_memory):
        for stream in (nothing, counting):  # one without fileno(), one whose fileno() raises
            with pytest.raises(
                TypeError, match=r"must be an int or an object with fileno\(\), not"
            ):
                call(0, stream, 1, 0)
    assert counting.calls == 0


@pytest.mark.parametrize("answer", ["3", None, 1.0])
def test_a_fileno_of_another_type(memory: MemoryMapping, answer: object) -> None:
    class Odd:
        def fileno(self) -> Any:
            return answer

    with pytest.raises(TypeError, match=r"^what fileno\(\) returns must be an int, not"):
        memory.read_to_memory(0, Odd(), 1, 0)


def test_closed_files(memory: MemoryMapping, tmp_path: Path) -> None:
    for buffering in (0, -1):
        with open(tmp_path / "file", "w+b", buffering=buffering) as stream:
            pass
        for offset in (None, 0):
            with pytest.raises(ValueError, match="closed file"):
                memory.read_to_memory(0, stream, 1, offset)
            with pytest.raises(ValueError, match="closed file"):
                memory.write_from_memory(0, stream, 1, offset)


def test_offsets_on_what_cannot_seek(memory: MemoryMapping) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"x")
    with pytest.raises(ReadFromSourceError) as read:
        memory.read_to_memory(0, read_end, 1, 0)
    with pytest.raises(WriteToDestinationError) as write:
        memory.write_from_memory(0, write_end, 1, 0)
    assert read.value.errno == write.value.errno == errno.ESPIPE
    assert os.read(read_end, 2) == b"x"
    os.close(read_end)
    os.close(write_end)


def test_a_partial_transfer_stays(memory: MemoryMapping, file: int) -> None:
    with pytest.raises(ReadFromSourceError) as caught:
        memory.read_to_memory(10, file, 100, 9950)
    assert caught.value.transferred == 50
    assert memory.read_bytes(9, 52) == b"\xee" + b"0123456789" * 5 + b"\xee"


@pytest.mark.parametrize("limit", [100, 4000])
def test_a_partial_write_says_how_much(file: int, limit: int, run_child: Any) -> None:
    """A file that may not grow takes what it can first."""
    code = """
    import os, resource, sys
    import guestmem
    fd, limit = map(int, sys.argv[1:])
    os.ftruncate(fd, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    memory = guestmem.MemoryMapping(5000)
    memory.fill(0x61)
    for offset in (None, 10):
        os.lseek(fd, 10, os.SEEK_SET)
        try:
            memory.write_from_memory(0, fd, 5000, offset)
        except guestmem.WriteToDestinationError as error:
            print(error.errno, error.transferred)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)  # a coverage build writes at exit
    """
    output = run_child(code, file, limit, pass_fds=[file])
    assert output == f"{errno.EFBIG} {limit - 10}\n" * 2
    assert os.pread(file, 5000, 0) == bytes(10) + b"a" * (limit - 10)


# Pages that are gone. The kernel says EFAULT where an access would be SIGBUS.


@pytest.fixture
def truncated(tmp_path: Path) -> Iterator[MemoryMapping]:
    """Four pages of which the last two are gone; the last two thirds of one are behind a slice."""
    path = tmp_path / "truncated"
    path.write_bytes(b"z" * 4 * PAGE)
    with path.open("r+b") as opened:
        mapping = MemoryMapping.from_fd(opened, 4 * PAGE)
        os.ftruncate(opened.fileno(), 2 * PAGE)
    yield mapping
    mapping.close()


def test_an_object_that_meets_a_fault_is_not_to_blame(truncated: MemoryMapping, file: int) -> None:
    class Raw(io.FileIO):
        """As good as its fd, but asked, as any subclass is."""

    os.ftruncate(file, 5 * PAGE)
    with Raw(file, "r+b", closefd=False) as raw:
        with pytest.raises(WriteToMemoryError) as into:
            truncated.read_to_memory(PAGE, raw, 2 * PAGE)
        assert (into.value.errno, into.value.offset) == (errno.EFAULT, 2 * PAGE)
        with pytest.raises(ReadFromMemoryError) as out:
            truncated.write_from_memory(PAGE, raw, 2 * PAGE)
        assert (out.value.errno, out.value.offset) == (errno.EFAULT, 2 * PAGE)


@pytest.mark.parametrize("start", [0, 1, PAGE, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 5, 4 * PAGE - 1])
def test_memory_that_faults_is_not_the_files_fault(
    truncated: MemoryMapping, file: int, start: int
) -> None:
    count = 4 * PAGE - start
    fault = max(start, 2 * PAGE)
    os.ftruncate(file, 5 * PAGE)
    with open(file, "r+b", buffering=0, closefd=False) as raw:
        for stream in (file, raw):
            os.lseek(file, 0, os.SEEK_SET)
            with pytest.raises(WriteToMemoryError) as into:
                truncated.read_to_memory(start, stream, count)
            assert (into.value.errno, into.value.offset) == (errno.EFAULT, fault)
            assert hex(fault) in str(into.value)
            os.lseek(file, 0, os.SEEK_SET)
            with pytest.raises(ReadFromMemoryError) as out:
                truncated.write_from_memory(start, stream, count)
            assert (out.value.errno, out.value.offset) == (errno.EFAULT, fault)
    for offset in (0, 7):
        with pytest.raises(WriteToMemoryError) as into:
            truncated.read_to_memory(start, file, count, offset)
        assert into.value.offset == fault


def test_what_comes_before_the_fault_is_there(truncated: MemoryMapping, file: int) -> None:
    os.pwrite(file, b"0123456789", 0)
    with pytest.raises(WriteToMemoryError):
        truncated.read_to_memory(2 * PAGE - 10, file, 20, 0)
    assert truncated.read_bytes(2 * PAGE - 11, 11) == b"z0123456789"
    truncated.read_to_memory(0, file, 2 * PAGE, 0)  # all that is there is fine


def test_faults_count_from_the_start_of_a_slice(truncated: MemoryMapping, file: int) -> None:
    part = truncated.get_slice(PAGE - 100, 2 * PAGE)
    for start in (0, 50, PAGE + 100, PAGE + 150):
        with pytest.raises(WriteToMemoryError) as caught:
            part.read_to_memory(start, file, 2 * PAGE - start, 0)
        assert caught.value.offset == max(start, PAGE + 100)
    part.release()


def test_faults_with_pipes_and_sockets(truncated: MemoryMapping) -> None:
    read_end, write_end = os.pipe()
    left, right = socket.socketpair()
    with left, right:
        for source, feed in ((read_end, write_end), (left.fileno(), right.fileno())):
            os.write(feed, b"x" * 100)
            with pytest.raises(WriteToMemoryError) as into:
                truncated.read_to_memory(2 * PAGE, source, 100)
            assert into.value.offset == 2 * PAGE
            with pytest.raises(ReadFromMemoryError) as out:
                truncated.write_from_memory(2 * PAGE + 3, feed, 100)
            assert out.value.offset == 2 * PAGE + 3
    os.close(read_end)
    os.close(write_end)


def test_an_address_that_is_bad_for_another_reason_is_the_files(memory: MemoryMapping) -> None:
    """/proc/self/mem answers for its own addresses, as a file."""
    with open("/proc/self/mem", "rb", buffering=0) as own:
        with pytest.raises(ReadFromSourceError) as caught:
            memory.read_to_memory(0, own, 8, 16)
        assert caught.value.errno == errno.EIO
        memory.read_to_memory(0, own, 8, memory.as_ptr() + 8)
        assert memory.read_bytes(0, 8) == b"\xee" * 8


def test_a_fifo(memory: MemoryMapping, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def feed() -> None:
        with path.open("wb", buffering=0) as fifo:
            for _ in range(5):
                fifo.write(b"12345678")

    thread = threading.Thread(target=feed)
    thread.start()
    with path.open("rb") as fifo:
        memory.read_to_memory(0, fifo, 20)
        with pytest.raises(ReadFromSourceError) as caught:
            memory.read_to_memory(20, fifo, 21)
    thread.join()
    assert caught.value.transferred == 20
    assert memory.read_bytes(0, 41) == b"12345678" * 5 + b"\xee"


def test_memory_that_is_closed_by_an_argument(memory: MemoryMapping) -> None:
    class Shutting:
        def __init__(self, value: int) -> None:
            self.value = value

        def __index__(self) -> int:
            memory.close()
            return self.value

        fileno = __index__

    counting = Counting()
    with pytest.raises(ClosedError):
        memory.read_to_memory(Shutting(0), counting, 1)
    assert counting.calls == 0
    memory = MemoryMapping(SIZE)
    with pytest.raises(ClosedError):
        memory.write_from_memory(0, Shutting(-1), 1, 0)
