"""Scalars: limits, byte orders, alignments, what is taken as a value, and the constants."""

import copy
import inspect
import math
import pickle
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import guestmem
from guestmem import ClosedError, InvalidAddressError, MemoryMapping, Scalar, VolatileRef

HUGE = 10**5000
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

# name -> (size, the format of struct)
INTS = {
    "u8": (1, "=B"), "u16": (2, "=H"), "u32": (4, "=I"), "u64": (8, "=Q"),
    "i8": (1, "=b"), "i16": (2, "=h"), "i32": (4, "=i"), "i64": (8, "=q"),
    "usize": (struct.calcsize("N"), "@N"), "isize": (struct.calcsize("n"), "@n"),
    "le16": (2, "<H"), "le32": (4, "<I"), "le64": (8, "<Q"),
    "be16": (2, ">H"), "be32": (4, ">I"), "be64": (8, ">Q"),
}  # fmt: skip
FLOATS = {"f32": (4, "=f"), "f64": (8, "=d")}
ALL = INTS | FLOATS

each = pytest.mark.parametrize("name", ALL)
each_int = pytest.mark.parametrize("name", INTS)
each_float = pytest.mark.parametrize("name", FLOATS)


def scalar_of(name: str) -> Scalar[Any]:
    scalar = getattr(guestmem, name)
    assert isinstance(scalar, Scalar)
    return scalar


def limits(name: str) -> tuple[int, int]:
    bits = 8 * INTS[name][0]
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if name[0] == "i" else (0, 2**bits - 1)


def writers(m: MemoryMapping, scalar: Scalar[Any], offset: int) -> list[Callable[[Any], None]]:
    return [
        lambda value: m.write_obj(value, offset, scalar),
        lambda value: m.write_obj(value, offset, type=scalar),
        m.get_ref(offset, scalar).store,
    ]


def check_values(name: str, values: list[Any]) -> None:
    """Write and read at every alignment, against struct, with guard bytes on both sides."""
    scalar, (size, fmt) = scalar_of(name), ALL[name]
    m = MemoryMapping(64)
    for offset in range(1, 18):
        for write in writers(m, scalar, offset):
            for value in values:
                m.fill(0xA5)
                write(value)
                packed = struct.pack(fmt, value)
                around = b"\xa5" * offset, b"\xa5" * (64 - offset - size)
                assert m.read_bytes(0, 64) == packed.join(around)
                for got in (m.read_obj(offset, scalar), m.get_ref(offset, scalar).load()):
                    (expected,) = struct.unpack(fmt, packed)
                    assert type(got) is type(expected)
                    assert got == expected or (math.isnan(got) and math.isnan(expected))
                    assert math.copysign(1, got) == math.copysign(1, expected)


