"""ctypes classes as the types of objects in memory, in every shape they have."""

import ctypes
import gc
import os
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

import guestmem
from guestmem import InvalidAddressError, MemoryMapping, OutOfBoundsError, u8, u32

SIZE = 256
PATTERN = bytes(i * 37 % 251 for i in range(SIZE))


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int32), ("y", ctypes.c_int32))


class Packed(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("tag", ctypes.c_uint8), ("value", ctypes.c_uint64), ("tail", ctypes.c_uint16))


class Bits(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32, 3), ("b", ctypes.c_uint32, 13), ("c", ctypes.c_uint32, 16))


class Either(ctypes.Union):
    _fields_ = (("word", ctypes.c_uint64), ("bytes", ctypes.c_uint8 * 8), ("point", Point))


class Nested(ctypes.Structure):
    _fields_ = (("points", Point * 2), ("either", Either), ("packed", Packed))


class Derived(Point):
    _fields_ = (("z", ctypes.c_int64),)  # type: ignore[assignment]


class SameFields(Derived):
    pass


ORDERED = (("half", ctypes.c_uint16), ("word", ctypes.c_uint32), ("real", ctypes.c_double))


class Big(ctypes.BigEndianStructure):
    _fields_ = ORDERED


class Little(ctypes.LittleEndianStructure):
    _fields_ = ORDERED


class BigEither(ctypes.BigEndianUnion):
    _fields_ = ORDERED[:2]


class LittleEither(ctypes.LittleEndianUnion):
    _fields_ = ORDERED[:2]


class Empty(ctypes.Structure):
    _fields_ = ()


class EmptyUnion(ctypes.Union):
    _fields_ = ()


class Reading(ctypes.c_uint32):
    """A subclass of a simple type."""


SIMPLE = [
    *(ctypes.c_bool, ctypes.c_char, ctypes.c_wchar, ctypes.c_byte, ctypes.c_ubyte, ctypes.c_short),
    *(ctypes.c_ushort, ctypes.c_int, ctypes.c_uint, ctypes.c_long, ctypes.c_ulong, ctypes.c_float),
    *(ctypes.c_double, ctypes.c_longdouble, ctypes.c_uint16.__ctype_be__, Reading, ctypes.c_size_t),
    ctypes.c_uint64.__ctype_le__,
]
COMPOSED = [
    *(Point, Packed, Bits, Either, Nested, Derived, SameFields, Big, Little, BigEither),
    *(LittleEither, Point * 3, Point * 2 * 2, ctypes.c_char * 5, ctypes.c_wchar * 2, Either * 1),
    *(ctypes.c_uint8 * 0, Empty, EmptyUnion),
]
CLASSES: list[Any] = [*SIMPLE, *COMPOSED]
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


def filled() -> MemoryMapping:
    m = MemoryMapping(SIZE)
    m.write_all(PATTERN, 0)
    return m


def readers(m: MemoryMapping, offset: int, kind: Any) -> list[Callable[[], Any]]:
    return [lambda: m.read_obj(offset, kind), lambda: m.get_ref(offset, kind).load()]


def writers(
    m: MemoryMapping, offset: int, kind: Any, *, kind_may_be_left_out: bool = True
) -> list[Callable[[Any], None]]:
    return [
        lambda value: m.write_obj(value, offset, kind),
        lambda value: m.write_obj(value, offset, type=kind),
        lambda value: m.get_ref(offset, kind).store(value),
        lambda value: m.write_obj(value, offset),
        lambda value: m.write_obj(value, offset, None),
        lambda value: m.write_obj(value, offset, type=None),
    ][: None if kind_may_be_left_out else 3]


@each_class
def test_an_instance_is_its_bytes(cls: Any) -> None:
    m, size = filled(), ctypes.sizeof(cls)
    for offset in (0, 1, 8, SIZE - size):
        data = PATTERN[offset : offset + size]
        for read in readers(m, offset, cls):
            got = read()
            assert type(got) is cls
            assert bytes(got) == data
            m.fill(0x55)  # it holds a copy
            assert bytes(got) == data
            for write in writers(m, offset, cls):
                m.fill(0x55)
                write(got)
                around = b"\x55" * offset, b"\x55" * (SIZE - offset - size)
                assert m.read_bytes(0, SIZE) == data.join(around)
            m.write_all(PATTERN, 0)


