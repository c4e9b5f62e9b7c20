"""Thousands of calls of everything public, with their errors: nothing may be left over."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import os
import pickle
import struct
import sys
import sysconfig
import tracemalloc
import weakref
from functools import partial
from operator import delitem, setitem
from typing import TYPE_CHECKING, Any

import pytest

import guestmem
from guestmem import (
    AtomicRef,
    DirtyBitmap,
    GuestMemory,
    GuestRegion,
    MemoryMapping,
    Ordering,
    Scalar,
    VolatileArrayRef,
    VolatileMemory,
    VolatileRef,
    VolatileSlice,
    be64,
    f32,
    f64,
    fence,
    preadv,
    pwritev,
    u8,
    u16,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS = 200  # refleaks.py makes more
PAGE = 4096


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint64))


class Growing(ctypes.Structure):
    """Without fields: it may still get some, so no verdict on it is kept."""


class Raising:
    """Raises a new error each time: one that is raised again keeps its old tracebacks."""

    def __init__(self, error: type[Exception], *arguments: object) -> None:
        self.error, self.arguments = error, arguments

    def readinto(self, view: object = None) -> Any:
        raise self.error(*self.arguments)

    write = fileno = __index__ = __float__ = readinto


LAYOUT = struct.Struct("<IQ")
DATA = bytes(range(64))
LARGE = bytes(1 << 18)


def export(memory: VolatileMemory) -> memoryview:
    return memoryview(memory)[2:].toreadonly()


def untyped(*values: object) -> Any:
    """Forget the types of what is wrong on purpose."""
    return values


class World:
    """What the calls work on; made once."""

    def __init__(self) -> None:
        self.m = MemoryMapping(1 << 18)
        self.s = self.m.get_slice(0, PAGE)
        self.other = self.m.get_slice(8, 64)
        self.ref = self.m.get_ref(0, u64)
        self.point = self.m.get_ref(0, Point)
        self.tuple = self.m.get_ref(0, LAYOUT)
        self.closed = MemoryMapping(PAGE)
        self.closed.close()
        self.buffer = bytearray(64)
        self.fd = os.memfd_create("guestmem-leaks")
        os.ftruncate(self.fd, PAGE)
        gone = os.memfd_create("guestmem-gone")
        os.ftruncate(gone, 2 * PAGE)
        self.file = MemoryMapping.from_fd(gone, 2 * PAGE)
        self.gone = self.file.get_slice(PAGE - 3, 64)
        self.gone_ref = self.file.get_ref(PAGE, u64)
        os.ftruncate(gone, PAGE)  # of two pages one is missing
        os.close(gone)
        self.tracked = MemoryMapping(300 * PAGE, track_dirty=True)
        assert self.tracked.dirty is not None
        self.dirty = self.tracked.dirty
        self.tracked_guest = GuestMemory([(0, self.tracked)])
        self.tracked.fill(1, 5 * PAGE, 70 * PAGE)
        self.guest = GuestMemory(
            [(PAGE, self.m.get_slice(64, PAGE)), (0, self.m.get_slice(9 * PAGE, PAGE))]
        )
        self.no_guest = GuestMemory([])
        self.no_guest.close()
        self.atomic = self.m.get_atomic_ref(8, u64)
        self.swapped = self.m.get_atomic_ref(16, be64)
        self.array: Any = self.m.get_array_ref(0, 8, u64)
        self.points: Any = self.m.get_array_ref(1, 4, Point)
        self.gone_array = self.file.get_array_ref(PAGE - 16, 8, u64)


def enter_and_leave(memory: MemoryMapping | VolatileSlice, *, fail: bool) -> None:
    with memory:
        kept = memory.get_slice(0, 1)
        if fail:
            1 / 0
        kept.release()


def refused_to_close(ranges: list[tuple[int, int]]) -> None:
    guest = GuestMemory.from_ranges(ranges)
    part = guest.get_slice(PAGE, 1)
    guest.close()
    part.release()


# Each key names the public thing that its calls use; "errors" are what they are refused.
def calls(w: World) -> dict[str, list[Callable[[], object]]]:
    m: Any = w.m
    s: Any = w.s
    f: Any = w.file
    g: Any = w.guest
    closed: Any = w.closed
    from_buffer: Any = VolatileSlice.from_buffer
    bad, boom, io_error = untyped(object(), Raising(ZeroDivisionError), Raising(OSError, 5, "five"))
    return {
        "MemoryMapping": [
            lambda: MemoryMapping(PAGE), lambda: MemoryMapping(size=1), lambda: MemoryMapping(0),
            lambda: MemoryMapping(2**63), lambda: MemoryMapping(-1), lambda: MemoryMapping(bad),
        ],
        "MemoryMapping.from_fd": [
            lambda: MemoryMapping.from_fd(w.fd, PAGE), lambda: MemoryMapping.from_fd(-1, PAGE),
            lambda: MemoryMapping.from_fd(bad, PAGE), lambda: MemoryMapping.from_fd(boom, PAGE),
        ],
        "MemoryMapping.from_fd_offset": [
            lambda: MemoryMapping.from_fd_offset(w.fd, PAGE, 0),
            lambda: MemoryMapping.from_fd_offset(w.fd, PAGE, 1),
            lambda: MemoryMapping.from_fd_offset(w.fd, PAGE, 2**63),
            lambda: MemoryMapping.from_fd_offset(w.fd, PAGE, bad),
        ],
        "MemoryMapping.close": [lambda: MemoryMapping(PAGE).close(), m.close, closed.close],
        "as_ptr": [
            m.as_ptr, s.as_ptr, w.ref.as_ptr, closed.as_ptr,
            lambda: bad_call(m.as_ptr), lambda: bad_call(w.ref.as_ptr),
        ],
        "get_slice": [
            lambda: m.get_slice(0, 8), lambda: s.get_slice(8, 8), lambda: m.get_slice(0, 1 << 20),
            lambda: m.get_slice(2**63, 2**63), lambda: closed.get_slice(0, 0),
            lambda: m.get_slice(0, bad), lambda: m.get_slice(2**64, 0),
        ],
        "get_ref": [
            lambda: m.get_ref(0, u64), lambda: s.get_ref(1, Point), lambda: m.get_ref(0, LAYOUT),
            lambda: m.get_ref(2**20, u8), lambda: m.get_ref(0, bad), lambda: m.get_ref(0, Growing),
            lambda: m.get_ref(0, ctypes.c_char_p), lambda: m.get_ref(0, ctypes.c_uint16 * 3),
        ],
        "get_atomic_ref": [
            lambda: m.get_atomic_ref(0, u64), lambda: s.get_atomic_ref(1, u64),
            lambda: m.get_atomic_ref(2**20, u8), lambda: m.get_atomic_ref(0, f64),
            lambda: m.get_atomic_ref(0, bad), lambda: closed.get_atomic_ref(0, u8),
        ],
        "get_array_ref": [
            lambda: m.get_array_ref(0, 3, u64), lambda: s.get_array_ref(1, 2, Point),
            lambda: m.get_array_ref(0, 2**20, u8), lambda: m.get_array_ref(0, 2**62, u64),
            lambda: m.get_array_ref(0, 2, LAYOUT), lambda: m.get_array_ref(0, 1, bad),
            lambda: closed.get_array_ref(0, 0, u8), lambda: m.get_array_ref(0, -1, u8),
        ],
        "preadv": [
            lambda: preadv(w.fd, [s, w.other], 0), lambda: preadv(-1, [s]),
            lambda: preadv(w.fd, bad), lambda: preadv(bad, []),
            lambda: preadv(w.fd, [s, bad], 0), lambda: preadv(w.fd, [s, closed], 0),
            lambda: preadv(w.fd, [s], 2**63), lambda: preadv(w.fd, [w.gone], 0),
            lambda: preadv(w.fd, [s], 2**63 - 1),
        ],
        "pwritev": [
            lambda: pwritev(w.fd, [w.other], 0), lambda: pwritev(-1, [s]),
            lambda: pwritev(w.fd, [w.gone], 0), lambda: pwritev(w.fd, [s], -1),
        ],
        "fence": [fence, lambda: fence(Ordering.ACQUIRE), lambda: fence(bad),
                  lambda: fence(Ordering.RELAXED)],
        "read_obj": [
            lambda: m.read_obj(0, u64), lambda: m.read_obj(1, f32), lambda: m.read_obj(0, Point),
            lambda: m.read_obj(0, LAYOUT), lambda: s.read_obj(PAGE, u8), lambda: m.read_obj(0, bad),
            lambda: m.read_obj(0, ctypes.py_object), lambda: closed.read_obj(0, u64),
            lambda: m.read_obj(0, Growing),
        ],
        "write_obj": [
            lambda: m.write_obj(2**64 - 1, 0, u64), lambda: m.write_obj(1.5, 3, f64),
            lambda: m.write_obj(Point(1, 2), 0), lambda: m.write_obj((1, 2), 0, type=LAYOUT),
            lambda: m.write_obj(2**64, 0, u64), lambda: m.write_obj(10**400, 0, f64),
            lambda: m.write_obj("1", 0, be64), lambda: m.write_obj((1,), 0, LAYOUT),
            lambda: m.write_obj(bad, 0), lambda: m.write_obj(Point(), 2**40),
            lambda: m.write_obj(boom, 0, u64), lambda: m.write_obj(1, 0, Point),
        ],
        "read_slice": [
            lambda: m.read_slice(w.buffer, 0), lambda: m.read_slice(bytearray(1 << 18), 0),
            lambda: m.read_slice(b"", 0), lambda: m.read_slice(w.buffer, 2**20),
            lambda: m.read_slice(bad, 0), lambda: closed.read_slice(w.buffer, 0),
        ],
        "write_slice": [
            lambda: m.write_slice(DATA, 1), lambda: m.write_slice(LARGE, 0),
            lambda: m.write_slice(memoryview(DATA)[::2], 0), lambda: m.write_slice(DATA, 2**20),
            lambda: m.write_slice(closed, 0),
        ],
        "read_bytes": [
            lambda: m.read_bytes(0, 0), lambda: m.read_bytes(0, 1 << 18),
            lambda: m.read_bytes(0, 2**62), lambda: closed.read_bytes(0, 1),
        ],
        "read_exact": [lambda: m.read_exact(w.buffer, 0), lambda: s.read_exact(w.buffer, PAGE - 8)],
        "write_all": [lambda: m.write_all(DATA, 0), lambda: s.write_all(DATA, PAGE - 8)],
        "read_to_memory": [
            lambda: m.read_to_memory(0, io.BytesIO(DATA), 64),
            lambda: m.read_to_memory(0, io.BytesIO(DATA), 65),
            lambda: m.read_to_memory(0, w.fd, 64, 0), lambda: s.read_to_memory(0, w.fd, PAGE, 1),
            lambda: m.read_to_memory(0, -1, 1), lambda: m.read_to_memory(0, -1, 2**20),
            lambda: m.read_to_memory(0, boom, 1), lambda: m.read_to_memory(0, io_error, 1),
            lambda: m.read_to_memory(0, bad, 1), lambda: m.read_to_memory(0, io.StringIO(), 1),
            lambda: m.read_to_memory(0, boom, 1, 0), lambda: m.read_to_memory(0, w.fd, 1, 2**63),
        ],
        "missing pages": [
            lambda: f.read_bytes(0, PAGE), lambda: f.read_bytes(1, PAGE), lambda: f.fill(1),
            lambda: f.read_obj(PAGE, u64), lambda: f.write_obj(1, PAGE - 1, u16),
            lambda: f.read_obj(PAGE - 1, Point), lambda: f.write_obj((1, 2), PAGE, LAYOUT),
            lambda: f.read_slice(bytearray(8), PAGE), lambda: f.write_all(DATA, PAGE - 8),
            w.gone_ref.load, lambda: w.gone_ref.store(1), lambda: w.gone.copy_to(bytearray(64)),
            lambda: w.gone.copy_from(DATA), lambda: w.gone.copy_to_volatile_slice(w.other),
            lambda: w.other.copy_to_volatile_slice(w.gone),
            lambda: f.read_to_memory(0, io.BytesIO(DATA), 64), lambda: f.remove_range(PAGE, 8),
            lambda: f.read_to_memory(PAGE - 8, io.BytesIO(DATA), 64),
            lambda: f.read_to_memory(0, boom, 1), lambda: f.read_to_memory(0, io_error, 1),
            lambda: f.write_from_memory(0, io.BytesIO(), 64),
            lambda: f.write_from_memory(PAGE - 8, io.BytesIO(), 64),
        ],
        "write_from_memory": [
            lambda: m.write_from_memory(0, io.BytesIO(), 64),
            lambda: m.write_from_memory(mem_offset=0, dst=w.fd, count=8, dst_offset=0),
            lambda: m.write_from_memory(0, boom, 1), lambda: m.write_from_memory(0, io_error, 1),
            lambda: m.write_from_memory(0, -1, 1), lambda: m.write_from_memory(0, bad, 1),
            lambda: closed.write_from_memory(0, w.fd, 1),
        ],
        "fill": [
            lambda: m.fill(0), lambda: s.fill(1, 2, 3), lambda: m.fill(256),
            lambda: m.fill(0, 2**20),
        ],
        "remove_range": [
            lambda: m.remove_range(0, PAGE + 1), lambda: m.remove_range(1, 1),
            lambda: m.remove_range(0, 2**20), lambda: closed.remove_range(0, 0),
        ],
        "size": [lambda: m.size, lambda: len(m), lambda: w.ref.size, lambda: u64.size],
        "closed": [lambda: m.closed, lambda: s.closed],
        "VolatileSlice.from_buffer": [
            lambda: VolatileSlice.from_buffer(w.buffer), lambda: from_buffer(DATA),
            lambda: VolatileSlice.from_buffer(w.buffer).get_ref(0, u8).to_slice(),
            lambda: from_buffer(bad), lambda: VolatileSlice.from_buffer(closed),
        ],
        "VolatileSlice.offset": [
            lambda: s.offset(3), lambda: s.offset(PAGE + 1), lambda: s.offset(bad),
        ],
        "VolatileSlice.copy_to": [lambda: s.copy_to(w.buffer), lambda: s.copy_to(DATA)],
        "VolatileSlice.copy_from": [lambda: s.copy_from(DATA), lambda: s.copy_from(bad)],
        "VolatileSlice.copy_to_volatile_slice": [
            lambda: s.copy_to_volatile_slice(w.other), lambda: s.copy_to_volatile_slice(bad),
            lambda: s.copy_to_volatile_slice(released()),
        ],
        "VolatileSlice.read_from": [
            lambda: s.read_from(io.BytesIO(DATA), 64), lambda: s.read_from(-1, 1),
            lambda: s.read_from(io.BytesIO(), 64), lambda: s.read_from(bad, 64),
        ],
        "VolatileSlice.write_to": [
            lambda: s.write_to(io.BytesIO(), 64), lambda: s.write_to(-1, 1),
            lambda: s.write_to(io_error, 64), lambda: s.write_to(io.BytesIO(), 2**40),
        ],
        "VolatileSlice.release": [released, lambda: refuse_release(w)],
        "VolatileRef.load": [w.ref.load, w.point.load, w.tuple.load, lambda: bad_call(w.ref.load)],
        "VolatileRef.store": [
            lambda: w.ref.store(5), lambda: w.point.store(Point(3)), lambda: w.tuple.store((1, 2)),
            lambda: w.ref.store(-1), lambda: w.ref.store(2**70), lambda: w.point.store(bad),
            lambda: w.tuple.store((1, -1)), lambda: w.ref.store(boom),
        ],
        "VolatileRef.to_slice": [
            w.ref.to_slice, w.point.to_slice, lambda: bad_call(w.ref.to_slice),
        ],
        "VolatileRef.type": [lambda: w.ref.type, lambda: w.point.type],
        "MemoryMapping.dirty": [
            lambda: MemoryMapping(PAGE, track_dirty=True).dirty, lambda: m.dirty,
            lambda: MemoryMapping(PAGE, track_dirty=Untrue()),
            lambda: MemoryMapping.from_fd(w.fd, PAGE, track_dirty=True),
        ],
        "DirtyBitmap.mark": [lambda: w.dirty.mark(5 * PAGE, 9), lambda: w.dirty.mark(0, 2**40),
                             lambda: w.dirty.mark(bad, 0)],
        "DirtyBitmap.is_dirty": [lambda: w.dirty.is_dirty(0), lambda: w.dirty.is_dirty(2**40)],
        "DirtyBitmap.ranges": [w.dirty.ranges, lambda: bad_call(w.dirty.ranges)],
        "DirtyBitmap.take": [take, lambda: bad_call(w.dirty.take)],
        "DirtyBitmap.merge": [
            lambda: w.dirty.merge(w.dirty), lambda: w.dirty.merge(b""), lambda: w.dirty.merge(bad),
            lambda: w.dirty.merge(bytes(8), 64 * PAGE), lambda: w.dirty.merge(bytes(9)),
            lambda: w.dirty.merge(bytes(48)), lambda: w.dirty.merge(bytes(8), 1),
            lambda: w.dirty.merge(bytes(8), bad), lambda: w.dirty.merge(w.gone.get_slice(0, 8)),
        ],
        "DirtyBitmap.count": [lambda: w.dirty.count, lambda: repr(w.dirty), lambda: bytes(w.dirty)],
        "DirtyBitmap.page_size": [lambda: w.dirty.page_size],
        "DirtyBitmap.num_pages": [lambda: w.dirty.num_pages],
        "tracked writes": [lambda: w.tracked.fill(1, 5 * PAGE, 8),
                           lambda: w.tracked.read_to_memory(5 * PAGE, io.BytesIO(DATA), 64),
                           lambda: w.tracked.read_to_memory(5 * PAGE, io.BytesIO(DATA), 65)],
        "GuestMemory": [
            lambda: GuestMemory([(0, s), (PAGE, m)]), lambda: GuestMemory([(0, s), (8, m)]),
            lambda: GuestMemory([(0, s), (PAGE, closed)]), lambda: GuestMemory(bad),
            lambda: GuestMemory([(0, s), (2**64 - 1, m)]), lambda: GuestMemory([(0, s), bad]),
            lambda: GuestMemory([(boom, s)]), lambda: GuestMemory([(0, m.get_slice(0, 0))]),
        ],
        "from_ranges": [lambda: GuestMemory.from_ranges([(0, PAGE), (PAGE, 1)]),
                        lambda: GuestMemory.from_ranges([(0, PAGE), (PAGE, 0)]),
                        lambda: GuestMemory.from_ranges([(0, 1), (PAGE, 1)], track_dirty=True),
                        lambda: refused_to_close([(0, 1), (PAGE, 1)])],
        "regions": [lambda: g.regions], "num_regions": [lambda: g.num_regions],
        "last_addr": [lambda: g.last_addr, lambda: repr(g)],
        "find_region": [lambda: g.find_region(PAGE), lambda: g.find_region(-1)],
        "address_in_range": [lambda: g.address_in_range(PAGE), lambda: g.address_in_range(bad)],
        "check_range": [lambda: g.check_range(0, 2 * PAGE), lambda: g.check_range(0, 2**64 - 1),
                        lambda: g.check_range(2**60, 5), lambda: g.check_range(0, bad)],
        "checked_offset": [lambda: g.checked_offset(5, 6), lambda: g.checked_offset(2**63, 2**63),
                           lambda: g.checked_offset(0, bad)],
        "get_host_address": [lambda: g.get_host_address(5), lambda: g.get_host_address(2**40)],
        "slices": [lambda: list(g.slices(PAGE - 5, 10)), lambda: g.slices(2 * PAGE, 1)],
        "dirty_ranges": [w.tracked_guest.dirty_ranges, lambda: bad_call(g.dirty_ranges)],
        "take_dirty": [taken_by_address, lambda: bad_call(g.take_dirty)],
        "mark_dirty": [
            lambda: w.tracked_guest.mark_dirty(5, 9), lambda: g.mark_dirty(PAGE - 1, 9),
            lambda: g.mark_dirty(2**40, 1), lambda: g.mark_dirty(0, bad),
        ],
        "merge_dirty": [
            lambda: w.tracked_guest.merge_dirty(0, w.dirty), lambda: g.merge_dirty(0, bytes(8)),
            lambda: g.merge_dirty(1, bytes(8)), lambda: g.merge_dirty(0, bytes(7)),
            lambda: g.merge_dirty(0, bytes(64)), lambda: g.merge_dirty(bad, b""),
            lambda: g.merge_dirty(0, bad), lambda: g.merge_dirty(0, w.gone.get_slice(0, 8)),
            lambda: g.merge_dirty(0, m),
        ],
        "with_region": [lambda: g.with_region(9 * PAGE, s), lambda: g.with_region(1, s),
                        lambda: g.with_region(bad, s), lambda: g.with_region(2**50, closed)],
        "without_region": [lambda: g.without_region(0, PAGE), lambda: g.without_region(0, 1),
                           lambda: g.without_region(9, 1)],
        "guest accessors": [
            lambda: g.read_obj(8, u64), lambda: g.read_obj(PAGE - 3, u64),
            lambda: g.read_obj(PAGE - 3, Point), lambda: g.read_obj(2**40, u64),
            lambda: g.read_obj(2 * PAGE - 3, LAYOUT), lambda: g.read_obj(0, bad),
            lambda: g.write_obj(2**63, 8, u64), lambda: g.write_obj(5, PAGE - 3, u64),
            lambda: g.write_obj(Point(1), PAGE - 3), lambda: g.write_obj(-1, PAGE - 3, u64),
            lambda: g.write_obj((1, 2), 2 * PAGE, LAYOUT), lambda: g.write_obj(bad, 0),
            lambda: g.read_bytes(PAGE - 3, 8), lambda: g.read_bytes(PAGE, 2 * PAGE),
            lambda: g.read_slice(bytearray(64), PAGE - 3), lambda: g.read_exact(bytearray(9), 5),
            lambda: g.read_slice(b"", 0), lambda: g.write_slice(DATA, 2 * PAGE - 3),
            lambda: g.write_all(DATA, PAGE - 3), lambda: g.write_all(DATA, 2 * PAGE - 3),
            lambda: g.fill(1, PAGE - 3, 8), lambda: g.fill(1, 2**64 - 3, 8),
            lambda: g.fill(1, 2 * PAGE - 3), lambda: g.fill(1, 2 * PAGE),
            lambda: g.write_all(m.get_slice(60, 64), PAGE - 3),  # it overlaps
            lambda: g.read_exact(m.get_slice(60, 64), PAGE - 3),
            lambda: w.tracked_guest.remove_range(90 * PAGE, PAGE + 5),
            lambda: g.remove_range(5, PAGE), lambda: g.remove_range(2 * PAGE, 1),
            lambda: g.write_obj(5, 0), lambda: w.no_guest.fill(1), lambda: w.no_guest.slices(0, 0),
            lambda: g.get_slice(PAGE, 8), lambda: g.get_slice(PAGE - 3, 8),
            lambda: g.get_ref(8, Point).load(), lambda: g.get_array_ref(8, 4, u64).tolist(),
            lambda: g.get_atomic_ref(8, u64).load(), lambda: g.get_atomic_ref(9, u64),
        ],
        "guest transfers": [
            lambda: g.read_to_memory(PAGE - 3, io.BytesIO(DATA), 64),
            lambda: g.read_to_memory(PAGE - 3, io.BytesIO(DATA), 65),
            lambda: g.read_to_memory(PAGE - 3, w.fd, 64, 0),
            lambda: g.write_from_memory(PAGE - 3, io.BytesIO(), 64),
            lambda: g.write_from_memory(2 * PAGE - 3, io.BytesIO(), 64),
        ],
        "ends of guests": [
            lambda: GuestMemory([(0, s)]).close(), lambda: g.get_ref(2 * PAGE - 1, u64),
            lambda: g.get_array_ref(PAGE, PAGE, u64), lambda: g.read_exact(bytearray(9), 2 * PAGE),
            lambda: g.write_slice(DATA, 2**40),
        ],
        "AtomicRef.as_ptr": [w.atomic.as_ptr, lambda: bad_call(w.atomic.as_ptr)],
        "AtomicRef.to_slice": [w.atomic.to_slice, lambda: bad_call(w.atomic.to_slice)],
        "AtomicRef.load": [w.atomic.load, lambda: w.atomic.load(Ordering.RELAXED),
                           lambda: w.atomic.load(bad), lambda: w.atomic.load(Ordering.RELEASE)],
        "AtomicRef.store": [lambda: w.atomic.store(5), lambda: w.atomic.store(-1)],
        "AtomicRef.exchange": [lambda: w.atomic.exchange(2**63), lambda: w.atomic.exchange(boom)],
        "AtomicRef.compare_exchange": [
            lambda: w.atomic.compare_exchange(2**63, 1), lambda: w.atomic.compare_exchange(0, 5),
            lambda: w.atomic.compare_exchange(0, bad), lambda: w.atomic.compare_exchange(-1, 0),
        ],
        "AtomicRef.fetch_add": [lambda: w.atomic.fetch_add(2**50), lambda: w.swapped.fetch_add(7),
                                lambda: w.atomic.fetch_add(bad)],
        "AtomicRef.fetch_sub": [lambda: w.atomic.fetch_sub(2**50), lambda: w.swapped.fetch_sub(7),
                                lambda: w.atomic.fetch_sub(2**64)],
        "AtomicRef.fetch_and": [lambda: w.atomic.fetch_and(2**64 - 1),
                                lambda: w.atomic.fetch_and(1, bad)],
        "AtomicRef.fetch_or": [lambda: w.atomic.fetch_or(0), lambda: w.atomic.fetch_or(bad)],
        "AtomicRef.fetch_xor": [lambda: w.atomic.fetch_xor(0), lambda: w.atomic.fetch_xor(-1)],
        "VolatileArrayRef.to_slice": [w.array.to_slice, lambda: bad_call(w.array.to_slice)],
        "VolatileArrayRef.tolist": [w.array.tolist, w.points.tolist, w.gone_array.tolist],
        "VolatileArrayRef.copy_to": [
            lambda: w.array.copy_to(w.buffer), lambda: w.array.copy_to(bad),
            lambda: w.array.copy_to(b"12345678"), lambda: w.gone_array.copy_to(bytearray(64)),
        ],
        "VolatileArrayRef.copy_from": [
            lambda: w.array.copy_from(range(9)), lambda: w.array.copy_from(DATA),
            lambda: w.array.copy_from([1, boom]), lambda: w.array.copy_from(bad),
            lambda: w.points.copy_from([Point(1, 2)]), lambda: w.array.copy_from("12"),
        ],
        "VolatileArrayRef.load": [lambda: w.array.load(1), lambda: w.array.load(8),
                                  lambda: w.points.load(1), lambda: w.array.load(2**61)],
        "VolatileArrayRef.store": [lambda: w.array.store(1, 2**63), lambda: w.array.store(9, 1),
                                   lambda: w.points.store(1, Point()),
                                   lambda: w.array.store(0, boom)],
        "__getitem__": [lambda: w.array[0], lambda: w.array[1:3], lambda: w.array[bad],
                        lambda: w.array[9], lambda: w.array[::2], lambda: list(w.points)],
        "__iter__": [lambda: list(w.array), lambda: next(iter(w.points)).x],
        "__setitem__": [lambda: setitem(w.array, 0, 1), lambda: setitem(w.array, 9, 1),
                        lambda: setitem(w.array, bad, 1), lambda: setitem(w.points, 0, Point())],
        "__delitem__": [lambda: delitem(w.array, 0)],
        "Ordering.name": [lambda: Ordering.RELAXED.name],
        "Scalar.name": [lambda: u64.name, lambda: hash(u64), lambda: u64 == u8],
        "__enter__": [lambda: enter_and_leave(MemoryMapping(1), fail=False), closed.__enter__],
        "__exit__": [
            lambda: enter_and_leave(MemoryMapping(1), fail=True),
            lambda: enter_and_leave(m.get_slice(0, 8), fail=False),
            lambda: enter_and_leave(m.get_slice(0, 8), fail=True), m.__exit__,
        ],
        "__reduce__": [
            lambda: pickle.dumps(m), lambda: copy.copy(s), lambda: copy.deepcopy(w.ref),
            lambda: pickle.loads(pickle.dumps(u64)), lambda: copy.deepcopy(be64),
        ],
        "__class_getitem__": [lambda: VolatileRef[int], lambda: Scalar[float],
                              lambda: AtomicRef[int], lambda: VolatileArrayRef[int]],
        "__repr__": [m.__repr__, closed.__repr__, lambda: repr(w.point), lambda: repr(u64),
                     lambda: repr(w.atomic), lambda: repr(w.array), lambda: repr(w.points)],
        "__len__": [lambda: len(s), lambda: len(closed)],
        "__buffer__": [
            partial(export, s), partial(bytes, s), partial(export, closed),
        ],
        "weak references": [lambda: weakref.ref(m.get_slice(0, 1)), lambda: weakref.ref(w.ref)],
        "no instances": [
            *untyped(VolatileMemory, VolatileSlice, VolatileRef, Scalar),
            *untyped(AtomicRef, VolatileArrayRef, DirtyBitmap),
        ],
    }  # fmt: skip


class Untrue:
    def __bool__(self) -> bool:
        raise ZeroDivisionError


def taken_by_address() -> object:
    memory = MemoryMapping(300 * PAGE, track_dirty=True)
    memory.fill(1, 5 * PAGE, 70 * PAGE)
    return GuestMemory([(0, memory.get_slice(5, 200 * PAGE)), (2**32, memory)]).take_dirty()


def take() -> object:
    memory: Any = MemoryMapping(300 * PAGE, track_dirty=True)
    memory.fill(1, 5 * PAGE, 70 * PAGE)
    return memory.dirty.take()


def bad_call(method: Callable[..., object]) -> None:
    method(1, 2, 3)


def released() -> VolatileSlice:
    part = VolatileSlice.from_buffer(bytearray(8))
    part.release()
    part.release()
    return part


def refuse_release(w: World) -> None:
    view = memoryview(w.s)
    try:
        w.s.release()
    finally:
        view.release()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    yield made
    os.close(made.fd)


def attempt(call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception:
        return False
    return True


def test_every_public_method_is_in_the_table(world: World) -> None:
    names = {name.rpartition(".")[2] for name in calls(world)}
    names |= set(dir(object)) - {"__reduce__", "__repr__"} | {"__release_buffer__", "__module__"}
    types = [VolatileMemory, MemoryMapping, VolatileSlice, VolatileRef, Scalar]
    types += [AtomicRef, VolatileArrayRef, DirtyBitmap, GuestMemory]
    missing = [f"{cls.__name__}.{name}" for cls in types for name in set(dir(cls)) - names]
    assert missing == []
    public = [getattr(guestmem, name) for name in guestmem.__all__]
    public = [cls for cls in public if isinstance(cls, type) and not issubclass(cls, Exception)]
    assert set(public) == {*types, GuestRegion, Ordering}


# Of these all calls work, or all are refused.
OF_ONE_KIND = {"size", "__repr__", "__class_getitem__", "no instances"}


def test_the_calls_of_the_table_do_what_they_are_there_for(world: World) -> None:
    for name, row in calls(world).items():
        outcomes = {attempt(call) for call in row}
        assert outcomes == {True, False} or len(row) < 4 or name in OF_ONE_KIND, name
    assert not world.m.closed


def counts() -> dict[str, int]:
    """What must not grow."""
    gc.collect()
    with open("/proc/self/maps") as file:
        mapped = sum("/dev/zero" in line or "guestmem" in line for line in file)
    constants = [value for value in vars(guestmem).values() if isinstance(value, Scalar)]
    classes: list[object] = [
        VolatileMemory, MemoryMapping, VolatileSlice, VolatileRef, Scalar, Point, Growing, LAYOUT,
        guestmem.InvalidAddressError, guestmem.ClosedError, io.FileIO, io.BytesIO,
    ]  # fmt: skip
    values: list[object] = [DATA, *constants, *classes]
    if sys.version_info < (3, 12):  # since then None is immortal, and its count means nothing
        values.append(None)
    return {
        "mappings": mapped,
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
        "blocks": sys.getallocatedblocks(),
        "references": sum(sys.getrefcount(value) for value in values),
    }


def growth(work: Callable[[], object]) -> dict[str, int]:
    """Return what grows with the number of rounds: by at least one in ten, and whenever we look.

    Python's own free lists grow as well, now and then.
    """
    for _ in range(50):
        attempt(work)
    grown: dict[str, int] = {}
    for _ in range(5):
        before = counts()
        for _ in range(ROUNDS):
            attempt(work)
        after = counts()
        grown = {
            name: after[name] - before[name]
            for name in before
            if after[name] - before[name] > ROUNDS // 10
        }
        if not grown:
            break
    return grown


@pytest.fixture
def frozen() -> Iterator[None]:
    """What is there is not looked at by the collector, hundreds of times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.usefixtures("frozen")
