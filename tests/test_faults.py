"""Pages that cannot be brought in: each access is an exception, and the process goes on."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import io
import mmap
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import guestmem
from guestmem import MemoryMapping, ReadFromMemoryError, VolatileSlice, WriteToMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Backing

    from guestmem import VolatileMemory

PAGE = mmap.PAGESIZE
PAGES = 4  # of which the last two are gone
GONE = 2 * PAGE
SIZE = PAGES * PAGE
SCALARS = [value for value in vars(guestmem).values() if isinstance(value, guestmem.Scalar)]


class Line(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint64 * 4),)


class Truncated:
    """Four pages of a file of which two are gone, in three guises; it can be made whole."""

    def __init__(self, fd: int, memory: VolatileMemory) -> None:
        self.fd = fd
        self.memory = memory

    def size(self, pages: int) -> None:
        os.ftruncate(self.fd, pages * PAGE)


@pytest.fixture(params=["mapping", "slice", "buffer"])
def cut(request: pytest.FixtureRequest, backing: Callable[[int], Backing]) -> Iterator[Truncated]:
    fd = backing(SIZE + PAGE).fd
    if request.param == "buffer":
        foreign = mmap.mmap(fd, SIZE)
        memory: VolatileMemory = VolatileSlice.from_buffer(foreign)
    elif request.param == "slice":
        memory = MemoryMapping.from_fd(fd, SIZE + 64).get_slice(0, SIZE)
    else:
        memory = MemoryMapping.from_fd(fd, SIZE)
    memory.fill(0x5A)
    os.ftruncate(fd, GONE)
    yield Truncated(fd, memory)
    with memory:  # closes, or releases: nothing was left held
        pass


def plain(size: int) -> VolatileSlice:
    return MemoryMapping(size).get_slice(0, size)


# Each touches [start, start + count) of the memory m.
READS: dict[str, Callable[[VolatileMemory, int, int], object]] = {
    "read_bytes": lambda m, start, count: m.read_bytes(start, count),
    "read_slice": lambda m, start, count: m.read_slice(bytearray(count), start),
    "read_exact": lambda m, start, count: m.read_exact(bytearray(count), start),
    "read_obj, ctypes": lambda m, start, count: m.read_obj(start, ctypes.c_char * count),
    "read_obj, Struct": lambda m, start, count: m.read_obj(start, struct.Struct(f"{count}s")),
    "ref.load, ctypes": lambda m, start, count: (
        m.get_slice(start, count).get_ref(0, ctypes.c_char * count).load()
    ),
    "write_from_memory, fd": lambda m, start, count: m.write_from_memory(start, sink(), count),
    "write_from_memory, object": lambda m, start, count: m.write_from_memory(
        start, io.BytesIO(), count
    ),
    "copy_to": lambda m, start, count: m.get_slice(start, count).copy_to(bytearray(count)),
    "copy_to_volatile_slice": lambda m, start, count: m.get_slice(
        start, count
    ).copy_to_volatile_slice(plain(count)),
}
WRITES: dict[str, Callable[[VolatileMemory, int, int], object]] = {
    "write_slice": lambda m, start, count: m.write_slice(bytes(count), start),
    "write_all": lambda m, start, count: m.write_all(bytes(count), start),
    "write_obj, ctypes": lambda m, start, count: m.write_obj((ctypes.c_char * count)(), start),
    "write_obj, Struct": lambda m, start, count: m.write_obj(
        (bytes(count),), start, struct.Struct(f"{count}s")
    ),
    "fill": lambda m, start, count: m.fill(0, start, count),
    "read_to_memory, fd": lambda m, start, count: m.read_to_memory(start, source(), count),
    "read_to_memory, readinto": lambda m, start, count: m.read_to_memory(
        start, io.BytesIO(bytes(count)), count
    ),
    "read_to_memory, read": lambda m, start, count: m.read_to_memory(start, Reader(), count),
    "copy_from": lambda m, start, count: m.get_slice(start, count).copy_from(bytes(count)),
    "copy_to_volatile_slice": lambda m, start, count: plain(count).copy_to_volatile_slice(
        m.get_slice(start, count)
    ),
}
RELATIVE = {"ref.load, ctypes", "copy_to", "copy_to_volatile_slice", "copy_from"}
EACH = [
    *(pytest.param(n, call, ReadFromMemoryError, id=f"reads: {n}") for n, call in READS.items()),
    *(pytest.param(n, call, WriteToMemoryError, id=f"writes: {n}") for n, call in WRITES.items()),
]
files: list[int] = []


def sink() -> int:
    files.append(os.memfd_create("sink"))
    return files[-1]


def source() -> int:
    files.append(os.open("/dev/zero", os.O_RDONLY))
    return files[-1]


@pytest.fixture(autouse=True)
def close_files() -> Iterator[None]:
    yield
    while files:
        os.close(files.pop())


class Reader:
    def read(self, count: int) -> bytes:
        return bytes(count)


@pytest.mark.parametrize(
    ("start", "count"),
    [(GONE, 8), (GONE + 5, 3), (GONE - 1, 2), (GONE - 3, 100), (0, SIZE), (1, GONE + 4000)],
)
@pytest.mark.parametrize(("name", "call", "error"), EACH)
def test_each_access(
    cut: Truncated, name: str, call: Any, error: Any, start: int, count: int
) -> None:
    """The offset is that of the first byte that faulted; twice, and all works again after it."""
    expected = max(start, GONE) - (start if name in RELATIVE else 0)
    for _ in range(2):
        with pytest.raises(error) as caught:
            call(cut.memory, start, count)
        assert (caught.value.offset, caught.value.errno) == (expected, errno.EFAULT)
    cut.size(PAGES)
    call(cut.memory, start, count)


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: scalar.name)
def test_scalars(cut: Truncated, scalar: Any) -> None:
    """Aligned ones and others, by method and by ref, in the missing page and across its border."""

    def at(offset: int) -> None:
        ref = cut.memory.get_ref(offset, scalar)
        first = max(offset, GONE)
        for error, where, call, *args in (
            (ReadFromMemoryError, first, cut.memory.read_obj, offset, scalar),
            (WriteToMemoryError, first, cut.memory.write_obj, 1, offset, scalar),
            (ReadFromMemoryError, first - offset, ref.load),
            (WriteToMemoryError, first - offset, ref.store, 1),
        ):
            with pytest.raises(error) as caught:
                call(*args)
            assert caught.value.offset == where
        cut.size(PAGES)
        ref.store(2)
        assert ref.load() == cut.memory.read_obj(offset, scalar) == 2
        cut.size(2)

    for offset in {GONE, GONE + 8, GONE + 1, GONE - scalar.size + 1}:
        at(offset)
    gc.collect()


def test_what_came_before_the_fault_is_written(cut: Truncated) -> None:
    for count in 1, 31, 100, 1000, PAGE:
        cut.memory.fill(0x5A, 0, GONE)
        with pytest.raises(WriteToMemoryError):
            cut.memory.write_slice(b"x" * (count + 100), GONE - count)
        expected = b"\x5a" * (GONE - count) + b"x" * count
        assert cut.memory.read_bytes(0, GONE) == expected


@pytest.mark.parametrize("apart", [1, 8, 64, PAGE])
def test_overlapping_copies(cut: Truncated, apart: int) -> None:
    """Also one that goes down, and meets the end of what is missing first."""
    count = SIZE - apart
    with cut.memory.get_slice(0, count) as low, cut.memory.get_slice(apart, count) as high:
        for source, target in (low, high), (high, low):
            with pytest.raises((ReadFromMemoryError, WriteToMemoryError)) as caught:
                source.copy_to_volatile_slice(target)
            reading = isinstance(caught.value, ReadFromMemoryError)
            start = 0 if (source if reading else target) is low else apart
            assert caught.value.offset == GONE - start


def test_a_copy_that_goes_down_brings_in_few_pages(backing: Callable[[int], Backing]) -> None:
    """To find the first byte that is missing is no reason to fill a sparse file."""
    size = 64 << 20
    file = backing(size)
    memory = MemoryMapping.from_fd(file.fd, size)
    os.ftruncate(file.fd, size - 2 * PAGE)
    with memory.get_slice(0, size - 64) as low, memory.get_slice(64, size - 64) as high:
        with pytest.raises(ReadFromMemoryError) as caught:
            low.copy_to_volatile_slice(high)
        assert caught.value.offset == size - 2 * PAGE
    assert file.blocks() < 100 * PAGE
    memory.close()


def test_the_rounding_mode_survives(cut: Truncated) -> None:
    """A handler begins with the processor's defaults; what the thread had set is put back."""
    libm = ctypes.CDLL("libm.so.6")
    before = libm.fegetround()
    upward = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())
    if upward is None:
        pytest.skip("FE_UPWARD is not known here")
    libm.fesetround(upward)
    try:
        for call in (
            lambda: cut.memory.read_bytes(0, SIZE),
            lambda: cut.memory.read_obj(GONE, guestmem.u64),
        ):
            with pytest.raises(ReadFromMemoryError):
                call()
            assert libm.fegetround() == upward
    finally:
        libm.fesetround(before)