@each_class
def test_ranges_are_those_of_the_class(cls: Any) -> None:
    m, size = filled(), ctypes.sizeof(cls)
    ref = m.get_ref(SIZE - size, cls)
    assert (ref.size, ref.type) == (size, cls)
    assert ref.as_ptr() == m.as_ptr() + SIZE - size
    assert ref.to_slice().read_bytes(0, size) == PATTERN[SIZE - size :]
    past = SIZE - size + 1
    for call in (lambda: m.read_obj(past, cls), lambda: m.write_obj(cls(), past)):
        with pytest.raises(InvalidAddressError) as caught:
            call()
        assert (caught.value.offset, caught.value.count) == (past, size)
    with pytest.raises(OutOfBoundsError):
        m.get_ref(past, cls)
    assert m.read_bytes(0, SIZE) == PATTERN


def test_fields() -> None:
    m = MemoryMapping(64)
    m.write_obj(Point(-1, 7), 4)
    assert m.read_bytes(0, 16) == bytes(4) + struct.pack("=ii", -1, 7) + bytes(4)
    bits = m.read_obj(4, Bits)
    assert (bits.a, bits.b, bits.c) == (7, 2**13 - 1, 0xFFFF)
    for cls, fmt in ((Big, ">Hxx I d"), (Little, "<Hxx I d")):
        m.write_obj(cls(0x1234, 0x89ABCDEF, 1.5), 0)
        assert m.read_bytes(0, 16) == struct.pack(fmt, 0x1234, 0x89ABCDEF, 1.5)
        got = m.read_obj(0, cls)
        assert (got.half, got.word, got.real) == (0x1234, 0x89ABCDEF, 1.5)
    derived = Derived(1, 2, 3)
    m.get_ref(0, SameFields).store(SameFields(1, 2, 3))
    assert bytes(m.read_obj(0, Derived)) == bytes(derived)


def test_neither_init_nor_new_runs_on_read() -> None:
    class Loud(Point):
        def __new__(cls, *args: int) -> Self:
            if not args:
                raise AssertionError("__new__ ran")
            return super().__new__(cls)

        def __init__(self, *args: int) -> None:
            if not args:
                raise AssertionError("__init__ ran")
            super().__init__(*args)

    m = MemoryMapping(16)
    m.write_obj(Loud(3, 4), 8)
    for read in readers(m, 8, Loud):
        got = read()
        assert type(got) is Loud
        assert (got.x, got.y) == (3, 4)


def test_overridden_constructors_are_not_asked() -> None:
    class Liar(Point):
        @classmethod
        def from_buffer_copy(cls, *args: Any) -> Any:
            raise AssertionError("from_buffer_copy ran")

        from_buffer = from_buffer_copy

        def __bytes__(self) -> bytes:
            raise AssertionError("__bytes__ ran")

    m = MemoryMapping(16)
    m.write_obj(Liar(3, 4), 0)
    assert m.read_obj(0, Liar).y == 4


def test_instances_of_other_classes() -> None:
    class Twin(ctypes.Structure):
        _fields_ = Point._fields_

    m = filled()
    others: list[object] = [Twin(1, 2), ctypes.c_int64(1), bytes(8), (1, 2), 1, None, Point]
    for value in others:
        for write in writers(m, 0, Point, kind_may_be_left_out=False):
            with pytest.raises(TypeError, match=r"val must be an instance of .*Point'>, not of "):
                write(value)
        assert m.read_bytes(0, SIZE) == PATTERN
    with pytest.raises(TypeError):  # the base is no Derived, though a Derived is a Point
        m.write_obj(Point(1, 2), 0, Derived)
    m.write_obj(Derived(5, 6, 7), 0, Point)
    assert m.read_bytes(0, 16) == struct.pack("=ii", 5, 6) + PATTERN[8:16]


