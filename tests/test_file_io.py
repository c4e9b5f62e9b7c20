"""Files of every kind: bytes skipped in a buffer, read twice, or moved past the file's position.

What goes wrong on purpose is in test_file_io_errors, signals are in test_file_io_signals.
"""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import io
import mmap
import os
import socket
import tempfile
import threading
import zipfile
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import pytest

import guestmem
from guestmem import MemoryMapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Backing

SIZE = 20_000
DATA = bytes(n * 7 % 251 for n in range(SIZE))
LIMIT = 0x7FFFF000  # the most bytes that one read(2) moves


@pytest.fixture
def memory() -> MemoryMapping:
    mapping = MemoryMapping(SIZE)
    mapping.fill(0xEE)
    return mapping


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data"
    file.write_bytes(DATA)
    return file


@pytest.fixture
def fds(path: Path) -> Iterator[Callable[[int], int]]:
    opened: list[int] = []

    def open_path(flags: int) -> int:
        opened.append(os.open(path, flags))
        return opened[-1]

    yield open_path
    for fd in opened:
        os.close(fd)


def test_descriptors(memory: MemoryMapping, fds: Callable[[int], int], path: Path) -> None:
    fd = fds(os.O_RDONLY)
    assert memory.read_to_memory(1, fd, 100) is None
    assert memory.read_bytes(0, 102) == b"\xee" + DATA[:100] + b"\xee"
    memory.read_to_memory(0, fd, 100)  # goes on where it stood
    assert memory.read_bytes(0, 100) == DATA[100:200]
    assert os.lseek(fd, 0, os.SEEK_CUR) == 200

    fd = fds(os.O_WRONLY | os.O_APPEND)
    assert memory.write_from_memory(0, fd, 100) is None
    assert path.read_bytes() == DATA + DATA[100:200]
    memory.write_from_memory(101, fd, 1)
    assert path.read_bytes()[SIZE + 100 :] == b"\xee"


def open_temporary() -> IO[bytes]:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115
    file.write(DATA)
    file.seek(0)
    return file


def open_sources(path: Path, tmp_path: Path) -> dict[str, Callable[[], IO[bytes]]]:
    def packed(name: str, opener: Callable[..., Any]) -> IO[bytes]:
        with opener(tmp_path / name, "wb") as file:
            file.write(DATA)
        opened: IO[bytes] = opener(tmp_path / name, "rb")
        return opened

    def zipped() -> IO[bytes]:
        with zipfile.ZipFile(tmp_path / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("member", DATA)
        return zipfile.ZipFile(tmp_path / "zip").open("member")

    def spooled() -> IO[bytes]:
        file = tempfile.SpooledTemporaryFile(100)  # noqa: SIM115
        file.write(DATA)
        file.seek(0)
        return file

    def mapped() -> Any:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)

    return {
        "FileIO": lambda: path.open("rb", buffering=0),
        "BufferedReader": lambda: path.open("rb"),
        "BufferedReader with a small buffer": lambda: path.open("rb", buffering=16),
        "BufferedRandom": lambda: path.open("r+b"),
        "BytesIO": lambda: io.BytesIO(DATA),
        "BufferedReader of BytesIO": lambda: io.BufferedReader(io.BytesIO(DATA)),
        "BufferedRWPair": lambda: io.BufferedRWPair(
            path.open("rb", buffering=0),
            io.BytesIO(),
        ),
        "gzip": lambda: packed("gzip", gzip.open),
        "bz2": lambda: packed("bz2", bz2.open),
        "zip": zipped,
        "SpooledTemporaryFile": spooled,
        "NamedTemporaryFile": open_temporary,
        "mmap": mapped,
    }