def test_nothing_is_left_over(world: World) -> None:
    leaks = {}
    for name, row in calls(world).items():
        for number, call in enumerate(row):
            if grown := growth(call):
                leaks[f"{name} [{number}]"] = grown
    assert leaks == {}


def test_leaks_would_be_seen() -> None:
    kept: list[object] = []
    fds: list[int] = []
    try:
        assert growth(lambda: kept.append(MemoryMapping(1))).keys() >= {"mappings", "references"}
        assert "references" in growth(lambda: kept.append(u64))
        assert "blocks" in growth(lambda: kept.append(bytes(100))) or no_blocks()
        assert "objects" in growth(lambda: kept.append([]))
        assert "file descriptors" in growth(lambda: fds.append(os.dup(0))) or len(fds) < ROUNDS
    finally:
        for fd in fds:
            os.close(fd)


def no_blocks() -> bool:
    """Whether blocks are not counted: not by malloc, and not by every free-threaded build."""
    return sys.getallocatedblocks() == 0 or bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


@pytest.mark.usefixtures("frozen")
def test_no_memory_is_left_over(world: World) -> None:
    """All together, by the bytes that Python's allocators have given out.

    What caches take falls from look to look, slowly under a sanitizer; what leaks does not.
    """
    everything = [call for row in calls(world).values() for call in row]
    rounds = 200
    grown = []
    tracemalloc.start()
    try:
        for _ in range(15):
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(rounds):
                for call in everything:
                    attempt(call)
            gc.collect()
            grown.append(tracemalloc.get_traced_memory()[0] - before)
            if grown[-1] < rounds * 16:  # one lost block in each
                break
    finally:
        tracemalloc.stop()
    assert min(grown) < rounds * 16


@pytest.mark.usefixtures("mortal_classes")
def test_classes_without_end_do_not_fill_the_memory() -> None:
    """What is remembered of a ctypes class does not keep it."""
    memory = MemoryMapping(64)
    gone = []
    for n in range(3000):
        cls = ctypes.c_uint8 * (n % 64 + 1) if n % 2 else type(f"C{n}", (Point,), {})
        memory.read_obj(0, cls)
        if n % 2 == 0:
            gone.append(weakref.ref(cls))
    del cls
    gc.collect()
    assert sum(to() is not None for to in gone) == 0