def test_a_page_that_comes_back_is_not_the_files_fault(backing: Callable[[int], Backing]) -> None:
    """The kernel found it missing, and we find it there."""
    file = backing(SIZE)
    memory = MemoryMapping.from_fd(file.fd, SIZE)
    zeros, stop = source(), time.monotonic() + 1

    def resize() -> None:
        while time.monotonic() < stop:
            os.ftruncate(file.fd, GONE)
            os.ftruncate(file.fd, SIZE)

    thread = threading.Thread(target=resize)
    thread.start()
    try:
        while time.monotonic() < stop:
            with contextlib.suppress(WriteToMemoryError):
                memory.read_to_memory(GONE, zeros, PAGE)
    finally:
        thread.join()


def test_large_copies_without_the_gil(backing: Callable[[int], Backing]) -> None:
    """Past the caches, and from several threads at once."""
    size = 40 << 20
    file = backing(size)
    memory = MemoryMapping.from_fd(file.fd, size)
    os.ftruncate(file.fd, 20 << 20)
    caught: list[tuple[str, int]] = []

    def work(call: Callable[[], object]) -> None:
        for _ in range(3):
            try:
                call()
            except (ReadFromMemoryError, WriteToMemoryError) as error:
                caught.append((type(error).__name__, error.offset))

    threads = [
        threading.Thread(target=work, args=(call,))
        for call in (
            lambda: memory.read_bytes(5, size - 5),
            lambda: memory.write_slice(bytes(size), 3),
            lambda: memory.fill(7),
            lambda: memory.read_slice(bytearray(size), 1),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reads, writes = ("ReadFromMemoryError", 20 << 20), ("WriteToMemoryError", 20 << 20)
    assert sorted(caught) == [reads] * 6 + [writes] * 6
    memory.close()


def test_while_the_file_shrinks_and_grows(backing: Callable[[int], Backing]) -> None:
    file = backing(SIZE)
    memory = MemoryMapping.from_fd(file.fd, SIZE)
    ref = memory.get_ref(GONE, guestmem.u64)
    stop = time.monotonic() + 1
    seen: set[str] = set()

    def resize() -> None:
        while time.monotonic() < stop:
            os.ftruncate(file.fd, GONE)
            os.ftruncate(file.fd, SIZE)

    def use() -> None:
        scratch = bytearray(SIZE)
        calls = (
            ref.load,
            lambda: ref.store(1),
            lambda: memory.read_slice(scratch, 0),
            lambda: memory.write_slice(scratch, 0),
            lambda: memory.fill(1, 1),
            lambda: memory.read_to_memory(0, io.BytesIO(scratch), SIZE),
            lambda: memory.write_from_memory(0, io.BytesIO(), SIZE),
        )
        while time.monotonic() < stop:
            for call in calls:
                try:
                    call()
                except (ReadFromMemoryError, WriteToMemoryError) as error:
                    seen.add(type(error).__name__)

    threads = [threading.Thread(target=work) for work in (resize, use, use)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"ReadFromMemoryError", "WriteToMemoryError"}


def test_a_full_tmpfs(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    where = os.fsencode(tmp_path)
    if libc.mount(b"tmpfs", where, b"tmpfs", 0, b"size=%d" % (2 * PAGE)):
        pytest.skip(f"no tmpfs can be mounted: {os.strerror(ctypes.get_errno())}")
    try:
        with open(tmp_path / "ram", "w+b") as file:
            file.truncate(SIZE)
            memory = MemoryMapping.from_fd(file, SIZE)
            with pytest.raises(WriteToMemoryError) as caught:
                memory.write_slice(b"x" * SIZE, 0)
            assert caught.value.offset == GONE
            assert memory.read_bytes(0, GONE) == b"x" * GONE
            memory.remove_range(0, GONE)
            memory.write_slice(b"y" * GONE, GONE)
            memory.close()
    finally:
        libc.umount2(where, 2)


class Hoarder(io.RawIOBase):
    """Keeps a view of all that it was given, and lies about it if told to."""

    def __init__(self, claim: int | None = None) -> None:
        self.kept: list[memoryview] = []
        self.claim = claim

    def readinto(self, buffer: Any) -> int:
        buffer[:] = bytes([0x30 + len(self.kept)]) * len(buffer)
        self.kept.append(memoryview(buffer))
        return len(buffer) if self.claim is None else self.claim

    def write(self, buffer: Any) -> int:
        self.kept.append(memoryview(buffer))
        return len(buffer) if self.claim is None else self.claim


def test_objects_get_a_buffer_in_between(backing: Callable[[int], Backing]) -> None:
    """Of memory that can fault: in steps, and what an object kept is its own afterwards."""
    size = (2 << 20) + 5
    memory = MemoryMapping.from_fd(backing(size).fd, size)
    hoarder = Hoarder()
    memory.read_to_memory(0, hoarder, size)
    # What takes all gets more, up to 1 MiB at once.
    steps = [1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, (1 << 16) + 5]
    assert [len(view) for view in hoarder.kept] == steps
    expected = [bytes([0x30 + i]) * step for i, step in enumerate(steps)]
    assert memory.read_bytes(0, size) == b"".join(expected)
    memory.fill(0x41)
    assert [bytes(view) for view in hoarder.kept] == expected
    writer = Hoarder()
    memory.write_from_memory(0, writer, size)
    assert [bytes(view) for view in writer.kept] == [b"A" * step for step in steps]
    memory.close()  # nothing of it is held


def test_what_takes_little_is_offered_little(backing: Callable[[int], Backing]) -> None:
    memory = MemoryMapping.from_fd(backing(1 << 18).fd, 1 << 18)
    offered: list[int] = []

    class Small(io.RawIOBase):
        def write(self, buffer: Any) -> int:
            offered.append(len(buffer))
            return min(len(buffer), 1460)

    memory.write_from_memory(0, Small(), 1 << 18)
    assert max(offered[1:]) == PAGE


@pytest.mark.parametrize("count", [1, 100, PAGE, GONE])
def test_a_writer_gets_what_can_be_read(cut: Truncated, count: int) -> None:
    """As a file descriptor does."""
    cut.size(PAGES)
    data = bytes(n % 251 for n in range(GONE))
    cut.memory.write_all(data, 0)
    cut.size(2)
    writer = io.BytesIO()
    with pytest.raises(ReadFromMemoryError) as caught:
        cut.memory.write_from_memory(GONE - count, writer, count + PAGE)
    assert caught.value.offset == GONE
    assert writer.getvalue() == data[GONE - count :]


@pytest.mark.parametrize("other_is_cut", [True, False])
def test_other_memory_as_the_buffer(cut: Truncated, *, other_is_cut: bool) -> None:
    """Both sides of a copy between two memories are guarded; the offset is in the one cut."""
    whole = MemoryMapping(SIZE)
    near, far = (whole, cut.memory) if other_is_cut else (cut.memory, whole)
    errors = (ReadFromMemoryError, WriteToMemoryError)
    for calls, error in (
        ((near.write_slice, near.write_all), errors[not other_is_cut]),
        ((near.read_slice, near.read_exact), errors[other_is_cut]),
    ):
        for call in calls:
            with pytest.raises(error) as caught:
                call(far, 0)
            assert caught.value.offset == GONE
    with near.get_slice(0, SIZE) as part:
        for copy in part.copy_to, part.copy_from:
            with pytest.raises((ReadFromMemoryError, WriteToMemoryError)) as caught:
                copy(far)
            assert caught.value.offset == GONE
    cut.size(PAGES)
    assert near.write_slice(far, 0) == near.read_slice(far, 0) == SIZE


def test_a_copy_knows_whether_it_read_or_wrote(tmp_path: Path) -> None:
    """Of a hole that can be read, and not written because the file system is full."""
    libc = ctypes.CDLL(None, use_errno=True)
    image = tmp_path / "image"
    where = tmp_path / "full"
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4 (e2fsprogs)")
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mount = ["mount", "-o", "loop", str(image), str(where)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    try:
        with open(where / "ram", "w+b") as file:
            file.truncate(SIZE)
            memory = MemoryMapping.from_fd(file, SIZE)
            memory.write_slice(b"x" * PAGE, 0)
            os.fsync(file.fileno())
            with open(where / "filler", "wb", buffering=0) as filler:
                with pytest.raises(OSError, match="No space"):
                    while True:
                        filler.write(bytes(1 << 16))
                os.fsync(filler.fileno())
            assert memory.read_bytes(PAGE, PAGE) == bytes(PAGE)
            count = SIZE - PAGE
            with memory.get_slice(PAGE, count) as high, memory.get_slice(0, count) as low:
                with pytest.raises(WriteToMemoryError) as caught:
                    high.copy_to_volatile_slice(low)
                assert caught.value.offset in range(PAGE, count, PAGE)
            memory.close()
    finally:
        libc.umount2(os.fsencode(where), 2)


@pytest.mark.parametrize("claim", [0, -1, 101, 2**70])
def test_objects_that_lie_about_it(backing: Callable[[int], Backing], claim: int) -> None:
    memory = MemoryMapping.from_fd(backing(SIZE).fd, SIZE)
    memory.fill(0x11)
    with pytest.raises(guestmem.ReadFromSourceError):
        memory.read_to_memory(0, Hoarder(claim), 100)
    with pytest.raises(guestmem.WriteToDestinationError):
        memory.write_from_memory(0, Hoarder(claim), 100)
    assert memory.read_bytes(0, 200) == b"\x11" * 200


def test_an_object_cannot_take_the_buffer_away(backing: Callable[[int], Backing]) -> None:
    memory = MemoryMapping.from_fd(backing(SIZE).fd, SIZE)
    errors = []

    class Thief(io.RawIOBase):
        def readinto(self, buffer: Any) -> int:
            owner = buffer.obj
            buffer.release()
            for steal in (owner.clear, owner.pop, lambda: owner.extend(bytes(1 << 20))):
                try:
                    steal()
                except BufferError as error:
                    errors.append(error)
            return 4

    memory.read_to_memory(0, Thief(), 4)
    assert len(errors) == 3
    assert memory.read_bytes(0, 4) == bytes(4)


# What happens around it, in processes of their own.

CHILD = """
import faulthandler, mmap, os, signal, sys, threading
PAGE = mmap.PAGESIZE
steps, forked = sys.argv[1:], False
fd = os.memfd_create("file")

def note(text):
    print(text, flush=True)

for step in steps:
    if step == "import":
        import guestmem
        from guestmem import *
    elif step == "faulthandler":
        faulthandler.enable()
    elif step == "no faulthandler":
        faulthandler.disable()
    elif step == "handler":
        signal.signal(signal.SIGBUS, lambda *_: note("handler"))
    elif step == "ignore":
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
    elif step == "map":
        os.ftruncate(fd, 4 * PAGE)
        memory = MemoryMapping.from_fd(fd, 4 * PAGE)
        refs = [memory.get_ref(at, kind) for at, kind in ((2 * PAGE, u64), (2 * PAGE - 1, u16))]
        os.ftruncate(fd, 2 * PAGE)
    elif step == "fault":
        for call in (refs[0].load, lambda: refs[0].store(1), refs[1].load,
                     lambda: memory.read_bytes(0, 4 * PAGE), lambda: memory.fill(1)):
            try:
                call()
            except GuestMemoryError as error:
                note(type(error).__name__)
            else:
                note("no error")
    elif step == "threads":
        def load():
            try:
                refs[0].load()
            except ReadFromMemoryError:
                note("ReadFromMemoryError")
        for thread in [threading.Thread(target=load) for _ in range(3)]:
            thread.start()
            thread.join()
    elif step == "fork":
        child = os.fork()
        if child == 0:
            forked = True  # and go on with what follows
            continue
        note(os.waitpid(child, 0)[1])
        sys.exit()
    elif step == "kill":
        os.kill(os.getpid(), signal.SIGBUS)
        note("alive")
    elif step == "raise":
        signal.raise_signal(signal.SIGBUS)
        note("alive")
    else:
        os.ftruncate(fd, 4 * PAGE)
        theirs = mmap.mmap(fd, 4 * PAGE)
        os.ftruncate(fd, 2 * PAGE)
        if step == "foreign":
            theirs[2 * PAGE]
        else:  # as the host's buffer of a guarded copy
            other = os.memfd_create("other")
            os.ftruncate(other, 2 * PAGE)
            MemoryMapping.from_fd(other, 2 * PAGE).write_slice(memoryview(theirs)[2 * PAGE:], 0)
if forked:
    os._exit(0)  # the interpreter itself leaks in a child that ends in order
"""
FAULT = ["ReadFromMemoryError", "WriteToMemoryError", "ReadFromMemoryError"]
FAULT += ["ReadFromMemoryError", "WriteToMemoryError"]
SIGBUS = -signal.SIGBUS


@pytest.mark.parametrize(
    ("steps", "output", "status", "reports"),
    [
        # The guard, and faulthandler at every point of time.
        ("import map fault fault", FAULT * 2, 0, 0),
        ("faulthandler import map fault fault", FAULT * 2, 0, 0),
        ("import faulthandler map fault fault", FAULT * 2, 0, 0),
        ("import map faulthandler fault fault", FAULT * 2, 0, 1),
        ("import map faulthandler map fault fault", FAULT * 2, 0, 0),
        ("import map faulthandler fault map fault", FAULT * 2, 0, 1),
        ("faulthandler import map threads fault", ["ReadFromMemoryError"] * 3 + FAULT, 0, 0),
        ("import map faulthandler threads", ["ReadFromMemoryError"] * 3, 0, 1),
        ("import map fork fault", [*FAULT, "0"], 0, 0),
        # faulthandler takes its own handler back, and ours with it; the next mapping returns.
        ("faulthandler import map no-faulthandler map fault", FAULT, 0, 0),
        # A handler of Python's stays for what is not ours.
        ("handler import map kill fault", ["alive", "handler", *FAULT], 0, 0),
        ("import map handler map kill fault", ["alive", "handler", *FAULT], 0, 0),
        ("handler import map raise fault kill", ["handler", "alive"] * 2 + FAULT, 0, 0),
        ("ignore import map kill raise fault", ["alive", "alive", *FAULT], 0, 0),
        # Faults that are not ours end as without us.
        ("import map foreign", [], SIGBUS, 0),
        ("import map host", [], SIGBUS, 0),
        ("ignore import map foreign", [], SIGBUS, 0),
        ("faulthandler import map foreign", [], SIGBUS, 1),
        ("faulthandler import map host", [], SIGBUS, 1),
        ("import map faulthandler foreign", [], SIGBUS, 1),
        ("import map faulthandler map foreign", [], SIGBUS, 1),
        ("import map faulthandler map host", [], SIGBUS, 1),
        ("import map fault kill", FAULT, SIGBUS, 0),
        ("import map fault raise", FAULT, SIGBUS, 0),
        ("faulthandler import map kill", [], SIGBUS, 1),
        ("import map faulthandler kill", [], SIGBUS, 1),
        ("import map faulthandler map kill", [], SIGBUS, 1),
        ("import map faulthandler map raise", [], SIGBUS, 1),
        ("import map fork kill", ["7"], 0, 0),
    ],
)
def test_what_others_do_with_the_signal(
    steps: str, output: list[str], status: int, reports: int
) -> None:
    """Whatever had SIGBUS before us, or takes it after us."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *(step.replace("-", " ") for step in steps.split())],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    # When Python's handler runs is Python's affair.
    assert sorted(child.stdout.split()) == sorted(output), child
    assert (child.returncode, child.stderr.count("Fatal Python error: Bus error")) == (
        status,
        reports,
    ), child
    assert reports or not child.stderr, child


def test_a_signal_from_outside_interrupts_as_it_did(run_child: Callable[..., str]) -> None:
    """With SIGBUS ignored, a system call goes on; with Python's handler, that runs in between."""
    run_child(
        """
        import os, signal, threading, time
        from guestmem import MemoryMapping
        seen = []
        for handler in signal.SIG_IGN, lambda *_: seen.append(1):
            signal.signal(signal.SIGBUS, handler)
            fd = os.memfd_create("file")
            os.ftruncate(fd, 4096)
            memory = MemoryMapping.from_fd(fd, 4096)
            source, sink = os.pipe()
            main = threading.get_ident()
            def send():
                for _ in range(5):
                    time.sleep(0.02)
                    signal.pthread_kill(main, signal.SIGBUS)
                os.write(sink, b"12345678")
            thread = threading.Thread(target=send)
            thread.start()
            memory.read_to_memory(0, source, 8)
            thread.join()
            assert memory.read_bytes(0, 8) == b"12345678"
        assert len(seen) == 5, seen
        """
    )


def test_in_a_subinterpreter(run_child: Callable[..., str]) -> None:
    run_child(
        """
        import textwrap
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        code = textwrap.dedent('''
        import os
        from guestmem import *
        fd = os.memfd_create("file")
        page = os.sysconf("SC_PAGESIZE")
        os.ftruncate(fd, 2 * page)
        memory = MemoryMapping.from_fd(fd, 2 * page)
        ref = memory.get_ref(page, u64)
        os.ftruncate(fd, page)
        for call in ref.load, lambda: memory.read_bytes(0, 2 * page):
            try:
                call()
            except ReadFromMemoryError:
                continue
            raise AssertionError
        ''')
        run = getattr(interpreters, "exec", None) or interpreters.run_string
        for _ in range(2):
            which = interpreters.create()
            failure = run(which, code)
            assert failure is None, failure
            interpreters.destroy(which)
        exec(code)
        """
    )