SOURCES = [
    "FileIO", "BufferedReader", "BufferedReader with a small buffer", "BufferedRandom", "BytesIO",
    "BufferedReader of BytesIO", "BufferedRWPair", "gzip", "bz2", "zip", "SpooledTemporaryFile",
    "NamedTemporaryFile", "mmap",
]  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_of_every_kind(
    memory: MemoryMapping, path: Path, tmp_path: Path, kind: str
) -> None:
    source = open_sources(path, tmp_path)[kind]()
    try:
        assert source.read(3) == DATA[:3]  # a buffered one holds more than these now
        memory.read_to_memory(5, source, 9000)
        assert memory.read_bytes(5, 9000) == DATA[3:9003]
        assert source.read(2) == DATA[9003:9005]  # and not a byte more was taken
        memory.read_to_memory(0, source, SIZE - 9005)
        assert memory.read_bytes(0, SIZE - 9005) == DATA[9005:]
        assert source.read(1) == b""
    finally:
        source.close()


def test_a_source_that_decodes(memory: MemoryMapping) -> None:
    class Rot13(io.RawIOBase):
        """A stream made of Python code, as a codec's reader is."""

        def __init__(self, inner: io.BytesIO) -> None:
            self.inner = inner

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            chunk = self.inner.read(min(7, len(buffer)))
            buffer[: len(chunk)] = codecs.encode(chunk.decode(), "rot13").encode()
            return len(chunk)

    memory.read_to_memory(0, Rot13(io.BytesIO(b"uryyb jbeyq, uryyb")), 18)
    assert memory.read_bytes(0, 18) == b"hello world, hello"
    memory.read_to_memory(0, io.BufferedReader(Rot13(io.BytesIO(b"uryyb jbeyq"))), 11)
    assert memory.read_bytes(0, 11) == b"hello world"


class Kept(io.BytesIO):
    """It can be looked at after it was closed."""

    content = b""

    def close(self) -> None:
        self.content = self.content or self.getvalue()
        super().close()


def open_destination(kind: str, path: Path) -> tuple[Any, Callable[[], bytes]]:
    """Return the destination, and what tells its content once it has been closed."""
    kept = Kept()
    raw = path.open("wb", buffering=0) if kind == "BufferedRWPair" else None
    opened: dict[str, Callable[[], Any]] = {
        "FileIO": lambda: path.open("wb", buffering=0),
        "BufferedWriter": lambda: path.open("wb"),
        "BufferedWriter with a small buffer": lambda: path.open("wb", buffering=16),
        "BufferedRandom": lambda: path.open("w+b"),
        "BufferedRWPair": lambda: io.BufferedRWPair(io.BytesIO(), raw),
        "BytesIO": lambda: kept,
        "BufferedWriter of BytesIO": lambda: io.BufferedWriter(kept),
        "gzip": partial(gzip.open, path, "wb"),
        "bz2": partial(bz2.open, path, "wb"),
    }
    look: dict[str, Callable[[], bytes]] = {
        "BytesIO": lambda: kept.content,
        "BufferedWriter of BytesIO": lambda: kept.content,
        "gzip": lambda: gzip.decompress(path.read_bytes()),
        "bz2": lambda: bz2.decompress(path.read_bytes()),
    }
    return opened[kind](), look.get(kind, path.read_bytes)


@pytest.mark.parametrize(
    "kind",
    [
        "FileIO", "BufferedWriter", "BufferedWriter with a small buffer", "BufferedRandom",
        "BufferedRWPair", "BytesIO", "BufferedWriter of BytesIO", "gzip", "bz2",
    ],
)  # fmt: skip
def test_destinations_of_every_kind(memory: MemoryMapping, path: Path, kind: str) -> None:
    memory.write_all(DATA, 0)
    destination, look = open_destination(kind, path)
    destination.write(b"<")  # which a buffered one has not passed on yet
    memory.write_from_memory(0, destination, 9)
    memory.write_from_memory(1, destination, SIZE - 1)
    destination.write(b">")
    destination.close()
    assert look() == b"<" + DATA[:9] + DATA[1:] + b">"


