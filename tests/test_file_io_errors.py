"""Transfers that fail: nothing is lost without a word, and what did arrive is said and stays.

Sources and destinations end early, stall, raise, answer nonsense, or turn on the memory itself.
"""

from __future__ import annotations

import errno
import io
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from guestmem import (
    MemoryMapping,
    ReadFromSourceError,
    VolatileSlice,
    WriteToDestinationError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 1000


@pytest.fixture
def memory() -> MemoryMapping:
    mapping = MemoryMapping(SIZE)
    mapping.fill(0xEE)
    return mapping


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


class Script:
    """Does one step of its script at each call: returns it, raises it or calls it."""

    def __init__(self, method: str, *script: object) -> None:
        self.script = list(script)
        self.asked: list[int] = []
        setattr(self, method, self.step)

    def step(self, argument: Any) -> object:
        self.asked.append(argument if isinstance(argument, int) else len(argument))
        action = self.script.pop(0)
        if isinstance(action, BaseException):
            raise action
        return action(argument) if callable(action) else action


def script(method: str, *steps: object) -> Any:
    """Return a source or destination; it does not have the other methods, so it is Any."""
    return Script(method, *steps)


class Boom(Exception):
    pass


# Descriptors


def closed_fd() -> int:
    fd = os.open("/dev/null", os.O_RDWR)
    os.close(fd)
    return fd


def test_bad_descriptors(memory: MemoryMapping, tmp_path: Path) -> None:
    for fd in (-1, closed_fd(), 2**31 - 1):
        with pytest.raises(ReadFromSourceError) as read:
            memory.read_to_memory(0, fd, 1)
        with pytest.raises(WriteToDestinationError) as write:
            memory.write_from_memory(0, fd, 1)
        for error in (read.value, write.value):
            assert (error.errno, error.strerror) == (errno.EBADF, "Bad file descriptor")
            assert error.transferred == 0
    for fd in (2**31, 2**64, -(2**31) - 1):
        with pytest.raises(OverflowError, match="^src must be a file descriptor, a C int, not"):
            memory.read_to_memory(0, fd, 1)


def test_directories_and_wrong_modes(memory: MemoryMapping, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    read_only, write_only = os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
    try:
        for fd, code in ((directory, errno.EISDIR), (write_only, errno.EBADF)):
            for offset in (None, 0):
                with pytest.raises(ReadFromSourceError) as read:
                    memory.read_to_memory(0, fd, 1, offset)
                assert read.value.errno == code
        for fd in (directory, read_only):
            with pytest.raises(WriteToDestinationError) as write:
                memory.write_from_memory(0, fd, 1)
            assert write.value.errno == errno.EBADF
    finally:
        for fd in (directory, read_only, write_only):
            os.close(fd)
    assert memory.read_bytes(0, 2) == b"\xee\xee"


def test_full_device(memory: MemoryMapping) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        for destination in (full, full.fileno()):
            with pytest.raises(WriteToDestinationError) as caught:
                memory.write_from_memory(0, destination, 8)
            assert (caught.value.errno, caught.value.transferred) == (errno.ENOSPC, 0)
    buffered: Any = open("/dev/full", "wb", buffering=4)  # noqa: SIM115
    with pytest.raises(WriteToDestinationError) as caught:
        memory.write_from_memory(0, buffered, 8)
    assert caught.value.errno == errno.ENOSPC
    assert type(caught.value.__cause__) is OSError
    buffered.detach().close()


@pytest.mark.parametrize("kind", ["fd", "FileIO", "BufferedReader", "offset", "pipe", "socket"])
def test_a_source_that_ends_early(memory: MemoryMapping, file: int, kind: str) -> None:
    source: Any = file
    if kind in {"FileIO", "BufferedReader"}:
        source = open(file, "rb", buffering=0 if kind == "FileIO" else -1, closefd=False)  # noqa: SIM115
    elif kind == "pipe":
        source, write_end = os.pipe()
        os.write(write_end, b"0123456789")
        os.close(write_end)
    elif kind == "socket":
        left, right = socket.socketpair()
        right.sendall(b"0123456789")
        right.close()
        source = left.makefile("rb")
        left.close()
    with pytest.raises(ReadFromSourceError) as caught:
        memory.read_to_memory(1, source, 11, 0 if kind == "offset" else None)
    error = caught.value
    assert type(error.__cause__) is EOFError
    assert (error.transferred, error.errno) == (10, None)
    assert str(error) == "the source failed after 10 bytes: it ended early"
    assert memory.read_bytes(0, 12) == b"\xee0123456789\xee"
    os.close(source) if kind == "pipe" else None if kind in {"fd", "offset"} else source.close()


def test_a_broken_pipe(memory: MemoryMapping) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with pytest.raises(WriteToDestinationError) as caught:
        memory.write_from_memory(0, write_end, 1)
    assert caught.value.errno == errno.EPIPE
    os.close(write_end)


def test_a_source_that_would_block(memory: MemoryMapping, pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[0], False)
    for buffering in (None, 0, -1):
        os.write(pipe[1], b"abc")
        source: Any = pipe[0]
        if buffering is not None:
            source = open(pipe[0], "rb", buffering=buffering, closefd=False)  # noqa: SIM115
        with pytest.raises(ReadFromSourceError) as caught:
            memory.read_to_memory(0, source, 5)
        assert isinstance(caught.value.__cause__, BlockingIOError)
        assert (caught.value.errno, caught.value.transferred) == (errno.EAGAIN, 3)
        assert memory.read_bytes(0, 4) == b"abc\xee"
        memory.fill(0xEE)
        if buffering is not None:
            source.close()


def test_a_destination_that_would_block(pipe: tuple[int, int]) -> None:
    big = MemoryMapping(1 << 20)
    for n in range(0, 1 << 20, 1 << 12):
        big.fill(n >> 12 & 0xFF, n, 1 << 12)
    os.set_blocking(pipe[1], False)
    os.set_blocking(pipe[0], False)
    for raw in (True, False):
        destination: Any = pipe[1]
        if not raw:
            destination = open(pipe[1], "wb", buffering=0, closefd=False)  # noqa: SIM115
        with pytest.raises(WriteToDestinationError) as caught:
            big.write_from_memory(0, destination, 1 << 20)
        assert isinstance(caught.value.__cause__, BlockingIOError)
        assert caught.value.errno == errno.EAGAIN
        got = os.read(pipe[0], 2 << 20)
        assert 0 < caught.value.transferred == len(got)
        assert got == big.read_bytes(0, len(got))
        if not raw:
            destination.close()


def test_a_buffered_writer_on_a_full_pipe(pipe: tuple[int, int]) -> None:
    big = MemoryMapping(1 << 20)
    for n in range(0, 1 << 20, 1 << 12):
        big.fill(n >> 12 & 0xFF, n, 1 << 12)
    os.set_blocking(pipe[1], False)
    writer = open(pipe[1], "wb", buffering=1000, closefd=False)  # noqa: SIM115
    with pytest.raises(WriteToDestinationError) as caught:
        big.write_from_memory(0, writer, 1 << 20)
    cause = caught.value.__cause__
    assert isinstance(cause, BlockingIOError)
    taken = caught.value.transferred
    assert 0 < cause.characters_written <= taken < 1 << 20
    got = bytearray()
    while len(got) < taken:  # some are in the writer's buffer
        got += os.read(pipe[0], taken - len(got))
        writer.flush()
    assert got == big.read_bytes(0, taken)
    os.set_blocking(pipe[0], False)
    writer.close()
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 1)  # it took no more than it said


# Objects


@pytest.mark.parametrize("method", ["readinto", "read", "write"])
def test_an_os_error_is_wrapped(memory: MemoryMapping, method: str) -> None:
    first = b"ab" if method == "read" else 2
    for raised in (
        OSError(errno.EIO, "no luck"),
        FileNotFoundError(errno.ENOENT, "gone"),
        OSError("without a number"),
        TimeoutError(),
        io.UnsupportedOperation("not today"),
    ):
        stream = script(method, first, raised)
        with pytest.raises((ReadFromSourceError, WriteToDestinationError)) as caught:
            transfer(memory, method, stream, 10)
        error = caught.value
        assert type(error) is (
            WriteToDestinationError if method == "write" else ReadFromSourceError
        )
        assert error.__cause__ is raised
        assert error.errno == raised.errno
        assert error.transferred == 2
        assert stream.asked == [10, 8]


def transfer(memory: MemoryMapping | VolatileSlice, method: str, stream: Any, count: int) -> None:
    if method == "write":
        memory.write_from_memory(0, stream, count)
    else:
        memory.read_to_memory(0, stream, count)


@pytest.mark.parametrize("method", ["readinto", "read", "write"])
@pytest.mark.parametrize(
    "raised", [Boom(), KeyboardInterrupt(), SystemExit(3), EOFError(), ValueError()]
)
def test_any_other_exception_passes_untouched(
    memory: MemoryMapping, method: str, raised: BaseException
) -> None:
    with pytest.raises(type(raised)) as caught:
        transfer(memory, method, script(method, raised), 10)
    assert caught.value is raised
    assert raised.__cause__ is None
    assert raised.__context__ is None
    memory.close()  # nothing was left behind


@pytest.mark.parametrize("method", ["readinto", "write"])
@pytest.mark.parametrize("answer", [-1, -(2**70), 11, 2**63, 2**70])
def test_impossible_counts(memory: MemoryMapping, method: str, answer: int) -> None:
    with pytest.raises((ReadFromSourceError, WriteToDestinationError)) as caught:
        transfer(memory, method, script(method, answer), 10)
    error = caught.value
    assert (error.errno, error.transferred) == (None, 0)
    assert f"its {method}() said {max(min(answer, 2**63 - 1), -(2**63))} of the 10 bytes" in str(
        error
    )


@pytest.mark.parametrize("method", ["readinto", "write"])
@pytest.mark.parametrize("answer", ["3", 3.0, b"abc", [], object()])
def test_answers_of_another_type(memory: MemoryMapping, method: str, answer: object) -> None:
    with pytest.raises(TypeError, match=rf"^what {method}\(\) returns must be an int or None, not"):
        transfer(memory, method, script(method, answer), 10)


@pytest.mark.parametrize("answer", ["text", 3, 1.5, [1], object()])
def test_read_answers_of_another_type(memory: MemoryMapping, answer: object) -> None:
    with pytest.raises(TypeError, match=r"^what read\(\) returns must be bytes or None, not"):
        memory.read_to_memory(0, script("read", answer), 10)


def test_read_answers_too_much(memory: MemoryMapping) -> None:
    with pytest.raises(ReadFromSourceError, match=r"its read\(\) said 9 of the 8 bytes"):
        memory.read_to_memory(0, script("read", b"ab", b"123456789"), 10)
    assert memory.read_bytes(0, 4) == b"ab\xee\xee"
    with pytest.raises(BufferError):
        memory.read_to_memory(0, script("read", memoryview(b"123456")[::2]), 10)


def test_none_is_would_block_and_nothing_is_the_end(memory: MemoryMapping) -> None:
    for method, first, nothing in (("readinto", 4, 0), ("read", b"1234", b""), ("write", 4, 0)):
        for answer, cause in ((None, BlockingIOError), (nothing, EOFError)):
            with pytest.raises((ReadFromSourceError, WriteToDestinationError)) as caught:
                transfer(memory, method, script(method, first, answer), 10)
            assert caught.value.transferred == 4
            if method == "write" and answer == 0:
                assert str(caught.value) == (
                    "the destination failed after 4 bytes: it took no bytes"
                )
            else:
                assert type(caught.value.__cause__) is cause


def test_answers_that_will_do(memory: MemoryMapping) -> None:
    class Three:
        def __index__(self) -> int:
            return 3

    source = script("readinto", True, Three(), 6)
    memory.read_to_memory(0, source, 10)
    assert source.asked == [10, 9, 6]
    memory.read_to_memory(
        0, script("read", b"a", bytearray(b"bc"), memoryview(b"defg").cast("I")), 7
    )
    assert memory.read_bytes(0, 8) == b"abcdefg\xee"


def test_a_broken_attribute(memory: MemoryMapping) -> None:
    class Hostile:
        @property
        def readinto(self) -> object:
            raise Boom

        write = readinto

    hostile: Any = Hostile()
    with pytest.raises(Boom):
        memory.read_to_memory(0, hostile, 1)
    with pytest.raises(Boom):
        memory.write_from_memory(0, hostile, 1)


# Objects that turn on the memory


def test_it_re_enters_the_memory(memory: MemoryMapping) -> None:
    def into(view: memoryview) -> int:
        memory.fill(0x11)
        memory.read_to_memory(4, io.BytesIO(b"inner"), 5)
        view[:2] = b"ab"
        return 2

    memory.read_to_memory(0, script("readinto", into, into), 4)
    assert memory.read_bytes(0, 10) == b"\x11\x11abinner\x11"
    memory.close()


@pytest.mark.parametrize("method", ["readinto", "read", "write"])
def test_it_closes_the_memory(memory: MemoryMapping, method: str) -> None:
    part = memory.get_slice(0, 10)
    for target, close in ((memory, memory.close), (part, part.release)):

        def shut(_: object, close: Callable[[], None] = close) -> Any:
            with pytest.raises(BufferError, match="1 running call$"):
                close()
            return b"x" * 10 if method == "read" else 10

        transfer(target, method, script(method, shut), 10)
        assert not target.closed
    part.release()
    memory.close()


def test_the_view_is_released_afterwards(memory: MemoryMapping) -> None:
    kept: list[memoryview] = []

    def keep(view: memoryview) -> int:
        assert not view.readonly
        assert (view.format, view.nbytes) == ("B", 10)
        kept.append(view)
        return 10

    memory.read_to_memory(0, script("readinto", keep), 10)
    memory.write_from_memory(0, script("write", keep), 10)
    for view in kept:
        with pytest.raises(ValueError, match="released"):
            view[0]
    memory.close()

    def keep_and_raise(view: memoryview) -> int:
        kept.append(view)
        raise Boom

    other = MemoryMapping(SIZE)
    with pytest.raises(Boom):
        other.read_to_memory(0, script("readinto", keep_and_raise), 10)
    with pytest.raises(ValueError, match="released"):
        kept[-1][0]
    other.close()


@pytest.mark.parametrize("raising", [False, True])
def test_an_export_that_it_kept_keeps_the_borrow(memory: MemoryMapping, raising: bool) -> None:
    kept: list[memoryview] = []

    def keep(view: memoryview) -> int:
        kept.append(memoryview(view)[2:4])
        if raising:
            raise OSError(errno.EIO, "after all")
        return 10

    try:
        memory.read_to_memory(0, script("readinto", keep), 10)
    except ReadFromSourceError:
        assert raising
    with pytest.raises(BufferError, match="held by 1 slice$"):
        memory.close()
    kept[0][:] = b"zz"
    assert memory.read_bytes(0, 5) == b"\xee\xeezz\xee"
    kept[0].release()
    memory.close()
