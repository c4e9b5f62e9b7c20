"""VolatileArrayRef: objects of one type side by side."""

from __future__ import annotations

import array
import copy
import ctypes
import gc
import os
import pickle
import random
import struct
import sys
from typing import TYPE_CHECKING, Any, get_origin

import pytest

import guestmem
from guestmem import (
    AddressOverflowError,
    MemoryMapping,
    OutOfBoundsError,
    ReadFromMemoryError,
    Scalar,
    VolatileArrayRef,
    VolatileSlice,
    WriteToMemoryError,
    be16,
    f32,
    i8,
    u8,
    u16,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Backing

PAGE = 4096
SCALARS = [value for value in vars(guestmem).values() if isinstance(value, Scalar)]
LAYOUT = struct.Struct("<IH")


class Point(ctypes.LittleEndianStructure):
    _fields_ = (("x", ctypes.c_uint16), ("y", ctypes.c_uint8))


class Index:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.fixture(params=["anonymous", "file"])
def memory(request: pytest.FixtureRequest, backing: Callable[[int], Backing]) -> MemoryMapping:
    size = 4 * PAGE
    if request.param == "file":
        return MemoryMapping.from_fd(backing(size).fd, size)
    return MemoryMapping(size)


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: scalar.name)
@pytest.mark.parametrize("offset", [0, 1, 4, 13])
def test_scalars(memory: MemoryMapping, scalar: Any, offset: int) -> None:
    """As so many refs, whatever the alignment, and over more than one piece of tolist()."""
    count = 1500
    values = [random.Random(i).randrange(128) for i in range(count)]
    ref = memory.get_array_ref(offset, count, scalar)
    assert (len(ref), ref.size, ref.type) == (count, count * scalar.size, scalar)
    assert ref.copy_from(values) == count
    expected = [memory.read_obj(offset + i * scalar.size, scalar) for i in range(count)]
    assert expected == values
    assert ref.tolist() == list(ref) == [ref[i] for i in range(count)] == values
    assert [ref.load(i) for i in range(count)] == values
    ref[3], ref[-1] = 7, 9
    ref.store(4, 8)
    assert (ref[3], ref.load(4), ref[count - 1]) == (7, 8, 9)
    assert memory.read_obj(offset + 4 * scalar.size, scalar) == 8
    assert memory.read_bytes(0, offset) == bytes(offset)


def test_structs_and_classes(memory: MemoryMapping) -> None:
    tuples = memory.get_array_ref(2, 3, LAYOUT)
    assert tuples.copy_from([(1, 2), (3, 4)]) == 2
    assert tuples.tolist() == [(1, 2), (3, 4), (0, 0)]
    tuples[2] = (5, 6)
    assert list(tuples) == [(1, 2), (3, 4), (5, 6)]
    points = memory.get_array_ref(64, 4, Point)
    points.copy_from([Point(i, i + 1) for i in range(9)])
    assert [(point.x, point.y) for point in points] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert repr(points) == "<guestmem.VolatileArrayRef type=Point len=4>"
    assert repr(tuples) == "<guestmem.VolatileArrayRef type=Struct len=3>"
    with pytest.raises(TypeError):
        points[0] = (1, 2)  # type: ignore[assignment]


def test_parts(memory: MemoryMapping) -> None:
    whole = memory.get_array_ref(8, 10, u16)
    whole.copy_from(range(10))
    values = list(range(10))
    for start in None, 0, 3, 9, 10, 12, -1, -10, -12:
        for stop in None, 0, 3, 9, 10, 12, -1, -10, -12:
            part = whole[start:stop]
            assert isinstance(part, VolatileArrayRef)
            assert part.tolist() == values[start:stop]
            assert len(part) == len(values[start:stop])
    part = whole[2:6][1:3]
    part[0] = 99
    assert memory.read_obj(8 + 2 * 3, u16) == 99
    with pytest.raises(ValueError, match="must have step 1"):
        whole[::2]
    with pytest.raises(TypeError, match="an index to store at must be an int, not 'slice'"):
        whole[0:2] = [1, 2]  # type: ignore[call-overload]