def test_zip_and_spooled_destinations(memory: MemoryMapping, tmp_path: Path) -> None:
    memory.write_all(DATA, 0)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive, archive.open("member", "w") as member:
        memory.write_from_memory(3, member, 5000)
    with zipfile.ZipFile(tmp_path / "zip") as archive:
        assert archive.read("member") == DATA[3:5003]
    with tempfile.SpooledTemporaryFile(100) as file:
        memory.write_from_memory(0, file, SIZE)
        file.seek(0)
        assert file.read() == DATA


@pytest.mark.parametrize(
    "make", ["path", "StringIO", "TextIOWrapper", "codecs", "SpooledTemporaryFile", "temporary"]
)
def test_text_files_are_refused(memory: MemoryMapping, path: Path, make: str) -> None:
    opened: dict[str, Callable[[], Any]] = {
        "path": lambda: path.open("r+", encoding="latin-1"),
        "StringIO": lambda: io.StringIO("text"),
        "TextIOWrapper": lambda: io.TextIOWrapper(io.BytesIO(b"text"), "utf-8"),
        # These pass on what the binary file below them can do.
        "codecs": lambda: codecs.StreamReaderWriter(
            path.open("r+b"), codecs.getreader("latin-1"), codecs.getwriter("latin-1")
        ),
        "SpooledTemporaryFile": lambda: tempfile.SpooledTemporaryFile(100, "w+"),  # noqa: SIM115
        "temporary": lambda: tempfile.NamedTemporaryFile("w+"),  # noqa: SIM115
    }
    file = opened[make]()
    with file:
        for offset in (None, 0):
            with pytest.raises(TypeError, match="^src must be a file opened in binary mode, not"):
                memory.read_to_memory(0, file, 1, offset)
            with pytest.raises(TypeError, match="^dst must be a file opened in binary mode, not"):
                memory.write_from_memory(0, file, 1, offset)
    assert path.read_bytes() == DATA
    assert memory.read_bytes(0, 2) == b"\xee\xee"


@pytest.mark.parametrize("stream", [None, "path", b"bytes", 1.5, object(), [0]])
def test_what_is_no_stream_is_a_type_error(memory: MemoryMapping, stream: Any) -> None:
    with pytest.raises(TypeError, match=r"^src must be an fd or an object with readinto\(\) or"):
        memory.read_to_memory(0, stream, 1)
    with pytest.raises(TypeError, match=r"^dst must be an fd or an object with write\(\), not"):
        memory.write_from_memory(0, stream, 1)
    with pytest.raises(TypeError, match=r"^src must be an int or an object with fileno\(\), not"):
        memory.read_to_memory(0, stream, 1, 0)


def test_keywords(memory: MemoryMapping, fds: Callable[[int], int], path: Path) -> None:
    fd = fds(os.O_RDWR)
    memory.read_to_memory(count=4, src_offset=8, src=fd, mem_offset=2)
    assert memory.read_bytes(0, 7) == b"\xee\xee" + DATA[8:12] + b"\xee"
    memory.read_to_memory(0, fd, count=2, src_offset=None)
    assert memory.read_bytes(0, 2) == DATA[:2]
    memory.write_from_memory(dst=fd, dst_offset=0, mem_offset=2, count=4)
    assert path.read_bytes()[:5] == DATA[8:12] + DATA[4:5]
    for bad in ({"dst": fd}, {"source": fd}, {}):
        with pytest.raises(TypeError):
            memory.read_to_memory(mem_offset=0, count=1, **bad)
    with pytest.raises(TypeError, match="two values for argument 'src'"):
        memory.read_to_memory(0, fd, src=fd, count=1)  # type: ignore[call-overload]


# At an offset of the file


