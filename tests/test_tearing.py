"""No aligned field of up to 8 bytes of guest memory is torn by a copy, whatever its alignment.

Two processes, really at once: one flips memory between two patterns of equal bytes, the other
looks. A field that holds bytes of both was torn. GUESTMEM_TEAR_SECONDS lets each test look longer.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from guestmem import MemoryMapping, VolatileSlice, u64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Backing

    Backings = Callable[[int], Backing]

SECONDS = float(os.environ.get("GUESTMEM_TEAR_SECONDS", "0.4"))
PATTERNS = 0x11, 0xEE
AREA = 384  # bytes that are written and looked at; a multiple of the page before it says how
PAGE = 4096
LENGTHS = [2, 4, 7, 8, 9, 12, 15, 16, 23, 24, 31, 33, 40, 63, 65, 100, 127, 129, 191, 256]
RANGES = list(itertools.product(range(32, 40), LENGTHS))  # every head with every tail
ROWS = 128  # copies that are looked at together

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="a race needs two processors"
)

# argv: fd, how, ranges, patterns. The word at 0 asks for one of the ranges, the word at 8 says
# which one was flipped all through.
WRITER = """
import struct, sys
from guestmem import MemoryMapping, u64
fd, how, ranges, patterns = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4])
memory = MemoryMapping.from_fd(fd, 8192)
exported = memoryview(memory)
near = [MemoryMapping(300) for _ in patterns]
hosts = []
for one, pattern in zip(near, patterns):
    one.fill(pattern)
    hosts.append([memoryview(bytes([pattern]) * 300)[align:] for align in range(8)])

def flip(align, k, pattern, start, length):
    at, host = 4096 + start, hosts[k][align][:length]
    if how in ("write_slice", "write_all"):
        return getattr(memory, how), (host, at)
    if how == "copy_from":
        return memory.get_slice(at, length).copy_from, (host,)
    if how == "copy_to_volatile_slice":
        source = near[k].get_slice(align, length)
        return source.copy_to_volatile_slice, (memory.get_slice(at, length),)
    if how == "fill":
        return memory.fill, (pattern, at, length)
    # struct: byte by byte, which must be seen to tear
    first, words = (at + 7) // 8 * 8, max((at + length) // 8 - (at + 7) // 8, 0)
    values = [pattern * 0x0101010101010101] * words
    return struct.Struct(f"<{words}Q").pack_into, (exported, first, *values)

def flip_words(pattern, start, length):  # single stores of aligned words
    refs = [memory.get_ref(4096 + at, u64) for at in range(start, start + length, 8)]
    return [(ref.store, (pattern * 0x0101010101010101,)) for ref in refs]

steps = []
for one in ranges:
    if how == "words":
        steps.append([step for pattern in patterns for step in flip_words(pattern, *one)])
    else:
        steps.append([
            flip(align, k, pattern, *one)
            for align in range(8) for k, pattern in enumerate(patterns)
        ])
now, done = memory.get_ref(0, u64), memory.get_ref(8, u64)
done.store(len(ranges))
print("ready", flush=True)
while True:
    n = now.load()
    for call, arguments in steps[n]:
        call(*arguments)
    done.store(n)