def test_indexes(memory: MemoryMapping) -> None:
    ref: Any = memory.get_array_ref(0, 4, u64)
    for bad in 4, -5, 2**31, 2**62:
        with pytest.raises(OutOfBoundsError) as caught:
            ref[bad]
        with pytest.raises(OutOfBoundsError):
            ref[bad] = 1
        assert caught.value.size == 32
    with pytest.raises(OutOfBoundsError) as caught:
        ref.load(4)
    assert caught.value.addr == 40
    for bad in 2**61, 2**63 - 1, 2**64 - 1:
        with pytest.raises(OutOfBoundsError):
            ref.load(bad)
        with pytest.raises(OutOfBoundsError):
            ref.store(bad, 1)
    for bad in -1, 2**64:
        with pytest.raises(OverflowError, match="i must be from 0"):
            ref.load(bad)
    for bad in 2**64, -(2**64):
        with pytest.raises(IndexError):
            ref[bad]
    with pytest.raises(TypeError, match="an index must be an int or a slice, not 'str'"):
        ref["0"]
    with pytest.raises(TypeError, match="cannot be deleted"):
        del ref[0]
    ref[Index(2)] = Index(5)
    assert ref[Index(2)] == ref[Index(-2)] == ref.load(Index(2)) == 5
    assert 5 in ref
    assert list(reversed(ref)) == [0, 5, 0, 0]
    assert memory.read_bytes(0, 32) == struct.pack("4Q", 0, 0, 5, 0)


def test_ranges(memory: MemoryMapping) -> None:
    size = memory.size
    assert len(memory.get_array_ref(size, 0, u64)) == 0
    assert memory.get_array_ref(size - 16, 2, u64).tolist() == [0, 0]
    with pytest.raises(OutOfBoundsError) as caught:
        memory.get_array_ref(size - 16, 3, u64)
    assert caught.value.addr == size + 8
    with pytest.raises(AddressOverflowError) as over:
        memory.get_array_ref(8, 2**61, u64)
    assert (over.value.base, over.value.offset) == (8, 2**64)
    with pytest.raises(AddressOverflowError) as over:
        memory.get_array_ref(2**63, 2**60, u64)
    assert (over.value.base, over.value.offset) == (2**63, 2**63)
    for bad in -1, 2**63:
        with pytest.raises(OverflowError, match="n must be from 0"):
            memory.get_array_ref(0, bad, u8)
    with pytest.raises(TypeError, match="type must be"):
        memory.get_array_ref(0, 1, int)  # type: ignore[type-var]


def test_copies(memory: MemoryMapping) -> None:
    """Whole objects, as many as both sides have; bytes as they are."""
    ref = memory.get_array_ref(6, 5, be16)
    ref.copy_from([1, 2, 3, 4, 5])
    for length, count in (0, 0), (1, 0), (2, 1), (9, 4), (10, 5), (11, 5), (100, 5):
        buffer = bytearray(b"\xee" * length)
        assert ref.copy_to(buffer) == count
        assert buffer == struct.pack(">5H", 1, 2, 3, 4, 5)[: 2 * count] + b"\xee" * (
            length - 2 * count
        )
        ref.copy_from([0] * 5)
        assert ref.copy_from(bytes(range(1, length + 1))) == count
        assert ref.to_slice().read_bytes(0, 2 * count) == bytes(range(1, 2 * count + 1))
        ref.copy_from((1, 2, 3, 4, 5))
    numbers = array.array("d", [0.5, -2.0])
    floats = memory.get_array_ref(64, 9, guestmem.f64)
    assert floats.copy_from(numbers) == 2
    assert floats[:2].tolist() == [0.5, -2.0]
    assert floats.copy_to(memoryview(numbers)) == 2
    with pytest.raises(BufferError):
        ref.copy_to(b"12")
    for bad in "12", {1, 2}, 5, None:
        with pytest.raises(TypeError, match="src must be a buffer or a sequence of values"):
            ref.copy_from(bad)  # type: ignore[arg-type]