def test_offsets_leave_the_position(
    memory: MemoryMapping, fds: Callable[[int], int], path: Path
) -> None:
    fd = fds(os.O_RDWR)
    os.lseek(fd, 77, os.SEEK_SET)
    memory.read_to_memory(0, fd, 10, 1000)
    assert memory.read_bytes(0, 10) == DATA[1000:1010]
    memory.write_from_memory(0, fd, 10, 0)
    memory.write_from_memory(0, fd, 10, SIZE + 6)  # past the end
    assert os.lseek(fd, 0, os.SEEK_CUR) == 77
    assert path.read_bytes() == DATA[1000:1010] + DATA[10:] + bytes(6) + DATA[1000:1010]


def test_offsets_of_files_with_a_descriptor(memory: MemoryMapping, path: Path) -> None:
    with path.open("r+b") as buffered, path.open("r+b", buffering=0) as raw:
        assert buffered.read(5) == DATA[:5]
        for file in (buffered, raw):
            before = file.tell()
            memory.read_to_memory(0, file, 100, 500)
            assert memory.read_bytes(0, 100) == DATA[500:600]
            memory.write_from_memory(0, file, 100, 500)
            assert file.tell() == before
        assert buffered.read(5) == DATA[5:10]
    assert path.read_bytes() == DATA


# Devices, pipes, sockets


def test_devices(memory: MemoryMapping) -> None:
    with open("/dev/zero", "rb", buffering=0) as zero:
        memory.read_to_memory(1, zero, SIZE - 2)
        assert memory.read_bytes(0, SIZE) == b"\xee" + bytes(SIZE - 2) + b"\xee"
    with open("/dev/null", "wb", buffering=0) as null:
        memory.write_from_memory(0, null, SIZE)


def test_a_pipe_gives_a_little_at_a_time(memory: MemoryMapping) -> None:
    read_end, write_end = os.pipe()
    chunks = [DATA[n : n + 1000] for n in range(0, SIZE, 1000)]

    def feed() -> None:
        for chunk in chunks:
            os.write(write_end, chunk)

    thread = threading.Thread(target=feed)
    thread.start()
    memory.read_to_memory(0, read_end, SIZE)
    thread.join()
    assert memory.read_bytes(0, SIZE) == DATA
    os.close(read_end)
    os.close(write_end)


def test_a_pipe_takes_a_little_at_a_time() -> None:
    big = MemoryMapping(300_000)
    big.write_all(DATA * 15, 0)
    read_end, write_end = os.pipe()
    got = bytearray()

    def drain() -> None:
        while len(got) < 300_000:
            got.extend(os.read(read_end, 5000))

    thread = threading.Thread(target=drain)
    thread.start()
    big.write_from_memory(0, write_end, 300_000)
    thread.join()
    assert got == DATA * 15
    os.close(read_end)
    os.close(write_end)


def test_sockets(memory: MemoryMapping) -> None:
    left, right = socket.socketpair()
    with left, right, left.makefile("rwb") as file:
        right.sendall(DATA[:1000])
        memory.read_to_memory(0, left.fileno(), 500)
        memory.read_to_memory(500, file, 400)
        assert file.read(100) == DATA[900:1000]
        assert memory.read_bytes(0, 900) == DATA[:900]
        memory.write_from_memory(0, file, 300)
        file.flush()
        memory.write_from_memory(300, left.fileno(), 300)
        assert right.recv(600, socket.MSG_WAITALL) == DATA[:600]
        with right.makefile("rb", buffering=0) as raw:
            left.sendall(b"abc")
            memory.read_to_memory(0, raw, 3)
        assert memory.read_bytes(0, 3) == b"abc"


def test_from_one_mapping_to_another(backing: Callable[[int], Backing]) -> None:
    """By a file that is itself mapped."""
    file = backing(8192)
    mapping = MemoryMapping.from_fd(file.fd, 8192)
    mapping.write_all(DATA[:4096], 0)
    mapping.write_from_memory(0, file.fd, 4096, 4096)
    assert mapping.read_bytes(4096, 4096) == DATA[:4096]
    mapping.read_to_memory(0, file.fd, 100, 4100)
    assert mapping.read_bytes(0, 100) == DATA[4:104]


