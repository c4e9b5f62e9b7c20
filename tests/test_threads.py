"""Threads: calls that take long let others run, and no race makes memory go away under a call."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import random
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from guestmem import (
    ClosedError,
    MemoryMapping,
    VolatileMemory,
    VolatileRef,
    VolatileSlice,
    u32,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Backing

    Backings = Callable[[int], Backing]
    Race = Callable[..., None]

LARGE = 1 << 20


# Who lets others run


TICKING = """
import io, os, sys, threading, time
from guestmem import MemoryMapping, VolatileSlice, u64

# From here on, no thread is made to hand the GIL over: only who gives it away lets others run.
# On one processor, one who waits for it takes it at once.
sys.setswitchinterval(1000)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
ticks = 0
stop = False

def tick():
    global ticks
    while not stop:
        ticks += 1
        time.sleep(0.0002)

def lets_others_run(action, tries):
    for _ in range(tries):
        end = time.perf_counter() + 0.001
        while time.perf_counter() < end:
            pass  # until the other thread waits for the GIL
        before = ticks
        action()
        if ticks != before:
            return True
    return False

memory = MemoryMapping(8 << 20)
memory.fill(1)
large, small = bytearray(4 << 20), bytearray(4096)
source, target = memory.get_slice(0, 2 << 20), memory.get_slice(4 << 20, 2 << 20)
fd = os.memfd_create("ticking")
os.ftruncate(fd, 8 << 20)
pipe = os.pipe()
null = os.open("/dev/null", os.O_WRONLY)
zero = os.open("/dev/zero", os.O_RDONLY)

class Big:
    def read(self, count):
        return bytes(large[:count])

LONG = {
    "read_slice": lambda: memory.read_slice(large, 0),
    "write_slice": lambda: memory.write_slice(large, 1),
    "read_exact": lambda: memory.read_exact(large, 3),
    "write_all": lambda: memory.write_all(large, 0),
    "read_bytes": lambda: memory.read_bytes(0, 4 << 20),
    "fill": lambda: memory.fill(0),
    "copy_to": lambda: source.copy_to(large),
    "copy_from": lambda: source.copy_from(large),
    "copy_to_volatile_slice": lambda: source.copy_to_volatile_slice(target),
    "read of fd": lambda: memory.read_to_memory(0, zero, 1 << 20),
    "write to fd": lambda: memory.write_from_memory(0, null, 1 << 20),
    "pread": lambda: memory.read_to_memory(0, fd, 1 << 20, 0),
    "remove_range": lambda: memory.remove_range(0, 4 << 20),
    "mmap": lambda: MemoryMapping.from_fd(fd, 8 << 20),
    "anonymous mmap": lambda: MemoryMapping(8 << 20),
}
SHORT = {
    "read_slice": lambda: memory.read_slice(small, 0),
    "write_slice": lambda: memory.write_slice(small, 1),
    "read_bytes": lambda: memory.read_bytes(0, 4096),
    "fill": lambda: memory.fill(0, 0, 4096),
    "read_obj": lambda: memory.read_obj(0, u64),
    "get_slice": lambda: memory.get_slice(0, 8),
    "nothing": lambda: None,
}
thread = threading.Thread(target=tick)
thread.start()
time.sleep(0.01)
try:
    failed = [name for name, action in LONG.items() if not lets_others_run(action, 300)]
    # The other way round shows that the clock above measures what it says.
    failed += ["not " + name for name, action in SHORT.items() if lets_others_run(action, 5)]

    def close():  # memory that was touched, so that there is something to unmap
        other = MemoryMapping(8 << 20)
        other.fill(1)
        global ticks
        end = time.perf_counter() + 0.001
        while time.perf_counter() < end:
            pass
        before = ticks
        other.close()
        return ticks != before

    if not any(close() for _ in range(20)):
        failed.append("munmap")
finally:
    stop = True
    thread.join()