"""


@contextmanager
def writer(fd: int, how: str, ranges: list[tuple[int, int]]) -> Iterator[None]:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(fd), how, repr(ranges), repr(PATTERNS)],
        pass_fds=[fd],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        yield
        assert child.poll() is None, "it must have written all the time"
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


class Copies:
    """Takes many copies of a slice of the area, and looks for torn fields in them."""

    def __init__(self, first: int, size: int, start: int, end: int, host: int = 0) -> None:
        """The slice is [first, first + size); it is torn where a field in [start, end) is."""
        self.first, self.size, self.start, self.end = first, size, start, end
        self.stride = (size + host + 7) // 8 * 8
        self.buffer = bytearray(ROWS * self.stride)
        view = memoryview(self.buffer)
        self.rows = [view[at + host :][:size] for at in range(0, len(view), self.stride)]
        self.host = host
        self.seen: set[int] = set()

    def torn(self) -> list[str]:
        content = np.frombuffer(self.buffer, np.uint8).reshape(ROWS, self.stride)
        content = content[:, self.host : self.host + self.size]
        found: list[str] = []
        for width in (8, 4, 2, 1):
            low, high = -(-self.start // width) * width, self.end // width * width
            if low >= high:
                continue
            fields = np.ascontiguousarray(content[:, low - self.first : high - self.first])
            values = fields.view(f"u{width}")
            whole = [values == int.from_bytes([byte] * width) for byte in PATTERNS]
            if width == 1:
                self.seen.update(
                    byte for byte, here in zip(PATTERNS, whole, strict=True) if here.any()
                )
            bad = np.argwhere(~(whole[0] | whole[1]))
            found += [
                f"at {low + column * width:#x}: {int(values[row, column]):0{2 * width}x}"
                for row, column in bad[:10]
            ]
        return found


def look_at_ranges(backing: Backings, how: str, seconds: float) -> tuple[list[str], set[int]]:
    """Let the other side write all the ranges in turn; return what was torn, and what was seen."""
    file = backing(2 * PAGE)
    memory = MemoryMapping.from_fd(file.fd, 2 * PAGE)
    memory.fill(PATTERNS[0], PAGE)
    now, done = memory.get_ref(0, u64), memory.get_ref(8, u64)
    area = memory.get_slice(PAGE, AREA)
    looks = [Copies(0, AREA, start, start + length) for start, length in RANGES]
    seen: set[int] = set()
    with writer(file.fd, how, RANGES):
        end = time.monotonic() + seconds
        for n in itertools.cycle(range(len(RANGES))):
            now.store(n)
            while done.load() != n:
                assert time.monotonic() < end + 30, "the writer does not answer"
            take, copies = area.read_slice, looks[n]
            for row in copies.rows:
                take(row, 0)
            if torn := copies.torn():
                return torn, seen
            seen |= copies.seen
            if time.monotonic() > end and n == len(RANGES) - 1:
                return [], seen
    raise AssertionError


@pytest.mark.parametrize(
    "how", ["write_slice", "write_all", "fill", "copy_from", "copy_to_volatile_slice"]
)
def test_what_writes_does_not_tear(backing: Backings, how: str) -> None:
    """With the host's buffers (or the source) at every alignment."""
    torn, seen = look_at_ranges(backing, how, SECONDS)
    assert torn == []
    assert seen == set(PATTERNS)


def test_tearing_would_be_seen(backing: Backings) -> None:
    """struct.pack_into("<Q") stores byte by byte: the same look must find that."""
    torn, _ = look_at_ranges(backing, "struct", 30)
    assert torn != []


READERS: dict[str, Callable[[VolatileSlice, Any, VolatileSlice], object]] = {
    "read_slice": lambda part, row, _: part.read_slice(row, 0),
    "read_exact": lambda part, row, _: part.read_exact(row, 0),
    "copy_to": lambda part, row, _: part.copy_to(row),
    "read_bytes": lambda part, row, _: row.__setitem__(slice(None), part.read_bytes(0, part.size)),
    "copy_to_volatile_slice": lambda part, row, near: (
        part.copy_to_volatile_slice(near),
        near.read_slice(row, 0),
    ),
}


@pytest.mark.parametrize("how", READERS)
def test_what_reads_does_not_tear(backing: Backings, how: str) -> None:
    """The other side stores aligned words, each at once; this one copies from every alignment."""
    file = backing(2 * PAGE)
    memory = MemoryMapping.from_fd(file.fd, 2 * PAGE)
    memory.fill(PATTERNS[0], PAGE)
    other = MemoryMapping(2 * AREA)
    take = READERS[how]
    looks = []
    for start, size, host in itertools.product(range(8), (8, 20, 57, 100, 200), range(8)):
        # From one slice to another the fields are whole where the two agree modulo 8.
        near = other.get_slice(start + 8 * host, size)
        copies = Copies(start, size, start, start + size, host)
        looks.append((copies, memory.get_slice(PAGE + start, size), near))
    seen: set[int] = set()
    with writer(file.fd, "words", [(0, AREA - 64)]):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end or len(seen) < 2:
            assert time.monotonic() < end + 30, "the writer does not write"
            for copies, part, near in looks:
                for row in copies.rows:
                    take(part, row, near)
                assert copies.torn() == []
                seen |= copies.seen


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="one of its sides is in C")
def test_the_long_run(run_child: Callable[..., str]) -> None:
    """It finds nothing torn but in its controls."""
    script = os.path.join(os.path.dirname(__file__), "torn_words.py")
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], None, '__main__')"
    )
    table = run_child(code, script, "--quick", "--count", 20_000, timeout=300).splitlines()
    assert " 0 torn, " in table[-1]
    assert [line.split()[-1] == "0" for line in table[1:-1]].count(False) == 2, table
