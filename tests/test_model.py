"""Any sequence of calls, with any numbers, does to memory what it does to a bytearray."""

from __future__ import annotations

import io
import os
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from guestmem import (
    AddressOverflowError,
    ClosedError,
    InvalidAddressError,
    InvalidRangeError,
    MemoryMapping,
    OutOfBoundsError,
    ReadFromSourceError,
    Scalar,
    VolatileMemory,
    VolatileRef,
    VolatileSlice,
    be16,
    be32,
    be64,
    i8,
    i16,
    i32,
    i64,
    le16,
    le32,
    le64,
    u8,
    u16,
    u32,
    u64,
)

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 2 * PAGE + 123
FORMATS: dict[Scalar[int], str] = {
    u8: "=B", u16: "=H", u32: "=I", u64: "=Q", i8: "=b", i16: "=h", i32: "=i", i64: "=q",
    le16: "<H", le32: "<I", le64: "<Q", be16: ">H", be32: ">I", be64: ">Q",
}  # fmt: skip


def near(*centres: int) -> st.SearchStrategy[int]:
    return st.one_of([st.integers(centre - 9, centre + 9) for centre in centres])


EDGES = near(0, SIZE, 2**31, 2**32, 2**63, 2**64) | st.integers(-(2**70), 2**70)
inside = st.integers(0, SIZE) | near(8, PAGE, 2 * PAGE, SIZE - 9)
offsets = st.one_of(inside, inside, inside, EDGES)
counts = st.one_of(st.integers(0, 300), inside, EDGES)
data = st.binary(max_size=300) | st.builds(
    lambda byte, count: bytes([byte]) * count, st.integers(0, 255), st.integers(0, SIZE + 9)
)
scalars = st.sampled_from(list(FORMATS))


class Part:
    """A memory and where it lies in the model."""

    def __init__(self, memory: VolatileMemory, start: int, size: int) -> None:
        self.memory, self.start, self.size = memory, start, size

    @property
    def is_released(self) -> bool:
        return self.memory.closed


