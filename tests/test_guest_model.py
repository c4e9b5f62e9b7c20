"""Any sequence of calls by guest address does to memory what it does to a dict of bytes."""

from __future__ import annotations

import io
import operator
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from guestmem import (
    AddressOverflowError,
    AtomicRef,
    GuestMemory,
    InvalidGuestAddressError,
    MemoryMapping,
    MemoryRegionOverlapError,
    MisalignedError,
    OutOfBoundsError,
    ReadFromSourceError,
    Scalar,
    VolatileArrayRef,
    VolatileMemory,
    be32,
    i16,
    le64,
    preadv,
    pwritev,
    u8,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = os.sysconf("SC_PAGESIZE")
TOP = 2**64
# Three regions that adjoin, one after a hole, one at the very end; the second is not tracked.
LOW, FIRST, SECOND, THIRD = 0x1000, 100, PAGE + 57, 2 * PAGE
MIDDLE, NEXT = LOW + FIRST, LOW + FIRST + SECOND
HOLE, HIGH, LAST = NEXT + THIRD, 0x10_0000, TOP - PAGE
REGIONS = {LOW: FIRST, MIDDLE: SECOND, NEXT: THIRD, HIGH: PAGE, LAST: PAGE}
UNTRACKED = MIDDLE
PLUGS = [HOLE, HIGH + PAGE, HIGH - PAGE, HIGH - 5]  # two adjoin what is there, the last overlaps it
EDGES = [*REGIONS, *(start + size for start, size in REGIONS.items() if start != LAST)]


def near(*centres: int) -> st.SearchStrategy[int]:
    return st.one_of([st.integers(centre - 9, min(centre + 9, TOP - 1)) for centre in centres])


addresses = near(*EDGES) | st.integers(LOW, HOLE) | near(TOP - 1) | st.integers(0, TOP - 1)
counts = st.integers(0, 20) | st.integers(0, HOLE - LOW + 9) | near(PAGE, FIRST, SECOND)
data = st.binary(max_size=30) | st.builds(
    operator.mul, st.binary(min_size=7, max_size=7), st.integers(0, (HOLE - LOW) // 7 + 2)
)
scalars: st.SearchStrategy[Scalar[int]] = st.sampled_from([u8, i16, be32, le64, u64])
numbers = near(0, 2**31, 2**32, 2**63) | st.integers(-(2**63), TOP - 1)

FETCHES: dict[str, Callable[[int, int], int]] = {
    "exchange": lambda old, new: new,
    "fetch_add": operator.add,
    "fetch_sub": operator.sub,
    "fetch_and": operator.and_,
    "fetch_or": operator.or_,
    "fetch_xor": operator.xor,
}


def is_signed(scalar: Scalar[int]) -> bool:
    return scalar is i16


def order(scalar: Scalar[int]) -> Any:
    return "big" if scalar is be32 else "little"


def fit(scalar: Scalar[int], number: int) -> int:
    """Return the value of the type that has the lowest bits of a number."""
    bits = 8 * scalar.size
    number %= 1 << bits
    return number - (1 << bits) if is_signed(scalar) and number >> (bits - 1) else number


class Model(RuleBasedStateMachine):
    atomics: Bundle[tuple[AtomicRef[int], int]] = Bundle("atomics")
    arrays: Bundle[tuple[VolatileArrayRef[int], int]] = Bundle("arrays")

    def __init__(self) -> None:
        super().__init__()
        self.fd = os.memfd_create("guestmem-model")
        self.regions: dict[int, VolatileMemory] = {
            start: MemoryMapping(size, track_dirty=start != UNTRACKED)
            for start, size in REGIONS.items()
        }
        self.guest = GuestMemory(self.regions.items())
        self.model = {start: bytearray(size) for start, size in REGIONS.items()}
        self.must: set[tuple[int, int]] = set()  # dirty: region and page
        self.may: set[tuple[int, int]] = set()

    def teardown(self) -> None:
        os.close(self.fd)

    @invariant()
    def same_bytes(self) -> None:
        for start, content in self.model.items():
            assert self.guest.read_bytes(start, len(content)) == content

    @invariant()
    def same_pages(self) -> None:
        self.check_dirty(self.guest.dirty_ranges())

    def check_dirty(self, ranges: list[tuple[int, int]]) -> None:
        assert ranges == sorted(ranges)
        dirty = set()
        for addr, count in ranges:
            at = addr
            while at < addr + count:
                start = self.region_of(at)
                assert start is not None
                assert (at - start) % PAGE == 0
                dirty.add((start, (at - start) // PAGE))
                at = min(at + PAGE, start + len(self.model[start]))
            assert at == addr + count
        assert self.must <= dirty <= self.may

    # The model

    def region_of(self, addr: int) -> int | None:
        for start, content in self.model.items():
            if start <= addr < start + len(content):
                return start
        return None

    def reach(self, addr: int, count: int) -> int:
        """Return how many of these bytes come before a hole."""
        at = addr
        while at < addr + count and (start := self.region_of(at)) is not None:
            at = start + len(self.model[start])
        return min(at - addr, count)

    def expect(self, addr: int, count: int) -> tuple[type[Exception] | None, int]:
        """Return what a call that wants all of a range raises, and where the hole is."""
        if addr + count > TOP:
            return AddressOverflowError, 0
        ends = {start + len(content) for start, content in self.model.items()}
        if count == 0 and (self.region_of(addr) is not None or addr in ends):
            return None, 0
        reach = self.reach(addr, count)
        return (None, 0) if 0 < reach == count else (InvalidGuestAddressError, addr + reach)

    def refused(self, addr: int, count: int, call: Any, *arguments: Any) -> bool:
        expected, hole = self.expect(addr, count)
        if expected is None:
            return False
        with pytest.raises(expected) as caught:
            call(*arguments)
        if expected is InvalidGuestAddressError:
            assert caught.value.addr == hole  # type: ignore[attr-defined]
        return True

    def crosses(self, addr: int, count: int, call: Any, *arguments: Any) -> bool:
        """Do the same for what has to lie within one region."""
        if self.refused(addr, count, call, *arguments):
            return True
        start = self.region_of(addr)
        if count == 0 or start is None or addr + count <= start + len(self.model[start]):
            return False
        with pytest.raises(OutOfBoundsError) as caught:
            call(*arguments)
        assert (caught.value.border, caught.value.addr) == (True, addr + count)
        return True

    def get(self, addr: int, count: int) -> bytes:
        content = b""
        while len(content) < count:
            start = self.region_of(addr + len(content))
            assert start is not None
            inside = addr + len(content) - start
            content += self.model[start][inside : inside + count - len(content)]
        return content

    def put(self, addr: int, content: bytes, asked: int | None = None) -> None:
        """Write into the model; up to asked bytes may be marked."""
        for pages, count in (self.must, len(content)), (self.may, asked or len(content)):
            at = addr
            while at < addr + count and (start := self.region_of(at)) is not None:
                end = min(addr + count, start + len(self.model[start]))
                if start != UNTRACKED:
                    first, last = (at - start) // PAGE, (end - 1 - start) // PAGE
                    pages.update((start, page) for page in range(first, last + 1))
                at = end
        while content:
            start = self.region_of(addr)
            assert start is not None
            inside = addr - start
            here = content[: len(self.model[start]) - inside]
            self.model[start][inside : inside + len(here)] = here
            addr, content = addr + len(here), content[len(here) :]

    # Objects and copies

    @rule(addr=addresses, number=numbers, scalar=scalars)
    def objects(self, addr: int, number: int, scalar: Scalar[int]) -> None:
        number = fit(scalar, number)
        if not self.refused(addr, scalar.size, self.guest.write_obj, number, addr, scalar):
            self.guest.write_obj(number, addr, scalar)
            self.put(addr, number.to_bytes(scalar.size, order(scalar), signed=is_signed(scalar)))
            assert self.guest.read_obj(addr, scalar) == number
        else:
            self.refused(addr, scalar.size, self.guest.read_obj, addr, scalar)

    @rule(addr=addresses, number=numbers, scalar=scalars)
    def refs(self, addr: int, number: int, scalar: Scalar[int]) -> None:
        number = fit(scalar, number)
        if not self.crosses(addr, scalar.size, self.guest.get_ref, addr, scalar):
            ref = self.guest.get_ref(addr, scalar)
            ref.store(number)
            self.put(addr, number.to_bytes(scalar.size, order(scalar), signed=is_signed(scalar)))
            assert ref.load() == number

    @rule(addr=addresses, content=data)
    def write_all(self, addr: int, content: bytes) -> None:
        if not self.refused(addr, len(content), self.guest.write_all, content, addr):
            self.guest.write_all(content, addr)
            self.put(addr, content)

    @rule(addr=addresses, content=data)
    def what_fits(self, addr: int, content: bytes) -> None:
        reach = self.reach(addr, len(content))
        back = bytearray(len(content))
        if reach == 0 or addr + len(content) > TOP:
            if content:
                self.refused(addr, len(content), self.guest.write_slice, content, addr)
                self.refused(addr, len(content), self.guest.read_slice, back, addr)
            return
        assert self.guest.write_slice(content, addr) == reach
        self.put(addr, content[:reach])
        assert self.guest.read_slice(back, addr) == reach
        assert back == content[:reach] + bytes(len(content) - reach)

    @rule(addr=addresses, count=counts)
    def read(self, addr: int, count: int) -> None:
        back = bytearray(count)
        if not self.refused(addr, count, self.guest.read_bytes, addr, count):
            assert self.guest.read_bytes(addr, count) == self.get(addr, count)
            self.guest.read_exact(back, addr)
            assert back == self.get(addr, count)
        else:
            self.refused(addr, count, self.guest.read_exact, back, addr)
        reach = self.reach(addr, count)
        assert self.guest.check_range(addr, count) == (self.expect(addr, count)[0] is None)
        assert self.guest.address_in_range(addr) == (self.region_of(addr) is not None)
        assert reach <= count

    @rule(addr=addresses, count=counts, byte=st.integers(0, 255))
    def fill(self, addr: int, count: int, byte: int) -> None:
        if not self.refused(addr, count, self.guest.fill, byte, addr, count):
            self.guest.fill(byte, addr, count)
            self.put(addr, bytes([byte]) * count)

    @rule(addr=addresses, count=counts)
    def slices(self, addr: int, count: int) -> None:
        if not self.refused(addr, count, lambda: list(self.guest.slices(addr, count))):
            parts = [bytes(part) for part in self.guest.slices(addr, count)]
            assert b"".join(parts) == self.get(addr, count)
            assert len(parts) <= len(self.model)
        if not self.crosses(addr, count, self.guest.get_slice, addr, count):
            assert bytes(self.guest.get_slice(addr, count)) == self.get(addr, count)

    # Atomics and arrays

    @rule(target=atomics, addr=addresses, scalar=scalars)
    def get_atomic_ref(self, addr: int, scalar: Scalar[int]) -> tuple[AtomicRef[int], int]:
        start = self.region_of(addr)
        if not self.crosses(addr, scalar.size, self.guest.get_atomic_ref, addr, scalar):
            assert start is not None
            if start not in PLUGS and (addr - start) % scalar.size == 0:
                return self.guest.get_atomic_ref(addr, scalar), addr
            if (addr - start) % scalar.size:
                with pytest.raises(MisalignedError):
                    self.guest.get_atomic_ref(addr, scalar)
        return self.guest.get_atomic_ref(HIGH + 8, scalar), HIGH + 8

    @rule(one=atomics, name=st.sampled_from(list(FETCHES)), number=numbers, other=numbers)
    def atomic(self, one: tuple[AtomicRef[int], int], name: str, number: int, other: int) -> None:
        ref, addr = one
        scalar = ref.type
        number, other = fit(scalar, number), fit(scalar, other)

        def put(value: int) -> None:
            self.put(addr, value.to_bytes(scalar.size, order(scalar), signed=is_signed(scalar)))
            assert ref.load() == value

        before = int.from_bytes(
            self.get(addr, scalar.size), order(scalar), signed=is_signed(scalar)
        )
        assert ref.load() == before
        assert getattr(ref, name)(number) == before
        put(now := fit(scalar, FETCHES[name](before, number)))
        assert ref.compare_exchange(other, number) == (other == now, now)
        if other == now:
            put(now := number)
        assert ref.compare_exchange(now, other) == (True, now)
        put(other)
        ref.store(number)
        put(number)

    @rule(target=arrays, addr=addresses, n=st.integers(0, 300), scalar=scalars)
    def get_array_ref(
        self, addr: int, n: int, scalar: Scalar[int]
    ) -> tuple[VolatileArrayRef[int], int]:
        crosses = self.crosses(addr, n * scalar.size, self.guest.get_array_ref, addr, n, scalar)
        if crosses or self.region_of(addr) in (None, *PLUGS):  # what is unplugged leaves the model
            addr = HIGH + 3
        return self.guest.get_array_ref(addr, n, scalar), addr

    @rule(
        target=arrays,
        one=arrays,
        i=st.integers(-310, 310),
        j=st.integers(-310, 310),
        number=numbers,
    )
    def array(
        self, one: tuple[VolatileArrayRef[int], int], i: int, j: int, number: int
    ) -> tuple[VolatileArrayRef[int], int]:
        array, addr = one
        scalar, n = array.type, len(array)
        assert isinstance(scalar, Scalar)
        number = fit(scalar, number)
        content = self.get(addr, n * scalar.size)
        values = [
            int.from_bytes(
                content[k * scalar.size :][: scalar.size], order(scalar), signed=is_signed(scalar)
            )
            for k in range(n)
        ]
        assert array.tolist() == list(array) == values
        part = array[i:j]
        first, end, _ = slice(i, j).indices(n)
        assert part.tolist() == values[i:j]
        word = number.to_bytes(scalar.size, order(scalar), signed=is_signed(scalar))
        if -n <= i < n:
            array[i] = number
            self.put(addr + i % n * scalar.size, word)
            assert array[i] == number
        else:
            with pytest.raises(IndexError):
                array[i] = number
        assert part.copy_from([number] * max(j % 7, 1)) == min(len(part), max(j % 7, 1))
        self.put(addr + first * scalar.size, word * min(len(part), max(j % 7, 1)))
        back = bytearray(len(part) * scalar.size)
        assert part.copy_to(back) == len(part) == max(end - first, 0)
        assert part.copy_from(back[::-1]) == len(part)
        self.put(addr + first * scalar.size, bytes(back[::-1]))
        return part, addr + first * scalar.size

    # Files

    @rule(addr=addresses, count=counts, short=st.integers(0, 3), by_fd=st.booleans())
    def read_to_memory(self, addr: int, count: int, short: int, by_fd: bool) -> None:
        content = bytes(n % 255 + 1 for n in range(max(count - short, 0)))
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, content, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        source = self.fd if by_fd else io.BytesIO(content)
        if self.refused(addr, count, self.guest.read_to_memory, addr, source, count):
            return
        if len(content) < count:
            with pytest.raises(ReadFromSourceError) as caught:
                self.guest.read_to_memory(addr, source, count)
            assert caught.value.transferred == len(content)
        else:
            self.guest.read_to_memory(addr, source, count)
        self.put(addr, content, count)

    @rule(addr=addresses, count=counts)
    def write_from_memory(self, addr: int, count: int) -> None:
        destination = io.BytesIO()
        if not self.refused(addr, count, self.guest.write_from_memory, addr, destination, count):
            self.guest.write_from_memory(addr, destination, count)
            assert destination.getvalue() == self.get(addr, count)

    @rule(addr=addresses, count=counts, short=st.integers(0, 300))
    def vectored(self, addr: int, count: int, short: int) -> None:
        if self.refused(addr, count, lambda: pwritev(self.fd, self.guest.slices(addr, count), 0)):
            return
        os.ftruncate(self.fd, 0)
        assert pwritev(self.fd, self.guest.slices(addr, count), 0) == count
        content = self.get(addr, count)
        assert os.pread(self.fd, count + 1, 0) == content
        content = content[::-1][: max(count - short, 0)]
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, content, 0)
        assert preadv(self.fd, self.guest.slices(addr, count), 0) == len(content)
        self.put(addr, content, count)

    @rule(addr=addresses, count=counts, short=st.integers(0, 300))
    def once(self, addr: int, count: int, short: int) -> None:
        if self.crosses(addr, count, self.guest.get_slice, addr, count):
            return
        part = self.guest.get_slice(addr, count)
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        assert part.write_to(self.fd, count) == count
        assert os.pread(self.fd, count + 1, 0) == self.get(addr, count)
        os.lseek(self.fd, short, os.SEEK_SET)
        content = self.get(addr, count)[short:]
        assert part.read_from(self.fd, count) == len(content)
        self.put(addr, content, count)

    # Dirty pages, and other guests

    @rule()
    def take_dirty(self) -> None:
        self.check_dirty(self.guest.take_dirty())
        assert self.guest.dirty_ranges() == []
        self.must.clear()
        self.may.clear()

    @rule(addr=st.sampled_from(PLUGS))
    def plug(self, addr: int) -> None:
        memory = MemoryMapping(PAGE, track_dirty=True)
        if addr in self.model:
            del memory
            self.guest = self.guest.without_region(addr, PAGE)
            del self.model[addr], self.regions[addr]
            for pages in self.must, self.may:
                pages -= {page for page in pages if page[0] == addr}
        elif any(at < addr + PAGE and addr < at + len(old) for at, old in self.model.items()):
            with pytest.raises(MemoryRegionOverlapError):
                self.guest.with_region(addr, memory)
        else:
            self.guest = self.guest.with_region(addr, memory)
            self.model[addr], self.regions[addr] = bytearray(PAGE), memory
        assert [region.start for region in self.guest.regions] == sorted(self.model)
        assert self.guest.size == sum(map(len, self.model.values()))


Model.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestModel = Model.TestCase
