"""preadv and pwritev: one system call for many pieces of memory."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from guestmem import (
    ClosedError,
    GuestMemory,
    InvalidOffsetError,
    MemoryMapping,
    ReadFromMemoryError,
    ReadFromSourceError,
    WriteToDestinationError,
    WriteToMemoryError,
    preadv,
    pwritev,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Backing

PAGE = os.sysconf("SC_PAGESIZE")
BASE = 0x1000
files: list[int] = []


@pytest.fixture(autouse=True)
def close_files() -> Iterator[None]:
    yield
    while files:
        os.close(files.pop())


def zeros() -> int:
    files.append(os.open("/dev/zero", os.O_RDONLY))
    return files[-1]


def sink() -> int:
    files.append(os.memfd_create("sink"))
    return files[-1]


@pytest.fixture
def guest() -> GuestMemory:
    """Two regions that adjoin, of 100 bytes and of 57."""
    low, high = MemoryMapping(300), MemoryMapping(57)
    return GuestMemory([(BASE, low.get_slice(11, 100)), (BASE + 100, high)])


@pytest.fixture
def cut(backing: Callable[[int], Backing]) -> MemoryMapping:
    """Two pages of a file of which the second one is gone."""
    file = backing(2 * PAGE)
    memory = MemoryMapping.from_fd(file.fd, 2 * PAGE)
    os.ftruncate(file.fd, PAGE)
    return memory


def test_vectored(guest: GuestMemory, backing: Callable[[int], Backing]) -> None:
    data = bytes(range(150))
    file = backing(1000)
    os.pwrite(file.fd, data, 100)
    assert preadv(file.fd, guest.slices(BASE + 3, 150), 100) == 150
    assert guest.read_bytes(BASE, 157) == bytes(3) + data + bytes(4)
    assert pwritev(file.fd, guest.slices(BASE + 3, 150), 500) == 150
    assert os.pread(file.fd, 150, 500) == data
    os.lseek(file.fd, 990, os.SEEK_SET)
    assert preadv(file.fd, guest.slices(BASE, 150)) == 10  # it may be short
    assert preadv(file.fd, guest.slices(BASE, 150)) == 0  # the end
    assert pwritev(file.fd, []) == 0
    parts = [MemoryMapping(16).get_slice(i, 1) for i in range(16)] * 100
    assert preadv(file.fd, parts, 0) == 1000  # of the file; of 1,600 pieces 1,024


def test_errors(cut: MemoryMapping) -> None:
    whole = MemoryMapping(10)
    with pytest.raises(WriteToMemoryError) as write:
        preadv(zeros(), [cut.get_slice(PAGE, 5), whole])
    assert write.value.offset == 0
    with pytest.raises(ReadFromMemoryError) as read:
        pwritev(sink(), [cut.get_slice(PAGE, 45), whole])
    assert read.value.offset == 0
    with pytest.raises(ReadFromSourceError) as source:
        preadv(-1, [whole])
    assert source.value.transferred == 0
    with pytest.raises(WriteToDestinationError):
        pwritev(zeros(), [whole])
    closed = MemoryMapping(5)
    closed.close()
    for call in preadv, pwritev:
        with pytest.raises(ClosedError):
            call(zeros(), [whole, closed])
        with pytest.raises(TypeError, match="a piece must be a VolatileMemory, not 'bytes'"):
            call(zeros(), [whole, b"12"])  # type: ignore[list-item]
        with pytest.raises(OverflowError):
            call(zeros(), [whole], -1)
    whole.close()  # nothing is held


@pytest.mark.parametrize("call", [preadv, pwritev])
def test_offsets_of_the_file(call: Callable[..., int]) -> None:
    """As of read_to_memory: all that is asked for must lie below 2**63."""
    pieces = [MemoryMapping(10), MemoryMapping(6)]
    fd = sink()
    with contextlib.suppress(WriteToDestinationError):  # some files hold less
        assert call(fd, pieces, 2**63 - 17) in {0, 16}
    for offset in 2**63 - 16, 2**63 - 1, 2**63, 2**64 - 1:
        with pytest.raises(InvalidOffsetError) as caught:
            call(fd, pieces, offset)
        assert (caught.value.offset, caught.value.count) == (offset, 16)
    for piece in pieces:
        piece.close()


def test_whose_page(cut: MemoryMapping) -> None:
    """Which of the pieces, and where in it: so the guest address is known."""
    plain = MemoryMapping(PAGE)
    guest = GuestMemory([(BASE, plain), (BASE + PAGE, cut.get_slice(PAGE - 4, 100))])
    gone = [cut.get_slice(PAGE + 9, 50)]
    with pytest.raises(WriteToMemoryError, match="offset 0x0 of piece 1") as write:
        preadv(zeros(), [plain.get_slice(0, 0), *gone, plain])
    assert (write.value.piece, write.value.offset) == (1, 0)
    with pytest.raises(ReadFromMemoryError, match="offset 0x0 of piece 0") as read:
        pwritev(sink(), gone * 2)
    assert (read.value.piece, read.value.offset) == (0, 0)
    # A pipe is read up to the missing page, and fails then.
    ends = os.pipe()
    files.extend(ends)
    os.write(ends[1], bytes(8))
    with pytest.raises(WriteToMemoryError) as write:
        preadv(ends[0], guest.slices(BASE + PAGE - 2, 8))
    assert (write.value.piece, write.value.offset) == (1, 4)
    # Of one memory there is no piece.
    with pytest.raises(WriteToMemoryError) as write:
        cut.fill(0)
    assert write.value.piece is None


def test_would_block(pipe: tuple[int, int]) -> None:
    piece = MemoryMapping(1 << 20)
    for end in pipe:
        os.set_blocking(end, False)
    with pytest.raises(ReadFromSourceError) as source:
        preadv(pipe[0], [piece])
    while True:
        try:
            pwritev(pipe[1], [piece, piece])
        except WriteToDestinationError as error:
            destination = error
            break
    for failed in source.value, destination:
        assert isinstance(failed.__cause__, BlockingIOError)
        assert failed.errno == failed.__cause__.errno
        assert failed.transferred == 0


def test_a_signal(pipe: tuple[int, int]) -> None:
    """Its handler runs, and the call is made again."""
    seen = []

    def handler(*_: object) -> None:
        seen.append(1)
        if len(seen) == 3:
            os.write(pipe[1], b"12345")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        assert preadv(pipe[0], [MemoryMapping(3), MemoryMapping(9)]) == 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) >= 3


def test_a_page_that_comes_back(backing: Callable[[int], Backing]) -> None:
    """The kernel found it missing, and we find it there: that is not the file's fault."""
    file = backing(2 * PAGE)
    memory = MemoryMapping.from_fd(file.fd, 2 * PAGE)
    piece, fd, stop = memory.get_slice(PAGE, 64), zeros(), time.monotonic() + 1

    def resize() -> None:
        while time.monotonic() < stop:
            os.ftruncate(file.fd, PAGE)
            os.ftruncate(file.fd, 2 * PAGE)

    thread = threading.Thread(target=resize)
    thread.start()
    try:
        while time.monotonic() < stop:
            with contextlib.suppress(WriteToMemoryError):
                preadv(fd, [piece])
    finally:
        thread.join()