def test_an_object_that_claims_a_class() -> None:
    class Claims:
        __class__ = Point  # type: ignore[assignment]

    m = filled()
    value: Any = Claims()
    calls: list[Callable[[], object]] = [
        lambda: m.write_obj(value, 0, Point),
        lambda: m.write_obj(value, 0),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    assert m.read_bytes(0, SIZE) == PATTERN


@pytest.mark.parametrize(
    "value", [1, 1.0, True, b"12345678", (1, 2), None, "x", u8, Point, object()]
)
def test_type_left_out(value: Any) -> None:
    m = filled()
    calls: list[Callable[[], object]] = [
        lambda: m.write_obj(value, 0),
        lambda: m.write_obj(value, 0, None),
        lambda: m.write_obj(value, 0, type=None),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="val must be a ctypes instance where type is left out"):
            call()
    assert m.read_bytes(0, SIZE) == PATTERN


class LooksLikeStruct:
    size = 4

    def unpack(self, data: bytes) -> tuple[int]:
        return (1,)

    def pack(self, *values: int) -> bytes:
        return b"1234"


WRONG_TYPES: list[Any] = [
    *(int, float, bytes, object, type, "u8", "<I", b"<I", 8, None, LooksLikeStruct()),
    *(LooksLikeStruct, struct.Struct, struct, ctypes, ctypes.c_int(5), Point(1, 2), u8.__class__),
    *(ctypes.Structure, ctypes.Union, ctypes.Array, ctypes._SimpleCData, type(Point)),
]


@pytest.mark.parametrize("kind", WRONG_TYPES, ids=lambda k: repr(k)[:24].partition(" at ")[0])
def test_what_is_no_type(kind: Any) -> None:
    m = filled()
    calls: list[Callable[[], object]] = [
        lambda: m.read_obj(0, kind),
        lambda: m.get_ref(0, kind),
        lambda: m.write_obj(1, 0, kind),
    ]
    for call in calls[: 2 if kind is None else 3]:
        with pytest.raises(TypeError, match="type must be a Scalar, a ctypes class of plain data"):
            call()
    assert m.read_bytes(0, SIZE) == PATTERN


# Classes that change, and instances that do


def test_fields_that_come_later() -> None:
    class Later(ctypes.Structure):
        pass

    m = filled()
    ref = m.get_ref(SIZE, Later)
    assert ref.size == 0
    Later._fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint8))
    assert m.get_ref(0, Later).size == 8
    assert bytes(m.read_obj(0, Later)) == PATTERN[:8]
    calls: list[Callable[[], object]] = [ref.load, lambda: ref.store(Later(1, 2))]
    for call in calls:  # there is room for 0 bytes
        with pytest.raises(TypeError, match="8 bytes now"):
            call()
    assert m.read_bytes(0, SIZE) == PATTERN
    with pytest.raises(InvalidAddressError) as caught:
        m.read_obj(SIZE - 7, Later)
    assert caught.value.count == 8


@pytest.mark.usefixtures("mortal_classes")
def test_classes_that_come_and_go() -> None:
    m = filled()
    gone = []
    for i in range(3000):
        size = 1 + i % 7
        cls = type(
            "Temporary", (ctypes.Structure,), {"_fields_": [("data", ctypes.c_uint8 * size)]}
        )
        assert bytes(m.read_obj(3, cls)) == PATTERN[3 : 3 + size]  # never the size of another
        gone.append(weakref.ref(cls))
        del cls
    gc.collect()
    assert sum(ref() is not None for ref in gone) < 100


@pytest.mark.parametrize("resized", [8, 9, 64, 4096])
def test_resized_instances(resized: int) -> None:
    m, point = filled(), Point(1, 2)
    if resized > 8:
        ctypes.resize(point, resized)
    ctypes.memset(ctypes.addressof(point), 0xEE, resized)
    for write in writers(m, 4, Point):
        m.write_all(PATTERN, 0)
        write(point)
        assert m.read_bytes(0, SIZE) == PATTERN[:4] + b"\xee" * 8 + PATTERN[12:]
    ctypes.resize(point, resized + 64)  # nobody holds its buffer


def test_an_array_of_two_mebibytes() -> None:
    size = 2 << 20
    page = ctypes.c_uint32 * (size // 4)
    m = MemoryMapping(size + 16)
    value = page(*range(size // 4))
    for offset in (0, 3, 8):
        m.fill(0x55)
        ref = m.get_ref(offset, page)
        ref.store(value)
        assert m.read_obj(offset + 4, u32) == 1
        assert m.read_obj(offset + size - 4, u32) == size // 4 - 1
        assert bytes(ref.load()) == bytes(m.read_obj(offset, page)) == bytes(value)
        assert m.read_bytes(0, offset) == b"\x55" * offset
        assert m.read_bytes(offset + size, 16 - offset) == b"\x55" * (16 - offset)


def test_neither_module_is_imported_before_it_is_used(run_child: Callable[..., str]) -> None:
    code = """
        import sys
        import guestmem

        m = guestmem.MemoryMapping(64)
        for wrong in (int, 5):
            for call in (lambda: m.read_obj(0, wrong), lambda: m.write_obj(wrong, 0)):
                try:
                    call()
                except TypeError:
                    continue
                raise AssertionError
        print([name for name in ("_ctypes", "_struct") if name in sys.modules])
        import ctypes, struct

        m.write_obj((1, 2), 0, struct.Struct("=II"))
        print(m.read_obj(0, ctypes.c_uint64).value == m.read_obj(0, guestmem.u64))
    """
    env = os.environ | {"PYTHONPATH": str(Path(guestmem.__file__).parents[1])}
    assert run_child(code, options=("-S",), env=env) == "[]\nTrue\n"
