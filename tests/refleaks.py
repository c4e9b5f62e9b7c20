"""References, blocks and mappings that calls leave behind, counted by a debug interpreter.

    GUESTMEM_FULL_API=1 python3.11d -m pip install '.[test]'
    python3.11d tests/refleaks.py [--rounds N] [--cycles N]

Every call of the table in test_leaks.py, with its errors, is made again and again: the total of
all references (sys.gettotalrefcount) and the blocks in use must stay. test_leaks.py itself counts
the references of some objects alone, as any interpreter can. A profile function sees which
functions really work and really fail: one that is missing from the table ends the run.

Then memory is mapped, used and closed 100,000 times in each way there is: the process must not
grow.

The package must be built for the full API: an abi3 module calls functions where a debug
interpreter's own macros count, so that there seem to be leaks where there are none.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ClassMethodDescriptorType, MethodDescriptorType
from typing import TYPE_CHECKING, Any

import guestmem
from guestmem import (
    AtomicRef,
    DirtyBitmap,
    GuestMemory,
    GuestRegion,
    MemoryMapping,
    Ordering,
    Scalar,
    VolatileArrayRef,
    VolatileMemory,
    VolatileRef,
    VolatileSlice,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests import test_leaks
else:
    import test_leaks  # beside this file

PAGE = 4096
TYPES: list[type] = [
    *(VolatileMemory, MemoryMapping, VolatileSlice, VolatileRef, AtomicRef, VolatileArrayRef),
    *(DirtyBitmap, GuestMemory, Scalar),
]
OTHERS: set[type] = {GuestRegion, Ordering}  # which have no functions of ours
# The interpreter calls these itself, unseen; test_leaks.py looks for their names in the table.
CALLED_BY_SYNTAX = {"__enter__", "__exit__", "__reduce__", "__class_getitem__"}

total_references: Callable[[], int] | None = getattr(sys, "gettotalrefcount", None)


# What there is, and what is called


def public_functions() -> set[object]:
    """Return every function written in C that users can call by its name."""
    public = [getattr(guestmem, name) for name in guestmem.__all__]
    types = {value for value in public if isinstance(value, type)}
    assert {cls for cls in types if not issubclass(cls, Exception)} - OTHERS == set(TYPES)
    return {
        value
        for cls in TYPES
        for name, value in vars(cls).items()
        if isinstance(value, (MethodDescriptorType, ClassMethodDescriptorType))
        and name not in CALLED_BY_SYNTAX
    }


def descriptor_of(function: Any) -> object:
    """Return what a bound method was made of."""
    owner = getattr(function, "__self__", None)
    cls = owner if isinstance(owner, type) else type(owner)
    found = (
        vars(base)[function.__name__] for base in cls.__mro__ if function.__name__ in vars(base)
    )
    return next(found, None)


def check_the_table(everything: list[Callable[[], object]]) -> int:
    """Make all the calls once; return how many functions there are."""
    works: set[object] = set()
    fails: set[object] = set()

    def profile(frame: object, event: str, function: Any) -> None:
        if event == "c_return":
            works.add(descriptor_of(function))
        elif event == "c_exception":
            fails.add(descriptor_of(function))

    sys.setprofile(profile)
    for call in everything:
        with suppress(Exception):
            call()
    sys.setprofile(None)
    public = public_functions()
    problems = [f"{function} is never seen to work" for function in public - works]
    problems += [f"{function} is never seen to fail" for function in public - fails]
    if problems:
        sys.exit("\n".join(sorted(problems)))
    return len(public)


# References and blocks


def counts() -> tuple[int, int]:
    gc.collect()
    return total_references() if total_references else 0, sys.getallocatedblocks()


def growth(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return how many references and blocks each call leaves behind, once caches are full."""
    numbers = range(rounds)
    for _ in range(50):
        with suppress(Exception):
            call()
    least = [float("inf")] * 2
    for _ in range(5):
        before = counts()
        for _ in numbers:
            with suppress(Exception):
                call()
        after = counts()
        least = [min(least[i], (after[i] - before[i]) / rounds) for i in range(2)]
        if max(least) < 0.01:
            break
    return least[0], least[1]


def check_that_a_leak_is_seen() -> None:
    kept: list[object] = []
    references, blocks = growth(lambda: kept.extend((u64, bytes(100))), 100)
    assert references >= 2, references
    assert blocks >= 1, blocks


