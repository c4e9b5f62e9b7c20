"""Looks for torn words in very many copies, between two processes that are really at once.

    python tests/torn_words.py [--count 100000000] [--quick]

One side fills memory with zeros, then with ones, and so on; the other looks at it all the time.
Where it sees a field of 1, 2, 4 or 8 bytes that holds some of both, that field was torn. One of
the sides is guestmem, the other is a few lines of C: single loads and stores of aligned words.

A line is printed for each way, width of the fields and alignment of the host's buffer (modulo
64). "accesses" are fields that guestmem copied, at least --count; "looks", at least a tenth of
that, are those that C looked at (written) or stored (read). "crossings" are the places where a
look found zeros beside ones: how often it caught the other side in the middle, where alone a torn
word can be seen. The last lines are controls: copies that do tear, in which torn words must be
found. The exit status is 1 where a word was torn, and 2 where the controls saw nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from guestmem import MemoryMapping, u8, u16, u32, u64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096  # the first one holds the words by which the two talk
BIG = 32 << 20  # copied with non-temporal stores
LENGTHS = {65536: 0.49, 4096: 0.5, 96: 0.01}  # and their shares of the count
ALIGNMENTS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 48]
STARTS = 0, 8, 16, 24  # in memory, modulo the largest vector
WIDTHS = {1: u8, 2: u16, 4: u32, 8: u64}
PATIENCE = 120  # seconds for one run

# The fields of [start, end) are those of width bytes, aligned in memory. Where all 8 bytes of an
# aligned word lie in the range, they are looked at as one: the word must be whole, too.
C_SIDE = r"""
#include <sched.h>
#include <stdint.h>
#include <string.h>

enum { RUN, STOP, DONE, MODE, START, END, WIDTH, LOOKS, TORN, CROSSINGS, FIRST };
enum { LOOK, STORE, QUIT };
struct seen { uint64_t looks, torn, crossings, first, last; };

static uint64_t load(const char *at, uint64_t width)
{
    switch (width) {
    case 1: return *(const volatile uint8_t *)at * UINT64_C(0x0101010101010101);
    case 2: return *(const volatile uint16_t *)at * UINT64_C(0x0001000100010001);
    case 4: return *(const volatile uint32_t *)at * UINT64_C(0x0000000100000001);
    default: return *(const volatile uint64_t *)at;
    }
}

static uint64_t load_copy(const char *at, uint64_t width) /* at any address */
{
    char aligned[8] __attribute__((aligned(8))) = {0};
    memcpy(aligned, at, width);
    return load(aligned, width);
}

/* bytes[0] stands for the byte of memory at start */
static inline void look(const char *bytes, uint64_t start, uint64_t end, uint64_t width,
                        int copied, struct seen *seen)
{
    int alone = end - start == width; /* a single field: from one look to the next */
    uint64_t step;
    for (uint64_t at = start; at < end; at += step) {
        step = at % 8 == 0 && end - at >= 8 ? 8 : width;
        const char *byte = bytes + (at - start);
        uint64_t value = copied ? load_copy(byte, step) : load(byte, step);
        if (value != 0 && ~value != 0 && seen->torn++ == 0)
            seen->first = value;
        seen->crossings += (at != start || alone) && value != seen->last;
        seen->looks += step / width;
        seen->last = value;
    }
}

void check(const char *copy, uint64_t start, uint64_t end, uint64_t width, struct seen *seen)
{
    look(copy, start, end, width, 1, seen);
}

#define GET(i) __atomic_load_n(&control[i], __ATOMIC_SEQ_CST)
#define SET(i, value) __atomic_store_n(&control[i], value, __ATOMIC_SEQ_CST)