class Model(RuleBasedStateMachine):
    parts: Bundle[Part] = Bundle("parts")
    refs: Bundle[tuple[VolatileRef[int], int]] = Bundle("refs")

    def __init__(self) -> None:
        super().__init__()
        self.fd = os.memfd_create("guestmem-model")
        os.ftruncate(self.fd, SIZE)
        self.mapping = MemoryMapping.from_fd(self.fd, SIZE)
        self.model = bytearray(SIZE)

    def teardown(self) -> None:
        os.close(self.fd)

    @invariant()
    def same_bytes(self) -> None:
        assert self.mapping.read_bytes(0, SIZE) == self.model
        assert os.pread(self.fd, SIZE, 0) == self.model

    # What must come of it

    def expect(
        self, part: Part, offset: int, count: int, error: type[Exception], *, short: bool = False
    ) -> type[Exception] | None:
        """Return the error that the range must be answered with; None if it fits."""
        if not (0 <= offset < 2**64 and 0 <= count < 2**64):
            return OverflowError
        if part.is_released:
            return ClosedError
        if error is OutOfBoundsError and offset + count >= 2**64:
            return AddressOverflowError
        fits = offset < part.size if short else offset + count <= part.size
        return None if fits else error

    def refused(self, expected: type[Exception] | None, call: Any, *arguments: Any) -> bool:
        if expected is None:
            return False
        with pytest.raises(expected) as caught:
            call(*arguments)
        assert type(caught.value) is expected
        return True

    def put(self, part: Part, offset: int, content: bytes) -> None:
        start = part.start + offset
        assert start + len(content) <= part.start + part.size
        self.model[start : start + len(content)] = content

    def get(self, part: Part, offset: int, count: int) -> bytes:
        assert offset + count <= part.size
        return bytes(self.model[part.start + offset :][:count])

    # Slices and refs

    @rule(target=parts)
    def whole(self) -> Part:
        return Part(self.mapping, 0, SIZE)

    @rule(target=parts, part=parts, offset=offsets, count=counts)
    def get_slice(self, part: Part, offset: int, count: int) -> Part:
        expected = self.expect(part, offset, count, OutOfBoundsError)
        if self.refused(expected, part.memory.get_slice, offset, count):
            return part
        made = part.memory.get_slice(offset, count)
        assert made.size == len(made) == count
        return Part(made, part.start + offset, count)

    @rule(target=parts, part=parts, count=offsets)
    def offset(self, part: Part, count: int) -> Part:
        if not isinstance(part.memory, VolatileSlice):
            return part
        if self.refused(self.expect(part, count, 0, OutOfBoundsError), part.memory.offset, count):
            return part
        return Part(part.memory.offset(count), part.start + count, part.size - count)

    @rule(target=refs, part=parts, offset=offsets, scalar=scalars)
    def get_ref(self, part: Part, offset: int, scalar: Scalar[int]) -> Any:
        expected = self.expect(part, offset, scalar.size, OutOfBoundsError)
        if self.refused(expected, part.memory.get_ref, offset, scalar):
            return self.mapping.get_ref(0, scalar), 0
        return part.memory.get_ref(offset, scalar), part.start + offset

    @rule(part=parts)
    def release(self, part: Part) -> None:
        if isinstance(part.memory, VolatileSlice):
            part.memory.release()
            assert part.is_released

    @rule(part=consumes(parts), ref=consumes(refs))
    def drop(self, part: Part, ref: object) -> None:
        """The last reference to them may go."""

    # Objects

    @rule(ref=refs, number=EDGES)
    def use_ref(self, ref: tuple[VolatileRef[int], int], number: int) -> None:
        one, start = ref
        self.use_scalar(one.type, number, start, one.load, one.store)  # type: ignore[arg-type]

    @rule(part=parts, offset=offsets, number=EDGES, scalar=scalars)
    def use_obj(self, part: Part, offset: int, number: int, scalar: Scalar[int]) -> None:
        memory = part.memory
        expected = self.expect(part, offset, scalar.size, InvalidAddressError)
        if not self.refused(expected, memory.read_obj, offset, scalar):
            self.use_scalar(
                scalar,
                number,
                part.start + offset,
                lambda: memory.read_obj(offset, scalar),
                lambda value: memory.write_obj(value, offset, scalar),
            )
        else:
            self.refused(expected, memory.write_obj, 1, offset, scalar)

    def use_scalar(
        self, scalar: Scalar[int], number: int, start: int, load: Any, store: Any
    ) -> None:
        layout = struct.Struct(FORMATS[scalar])
        assert load() == layout.unpack_from(self.model, start)[0]
        try:
            content = layout.pack(number)
        except struct.error:
            with pytest.raises(OverflowError, match=f" does not fit guestmem.{scalar.name}$"):
                store(number)
        else:
            store(number)
            assert load() == number
            self.model[start : start + scalar.size] = content

    # Copies

    @rule(part=parts, offset=offsets, content=data)
    def write_all(self, part: Part, offset: int, content: bytes) -> None:
        expected = self.expect(part, offset, len(content), InvalidAddressError)
        if not self.refused(expected, part.memory.write_all, content, offset):
            part.memory.write_all(content, offset)
            self.put(part, offset, content)

    @rule(part=parts, offset=offsets, content=data)
    def write_slice(self, part: Part, offset: int, content: bytes) -> None:
        expected = self.expect(part, offset, 0, InvalidAddressError, short=True)
        if not self.refused(expected, part.memory.write_slice, content, offset):
            content = content[: part.size - offset]
            assert part.memory.write_slice(
                content + b"?" * (offset + len(content) == part.size), offset
            ) == len(content)
            self.put(part, offset, content)

    @rule(part=parts, offset=offsets, count=counts)
    def read(self, part: Part, offset: int, count: int) -> None:
        memory = part.memory
        expected = self.expect(part, offset, count, InvalidAddressError)
        if not self.refused(expected, memory.read_bytes, offset, count):
            assert memory.read_bytes(offset, count) == self.get(part, offset, count)
        if not 0 <= count < 2 * SIZE:
            return
        buffer = bytearray(count)
        if not self.refused(expected, memory.read_exact, buffer, offset):
            memory.read_exact(buffer, offset)
            assert buffer == self.get(part, offset, count)
        expected = self.expect(part, offset, 0, InvalidAddressError, short=True)
        if not self.refused(expected, memory.read_slice, buffer, offset):
            fitting = min(count, part.size - offset)
            assert memory.read_slice(buffer, offset) == fitting
            assert buffer[:fitting] == self.get(part, offset, fitting)

    @rule(part=parts, offset=offsets, count=counts, byte=st.integers(0, 255))
    def fill(self, part: Part, offset: int, count: int, byte: int) -> None:
        expected = self.expect(part, offset, count, InvalidAddressError)
        if not self.refused(expected, part.memory.fill, byte, offset, count):
            part.memory.fill(byte, offset, count)
            self.put(part, offset, bytes([byte]) * count)

    @rule(source=parts, into=parts)
    def copy(self, source: Part, into: Part) -> None:
        one, two = source.memory, into.memory
        if not (isinstance(one, VolatileSlice) and isinstance(two, VolatileSlice)):
            return
        released = ClosedError if source.is_released or into.is_released else None
        if not self.refused(released, one.copy_to_volatile_slice, two):
            count = min(source.size, into.size)
            content = self.get(source, 0, count)
            assert one.copy_to_volatile_slice(two) == count
            self.put(into, 0, content)

    # Files

    @rule(part=parts, offset=offsets, count=counts, short=st.integers(0, 3))
    def read_to_memory(self, part: Part, offset: int, count: int, short: int) -> None:
        memory = part.memory
        expected = self.expect(part, offset, count, InvalidRangeError)
        source = io.BytesIO()
        if self.refused(expected, memory.read_to_memory, offset, source, count):
            return
        content = bytes(n % 255 + 1 for n in range(max(count - short, 0)))
        source = io.BytesIO(content)
        if len(content) < count:
            with pytest.raises(ReadFromSourceError) as caught:
                memory.read_to_memory(offset, source, count)
            assert caught.value.transferred == len(content)
        else:
            memory.read_to_memory(offset, source, count)
        self.put(part, offset, content)

    @rule(part=parts, offset=offsets, count=counts, by_fd=st.booleans())
    def write_from_memory(self, part: Part, offset: int, count: int, by_fd: bool) -> None:
        expected = self.expect(part, offset, count, InvalidRangeError)
        if self.refused(expected, part.memory.write_from_memory, offset, io.BytesIO(), count):
            return
        if by_fd:
            fd = os.memfd_create("guestmem-destination")
            part.memory.write_from_memory(offset, fd, count, 3)
            assert os.pread(fd, count, 3) == self.get(part, offset, count)
            os.close(fd)
        else:
            destination = io.BytesIO()
            part.memory.write_from_memory(offset, destination, count)
            assert destination.getvalue() == self.get(part, offset, count)

    @rule(part=parts, offset=offsets | st.sampled_from([0, PAGE, 2 * PAGE]), count=counts)
    def remove_range(self, part: Part, offset: int, count: int) -> None:
        expected = self.expect(part, offset, count, InvalidRangeError)
        if expected is None and count and (part.start + offset) % PAGE:
            expected = InvalidRangeError  # not aligned in memory
        if not self.refused(expected, part.memory.remove_range, offset, count):
            part.memory.remove_range(offset, count)
            self.put(part, offset, bytes(count))

    # Others

    @rule(offset=st.integers(0, SIZE - 1), content=st.binary(min_size=1, max_size=99))
    def somebody_else_writes(self, offset: int, content: bytes) -> None:
        content = content[: SIZE - offset]
        os.pwrite(self.fd, content, offset)
        self.model[offset : offset + len(content)] = content

    @rule(part=parts)
    def export(self, part: Part) -> None:
        if not self.refused(ClosedError if part.is_released else None, memoryview, part.memory):
            with memoryview(part.memory) as view:
                assert view == self.get(part, 0, part.size)


Model.TestCase.settings = settings(
    max_examples=400,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestModel = Model.TestCase