print(", ".join(failed) or "all")
"""


def has_gil() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


@pytest.mark.skipif(not has_gil(), reason="there is no GIL to release")
def test_calls_that_may_take_long_release_the_gil(run_child: Callable[..., str]) -> None:
    assert run_child(TICKING).strip() == "all"


def test_a_read_that_waits_lets_others_run() -> None:
    """The other thread feeds the pipe; if it could not run, this would never end."""
    memory = MemoryMapping(4096)
    read_end, write_end = os.pipe()
    thread = threading.Timer(0.02, os.write, (write_end, b"12345678"))
    thread.start()
    memory.read_to_memory(0, read_end, 8)
    thread.join()
    assert memory.read_bytes(0, 8) == b"12345678"
    os.close(read_end)
    os.close(write_end)


# Races


def test_a_waiting_call_keeps_the_memory_open(backing: Backings) -> None:
    file = backing(4096)
    memory = MemoryMapping.from_fd(file.fd, 4096)
    read_end, write_end = os.pipe()
    thread = threading.Thread(target=memory.read_to_memory, args=(0, read_end, 8))
    thread.start()
    deadline = time.monotonic() + 30
    while not inside(memory):
        assert time.monotonic() < deadline
    with pytest.raises(BufferError) as caught:
        memory.close()
    assert str(caught.value) == "cannot close the mapping: it is held by 1 running call"
    assert not memory.closed
    assert file.maps() == 1
    os.write(write_end, b"12345678")
    thread.join()
    memory.close()
    assert file.read(0, 8) == b"12345678"
    os.close(read_end)
    os.close(write_end)


def inside(memory: MemoryMapping) -> bool:
    """Whether a call is inside, by a close() that a slice makes harmless."""
    part = memory.get_slice(0, 0)
    try:
        memory.close()
    except BufferError as error:
        return "running call" in str(error)
    finally:
        part.release()
    return False


def read_zeros(memory: VolatileMemory) -> None:
    with open("/dev/zero", "rb", buffering=0) as zero:
        memory.read_to_memory(0, zero, 1 << 16)


USES: dict[str, Callable[[VolatileMemory], object]] = {
    "read_slice": lambda memory: memory.read_slice(bytearray(LARGE), 0),
    "write_all": lambda memory: memory.write_all(bytes(LARGE), 0),
    "read_bytes": lambda memory: memory.read_bytes(0, LARGE),
    "fill": lambda memory: memory.fill(1),
    "small": lambda memory: (memory.read_bytes(0, 64), memory.write_obj(1, 0, u64)),
    "read_to_memory": lambda memory: memory.read_to_memory(0, io.BytesIO(bytes(64)), 64),
    "from fd": read_zeros,
    "remove_range": lambda memory: memory.remove_range(0, 64),
    "slice": lambda memory: memory.get_slice(0, 64).read_bytes(0, 64),
    "slice of slice": lambda memory: memory.get_slice(0, 64).get_slice(8, 8).fill(1),
    "ref": lambda memory: memory.get_ref(0, u64).store(5),
    "export": lambda memory: bytes(memoryview(memory)[:64]),
}


@pytest.mark.parametrize("kind", ["mapping", "slice"])
def test_close_against_everything_else(backing: Backings, kind: str, race: Race) -> None:
    """Each use works or says that the memory is closed; close() works or is refused."""
    file = backing(LARGE)
    shared: list[Any] = []
    made = used = refused = 0

    def renew() -> None:
        nonlocal made
        mapping = MemoryMapping.from_fd(file.fd, LARGE)
        shared[:] = [mapping if kind == "mapping" else mapping.get_slice(0, LARGE)]
        made += 1

    def use() -> None:
        nonlocal used
        try:
            USES[random.choice(names)](shared[0])
            used += 1
        except ClosedError:
            pass

    def close() -> None:
        nonlocal refused
        memory: MemoryMapping | VolatileSlice = shared[0]
        try:
            memory.close() if isinstance(memory, MemoryMapping) else memory.release()
        except BufferError as error:
            assert "it is held by " in str(error)  # noqa: PT017
            refused += 1
        else:
            assert memory.closed
            renew()
            time.sleep(random.random() * 0.001)  # or hardly anybody meets open memory

    names = list(USES)
    renew()
    race(use, use, close, enough=lambda: made > 3 and used > 3 and refused > 0)
    shared.clear()
    assert file.maps() == 0


def test_leaving_by_an_exception_against_everything_else(backing: Backings, race: Race) -> None:
    file = backing(LARGE)
    shared: list[MemoryMapping] = [MemoryMapping.from_fd(file.fd, LARGE)]
    names = list(USES)

    def use() -> None:
        with contextlib.suppress(ClosedError):
            USES[random.choice(names)](shared[0])

    def leave() -> None:
        try:
            with shared[0]:
                shared[0] = MemoryMapping.from_fd(file.fd, LARGE)
                time.sleep(random.random() * 0.001)
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    race(use, use, leave)
    shared.clear()
    assert file.maps() == 0


def test_slices_made_and_dropped_in_many_threads(backing: Backings, race: Race) -> None:
    file = backing(4096)
    memory = MemoryMapping.from_fd(file.fd, 4096)
    part = memory.get_slice(0, 4096)

    def make() -> None:
        slices = [part.get_slice(n, 8) for n in range(8)]
        refs = [one.get_ref(0, u64) for one in slices]
        views = [memoryview(one) for one in slices]
        assert all(view.nbytes == ref.size == 8 for view, ref in zip(views, refs, strict=True))

    race(make, make, make)
    with pytest.raises(BufferError) as caught:
        memory.close()
    assert str(caught.value) == "cannot close the mapping: it is held by 1 slice"  # all counted
    part.release()
    memory.close()
    assert file.maps() == 0


def test_only_one_of_many_closes(backing: Backings) -> None:
    file = backing(4096)
    for _ in range(200):
        memory = MemoryMapping.from_fd(file.fd, 4096)
        start = threading.Barrier(3)

        def close(memory: MemoryMapping = memory, start: threading.Barrier = start) -> None:
            start.wait()
            memory.close()

        threads = [threading.Thread(target=close) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert memory.closed
        assert file.maps() == 0


def test_a_ref_in_many_threads(race: Race) -> None:
    memory = MemoryMapping(4096)
    ref: VolatileRef[int] = memory.get_ref(0, u64)
    half = memory.get_ref(8, u32)
    patterns = {0, 2**64 - 1, 0x0123456789ABCDEF}

    def store() -> None:
        for value in patterns:
            ref.store(value)
            half.store(value & 0xFFFFFFFF)

    def load() -> None:
        for _ in range(10):
            assert ref.load() in patterns
            assert memory.read_obj(0, u64) in patterns
            assert half.load() in {value & 0xFFFFFFFF for value in patterns}

    race(store, load, store, load)


def test_copies_in_many_threads_do_not_mix(race: Race) -> None:
    """Each has a range of its own, small and large enough to give the GIL away."""
    memory = MemoryMapping(4 * LARGE)

    def copier(number: int) -> Callable[[], None]:
        content = bytes([number]) * LARGE
        back = bytearray(LARGE)

        def copy() -> None:
            count = random.choice([1, 100, 4096, 1 << 18, LARGE])
            memory.fill(0, number * LARGE, count)
            memory.write_all(content[:count], number * LARGE)
            memory.read_slice(back, number * LARGE)
            assert back[:count] == content[:count]

        return copy

    race(*(copier(number) for number in range(4)))


# What threads share besides the memory


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint64))


def test_a_slice_that_all_look_at_while_others_replace_it(race: Race) -> None:
    """What is written when a slice is made is there for whoever it is handed to."""
    memory = MemoryMapping(1 << 16)
    shared = [memory.get_slice(0, 400)]
    refs = [memory.get_ref(0, u64)]

    def use() -> None:
        part, ref = shared[0], refs[0]
        with contextlib.suppress(ClosedError):
            assert repr(part).startswith("<guestmem.VolatileSlice size=0x190")
            assert len(part) == part.size == 400
            assert part.offset(1).copy_to(bytearray(300)) == 300
            assert part.copy_to_volatile_slice(part) == 400
            refs[0] = part.get_ref(8, u64)
        assert "u64" in repr(ref)
        assert ref.load() == 0
        assert ref.to_slice().size == ref.size == 8

    def replace() -> None:
        shared[0], old = memory.get_slice(0, 400), shared[0]
        with contextlib.suppress(BufferError):
            old.release()
        with pytest.raises(BufferError, match="cannot close the mapping: it is held by "):
            memory.close()

    race(use, use, replace)


def test_types_of_objects_in_many_threads(race: Race) -> None:
    """The verdicts on classes are shared, and fewer are kept than there are classes here."""
    memory = MemoryMapping(4096)
    memory.write_obj(Point(1, 2), 0)
    layout = struct.Struct("<IQ")
    classes = [ctypes.c_uint8 * n for n in range(1, 100)]

    def known() -> None:
        point = memory.read_obj(0, Point)
        assert (point.x, point.y) == (1, 2)
        memory.write_obj(point, 64)
        memory.write_obj((3, 4), 128, layout)
        assert memory.read_obj(128, layout) == (3, 4)

    def new() -> None:
        cls = random.choice(classes)
        assert len(memory.read_obj(256, cls)) == ctypes.sizeof(cls)
        own = type("Own", (ctypes.Structure,), {"_fields_": [("x", random.choice(classes))]})
        assert ctypes.sizeof(memory.get_ref(256, own).load()) <= 99
        with pytest.raises(TypeError, match="pointer"):
            memory.get_ref(256, ctypes.c_char_p)

    race(known, known, new, new)


FIRST_USE = """
import ctypes, struct, threading
from guestmem import MemoryMapping

