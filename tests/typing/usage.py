"""What type checkers make of the API: checked by mypy and pyright, never run."""

import ctypes
import io
import os
import socket
from struct import Struct
from typing import Any, assert_type

import guestmem
from guestmem import MemoryMapping, Scalar, VolatileRef, VolatileSlice, f64, le16, u64


class Descriptor(ctypes.LittleEndianStructure):
    _fields_ = (("addr", ctypes.c_uint64), ("len", ctypes.c_uint32))


def objects(mem: MemoryMapping) -> None:
    assert_type(u64, Scalar[int])
    assert_type(mem.read_obj(0, u64), int)
    assert_type(mem.read_obj(0, f64), float)
    assert_type(mem.read_obj(0, Descriptor), Descriptor)
    assert_type(mem.read_obj(0, ctypes.c_uint8 * 4), ctypes.Array[ctypes.c_uint8])
    assert_type(mem.read_obj(0, Struct("<QI")), tuple[Any, ...])
    mem.write_obj(1, 0, le16)
    mem.write_obj(1.5, 0, type=f64)
    mem.write_obj(1, 0, f64)
    mem.write_obj(Descriptor(1, 2), 0)
    mem.write_obj(Descriptor(1, 2), 0, Descriptor)
    mem.write_obj((1, 2), 0, Struct("<QI"))
    mem.write_obj(1.5, 0, u64)  # type: ignore[arg-type]  # pyright: ignore
    mem.write_obj(1, 0)  # type: ignore[call-overload]  # pyright: ignore
    mem.write_obj("1", 0, u64)  # type: ignore[call-overload]  # pyright: ignore
    mem.read_obj(0, int)  # type: ignore[type-var]  # pyright: ignore


def refs(mem: MemoryMapping) -> VolatileRef[int]:
    ref = mem.get_ref(8, u64)
    assert_type(ref, VolatileRef[int])
    assert_type(ref.load(), int)
    ref.store(3)
    mem.get_ref(8, f64).store(1)
    mem.get_ref(8, Descriptor).store(Descriptor())
    assert_type(mem.get_ref(8, Descriptor).load(), Descriptor)
    assert_type(mem.get_ref(0, Struct("<QI")).load(), tuple[Any, ...])
    ref.store("3")  # type: ignore[call-overload]  # pyright: ignore
    return ref


def slices(mem: MemoryMapping) -> None:
    part = mem.get_slice(0, 16)
    assert_type(part, VolatileSlice)
    assert_type(part.offset(8), VolatileSlice)
    assert_type(part.copy_to(bytearray(4)), int)
    assert_type(part.copy_to_volatile_slice(part), int)
    assert_type(VolatileSlice.from_buffer(bytearray(8)), VolatileSlice)
    assert_type(mem.read_slice(bytearray(4), 0), int)
    assert_type(mem.read_bytes(0, 4), bytes)
    assert_type(memoryview(mem)[0], int)
    mem.fill(0)
    mem.fill(0, 8, None)
    with part as same:
        assert_type(same, VolatileSlice)


def files(mem: MemoryMapping, file: io.BufferedRandom, peer: socket.socket) -> None:
    mem.read_to_memory(0, file, 16)
    mem.read_to_memory(0, file, 16, src_offset=32)
    mem.read_to_memory(0, peer, 16, src_offset=32)
    mem.read_to_memory(0, io.BytesIO(bytes(16)), 16)
    mem.write_from_memory(0, file, 16, dst_offset=0)
    mem.write_from_memory(0, 1, 16)
    mem.read_to_memory(0, io.BytesIO(b""), 16, 0)
    mem.read_to_memory(0, io.StringIO(""), 16)  # type: ignore[call-overload]  # pyright: ignore
    mem.read_to_memory(0, peer, 16)  # type: ignore[call-overload]  # pyright: ignore
    with MemoryMapping.from_fd_offset(os.memfd_create("ram"), 4096, 0) as other:
        assert_type(other, MemoryMapping)


def atomics(mem: MemoryMapping) -> None:
    ref = mem.get_atomic_ref(0, guestmem.u32)
    assert_type(ref, guestmem.AtomicRef[int])
    assert_type(ref.load(guestmem.Ordering.ACQUIRE), int)
    assert_type(ref.compare_exchange(1, 2), tuple[bool, int])
    assert_type(ref.fetch_add(1, None), int)
    guestmem.fence(guestmem.Ordering.SEQ_CST)
    mem.get_atomic_ref(0, guestmem.f64)  # type: ignore[arg-type]  # pyright: ignore
    ref.load("SEQ_CST")  # type: ignore[arg-type]  # pyright: ignore


def arrays(mem: MemoryMapping) -> None:
    numbers = mem.get_array_ref(0, 4, guestmem.u16)
    assert_type(numbers, guestmem.VolatileArrayRef[int])
    assert_type(numbers[0], int)
    assert_type(numbers[1:], guestmem.VolatileArrayRef[int])
    assert_type(numbers.tolist(), list[int])
    numbers[0] = 5
    numbers.copy_from([1, 2])
    numbers.copy_from(b"12")
    for number in numbers:
        assert_type(number, int)
    points = mem.get_array_ref(0, 4, Descriptor)
    assert_type(points[0], Descriptor)
    points[1] = Descriptor()
    numbers[0] = "5"  # type: ignore[call-overload]  # pyright: ignore


