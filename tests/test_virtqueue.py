"""The device of tests/hypervisor and drivers of every kind: honest, odd, malicious, random."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from struct import Struct
from typing import TYPE_CHECKING

import pytest

from block import FLUSH, GET_ID, IN, IO_ERROR, OK, OUT, SECTOR, UNSUPPORTED, BlockDevice
from guestmem import (
    GuestMemory,
    GuestMemoryError,
    MemoryMapping,
    ReadFromMemoryError,
    le16,
    u8,
)
from virtqueue import DESCRIPTOR, INDIRECT, NEXT, NO_INTERRUPT, USED, WRITE, RingError, Virtqueue

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.conftest import Backing

TOP = (1 << 64) - 0x1000
REGIONS = [(0, 0x4000), (0x4000, 0x2000), (0x8000, 0x2000), (TOP, 0x1000)]
BORDER, HOLE = 0x4000, 0x6000
ADJOINING = [(0, 0x6000), (0x8000, 0x2000), (TOP, 0x1000)]  # the same, as a driver sees it
TABLE, AVAILABLE, USED_RING, DATA = 0x0, 0x400, 0x800, 0x1000  # where the driver puts things
HEADER = Struct("<IIQ")
SECTORS = 16

RINGS = int(os.environ.get("GUESTMEM_RINGS", "8000"))

Descriptor = tuple[int, int, int, int]


class Driver:
    """The other side of the queue, and the device that this one has."""

    def __init__(self, memory: GuestMemory, disk: int, size: int = 8, first: int = 0) -> None:
        self.memory, self.size, self.available = memory, size, first
        for ring in AVAILABLE, USED_RING:
            memory.write_obj(0, ring, le16)
            memory.write_obj(first, ring + 2, le16)
        self.queue = Virtqueue(
            *(memory, size, TABLE, AVAILABLE, USED_RING), next_available=first, indirect=True
        )
        self.device = BlockDevice(disk)

    def write_chain(self, parts: Sequence[tuple[int, int, int]], table: int = TABLE) -> None:
        """Write descriptors one after the other: address, length, WRITE or 0."""
        for i, (address, length, flags) in enumerate(parts):
            more = NEXT if i + 1 < len(parts) else 0
            self.write_descriptor(i, (address, length, flags | more, i + 1), table)

    def write_descriptor(self, i: int, descriptor: Descriptor, table: int = TABLE) -> None:
        self.memory.write_obj(descriptor, table + DESCRIPTOR.size * i, DESCRIPTOR)

    def make_available(self, head: int = 0) -> None:
        self.memory.write_obj(head, AVAILABLE + 4 + 2 * (self.available % self.size), le16)
        self.available = (self.available + 1) & 0xFFFF
        self.memory.write_obj(self.available, AVAILABLE + 2, le16)

    def run(self) -> tuple[int, int]:
        """Let the device do one request; return the entry that it left in the used ring."""
        before: int = self.memory.read_obj(USED_RING + 2, le16)
        chain = self.queue.pop()
        assert chain is not None
        self.queue.push(chain, self.device.handle(chain))
        assert self.memory.read_obj(USED_RING + 2, le16) == (before + 1) & 0xFFFF
        entry = USED_RING + 4 + USED.size * (before % self.size)
        head, written = self.memory.read_obj(entry, USED)
        return head, written

    def request(
        self, kind: int, sector: int, data: Sequence[tuple[int, int, int]], status: int = DATA + 16
    ) -> tuple[int, int]:
        """Do a request of three parts or more; return its status, and what was written."""
        self.memory.write_obj((kind, 0, sector), DATA, HEADER)
        self.memory.write_obj(0xEE, status, u8)
        self.write_chain([(DATA, HEADER.size, 0), *data, (status, 1, WRITE)])
        self.make_available()
        head, written = self.run()
        assert head == 0
        return self.memory.read_obj(status, u8), written


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory((address, MemoryMapping(size)) for address, size in REGIONS)


@pytest.fixture
def disk(backing: Callable[[int], Backing]) -> Backing:
    made = backing(SECTORS * SECTOR)
    os.pwrite(made.fd, random.Random(1).randbytes(made.size), 0)
    return made


@pytest.fixture
def driver(memory: GuestMemory, disk: Backing) -> Driver:
    return Driver(memory, disk.fd)


# --- honest drivers ---


def test_read_and_write(driver: Driver, disk: Backing) -> None:
    assert driver.queue.pop() is None
    memory = driver.memory
    assert driver.request(IN, 3, [(0x2000, 1024, WRITE)]) == (OK, 1025)
    assert memory.read_bytes(0x2000, 1024) == disk.read(3 * SECTOR, 1024)
    memory.fill(0x77, 0x2000, 512)
    assert driver.request(OUT, 15, [(0x2000, 512, 0)]) == (OK, 1)
    assert disk.read(15 * SECTOR) == b"\x77" * 512
    assert driver.queue.pop() is None


def test_other_requests(driver: Driver) -> None:
    assert driver.request(FLUSH, 0, []) == (OK, 1)
    assert driver.request(GET_ID, 0, [(0x2000, 20, WRITE)]) == (OK, 21)
    assert driver.memory.read_bytes(0x2000, 20) == b"guestmem" + bytes(12)
    assert driver.request(GET_ID, 0, [(0x2000, 4, WRITE)]) == (OK, 5)
    assert driver.request(GET_ID, 0, [(0x2000, 30, WRITE)]) == (OK, 20)  # the status has a gap
    assert driver.request(2, 0, []) == (UNSUPPORTED, 1)
    assert driver.request(IN, 0, []) == (OK, 1)


@pytest.mark.parametrize("sector", [SECTORS, SECTORS - 1, 1 << 55, (1 << 64) - 1])
def test_beyond_the_disk(driver: Driver, disk: Backing, sector: int) -> None:
    before = disk.read()
    assert driver.request(IN, sector, [(0x2000, 1024, WRITE)]) == (IO_ERROR, 0)
    assert driver.request(OUT, sector, [(0x2000, 1024, 0)]) == (IO_ERROR, 1)
    assert disk.read() == before


def test_not_whole_sectors(driver: Driver) -> None:
    assert driver.request(IN, 0, [(0x2000, 511, WRITE)]) == (IO_ERROR, 0)
    assert driver.request(OUT, 0, [(0x2000, 513, 0)]) == (IO_ERROR, 1)


def test_disk_that_fails(driver: Driver, disk: Backing, pipe: tuple[int, int]) -> None:
    os.ftruncate(disk.fd, 512)
    assert driver.request(IN, 0, [(0x2000, 1024, WRITE)]) == (IO_ERROR, 0)
    assert driver.request(IN, 0, [(0x2000, 512, WRITE)]) == (OK, 513)
    driver.device = BlockDevice(pipe[1])
    assert driver.request(FLUSH, 0, []) == (IO_ERROR, 1)
    assert driver.request(OUT, 0, []) == (OK, 1)


def test_scattered(driver: Driver, disk: Backing) -> None:
    """Descriptors may begin and end anywhere, in the middle of the header, and cross regions."""
    memory = driver.memory
    memory.write_all(HEADER.pack(IN, 0, 2), BORDER - 7)
    driver.write_chain(
        [
            (BORDER - 7, 12, 0),  # across the border of two regions
            (BORDER + 5, 4, 0),
            (0x9000, 1, WRITE),
            (BORDER - 100, 200, WRITE),
            (TOP + 0x1000 - 311, 311, WRITE),  # to the last byte there is
            (0x2000, 513, WRITE),  # with the status
        ]
    )
    driver.make_available()
    assert driver.run() == (0, 1025)
    pieces = [(0x9000, 1), (BORDER - 100, 200), (TOP + 0x1000 - 311, 311), (0x2000, 513)]
    got = b"".join(memory.read_bytes(address, count) for address, count in pieces)
    assert got == disk.read(2 * SECTOR, 1024) + bytes([OK])

    memory.write_all(HEADER.pack(OUT, 0, 9) + b"out!" * 256, BORDER - 300)
    driver.write_chain([(BORDER - 300, 1040, 0), (0x2000, 1, WRITE)])
    driver.make_available()
    assert driver.run() == (0, 1)
    assert disk.read(9 * SECTOR, 1024) == b"out!" * 256


@pytest.mark.parametrize("direct", [0, 1])
@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | WRITE])  # WRITE means nothing here
def test_indirect(driver: Driver, disk: Backing, direct: int, flags: int) -> None:
    parts = [(DATA, HEADER.size, 0), (0x2000, 512, WRITE), (0x3000, 1, WRITE)]
    driver.memory.write_obj((IN, 0, 5), DATA, HEADER)
    driver.write_descriptor(6, (*parts[0][:2], NEXT, 7))
    table = parts[direct:]
    driver.write_chain(table, 0x8008)
    driver.write_descriptor(7, (0x8008, 16 * len(table), flags, 0xFFFF))
    driver.make_available(6 if direct else 7)
    assert driver.run() == (6 if direct else 7, 513)
    assert driver.memory.read_bytes(0x2000, 512) == disk.read(5 * SECTOR, 512)


def test_a_chain_as_long_as_the_queue(driver: Driver) -> None:
    parts = [(0x2000 + 64 * i, 64, WRITE) for i in range(6)]
    assert driver.request(IN, 0, [*parts[:5], (0x3000, 192, WRITE)]) == (OK, 513)
    table = [(DATA, HEADER.size, 0), *parts, (0x3000, 129, WRITE)]
    driver.write_chain(table, 0x8000)  # the descriptor of the table does not count
    driver.write_descriptor(0, (0x8000, 16 * 8, INDIRECT, 0))
    driver.make_available()
    assert driver.run() == (0, 513)


def test_indices_wrap(memory: GuestMemory, disk: Backing) -> None:
    driver = Driver(memory, disk.fd, first=0xFFFD)
    memory.write_obj((FLUSH, 0, 0), DATA, HEADER)
    for i in range(4):
        driver.write_descriptor(i, (DATA, 16, NEXT, 4 + i))
        driver.write_descriptor(4 + i, (0x2000 + i, 1, WRITE, 0))
    for i in range(4):
        driver.make_available(i)
    assert [driver.run()[0] for _ in range(4)] == [0, 1, 2, 3]
    assert driver.queue.pop() is None
    assert driver.queue.next_available == 1
    driver.make_available(2)
    again = Virtqueue(memory, 8, TABLE, AVAILABLE, USED_RING, next_available=1)
    chain = again.pop()
    assert chain is not None
    again.push(chain, 0)  # where the one before has left off
    assert memory.read_obj(USED_RING + 2, le16) == 2
    assert memory.read_obj(USED_RING + 4 + 8, USED) == (2, 0)


def test_interrupts(driver: Driver) -> None:
    assert driver.queue.wants_interrupt()
    driver.memory.write_obj(NO_INTERRUPT, AVAILABLE, le16)
    assert not driver.queue.wants_interrupt()
    driver.memory.write_obj(0xFFFE, AVAILABLE, le16)
    assert driver.queue.wants_interrupt()


# --- malicious drivers ---

# What they write into the table, and what the device says to it. None: the memory says it.
H = (DATA, 16, NEXT, 1)  # a header, then descriptor 1
S = (DATA + 16, 1, WRITE, 0)
MALICIOUS: dict[str, tuple[list[Descriptor], str | None]] = {
    "loop of one": ([(DATA, 16, NEXT, 0)], "more than 8 descriptors"),
    "loop of two": ([H, (DATA, 16, NEXT, 0)], "more than 8 descriptors"),
    "next out of range": ([(DATA, 16, NEXT, 8)], "descriptor 8 of 8"),
    "next far out of range": ([(DATA, 16, NEXT, 0xFFFF)], "descriptor 65535 of 8"),
    "no bytes": ([(DATA, 0, NEXT, 1), S], "0 bytes"),
    "no bytes to write": ([H, (DATA, 0, WRITE, 0)], "0 bytes"),
    "readable after writable": ([H, (DATA, 1, WRITE | NEXT, 2), (*S[:2], 0, 0)], "after a wr"),
    "into a hole": ([H, (HOLE, 1, WRITE, 0)], None),
    "up to a hole and on": ([H, (HOLE - 1, 2, WRITE, 0)], None),
    "across a hole": ([H, (HOLE - 1, 0x2002, WRITE, 0)], None),
    "header in a hole": ([(HOLE, 16, NEXT, 1), S], None),
    "past the last address": ([H, (TOP, 0x1001, WRITE, 0)], None),
    "past 2**64": ([H, ((1 << 64) - 1, 0xFFFFFFFF, WRITE, 0)], None),
    "4 GiB less one": ([H, (0, 0xFFFFFFFF, WRITE, 0)], None),
    "short header": ([(DATA, 15, NEXT, 1), S], "without a header"),
    "no status": ([(DATA, 16, 0, 0)], "without room for the status"),
    "no header": ([S], "without a header"),
    "table in a hole": ([(HOLE, 16, INDIRECT, 0)], None),
    "table past 2**64": ([((1 << 64) - 16, 32, INDIRECT, 0)], None),
    "table of no bytes": ([(0x8000, 0, INDIRECT, 0)], "descriptor 0 of 0"),
    "table of 17 bytes": ([(0x8000, 17, INDIRECT, 0)], "a table of 17 bytes"),
    "table, then more": ([(0x8030, 16, INDIRECT | NEXT, 1), S], "a table of 16 bytes"),
    "table in a table": ([(0x8000, 48, INDIRECT, 0)], "a table of 16 bytes"),
    "loop in a table": ([(0x8010, 32, INDIRECT, 0)], "more than 8 descriptors"),
    "out of the table": ([(0x8010, 16, INDIRECT, 0)], "descriptor 1 of 1"),
    "table of itself": ([(TABLE, 16, INDIRECT, 0)], "a table of 16 bytes"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_chains(driver: Driver, name: str) -> None:
    descriptors, message = MALICIOUS[name]
    driver.write_descriptor(0, (0x8000, 16, INDIRECT, 0), 0x8000)
    driver.write_descriptor(1, (DATA, 16, NEXT, 1), 0x8000)
    driver.write_descriptor(2, (DATA, 16, NEXT, 0), 0x8000)
    driver.write_descriptor(3, (DATA, 16, 0, 0), 0x8000)
    for i, descriptor in enumerate(descriptors):
        driver.write_descriptor(i, descriptor)
    driver.make_available()
    before = snapshot(driver.memory)
    with pytest.raises(RingError if message else GuestMemoryError, match=message):
        driver.run()
    assert snapshot(driver.memory) == before


def test_malicious_rings(driver: Driver) -> None:
    driver.make_available(8)
    with pytest.raises(RingError, match="descriptor 8 of 8"):
        driver.queue.pop()
    driver.memory.write_obj(9, AVAILABLE + 2, le16)
    with pytest.raises(RingError, match="9 requests in a queue of 8"):
        driver.queue.pop()
    driver.memory.write_obj(0xFFFF, AVAILABLE + 2, le16)
    with pytest.raises(RingError, match="65535 requests"):
        driver.queue.pop()


def test_indirect_only_if_it_was_agreed_on(memory: GuestMemory) -> None:
    memory.write_obj((0x8000, 16, INDIRECT, 0), TABLE, DESCRIPTOR)
    memory.write_obj(1, AVAILABLE + 2, le16)
    with pytest.raises(RingError, match="a table"):
        Virtqueue(memory, 8, TABLE, AVAILABLE, USED_RING).pop()


@pytest.mark.parametrize(
    "where",
    [
        (0, 0, 0x400, 0x800),
        (3, 0, 0x400, 0x800),
        (1 << 16, 0, 0x400, 0x800),
        (8, 8, 0x400, 0x800),
        (8, 0, 0x401, 0x800),
        (8, 0, 0x400, 0x802),
        (8, HOLE, 0x400, 0x800),
        (8, 0, HOLE - 2, 0x800),
        (8, 0, 0x400, HOLE - 4),
        (8, (1 << 64) - 16, 0x400, 0x800),
        (8, 0, (1 << 64) - 2, 0x800),
        (8, 0, 0x400, (1 << 64) - 4),
        (1 << 15, 0, 0x400, 0x800),
    ],
)
def test_queues_that_cannot_be(memory: GuestMemory, where: tuple[int, int, int, int]) -> None:
    with pytest.raises((RingError, GuestMemoryError)):
        Virtqueue(memory, *where)


def test_memory_that_is_gone(backing: Callable[[int], Backing], disk: Backing) -> None:
    ram = backing(0x4000)
    driver = Driver(GuestMemory([(0, MemoryMapping.from_fd(ram.fd, 0x4000))]), disk.fd)
    assert driver.request(IN, 0, [(0x2000, 512, WRITE)]) == (OK, 513)
    os.ftruncate(ram.fd, 0x2000)
    with pytest.raises(GuestMemoryError):  # whatever the kernel says first
        driver.request(IN, 0, [(0x2000, 512, WRITE)])
    with pytest.raises(GuestMemoryError):
        driver.request(OUT, 0, [(0x2000, 512, 0)])
    os.ftruncate(ram.fd, 0)
    with pytest.raises(ReadFromMemoryError):
        driver.queue.pop()


# --- random drivers ---


def snapshot(memory: GuestMemory) -> list[bytearray]:
    return [bytearray(memory.read_bytes(start, size)) for start, size in ADJOINING]


class Model:
    """What a queue means, from a copy of all memory: written once more, for bytes."""

    def __init__(self, ram: list[bytearray]) -> None:
        self.ram = ram

    def find(self, address: int, count: int) -> tuple[bytearray, int]:
        for (start, size), content in zip(ADJOINING, self.ram, strict=True):
            if start <= address and address + count <= start + size:
                return content, address - start
        raise ValueError("not in memory")

    def number(self, address: int, size: int) -> int:
        content, at = self.find(address, size)
        return int.from_bytes(content[at : at + size], "little")

    def erase(self, address: int, count: int) -> None:
        content, at = self.find(address, count)
        content[at : at + count] = bytes(count)

    def chain(self, size: int, seen: int) -> list[tuple[int, int, int]] | None:
        """Return address, length, flags of each part of the next request. ValueError: a bad one."""
        waiting = (self.number(AVAILABLE + 2, 2) - seen) % 0x10000
        if waiting == 0:
            return None
        if waiting > size:
            raise ValueError("too many")
        index = self.number(AVAILABLE + 4 + seen % size * 2, 2)
        table, entries, in_table = TABLE, size, False
        parts: list[tuple[int, int, int]] = []
        while True:
            if index >= entries or len(parts) == size:
                raise ValueError("out of the table, or a loop")
            at = table + 16 * index
            address, length = self.number(at, 8), self.number(at + 8, 4)
            flags, index = self.number(at + 12, 2), self.number(at + 14, 2)
            if flags & INDIRECT:
                whole = any(a <= address and address + length <= a + n for a, n in REGIONS)
                if in_table or flags & NEXT or length % 16 or not whole:
                    raise ValueError("a bad table")
                table, entries, index, in_table = address, length // 16, 0, True
                continue
            self.find(address, length)
            if length == 0 or (not flags & WRITE and parts and parts[-1][2] & WRITE):
                raise ValueError("a bad part")
            parts.append((address, length, flags))
            if not flags & NEXT:
                return parts


class RandomDriver(Driver):
    """Writes rings that are right, wrong here and there, or nothing but noise."""

    def __init__(self, memory: GuestMemory, disk: int, dice: random.Random) -> None:
        super().__init__(memory, disk, dice.choice([1, 2, 4, 8, 16, 32]), dice.randrange(1 << 16))
        self.dice = dice

    def address(self) -> int:
        dice = self.dice
        edge, size = dice.choice(REGIONS)
        return dice.choice(
            [
                *(dice.randrange(DATA, HOLE), dice.randrange(0x8000, 0xA000)),
                dice.randrange(DATA),  # the rings themselves
                max(0, edge - dice.randrange(600)),
                edge + size - dice.randrange(1, 600),
                dice.randrange(1 << 64),
            ]
        )

    def length(self) -> int:
        dice = self.dice
        lengths = [1, 16, 511, 512, 513, 1024, 8192, 0xFFFFFFFF, dice.randrange(600)]
        return dice.choice(lengths)

    def noise(self) -> Descriptor:
        dice = self.dice
        flags = dice.choice([0, NEXT, NEXT, WRITE, WRITE | NEXT, INDIRECT, INDIRECT | NEXT])
        flags |= dice.choice([0, 0, dice.randrange(1 << 13) << 3])  # bits that mean nothing
        following = dice.choice([dice.randrange(self.size), dice.randrange(1 << 16)])
        return self.address(), self.length(), flags, following

    def good_chain(self, table: int) -> int:
        """Write a request in some parts; return their number."""
        dice = self.dice
        self.memory.write_obj(
            (dice.choice([IN, OUT, FLUSH, GET_ID, 9]), 0, dice.randrange(20)), DATA, HEADER
        )
        where, direction = range(DATA + 16, 0x5000), dice.choice([0, WRITE])
        lengths = dice.choices([256, 512, 1024], k=dice.randrange(4))
        data = [(dice.choice(where), length, direction) for length in lengths]
        parts = [(DATA, 16, 0), *data, (dice.choice(where), 1, WRITE)]
        self.write_chain(parts, table)
        return len(parts)

    def write_requests(self) -> None:
        dice = self.dice
        table = dice.choice([TABLE, TABLE, 0x8000])
        style = dice.choice(["good", "flawed", "noise"])
        if style == "noise":
            for i in range(self.size):
                self.write_descriptor(i, self.noise())
            for i in range(8):
                self.write_descriptor(i, self.noise(), 0x8000)
        else:
            count = self.good_chain(table)
            if table != TABLE:
                self.write_descriptor(0, (table, 16 * count, INDIRECT, 0))
            if style == "flawed":
                for _ in range(dice.randrange(1, 3)):
                    self.flaw(table, dice.randrange(count))
        for _ in range(dice.randrange(1, 4)):
            self.make_available(dice.choice([0, 0, 0, dice.randrange(self.size + 1)]))
        if dice.random() < 0.05:
            self.memory.write_obj(dice.randrange(1 << 16), AVAILABLE + 2, le16)

    def flaw(self, table: int, i: int) -> None:
        good = list(self.memory.read_obj(table + 16 * i, DESCRIPTOR))
        field = self.dice.randrange(4)
        good[field] = self.noise()[field]
        self.write_descriptor(i, (good[0], good[1], good[2], good[3]), table)


def answer(driver: Driver) -> str:
    """Let the device look for one request; check what it did with it, and to all memory."""
    queue, before = driver.queue, Model(snapshot(driver.memory))
    seen, used = queue.next_available, before.number(USED_RING + 2, 2)
    try:
        expected = before.chain(driver.size, seen)
    except ValueError:
        with pytest.raises((RingError, GuestMemoryError)):
            queue.pop()
        assert snapshot(driver.memory) == before.ram
        return "refused"

    chain = queue.pop()
    if expected is None or chain is None:
        assert (expected, chain) == (None, None)
        return "nothing"
    readable = [(address, length) for address, length, flags in expected if not flags & WRITE]
    writable = [(address, length) for address, length, flags in expected if flags & WRITE]
    for part, pieces in (chain.readable, readable), (chain.writable, writable):
        assert (part.size if part else 0) == sum(length for _, length in pieces)
    try:
        written = driver.device.handle(chain)
    except RingError:
        assert not writable or sum(length for _, length in readable) < HEADER.size
        assert snapshot(driver.memory) == before.ram
        return "not a request"
    assert 0 <= written <= sum(length for _, length in writable)
    queue.push(chain, written)

    after = Model(snapshot(driver.memory))
    assert after.number(USED_RING + 2, 2) == (used + 1) % 0x10000
    entry = USED_RING + 4 + 8 * (used % driver.size)
    for address, length in *writable, (USED_RING + 2, 2), (entry, 8):
        before.erase(address, length)
        after.erase(address, length)
    assert after.ram == before.ram
    return "done"


@pytest.mark.parametrize("seed", range(8))
def test_random_rings(disk: Backing, seed: int) -> None:
    dice = random.Random(seed)
    ends = dict.fromkeys(("nothing", "refused", "not a request", "done"), 0)
    memory = GuestMemory((address, MemoryMapping(size)) for address, size in REGIONS)
    for _ in range(RINGS // 8):
        driver = RandomDriver(memory, disk.fd, dice)
        driver.write_requests()
        while (end := answer(driver)) == "done" and dice.random() < 0.9:
            ends[end] += 1
        ends[end] += 1
    assert os.fstat(disk.fd).st_size == SECTORS * SECTOR
    assert min(ends.values()) > RINGS // 400, ends


FLIPS = """
import sys
from guestmem import MemoryMapping
sys.path.insert(0, sys.argv[2])
from virtqueue import DESCRIPTOR