void peer(char *base)
{
    uint64_t *control = (uint64_t *)base, run = 0;
    for (;;) {
        while (GET(RUN) == run)
            sched_yield();
        run = GET(RUN);
        uint64_t mode = GET(MODE), start = GET(START), end = GET(END), pattern = 0;
        struct seen seen = {0, 0, 0, 0, 0};
        if (mode == QUIT)
            return;
        while (GET(STOP) != run) {
            if (mode == LOOK) {
                look(base + start, start, end, GET(WIDTH), 0, &seen);
                SET(TORN, seen.torn);
                SET(CROSSINGS, seen.crossings);
                SET(FIRST, seen.first);
            }
            else {
                pattern = ~pattern;
                for (uint64_t at = start & ~UINT64_C(7); at < end; at += 8)
                    *(volatile uint64_t *)(base + at) = pattern;
                seen.looks += (end - start) / GET(WIDTH);
            }
            SET(LOOKS, seen.looks);
        }
        SET(DONE, run);
    }
}
"""
RUN, STOP, DONE, MODE, START, END, WIDTH, LOOKS, TORN, CROSSINGS, FIRST = range(11)
LOOK, STORE, QUIT = range(3)
FIGURES = "accesses", "looks", "crossings", "torn"


class Seen(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("looks", "torn", "crossings", "first", "last")
    )


class Job(NamedTuple):
    """One way of copying one range of memory."""

    start: int
    end: int
    width: int
    mode: int  # of the other side
    step: Callable[[Seen], object]  # copies, and counts what it sees where the other side stores
    fields: int  # that one step accesses


def line(*columns: object) -> str:
    return "{:<8} {:<21} {:>5} {:>6} {:>12} {:>12} {:>10} {:>6}".format(*columns)


class Bench:
    """Memory that two processes share, and the C side in the other."""

    def __init__(self, folder: Path, size: int) -> None:
        source, library = folder / "torn_words.c", folder / "torn_words.so"
        source.write_text(C_SIDE)
        compiler = os.environ.get("CC", "cc").split()
        flags = ["-O2", "-fPIC", "-shared", "-o", str(library), str(source)]
        subprocess.run([*compiler, *flags], check=True)
        self.c = ctypes.CDLL(str(library))
        self.c.check.argtypes = [ctypes.c_void_p, *[ctypes.c_uint64] * 3, ctypes.POINTER(Seen)]
        self.c.check.restype = None
        self.fd = os.memfd_create("torn-words")
        os.ftruncate(self.fd, size)
        self.memory = MemoryMapping.from_fd(self.fd, size)
        self.words = [self.memory.get_ref(8 * i, u64) for i in range(FIRST + 1)]
        self.near = [MemoryMapping(size) for _ in range(2)]
        self.near[1].fill(255)
        self.far = MemoryMapping(size)
        self.totals: Counter[str] = Counter()
        self.runs = 0
        mine, its = sorted(os.sched_getaffinity(0))[:2]
        os.sched_setaffinity(0, {mine})
        self.child = subprocess.Popen(
            [sys.executable, __file__, "--peer", str(self.fd), str(library), str(its)],
            pass_fds=[self.fd],
        )

    def close(self) -> None:
        self.words[MODE].store(QUIT)
        self.words[RUN].store(self.runs + 1)
        self.child.wait(10)
        os.close(self.fd)

    def run(self, job: Job, count: int, *, until_torn: bool = False) -> Counter[str]:
        """Access that many fields, while the other side looks at them, or stores them."""
        words, seen = self.words, Seen()
        self.memory.fill(0, job.start, job.end - job.start)
        self.runs += 1
        for at in (LOOKS, TORN, CROSSINGS, FIRST):
            words[at].store(0)
        for at, value in ((MODE, job.mode), (START, job.start), (END, job.end), (WIDTH, job.width)):
            words[at].store(value)
        words[RUN].store(self.runs)
        accesses, looks, began = 0, 0, time.monotonic()
        batch = max(1, min(1000, count // job.fields // 4))
        while min(accesses, 10 * looks) < count or until_torn > bool(seen.torn):
            for _ in range(batch):
                job.step(seen)
            accesses += batch * job.fields
            looks = words[LOOKS].load()
            if job.mode == LOOK:
                seen.torn, seen.crossings, seen.first = (
                    words[at].load() for at in (TORN, CROSSINGS, FIRST)
                )
            if time.monotonic() > began + PATIENCE or self.child.poll() is not None:
                if until_torn and looks:
                    break
                raise TimeoutError("the other side does not answer")
        words[STOP].store(self.runs)
        while words[DONE].load() != self.runs:
            os.sched_yield()
        if seen.torn and not until_torn:
            print(f"torn: {seen.first:016x}", file=sys.stderr)
        return Counter(accesses=accesses, looks=looks, crossings=seen.crossings, torn=seen.torn)

    def report(self, way: str, how: str, align: object, jobs: list[Job], count: int) -> None:
        """Run the jobs, of which each has its share, and print a line."""
        sums: Counter[str] = Counter()
        shares = [LENGTHS.get(job.end - job.start, 1) for job in jobs]
        for job, share in zip(jobs, shares, strict=True):
            sums += self.run(job, int(count * share / sum(shares)) + 1)
        print(line(way, how, jobs[0].width, align, *(sums[name] for name in FIGURES)), flush=True)
        self.totals += sums

    # --- jobs ---

    def host(self, size: int, align: int, byte: int = 0) -> tuple[memoryview, int]:
        """Return a buffer at that alignment, and its address."""
        whole = bytearray([byte]) * (size + 64)
        address = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        skip = (align - address) % 64
        return memoryview(whole)[skip : skip + size], address + skip

    def written(self, start: int, size: int, width: int, align: int) -> Iterator[Job]:
        """Yield all ways to write a range from a buffer at that alignment."""
        memory, part = self.memory, self.memory.get_slice(start, size)
        hosts = [self.host(size, align, byte)[0] for byte in (0, 255)]
        near = [one.get_slice(align, size) for one in self.near]
        for calls in (
            [(memory.write_slice, (host, start)) for host in hosts],
            [(memory.write_all, (host, start)) for host in hosts],
            [(part.copy_from, (host,)) for host in hosts],
            [(one.copy_to_volatile_slice, (part,)) for one in near],
        ):
            yield self.writing(start, size, width, calls)

    def read(self, start: int, size: int, width: int, align: int) -> Iterator[Job]:
        """Yield all ways to read a range into a buffer at that alignment."""
        memory, part = self.memory, self.memory.get_slice(start, size)
        host, address = self.host(size, align)
        # Between two slices the source's fields are whole where both agree modulo 8.
        near = self.far.get_slice(start % 8 + 8 * align, size)
        yield self.reading(start, size, width, memory.read_slice, (host, start), address)
        yield self.reading(start, size, width, memory.read_exact, (host, start), address)
        yield self.reading(start, size, width, part.copy_to, (host,), address)
        yield self.reading(start, size, width, part.copy_to_volatile_slice, (near,), near.as_ptr())

    def written_anywhere(self, start: int, size: int, width: int) -> Iterator[Job]:
        """Yield ways to write without a buffer, or with one that lies where it lies."""
        array = ctypes.c_uint8 * size
        values = array(), array(*b"\xff" * size)
        fills = [(self.memory.fill, (byte, start, size)) for byte in (0, 255)]
        yield self.writing(start, size, width, fills)
        stores = [(self.memory.write_obj, (value, start)) for value in values]
        yield self.writing(start, size, width, stores)

    def read_anywhere(self, start: int, size: int, width: int) -> Iterator[Job]:
        array = ctypes.c_uint8 * size
        yield self.reading(start, size, width, self.memory.read_bytes, (start, size))
        yield self.reading(start, size, width, self.memory.read_obj, (start, array))

    def writing(self, start: int, size: int, width: int, calls: list[Any]) -> Job:
        (zeros, with_zeros), (ones, with_ones) = calls

        def step(seen: Seen) -> None:
            zeros(*with_zeros)
            ones(*with_ones)

        return Job(start, start + size, width, LOOK, step, 2 * size // width)

    def reading(
        self, start: int, size: int, width: int, call: Any, given: Any, address: Any = None
    ) -> Job:
        """Make a job that looks at the copy: at the address, or what the call returns."""
        check, end = self.c.check, start + size

        def step(seen: Seen) -> None:
            got = call(*given)
            check(address or got, start, end, width, ctypes.byref(seen))

        return Job(start, end, width, STORE, step, size // width)

    def controls(self) -> Iterator[tuple[str, str, Job]]:
        """Yield what is known to tear: libc's copies, whose vectors may lie at any address."""
        start, size = PAGE + 4, 200
        view = memoryview(self.memory)[start : start + size]
        hosts = [self.host(size, 1, byte)[0] for byte in (0, 255)]
        assign = [(view.__setitem__, (slice(None), host)) for host in hosts]
        yield "written", "memoryview[:] =", self.writing(start, size, 4, assign)
        yield "read", "memoryview.tobytes", self.reading(start, size, 4, view.tobytes, ())

    def scalars(self, width: int) -> Iterator[tuple[str, str, Job]]:
        """Yield the methods that access one field."""
        memory, of, at = self.memory, WIDTHS[width], PAGE + width % 8
        ref, patterns, many = memory.get_ref(at, of), {0, 256**width - 1}, 1000

        def stores(store: Callable[..., object], *more: Any) -> Job:
            values = [(value, *more) for value in patterns] * (many // 2)

            def step(seen: Seen) -> None:
                deque(itertools.starmap(store, values), maxlen=0)

            return Job(at, at + width, width, LOOK, step, many)

        def loads(load: Callable[..., int], *given: Any) -> Job:
            each = [given] * many

            def step(seen: Seen) -> None:
                got = set(itertools.starmap(load, each))
                seen.torn += len(got - patterns)
                seen.crossings += got >= patterns

            return Job(at, at + width, width, STORE, step, many)

        yield "written", "ref.store", stores(ref.store)
        yield "written", "write_obj", stores(memory.write_obj, at, of)
        yield "read", "ref.load", loads(ref.load)
        yield "read", "read_obj", loads(memory.read_obj, at, of)


def ranges(width: int) -> Iterator[tuple[int, int, int]]:
    """Yield starts and sizes. Both ends are a multiple of the width, and of no more up to 8."""
    for start, size in itertools.product(STARTS, LENGTHS):
        yield PAGE + start + width % 8, size, width


def everything(bench: Bench, count: int, *, big: bool) -> bool:
    """Print the table; return whether the controls saw torn words."""
    for width, align in itertools.product(WIDTHS, ALIGNMENTS):
        for way, make in (("written", bench.written), ("read", bench.read)):
            jobs = [job for at in ranges(width) for job in make(*at, align)]
            bench.report(way, "from and to buffers", align, jobs, count)
    for width in WIDTHS:
        jobs = [job for at in ranges(width) for job in bench.written_anywhere(*at)]
        bench.report("written", "fill, write_obj", "-", jobs, count)
        jobs = [job for at in ranges(width) for job in bench.read_anywhere(*at)]
        bench.report("read", "read_bytes, read_obj", "-", jobs, count)
        for way, how, job in bench.scalars(width):
            bench.report(way, how, "-", [job], count)
    for align in ALIGNMENTS if big else []:
        for way, make in (("written", bench.written), ("read", bench.read)):
            jobs = list(make(PAGE, BIG, 8, align))
            bench.report(way, "32 MiB at a time", align, jobs, count)
    seen = True
    for way, how, job in bench.controls():
        sums = bench.run(job, min(count, 10**6), until_torn=True)
        print(line(way, f"({how})", job.width, "-", *(sums[name] for name in FIGURES)))
        seen &= sums["torn"] > 0
    return seen


def peer(fd: str, library: str, processor: str) -> None:
    os.sched_setaffinity(0, {int(processor)})
    area = mmap.mmap(int(fd), 0)
    ctypes.CDLL(library).peer(ctypes.byref(ctypes.c_char.from_buffer(area)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10**8, help="accesses for each line")
    parser.add_argument("--quick", action="store_true", help="leave out copies of 32 MiB")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("a race needs two processors")
    began = time.monotonic()
    print(line("way", "how", "width", "align", "accesses", "looks", "crossings", "torn"))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), PAGE + BIG + 64 + 8 * 64)
        try:
            seen = everything(bench, options.count, big=not options.quick)
        finally:
            bench.close()
    total, torn = bench.totals, bench.totals["torn"]
    print(
        f"{total['accesses']:.3g} accesses, {total['looks']:.3g} looks, {total['crossings']:.3g} "
        f"crossings, {torn} torn, in {time.monotonic() - began:.0f} s"
    )
    if not seen:
        print("but the controls were not seen to tear", file=sys.stderr)
    return 1 if torn else 0 if seen else 2


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(*sys.argv[2:])
    else:
        sys.exit(main())
