"""AtomicRef, Ordering and fence: what they return, and that no other processor gets in between."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any, get_origin

import pytest

import guestmem
from guestmem import (
    AddressOverflowError,
    AtomicRef,
    MemoryMapping,
    MisalignedError,
    Ordering,
    OutOfBoundsError,
    ReadFromMemoryError,
    Scalar,
    VolatileSlice,
    WriteToMemoryError,
    be32,
    fence,
    i16,
    u8,
    u32,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Backing

PAGE = 4096
SCALARS = [value for value in vars(guestmem).values() if isinstance(value, Scalar)]
INTEGERS: list[Scalar[int]] = [scalar for scalar in SCALARS if not scalar.name.startswith("f")]
ORDERINGS = [Ordering.RELAXED, Ordering.ACQUIRE, Ordering.RELEASE, Ordering.ACQ_REL]
ORDERINGS.append(Ordering.SEQ_CST)
each_integer = pytest.mark.parametrize("scalar", INTEGERS, ids=lambda scalar: scalar.name)


def limits(scalar: Scalar[int]) -> tuple[int, int]:
    bits = 8 * scalar.size
    if scalar.name.startswith("i"):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def wrap(scalar: Scalar[int], value: int) -> int:
    low, high = limits(scalar)
    return (value - low) % (high - low + 1) + low


@pytest.fixture(params=["anonymous", "file"])
def memory(request: pytest.FixtureRequest, backing: Callable[[int], Backing]) -> MemoryMapping:
    if request.param == "file":  # may fault, so each access is guarded
        return MemoryMapping.from_fd(backing(PAGE).fd, PAGE)
    return MemoryMapping(PAGE)


@each_integer
def test_each_operation(memory: MemoryMapping, scalar: Scalar[int]) -> None:
    low, high = limits(scalar)
    ref = memory.get_atomic_ref(64, scalar)
    plain = memory.get_ref(64, scalar)
    for value in low, low + 1, 0, 1, 0x5A, high - 1, high:
        for operand in 0, 1, 3, 0x55, high, low:
            for name, result in (
                ("fetch_add", value + operand),
                ("fetch_sub", value - operand),
                ("fetch_and", value & operand),
                ("fetch_or", value | operand),
                ("fetch_xor", value ^ operand),
                ("exchange", operand),
            ):
                memory.fill(0x33)
                plain.store(value)
                assert getattr(ref, name)(operand) == value, name
                assert ref.load() == plain.load() == wrap(scalar, result), (name, value, operand)
                assert memory.read_bytes(56, 8) == b"\x33" * 8
                assert memory.read_bytes(64 + scalar.size, 8) == b"\x33" * 8
            ref.store(value)
            assert plain.load() == value
            other = wrap(scalar, value + 1)
            assert ref.compare_exchange(other, operand) == (False, value)
            assert plain.load() == value
            assert ref.compare_exchange(value, operand) == (True, value)
            assert plain.load() == operand


@each_integer
def test_values_that_do_not_fit(memory: MemoryMapping, scalar: Scalar[int]) -> None:
    low, high = limits(scalar)
    ref: Any = memory.get_atomic_ref(0, scalar)
    ref.store(1)
    for name in "store", "exchange", "fetch_add", "fetch_sub", "fetch_and", "fetch_or", "fetch_xor":
        for bad in low - 1, high + 1:
            with pytest.raises(OverflowError, match=scalar.name):
                getattr(ref, name)(bad)
        with pytest.raises(TypeError, match="val must be an int"):
            getattr(ref, name)("1")
    for pair in (low - 1, 0), (0, high + 1):
        with pytest.raises(OverflowError):
            ref.compare_exchange(*pair)
    assert ref.load() == 1


def test_orders(memory: MemoryMapping) -> None:
    ref = memory.get_atomic_ref(0, u64)
    possible = {
        "load": {Ordering.RELAXED, Ordering.ACQUIRE, Ordering.SEQ_CST},
        "store": {Ordering.RELAXED, Ordering.RELEASE, Ordering.SEQ_CST},
        "exchange": set(ORDERINGS),
        "fetch_add": set(ORDERINGS),
        "compare_exchange": set(ORDERINGS),
    }
    arguments = {"load": (), "compare_exchange": (0, 0)}
    for name, orders in possible.items():
        call = getattr(ref, name)
        for order in [*ORDERINGS, None]:
            args = (*arguments.get(name, (0,)), order)
            if order is None or order in orders:
                call(*args)
            else:
                with pytest.raises(ValueError, match=f"a {name} cannot be .*{order.name}"):
                    call(*args)
        with pytest.raises(TypeError, match="order must be a guestmem.Ordering or None, not 'str'"):
            call(*arguments.get(name, (0,)), "SEQ_CST")


def test_fences() -> None:
    fence()
    for order in ORDERINGS[1:]:
        fence(order)
    with pytest.raises(ValueError, match=r"fence\(\) cannot be guestmem.Ordering.RELAXED"):
        fence(Ordering.RELAXED)
    with pytest.raises(TypeError, match="order must be"):
        fence(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"fence\(\) takes"):
        fence(None, None)  # type: ignore[call-arg]


def test_ordering() -> None:
    assert [order.name for order in ORDERINGS] == [
        *("RELAXED", "ACQUIRE", "RELEASE", "ACQ_REL", "SEQ_CST")
    ]
    for order in ORDERINGS:
        assert repr(order) == f"guestmem.Ordering.{order.name}"
        assert copy.copy(order) is copy.deepcopy(order) is order
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(order, protocol)) is order
    with pytest.raises(TypeError, match="cannot create"):
        Ordering()
    with pytest.raises(AttributeError):
        ORDERINGS[0].name = "x"  # type: ignore[misc]


def test_what_can_be_referred_to(memory: MemoryMapping) -> None:
    for offset in range(1, 8):
        for scalar in INTEGERS:
            if offset % scalar.size:
                with pytest.raises(MisalignedError) as caught:
                    memory.get_atomic_ref(offset, scalar)
                assert (caught.value.addr, caught.value.alignment) == (offset, scalar.size)
            else:
                memory.get_atomic_ref(offset, scalar)
    odd = memory.get_slice(3, 64)  # what counts is where it is in memory
    with pytest.raises(MisalignedError):
        odd.get_atomic_ref(0, u32)
    odd.get_atomic_ref(5, u64).store(7)
    assert memory.read_obj(8, u64) == 7
    with pytest.raises(OutOfBoundsError):
        memory.get_atomic_ref(PAGE - 4, u64)
    with pytest.raises(OutOfBoundsError):  # the range comes first
        memory.get_atomic_ref(PAGE - 1, u64)
    with pytest.raises(AddressOverflowError):
        memory.get_atomic_ref(2**64 - 4, u64)
    for real in guestmem.f32, guestmem.f64:
        with pytest.raises(TypeError, match=f"a Scalar of integers, not guestmem.{real.name}"):
            memory.get_atomic_ref(0, real)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a Scalar of integers, not the class 'int'"):
        memory.get_atomic_ref(0, int)  # type: ignore[arg-type]


def test_lifetime() -> None:
    memory = MemoryMapping(PAGE)
    ref = memory.get_atomic_ref(8, u64)
    assert repr(ref) == "<guestmem.AtomicRef type=guestmem.u64>"
    assert (ref.type, ref.size, ref.as_ptr()) == (u64, 8, memory.as_ptr() + 8)
    with pytest.raises(BufferError, match="held by 1 ref"):
        memory.close()
    part = ref.to_slice()
    part.write_obj(5, 0, u64)
    assert ref.load() == 5
    for bad in copy.copy, copy.deepcopy, pickle.dumps:
        with pytest.raises(TypeError, match="cannot copy or pickle AtomicRef objects"):
            bad(ref)
    with pytest.raises(TypeError, match="cannot create"):
        AtomicRef()
    assert get_origin(AtomicRef[int]) is AtomicRef
    del ref
    part.release()
    memory.close()


def test_of_a_buffer() -> None:
    buffer = bytearray(64)
    ref = VolatileSlice.from_buffer(buffer).get_atomic_ref(8, be32)
    assert ref.fetch_add(0x102) == 0
    assert buffer[8:12] == b"\0\0\1\2"
    with pytest.raises(BufferError):
        buffer.append(1)
    del ref
    buffer.append(1)


def test_faults(backing: Callable[[int], Backing]) -> None:
    file = backing(2 * PAGE)
    memory = MemoryMapping.from_fd(file.fd, 2 * PAGE)
    refs = [memory.get_atomic_ref(PAGE, scalar) for scalar in (u8, i16, be32, u64)]
    os.ftruncate(file.fd, PAGE)
    for ref in refs:
        with pytest.raises(ReadFromMemoryError) as read:
            ref.load()
        assert read.value.offset == 0
        calls: tuple[Any, ...] = (
            *((ref.store, 1), (ref.exchange, 1), (ref.fetch_add, 1), (ref.fetch_or, 1)),
            (ref.compare_exchange, 1, 1),
        )
        for call, *args in calls:
            with pytest.raises(WriteToMemoryError) as write:
                call(*args)
            assert write.value.offset == 0
    os.ftruncate(file.fd, 2 * PAGE)
    for ref in refs:
        before = ref.fetch_add(1)
        assert ref.load() == before + 1


ADDER = """
import sys
from guestmem import MemoryMapping
import guestmem
fd, name, way, count = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
memory = MemoryMapping.from_fd(fd, 4096)
kind, start = getattr(guestmem, name), memory.get_atomic_ref(0, guestmem.u32)
ref, plain = memory.get_atomic_ref(64, kind), memory.get_ref(64, kind)
start.fetch_add(1)
while start.load() < 2:
    pass