# An older kernel does not know MADV_POPULATE_READ: a seccomp filter says what it would.
OLD = """
import ctypes, os, struct, sys
madvise = {"x86_64": 28, "aarch64": 233}[os.uname().machine]
program = b"".join(struct.pack("=HBBI", *step) for step in (
    (0x20, 0, 0, 0),  # load the number of the system call
    (0x15, 0, 4, madvise),
    (0x20, 0, 0, 32),  # load the low half of its third argument
    (0x15, 1, 0, 22),
    (0x15, 0, 1, 23),
    (0x06, 0, 0, 0x00050000 | 22),  # SECCOMP_RET_ERRNO, EINVAL
    (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
))
steps = ctypes.create_string_buffer(program, len(program))
filters = struct.pack("@HP", len(program) // 8, ctypes.addressof(steps))
prctl = ctypes.CDLL(None).prctl
prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
if prctl(22, 2, ctypes.cast(ctypes.c_char_p(filters), ctypes.c_void_p).value, 0, 0) != 0:
    print("seccomp filters are not allowed here")
    sys.exit(77)

from guestmem import *
page = os.sysconf("SC_PAGESIZE")
fd = os.memfd_create("cut")
os.ftruncate(fd, page)
cut, plain = MemoryMapping.from_fd(fd, 2 * page).get_slice(page, 8), MemoryMapping(8)
zeros, sink = os.open("/dev/zero", os.O_RDONLY), os.memfd_create("sink")
for call in (
    lambda: preadv(zeros, [cut]),
    lambda: preadv(zeros, [cut, plain]),
    lambda: pwritev(sink, [cut]),
    lambda: cut.read_to_memory(0, zeros, 8),
    lambda: cut.write_from_memory(0, sink, 8),
):
    try:
        print("not refused", call())
    except (ReadFromMemoryError, WriteToMemoryError) as error:
        print(type(error).__name__, error.piece, error.offset)
"""


def test_where_the_kernel_cannot_tell(run_child: Callable[..., str]) -> None:
    if platform.machine() not in {"x86_64", "aarch64"}:
        pytest.skip(f"no seccomp filter is written for {platform.machine()}")
    assert run_child(OLD, skip=77).splitlines() == [
        "WriteToMemoryError 0 0",
        "WriteToMemoryError 0 0",
        "ReadFromMemoryError 0 0",
        "WriteToMemoryError None 0",
        "ReadFromMemoryError None 0",
    ]
