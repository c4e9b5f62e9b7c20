"""Counts the instructions of hot calls: they repeat where times are noisy.

    python tests/bench/instructions.py [--record]

prints them, and with --record writes them into instructions.json, which tests/test_instructions.py
guards. A count is that of the whole call, the interpreter's share included, without the loop. It
holds for one build of the interpreter and one compiler of the module: they are on record as well.
Needs valgrind.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import guestmem._native

RECORD = Path(__file__).with_suffix(".json")
MODULE = Path(guestmem._native.__file__)
CALLS = {
    "ref.load()": "load()",
    "ref.store(v)": "store(v)",
    "read_obj(off, u64)": "read_obj(off, u64)",
    "write_obj(v, off, u64)": "write_obj(v, off, u64)",
    "read_obj(off, Struct)": "read_obj(off, layout)",
    "get_slice(off, n)": "get_slice(off, 64)",
    "read_slice of 64 B": "read_slice(b, off)",
    "write_slice of 64 B": "write_slice(b, off)",
    "AtomicRef.load()": "atomic_load()",
    "AtomicRef.load(ACQUIRE)": "atomic_load(acquire)",
    "AtomicRef.store(v)": "atomic_store(v)",
    "AtomicRef.fetch_add(1)": "atomic_add(1)",
    "array.load(i)": "array_load(5)",
    "array[i]": "array[5]",
    "ref.store(v), tracked": "tracked_store(v)",
    "GuestMemory.read_obj": "guest_read(off, u64)",
    "two that find another region": "guest_read(off, u64); guest_read(far, u64)",
}
# Runs under callgrind, which starts a new count at each sched_yield().
CHILD = """
import gc, itertools, os, struct
from guestmem import GuestMemory, MemoryMapping, Ordering, u64
def loops(off, v, b, layout, u64, ram, ref, atomic, array, tracked, guest):
    load, store, read_obj, write_obj = ref.load, ref.store, ram.read_obj, ram.write_obj
    get_slice, read_slice, write_slice = ram.get_slice, ram.read_slice, ram.write_slice
    atomic_load, atomic_store, atomic_add = atomic.load, atomic.store, atomic.fetch_add
    array_load, tracked_store, guest_read = array.load, tracked.store, guest.read_obj
    acquire, far = Ordering.ACQUIRE, off + 500 * 4096
    repeat, gc_off = itertools.repeat, gc.disable()
{functions}
    return [{names}]
ram = MemoryMapping(4096)
ram.fill(0x5A)
ref = ram.get_ref(256, u64)
values = [256, 0x1234_5678_9ABC, bytearray(64), struct.Struct("<QIHH"), u64, ram, ref]
values += [ram.get_atomic_ref(512, u64), ram.get_array_ref(1024, 16, u64)]
values += [MemoryMapping(4096, track_dirty=True).get_ref(256, u64)]
pages = MemoryMapping(512 * 4096)
pages.fill(0x5A)
parts = [(i * 4096, pages.get_slice(i * 4096, 4096)) for i in range(512)]
values += [GuestMemory(parts)]
ref.store(values[1])
values[7].store(values[1])
values[9].store(values[1])
for loop in loops(*values):
    loop(1000)  # the interpreter adapts to what it runs
    for n in 1000, 2000:
        os.sched_yield()
        loop(n)
        os.sched_yield()
"""


def key() -> str:
    return f"{platform.machine()} {sys.version_info.major}.{sys.version_info.minor}{sys.abiflags}"


def build() -> str:
    """Say what else the counts depend on: which interpreter, compiled how, and our compiler."""
    comment = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", MODULE.read_bytes())
    arguments = sysconfig.get_config_var("CONFIG_ARGS") or ""
    optimized = "optimized" if "--enable-optimizations" in arguments else "not optimized"
    python = f"Python {platform.python_version()}, {platform.python_compiler()}, {optimized}"
    return f"{python}; module: {comment[0].decode() if comment else 'another compiler'}"


def is_instrumented() -> bool:
    """Whether this is a sanitizer's or a coverage build, which counts nothing that matters."""
    marks = (b"__asan_", b"__tsan_", b"__ubsan_", b"__gcov_", b".gcda")
    return any(mark in MODULE.read_bytes() for mark in marks)


def count() -> dict[str, int]:
    """Return the instructions of each call."""
    functions = [
        f"    def loop{i}(n):\n        for _ in repeat(None, n): {statement}"
        for i, statement in enumerate(["pass", *CALLS.values()])
    ]
    names = ", ".join(f"loop{i}" for i in range(len(functions)))
    child = CHILD.format(functions="\n".join(functions), names=names)
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *("valgrind", "--tool=callgrind", f"--callgrind-out-file={directory}/out"),
            *("--dump-before=sched_yield", "--dump-before=__sched_yield"),
            *(sys.executable, "-c", child),
        ]
        subprocess.run(
            command,
            env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=directory,
            check=True,
            capture_output=True,
            timeout=300,
        )
        # out.2, out.4 ... hold what ran from the first sched_yield() of a pair to the second.
        dumps = sorted(Path(directory).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        totals = [re.findall(r"^totals: (\d+)", path.read_text(), re.MULTILINE) for path in dumps]
    spans = [int(total) for (total,) in totals[1::2]]
    loops = [
        (longer - shorter) / 1000 for shorter, longer in zip(spans[::2], spans[1::2], strict=True)
    ]
    return {name: round(each - loops[0]) for name, each in zip(CALLS, loops[1:], strict=True)}


def recorded() -> dict[str, Any]:
    """Return all records: {machine and version: {"build": ..., "counts": {...}}}."""
    records: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return records


def main() -> None:
    if is_instrumented():
        sys.exit("this build of guestmem is a sanitizer's or counts coverage")
    counts, records = count(), recorded()
    before = records.get(key(), {"counts": {}})["counts"]
    print(f"{key()}: {build()}")
    for name, instructions in counts.items():
        print(f"  {name:<28} {instructions:>6}   on record {before.get(name, '-'):>6}")
    if "--record" in sys.argv[1:]:
        records[key()] = {"build": build(), "counts": counts}
        RECORD.write_text(json.dumps(records, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