if way == "fetch_add":
    for _ in range(count):
        ref.fetch_add(1)
elif way == "compare_exchange":
    for _ in range(count):
        seen = ref.load()
        while True:
            done, seen = ref.compare_exchange(seen, seen + 1)
            if done:
                break
elif way == "lock":
    lock = memory.get_atomic_ref(128, guestmem.u8)
    for _ in range(count):
        while lock.exchange(1, guestmem.Ordering.ACQUIRE):
            pass
        plain.store(plain.load() + 1)
        lock.store(0, guestmem.Ordering.RELEASE)
else:  # not atomic, to show that it would be seen
    for _ in range(count):
        plain.store(plain.load() + 1)
"""


def add_by_two(file: Backing, name: str, way: str, count: int) -> int:
    """Return what two processes have added together."""
    children = [
        subprocess.Popen([sys.executable, "-c", ADDER, *map(str, (file.fd, name, way, count))],
                         pass_fds=[file.fd])
        for _ in range(2)
    ]  # fmt: skip
    for child in children:
        assert child.wait(120) == 0
    memory = MemoryMapping.from_fd(file.fd, PAGE)
    scalar: Scalar[int] = getattr(guestmem, name)
    return memory.read_obj(64, scalar)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("u64", "fetch_add"), ("u32", "fetch_add"), ("be64", "fetch_add"), ("le32", "fetch_add")),
        *(("u32", "compare_exchange"), ("u64", "lock")),
    ],
)
def test_two_processes_lose_nothing(backing: Callable[[int], Backing], name: str, way: str) -> None:
    count = 20_000
    assert add_by_two(backing(PAGE), name, way, count) == 2 * count


def test_what_is_not_atomic_loses_some(backing: Callable[[int], Backing]) -> None:
    # On a busy machine the two may run one after the other: longer than that, then.
    for count in 20_000, 500_000, 500_000, 5_000_000:
        if add_by_two(backing(PAGE), "u64", "neither", count) < 2 * count:
            return
    pytest.fail("updates that are not atomic were never lost: nothing is shown")


@pytest.mark.slow
def test_ten_million_each(backing: Callable[[int], Backing]) -> None:
    assert add_by_two(backing(PAGE), "u64", "fetch_add", 10**7) == 2 * 10**7