def test_more_than_one_system_call_writes() -> None:
    with open("/dev/null", "wb", buffering=0) as null:
        big = MemoryMapping(LIMIT + 8193)
        big.write_from_memory(0, null, LIMIT + 8193)
        big.write_from_memory(1, null.fileno(), LIMIT + 8192, 5)


@pytest.mark.slow
def test_more_than_one_system_call_reads() -> None:
    size = LIMIT + 3 * 4096 + 1
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    if available < 4 * 1024 * 1024:
        pytest.skip("less than 4 GiB of memory is free")
    big = MemoryMapping(size)
    edges = [0, LIMIT - 1, LIMIT, LIMIT + 1, size - 1]
    for edge in edges:
        big.write_all(b"x", edge)
    with open("/dev/zero", "rb", buffering=0) as zero:
        big.read_to_memory(0, zero, size)
    assert b"".join(big.read_bytes(edge, 1) for edge in edges) == bytes(5)

    sparse = os.memfd_create("sparse")
    try:
        for n, edge in enumerate(edges):
            os.pwrite(sparse, bytes([n + 1]), edge + 3)
        big.read_to_memory(0, sparse, size, 3)  # the offset of the second call counts on
    finally:
        os.close(sparse)
    assert b"".join(big.read_bytes(edge, 1) for edge in edges) == b"\1\2\3\4\5"


# One step: read_from() and write_to() of a slice.


def test_one_read(pipe: tuple[int, int]) -> None:
    """What is there, and no more; 0 is the end."""
    source, sink = pipe
    os.write(sink, b"12345")
    with MemoryMapping(100) as memory, memory.get_slice(10, 50) as part:
        assert part.read_from(source, 50) == 5
        assert memory.read_bytes(9, 7) == b"\x0012345\x00"
        os.write(sink, b"abcdef")
        assert part.read_from(source, 2) == 2
        assert part.read_from(source, 0) == 0
        assert part.read_from(source, 50) == 4
        assert part.read_bytes(0, 6) == b"cdef5\x00"
        assert part.read_from(io.BytesIO(b"xyz"), 50) == 3
        assert part.read_from(io.BytesIO(b""), 50) == 0
        with open("/dev/null", "rb", 0) as empty:
            assert part.read_from(empty, 50) == 0
        assert part.read_bytes(0, 5) == b"xyzf5"


def test_one_write(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    os.set_blocking(sink, False)
    size = 1 << 20
    with MemoryMapping(size) as memory, memory.get_slice(0, size) as part:
        part.fill(0x61)
        taken = part.write_to(sink, size)
        assert 0 < taken < size  # what fits the pipe
        assert os.read(source, size) == b"a" * taken
        assert part.write_to(sink, 0) == 0

        class Slow(io.RawIOBase):
            def write(self, data: Any) -> int:
                return min(len(data), 7)

        assert part.write_to(Slow(), size) == 7
        written = io.BytesIO()
        assert part.write_to(written, 100) == 100
        assert written.getvalue() == b"a" * 100


def test_one_step_fails_as_all_of_them_do(pipe: tuple[int, int]) -> None:
    source, _ = pipe
    os.set_blocking(source, False)
    with MemoryMapping(100) as memory, memory.get_slice(0, 50) as part:
        for call in part.read_from, part.write_to:
            with pytest.raises(guestmem.InvalidRangeError):
                call(source, 51)
            with pytest.raises(TypeError):
                call("file", 1)  # type: ignore[arg-type]
            with pytest.raises(OverflowError):
                call(source, -1)
        with pytest.raises(guestmem.ReadFromSourceError) as read:
            part.read_from(source, 5)
        assert isinstance(read.value.__cause__, BlockingIOError)
        with pytest.raises(guestmem.WriteToDestinationError) as write:
            part.write_to(source, 5)
        assert (write.value.errno, write.value.transferred) == (errno.EBADF, 0)