@each_int
def test_ints(name: str) -> None:
    low, high = limits(name)
    distinct = int.from_bytes(bytes(range(1, ALL[name][0] + 1)), "big")
    check_values(name, [low, low + 1, 0, 1, distinct, high // 2, high // 2 + 1, high - 1, high])


@each_int
def test_ints_against_to_bytes(name: str) -> None:
    size = INTS[name][0]
    order: Any = {"l": "little", "b": "big"}.get(name[0], sys.byteorder)
    m = MemoryMapping(16)
    for value in (*limits(name), 1, limits(name)[1] // 3):
        m.write_obj(value, 3, scalar_of(name))
        assert m.read_bytes(3, size) == value.to_bytes(size, order, signed=name[0] == "i")


@each_float
def test_floats(name: str) -> None:
    small = 2.0**-149 if name == "f32" else 5e-324
    values = [0.0, -0.0, 1.5, -1.5, math.pi, math.inf, -math.inf, math.nan, -math.nan, small]
    check_values(name, values)


@each_float
def test_floats_keep_their_bits(name: str) -> None:
    size = FLOATS[name][0]
    scalar, word = scalar_of(name), {4: guestmem.u32, 8: guestmem.u64}[size]
    quiet = {4: 0x7FC00000, 8: 0x7FF8 << 48}[size]
    m = MemoryMapping(16)
    for bits in (0, 1 << (8 * size - 1), quiet, quiet + 0xBEEF, 1, quiet + (1 << (8 * size - 1))):
        m.write_obj(bits, 0, word)
        m.write_obj(m.read_obj(0, scalar), 8, scalar)
        assert m.read_obj(8, word) == bits


# What does not fit


def check_refused(name: str, values: list[Any], error: type[Exception], *said: str) -> None:
    m = MemoryMapping(16)
    m.fill(0xA5)
    for write in writers(m, scalar_of(name), 3):
        for value in values:
            with pytest.raises(error) as caught:
                write(value)
            assert type(caught.value) is error
            assert len(str(caught.value)) < 200
            assert all(part in str(caught.value) for part in said)
            assert m.read_bytes(0, 16) == b"\xa5" * 16


@each_int
def test_ints_that_do_not_fit(name: str) -> None:
    low, high = limits(name)
    for value in (low - 1, high + 1, 2**31, 2**32, 2**63, 2**64, -(2**31) - 1, -(2**63) - 1):
        if not low <= value <= high:
            check_refused(name, [value], OverflowError, f"guestmem.{name}")
            if abs(value) < 2**63:
                check_refused(name, [value], OverflowError, str(value))
    check_refused(name, [HUGE, -HUGE], OverflowError, f"guestmem.{name}", "16610 bits")


def test_the_f32_that_just_fits() -> None:
    m = MemoryMapping(8)
    largest = struct.unpack("<f", bytes.fromhex("ffff7f7f"))[0]
    half = 2.0**103  # half of its last place: from there on it rounds to infinity
    for value in (largest, math.nextafter(largest + half, 0)):
        m.write_obj(value, 0, guestmem.f32)
        assert m.read_obj(0, guestmem.f32) == largest
    for value in (largest + half, -largest - half, 1e39, -sys.float_info.max, 10**39):
        check_refused("f32", [value], OverflowError, "guestmem.f32")


@each_float
def test_floats_that_do_not_fit(name: str) -> None:
    check_refused(name, [10**400, -(10**400), HUGE], OverflowError, f"guestmem.{name}", "bits")


# What is taken as a value


class Index:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value  # type: ignore[no-any-return]


class Float(Index):
    def __float__(self) -> float:
        return self.value  # type: ignore[no-any-return]

    def __index__(self) -> int:
        raise AssertionError("__float__ comes first")


class SubInt(int):
    def __index__(self) -> int:
        raise AssertionError("an int is taken for what it is")


@each_int
def test_whatever_has_an_index(name: str) -> None:
    m = MemoryMapping(16)
    scalar = scalar_of(name)
    for value, expected in [
        (True, 1), (False, 0), (Index(77), 77), (SubInt(78), 78), (np.int8(79), 79),
        (np.uint64(80), 80), (np.array(81), 81),
    ]:  # fmt: skip
        for write in writers(m, scalar, 0):
            m.fill(0xFF)
            write(value)
            assert m.read_obj(0, scalar) == expected
            assert type(m.read_obj(0, scalar)) is int


@each_float
def test_whatever_has_a_float(name: str) -> None:
    m = MemoryMapping(16)
    scalar = scalar_of(name)
    for value, expected in [
        (Float(1.5), 1.5), (Index(2), 2.0), (3, 3.0), (True, 1.0), (np.float32(2.5), 2.5),
        (np.float64(-4.5), -4.5), (np.int16(-5), -5.0), (SubInt(6), 6.0),
    ]:  # fmt: skip
        for write in writers(m, scalar, 0):
            write(value)
            assert m.read_obj(0, scalar) == expected
            assert type(m.read_obj(0, scalar)) is float


@each
def test_other_types(name: str) -> None:
    others: list[object] = ["1", b"1", bytearray(8), None, 1j, [1], (1,), object(), int]
    for value in others:
        came = value.__name__ if isinstance(value, type) else type(value).__name__
        check_refused(name, [value], TypeError, came if name in INTS else "not ")
    if name in INTS:
        check_refused(name, [1.0, np.float64(1), Float(1.0)][:2], TypeError, "an int", "float")


@each
@pytest.mark.parametrize("answer", ["1", None, b"1", 1j])
def test_nonsense(name: str, answer: object) -> None:
    check_refused(name, [Index(answer) if name in INTS else Float(answer)], TypeError)


@each
def test_a_value_that_raises_or_closes(name: str) -> None:
    m = MemoryMapping(16)
    error = LookupError("mine")

    class Raises:
        def __index__(self) -> int:
            raise error

    class Closes:
        def __index__(self) -> int:
            m.close()
            return 1

    for write in writers(m, scalar_of(name), 0):
        with pytest.raises(LookupError) as caught:
            write(Raises())
        assert caught.value is error
    del write
    with pytest.raises(ClosedError):
        m.write_obj(Closes(), 0, scalar_of(name))


@each
def test_the_value_is_looked_at_before_the_range(name: str) -> None:
    m = MemoryMapping(8)
    with pytest.raises(TypeError):
        m.write_obj("1", 99, scalar_of(name))  # type: ignore[call-overload]
    with pytest.raises(InvalidAddressError) as caught:
        m.write_obj(1, 99, scalar_of(name))
    assert (caught.value.offset, caught.value.count) == (99, ALL[name][0])


# The constants


def test_there_are_these_and_no_others() -> None:
    assert {n for n, v in vars(guestmem).items() if isinstance(v, Scalar)} == set(ALL)
    assert len({id(scalar_of(name)) for name in ALL}) == len(ALL)


@each
def test_name_size_repr(name: str) -> None:
    scalar = scalar_of(name)
    assert scalar.name == name
    assert scalar.size == ALL[name][0]
    assert repr(scalar) == f"guestmem.{name}"
    ref = MemoryMapping(8).get_ref(0, scalar)
    assert ref.type is scalar
    assert ref.size == scalar.size
    assert repr(ref) == f"<guestmem.VolatileRef type=guestmem.{name}>"


@each
def test_copies_and_pickles_to_itself(name: str) -> None:
    scalar = scalar_of(name)
    assert copy.copy(scalar) is scalar
    assert copy.deepcopy([scalar])[0] is scalar
    for protocol in PROTOCOLS:
        assert pickle.loads(pickle.dumps(scalar, protocol)) is scalar
        assert pickle.loads(pickle.dumps({scalar: scalar}, protocol)) == {scalar: scalar}


@each
def test_equality_is_identity(name: str) -> None:
    scalar = scalar_of(name)
    assert [n for n in ALL if scalar_of(n) == scalar] == [name]
    assert {scalar: 1}[scalar] == 1


def test_none_can_be_made() -> None:
    makers: list[Callable[[], object]] = [
        Scalar,
        lambda: Scalar("u8"),  # type: ignore[call-arg]
        lambda: object.__new__(Scalar),
        type(guestmem.u8),
        lambda: Scalar.__new__(Scalar),
    ]
    for make in makers:
        with pytest.raises(TypeError, match="Scalar"):
            make()
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Sub", (Scalar,), {})


@pytest.mark.parametrize("attribute", ["name", "size", "other", "__class__", "__doc__"])
def test_immutable(attribute: str) -> None:
    for target in (guestmem.u8, Scalar):
        before = repr(guestmem.u8), guestmem.u8.size, guestmem.u8.name
        with pytest.raises((AttributeError, TypeError)):
            setattr(target, attribute, int)
        with pytest.raises((AttributeError, TypeError)):
            delattr(target, attribute)
        assert (repr(guestmem.u8), guestmem.u8.size, guestmem.u8.name) == before


def test_generic_at_run_time() -> None:
    for cls in (Scalar, VolatileRef):
        alias: Any = cls[int]
        assert isinstance(alias, types.GenericAlias)
        assert alias.__origin__ is cls
        assert alias.__args__ == (int,)

    def annotated(ref: VolatileRef[int]) -> Scalar[float]:
        raise NotImplementedError

    assert inspect.signature(annotated).parameters["ref"].annotation == VolatileRef[int]
