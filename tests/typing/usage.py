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