def guests(mem: MemoryMapping, part: VolatileSlice) -> None:
    guest = guestmem.GuestMemory([(0, mem), (1 << 20, part)])
    assert_type(guest, guestmem.GuestMemory)
    assert_type(guestmem.GuestMemory.from_ranges([(0, 4096)]), guestmem.GuestMemory)
    assert_type(guest.regions, tuple[guestmem.GuestRegion, ...])
    assert_type(guest.last_addr, int | None)
    region = guest.find_region(0)
    assert_type(region, guestmem.GuestRegion | None)
    if region is not None:
        assert_type(region.memory, guestmem.VolatileMemory)
        start, size, last_addr, memory = region
        assert_type(start + size + last_addr, int)
        assert_type(memory, guestmem.VolatileMemory)
    assert_type(guest.checked_offset(0, 8), int | None)
    assert_type(guest.check_range(0, 8), bool)
    assert_type(guest.get_host_address(0), int)
    assert_type(guest.read_obj(0, u64), int)
    assert_type(guest.read_obj(0, Descriptor), Descriptor)
    assert_type(guest.read_obj(0, Struct("<QI")), tuple[Any, ...])
    guest.write_obj(1, 0, le16)
    guest.write_obj(Descriptor(1, 2), 0)
    guest.write_obj(1, 0)  # type: ignore[call-overload]  # pyright: ignore
    guest.write_obj("1", 0, u64)  # type: ignore[call-overload]  # pyright: ignore
    assert_type(guest.get_slice(0, 8), VolatileSlice)
    assert_type(list(guest.slices(0, 8)), list[VolatileSlice])
    assert_type(guest.get_ref(0, f64), VolatileRef[float])
    assert_type(guest.get_atomic_ref(0, u64), guestmem.AtomicRef[int])
    assert_type(guest.get_array_ref(0, 4, Descriptor), guestmem.VolatileArrayRef[Descriptor])
    assert_type(guest.write_slice(b"1", 0), int)
    guest.fill(0, 0, 8)
    guest.fill()  # type: ignore[call-arg]  # pyright: ignore
    guest.read_to_memory(0, io.BytesIO(b"1"), 1)
    guest.write_from_memory(0, 1, 16, dst_offset=0)
    guest.read_to_memory(0, io.StringIO(""), 1)  # type: ignore[call-overload]  # pyright: ignore
    assert_type(guest.with_region(1 << 30, part), guestmem.GuestMemory)
    assert_type(guest.without_region(0, 4096), guestmem.GuestMemory)
    with guest as same:
        assert_type(same, guestmem.GuestMemory)
    guestmem.GuestMemory([(0, b"")])  # type: ignore[list-item]  # pyright: ignore


def dirty_pages(guest: guestmem.GuestMemory) -> None:
    mem = MemoryMapping(4096, track_dirty=True)
    assert_type(mem.dirty, guestmem.DirtyBitmap | None)
    mem.dirty.take()  # type: ignore[union-attr]  # pyright: ignore
    if mem.dirty is not None:
        assert_type(mem.dirty.ranges(), list[tuple[int, int]])
        assert_type(mem.dirty.take(), list[tuple[int, int]])
        assert_type(mem.dirty.is_dirty(0), bool)
        assert_type(mem.dirty.count + mem.dirty.page_size + mem.dirty.num_pages, int)
        assert_type(memoryview(mem.dirty)[0], int)
        mem.dirty.mark(0, 8)
        mem.dirty.merge(bytearray(8))
        mem.dirty.merge([1])  # type: ignore[arg-type]  # pyright: ignore
    assert_type(guest.dirty_ranges(), list[tuple[int, int]])
    assert_type(guest.take_dirty(), list[tuple[int, int]])


def one_system_call(
    part: VolatileSlice, guest: guestmem.GuestMemory, file: io.BufferedRandom, peer: socket.socket
) -> None:
    assert_type(part.read_from(0, 16), int)
    assert_type(part.read_from(file, 16), int)
    assert_type(part.write_to(io.BytesIO(), 16), int)
    assert_type(guestmem.preadv(0, guest.slices(0, 16)), int)
    assert_type(guestmem.preadv(file, [part, part], 512), int)
    assert_type(guestmem.pwritev(peer, (part,), None), int)
    part.read_from(io.StringIO(""), 16)  # type: ignore[arg-type]  # pyright: ignore
    part.write_to(peer, 16)  # type: ignore[arg-type]  # pyright: ignore
    guestmem.preadv(0, guest)  # type: ignore[arg-type]  # pyright: ignore
    guestmem.preadv(0, [b"1"])  # type: ignore[list-item]  # pyright: ignore


def finals() -> None:
    class Mine(MemoryMapping):  # type: ignore[misc]  # pyright: ignore
        pass

    guestmem.u64 = guestmem.u32  # type: ignore[misc]  # pyright: ignore


def errors(mem: MemoryMapping) -> int:
    try:
        mem.read_bytes(0, 4)
    except guestmem.InvalidAddressError as error:
        return error.offset + error.count + error.size
    except guestmem.ReadFromSourceError as error:
        assert_type(error.errno, int | None)
        return error.transferred
    return 0