def find_leaks(table: dict[str, list[Callable[[], object]]], rounds: int) -> int:
    leaks = 0
    for name, row in table.items():
        for number, call in enumerate(row):
            references, blocks = growth(call, rounds)
            if max(references, blocks) >= 0.01:
                leaks += 1
                print(
                    f"{name} [{number}]: {references:+.2f} references, {blocks:+.2f} blocks a call"
                )
    return leaks


# Mappings


def size_of_process() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/maps") as maps, open("/proc/self/statm") as statm:
        areas, resident = len(maps.readlines()), int(statm.read().split()[1])
    return {
        "areas": areas,
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "resident KiB": resident * resource.getpagesize() // 1024,
    }


class Exporter(bytearray):
    part: object


class Header(ctypes.LittleEndianStructure):
    _fields_ = (("index", ctypes.c_uint16), ("length", ctypes.c_uint32))


def use(memory: VolatileMemory) -> None:
    memory.write_obj(1, 0, u64)
    memory.write_obj(Header(1, 2), 8)
    part = memory.get_slice(0, 64)
    part.get_ref(8, Header).load()
    bytes(memoryview(part))
    with suppress(guestmem.OutOfBoundsError):
        part.offset(65)


def cycles(fd: int) -> dict[str, Callable[[], None]]:
    buffer = bytearray(PAGE)

    def closed(memory: MemoryMapping) -> None:
        use(memory)
        memory.close()

    def left_by_an_exception() -> None:
        with suppress(ZeroDivisionError), MemoryMapping(PAGE) as memory:
            part = memory.get_slice(0, PAGE)
            use(part)
            raise ZeroDivisionError

    def released() -> None:
        with VolatileSlice.from_buffer(buffer) as part:
            use(part)

    def a_cycle() -> None:  # that only the collector finds
        exporter = Exporter(64)
        exporter.part = VolatileSlice.from_buffer(exporter)

    return {
        "anonymous, closed": lambda: closed(MemoryMapping(PAGE)),
        "anonymous, dropped": lambda: use(MemoryMapping(PAGE)),
        "of a file, closed": lambda: closed(MemoryMapping.from_fd(fd, PAGE)),
        "of a file, dropped by its last slice": lambda: use(
            MemoryMapping.from_fd(fd, PAGE).get_slice(0, PAGE)
        ),
        "left by an exception": left_by_an_exception,
        "a slice of a buffer": released,
        "a reference cycle": a_cycle,
    }  # fmt: skip


def find_growth(rounds: int) -> int:
    fd = os.memfd_create("guestmem-refleaks")
    os.ftruncate(fd, PAGE)
    grown = 0
    for name, cycle in cycles(fd).items():
        for _ in range(max(rounds // 50, 1)):
            cycle()
        before = size_of_process()
        start = time.perf_counter()
        for _ in range(rounds):
            cycle()
        seconds = time.perf_counter() - start
        after = size_of_process()
        more = {what: after[what] - before[what] for what in before}
        # Free lists and arenas move a little; a page left by one cycle in a hundred would be 4 MiB.
        bad = more["areas"] > 4 or more["file descriptors"] or more["resident KiB"] > 512
        grown += bool(bad)
        print(
            f"{name}: {rounds} in {seconds:.1f} s,",
            ", ".join(f"{n:+d} {what}" for what, n in more.items()),
        )
    os.close(fd)
    return grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000, help="of each call (%(default)s)")
    parser.add_argument(
        "--cycles", type=int, default=100_000, help="of each way to map (%(default)s)"
    )
    arguments = parser.parse_args()
    if total_references is None:
        sys.exit("this interpreter counts no references: use a debug build (Debian: python3-dbg)")
    if Path(guestmem._native.__file__).name.endswith(".abi3.so"):
        sys.exit("this is an abi3 build: install with GUESTMEM_FULL_API=1")

    world = test_leaks.World()
    table = test_leaks.calls(world)
    functions = check_the_table([call for row in table.values() for call in row])
    check_that_a_leak_is_seen()
    leaks = find_leaks(table, arguments.rounds)
    grown = find_growth(arguments.cycles)
    calls = sum(map(len, table.values()))
    print(f"{calls} calls of {functions} functions, {arguments.rounds} times each: {leaks} leak")
    print(f"{len(cycles(0))} ways to map, {arguments.cycles} times each: {grown} grow")
    return int(bool(leaks or grown))


if __name__ == "__main__":
    sys.exit(main())