ram = MemoryMapping.from_fd(int(sys.argv[1]), 0x4000)
table = ram.get_array_ref(0, 2, DESCRIPTOR)
while True:
    for first, second in ((1, 1), (1, 0), (0, 1), (9, 1), (1, 0xFFFF)):
        for address, length, flags in ((0x2000, 513, 2), (0x2000, 512, 3), (0x3F00, 513, 2)):
            table[0] = 0x1000, 16, 1, first
            table[1] = address, length, flags, second
"""


def test_a_driver_that_changes_its_mind(backing: Callable[[int], Backing], disk: Backing) -> None:
    """Another process writes the descriptors while the device follows them."""
    ram = backing(0x4000)
    memory = GuestMemory([(0, MemoryMapping.from_fd(ram.fd, 0x4000))])
    driver = Driver(memory, disk.fd)
    memory.fill(0xEE, 0x2201, 0x1CFF)  # in no descriptor that there ever is
    hypervisor = os.path.join(os.path.dirname(__file__), "hypervisor")
    other = [sys.executable, "-c", FLIPS, str(ram.fd), hypervisor]
    done, refused = 0, set[str]()
    with subprocess.Popen(other, pass_fds=[ram.fd]) as child:
        try:
            end = time.monotonic() + 30
            while (done < 1000 or len(refused) < 4) and time.monotonic() < end:
                driver.make_available()
                try:
                    driver.run()
                    done += 1
                except (RingError, GuestMemoryError) as error:
                    refused.add(str(error))
                    driver = Driver(memory, disk.fd)
        finally:
            child.kill()
    assert done >= 1000
    assert len(refused) >= 4
    assert memory.read_bytes(0x2201, 0x1CFF) == b"\xee" * 0x1CFF
