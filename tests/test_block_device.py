"""The disk of tests/hypervisor: a request that is scattered costs one system call."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from block import HEADER, IN, IO_ERROR, OUT, SECTOR, BlockDevice
from guestmem import GuestMemory, MemoryMapping, ReadFromMemoryError, WriteToMemoryError, u8
from virtqueue import Chain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Backing

    from guestmem import VolatileMemory

SECTORS = 64
PAGE = 4096
ACCOUNT = Path("/proc/thread-self/io")


@pytest.fixture
def disk(backing: Callable[[int], Backing]) -> Backing:
    made = backing(SECTORS * SECTOR)
    os.pwrite(made.fd, random.Random(1).randbytes(made.size), 0)
    return made


def scattered(memory: VolatileMemory, sizes: list[int]) -> Iterator[tuple[int, VolatileMemory]]:
    """Lay the parts of a request side by side; in memory they lie in no order, with gaps."""
    places, at = list(range(len(sizes))), 0
    random.Random(2).shuffle(places)
    for place, size in zip(places, sizes, strict=True):
        yield at, memory.get_slice(place * PAGE, size)
        at += size


def request(kind: int, sector: int, sizes: list[int]) -> tuple[Chain, GuestMemory]:
    """Make a request with parts of these sizes for the data; return these as well."""
    ram = MemoryMapping((len(sizes) + 2) * PAGE)
    head, status = ram.get_slice(ram.size - PAGE, HEADER.size), ram.get_slice(ram.size - 1, 1)
    head.write_obj((kind, 0, sector), 0, HEADER)
    status.fill(0xEE)
    parts = list(scattered(ram, sizes))
    size = sum(sizes)
    if kind == IN:
        readable, writable = GuestMemory([(0, head)]), GuestMemory([*parts, (size, status)])
    else:
        moved = [(HEADER.size + at, part) for at, part in parts]
        readable, writable = GuestMemory([(0, head), *moved]), GuestMemory([(0, status)])
    return Chain(0, readable, writable), GuestMemory(parts)


def system_calls() -> tuple[int, int]:
    """Return how many reads and writes this thread has made."""
    values = dict(line.split(": ") for line in ACCOUNT.read_text().splitlines())
    return int(values["syscr"]), int(values["syscw"])


def cost(device: BlockDevice, chain: Chain) -> tuple[int, int, int]:
    """Do a request; return what handle() does, and how many reads and writes it took."""
    if not ACCOUNT.exists():
        pytest.skip(f"this kernel has no {ACCOUNT}")
    first, second = system_calls(), system_calls()  # the looking itself costs some
    written = device.handle(chain)
    third = system_calls()
    reads, writes = (c - 2 * b + a for a, b, c in zip(first, second, third, strict=True))
    return written, reads, writes


# Of their number: a system call takes at most 1,024 pieces, so the last one is short.
@pytest.mark.parametrize(
    ("sizes", "calls"),
    [([512], 1), ([1, 511, 7, 1024, 505, 2048] * 3, 1), ([512] * 60, 1), ([8] * 1536, 2)],
    ids=["1 descriptor", "18", "60", "1536"],
)
def test_what_a_request_costs(disk: Backing, sizes: list[int], calls: int) -> None:
    device, size = BlockDevice(disk.fd), sum(sizes)
    chain, data = request(IN, 2, sizes)
    assert cost(device, chain) == (size + 1, calls, 0)
    assert data.read_bytes(0, size) == disk.read(2 * SECTOR, size)
    chain, data = request(OUT, 3, sizes)
    content = random.Random(3).randbytes(size)
    data.write_all(content, 0)
    before = disk.read()
    assert cost(device, chain) == (1, 0, calls)
    assert disk.read() == before[: 3 * SECTOR] + content + before[3 * SECTOR + size :]


def test_a_disk_that_ends_in_the_middle(disk: Backing) -> None:
    device = BlockDevice(disk.fd)
    os.ftruncate(disk.fd, 700)
    chain, data = request(IN, 0, [100] * 10 + [24])
    assert device.handle(chain) == 0
    assert chain.writable is not None
    assert chain.writable.read_obj(1024, u8) == IO_ERROR
    assert data.read_bytes(0, 1024) == disk.read(0, 700).ljust(1024, b"\0")


@pytest.mark.parametrize("kind", [IN, OUT])
def test_memory_that_is_gone_in_the_middle(
    disk: Backing, backing: Callable[[int], Backing], kind: int
) -> None:
    """That is no fault of the disk's; what came before it has been moved."""
    file = backing(PAGE)
    chain, data = request(kind, 0, [512])
    lost = MemoryMapping.from_fd(file.fd, PAGE).get_slice(0, 512)
    side = chain.writable if kind == IN else chain.readable
    assert side is not None
    first, last = ((region.start, region.memory) for region in side.regions)
    if kind == IN:  # the data, then the status
        chain = chain._replace(writable=GuestMemory([first, (512, lost), (1024, last[1])]))
    else:  # the header, then the data
        chain = chain._replace(readable=GuestMemory([first, last, (HEADER.size + 512, lost)]))
    os.ftruncate(file.fd, 0)
    data.write_all(b"A" * 512, 0)
    with pytest.raises(WriteToMemoryError if kind == IN else ReadFromMemoryError):
        BlockDevice(disk.fd).handle(chain)
    assert data.read_bytes(0, 512) == disk.read(0, 512)