memory = MemoryMapping(4096)
memory.fill(1)
layout = struct.Struct("<I")
start = threading.Barrier(4)
results = []

def use():
    start.wait()
    results.append((memory.read_obj(0, ctypes.c_uint32).value, *memory.read_obj(0, layout)))

threads = [threading.Thread(target=use) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert results == [(0x01010101, 0x01010101)] * 4, results
"""


def test_the_first_use_of_ctypes_and_struct_in_many_threads(run_child: Callable[..., str]) -> None:
    for _ in range(3):
        run_child(FIRST_USE)


def test_buffers_of_others_in_many_threads(race: Race) -> None:
    """Each buffer is exported once: 3.13 counts the exports of a bytearray without a lock."""
    shared = [VolatileSlice.from_buffer(bytearray(4096))]

    def use() -> None:
        with contextlib.suppress(ClosedError):
            part = shared[0].get_slice(64, 64)
            part.fill(1)
            assert part.get_ref(0, u64).load() == 0x0101010101010101
            with memoryview(shared[0]) as view:
                assert view.nbytes == 4096

    def replace() -> None:
        garbage: list[Any] = [VolatileSlice.from_buffer(bytearray(4096))]
        garbage.append(garbage)  # only the collector finds it
        buffer = bytearray(4096)
        shared[0], old = VolatileSlice.from_buffer(buffer), shared[0]
        with pytest.raises(BufferError):
            buffer.append(0)
        with contextlib.suppress(BufferError):
            old.release()

    race(use, use, replace, gc.collect)