def test_a_sequence_is_looked_at_before_anything_is_written(memory: MemoryMapping) -> None:
    ref: Any = memory.get_array_ref(0, 4, i8)
    ref.copy_from([1, 2, 3, 4])
    for bad in [9, 9, 128, 9], [9, "x"], [9, None, 9], [9.5]:
        with pytest.raises((OverflowError, TypeError)):
            ref.copy_from(bad)
        assert ref.tolist() == [1, 2, 3, 4]

    class Lying(list[int]):
        def __len__(self) -> int:
            return 4

    with pytest.raises(IndexError):
        ref.copy_from(Lying([9, 9]))
    assert ref.tolist() == [1, 2, 3, 4]

    class Closing:
        def __index__(self) -> int:
            with pytest.raises(BufferError):
                memory.close()
            return 5

    assert ref.copy_from([Closing()]) == 1
    assert ref.tolist() == [5, 2, 3, 4]


def test_lifetime() -> None:
    memory = MemoryMapping(PAGE)
    ref = memory.get_array_ref(8, 4, f32)
    assert repr(ref) == "<guestmem.VolatileArrayRef type=guestmem.f32 len=4>"
    part = ref[1:3]
    with pytest.raises(BufferError, match="held by 2 refs"):
        memory.close()
    for bad in copy.copy, copy.deepcopy, pickle.dumps:
        with pytest.raises(TypeError, match="cannot copy or pickle"):
            bad(ref)
    with pytest.raises(TypeError, match="cannot create"):
        VolatileArrayRef()
    assert get_origin(VolatileArrayRef[int]) is VolatileArrayRef
    del ref
    part[0] = 1.5
    del part
    memory.close()


def test_of_a_buffer() -> None:
    buffer = bytearray(8)
    ref = VolatileSlice.from_buffer(buffer).get_array_ref(1, 7, u8)
    ref.copy_from(b"1234567")
    assert buffer == b"\x001234567"
    with pytest.raises(BufferError):
        buffer.append(1)
    del ref
    buffer.append(1)


def test_faults(backing: Callable[[int], Backing]) -> None:
    file = backing(2 * PAGE)
    memory = MemoryMapping.from_fd(file.fd, 2 * PAGE)
    ref = memory.get_array_ref(PAGE - 16, 8, u64)
    os.ftruncate(file.fd, PAGE)
    reads: list[Callable[[], object]] = [
        ref.tolist,
        lambda: ref.load(2),
        lambda: list(ref),
        lambda: ref.copy_to(bytearray(64)),
    ]
    writes: list[Callable[[], object]] = [
        lambda: ref.store(2, 1),
        lambda: ref.copy_from(bytes(64)),
        lambda: ref.copy_from([1] * 8),
    ]
    for call in reads:
        with pytest.raises(ReadFromMemoryError) as read:
            call()
        assert read.value.offset == 16
    for call in writes:
        with pytest.raises(WriteToMemoryError) as write:
            call()
        assert write.value.offset == 16
    assert ref[:2].tolist() == [1, 1]


def test_a_type_that_changes_its_size(memory: MemoryMapping) -> None:
    layout = struct.Struct("<I")
    ref = memory.get_array_ref(0, 4, layout)
    layout.__init__("<Q")  # type: ignore[misc]
    for call in lambda: ref[0], ref.tolist, lambda: ref.copy_from([(1,)]):
        with pytest.raises(TypeError, match="has 8 bytes now, and had 4"):
            call()


def test_a_list_that_is_half_made(backing: Callable[[int], Backing]) -> None:
    """The collector's callbacks can find it while objects are loaded: no slot of it is empty."""
    array = MemoryMapping(1 << 16).get_array_ref(0, 3000, struct.Struct("<QQ"))
    file = backing(1 << 16)
    gone: Any = MemoryMapping.from_fd(file.fd, 1 << 16).get_array_ref(0, 3000, u64)
    os.ftruncate(file.fd, 4096)
    seen: list[object] = []

    def look(phase: str, info: dict[str, int]) -> None:
        lists = (each for each in gc.get_objects() if type(each) is list)
        seen.extend(each[-1] for each in lists if len(each) == 3000)

    threshold = gc.get_threshold()
    gc.callbacks.append(look)
    gc.set_threshold(300)
    try:
        assert array.tolist() == [(0, 0)] * 3000
        gc.set_threshold(1)
        with pytest.raises(ReadFromMemoryError):
            gone.tolist()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(look)
    if sys.version_info < (3, 12):  # since then no collection begins in the middle of a call
        assert None in seen
    assert set(seen) <= {None, (0, 0)}
