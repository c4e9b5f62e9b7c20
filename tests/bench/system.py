"""What is not one statement against another: the machine, its limits, threads, start and size."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from tests.bench.rows import BANDWIDTH, LATENCY, MIB, copy_values, object_values, split
from tests.bench.timing import Result, make_loop, times

import guestmem
from guestmem import MemoryMapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.timing import Effort, Loop

try:
    import numpy as np
except ImportError:  # it is a peer in the pictures, no more
    np = None  # type: ignore[assignment]


def machine() -> dict[str, str]:
    with open("/proc/cpuinfo") as file:
        info = dict(line.split(":", 1) for line in file if ":" in line)
    model = {key.strip(): value.strip() for key, value in info.items()}.get("model name")
    kernel = f"{platform.system()} {platform.release().split('-')[0]}"
    build = "" if getattr(sys, "_is_gil_enabled", lambda: True)() else ", without a GIL"
    return {
        "cpu": f"{model or platform.machine()}, {os.cpu_count()} cores",
        "kernel": f"{kernel}, {platform.libc_ver()[0] or 'musl'}",
        "python": f"{platform.python_version()}{build} ({platform.python_compiler()})",
        "guestmem": guestmem.__version__,
        "numpy": "not installed" if np is None else np.__version__,
    }


def statements(table: str) -> dict[str, str]:
    """Return the statements by name, without what is not installed."""
    return {name: code for name, code in split(table) if np is not None or "array" not in code}


def latency(effort: Effort) -> dict[str, float]:
    """Nanoseconds of each way to read one u64."""
    values, ways = object_values(), statements(LATENCY)
    if np is not None:
        values["array"] = np.frombuffer(values["mm"], np.uint64)
    return dict(zip(ways, times(ways.values(), values, effort), strict=True))


def bandwidth(effort: Effort) -> dict[str, list[float | None]]:
    """GB/s of each way to copy, at each size. That of memcpy itself is without its call."""
    ways = statements(BANDWIDTH)
    speeds: dict[str, list[float | None]] = {name: [] for name in ("bytes", *ways)}
    for size in (64 << shift for shift in range(0, 21, 2)):
        values = copy_values(size)
        for name, buffer in ("guest_address", values["view"]), ("host_address", values["buf"]):
            values[name] = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        values["memmove"] = ctypes.memmove
        if np is not None:
            values["array"] = np.frombuffer(values["view"], np.uint8)
            values["numpy_buf"] = np.frombuffer(values["buf"], np.uint8)
        taken = dict(zip(ways, times(ways.values(), values, effort), strict=True))
        taken["memcpy"] -= (call := taken["a call of memcpy"])
        speeds["bytes"].append(size)
        for name, nanoseconds in taken.items():
            lost = name == "memcpy" and nanoseconds < call / 5  # in the noise of its call
            speeds[name].append(None if lost else round(size / nanoseconds, 3))
    del speeds["a call of memcpy"]
    return speeds


def threads(quick: bool) -> Iterator[Result]:
    total = (128 if quick else 1024) * MIB
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    if free > 2 * total:
        source = bytes(64 * MIB)
        rounds = [
            (longest_stall(write_ours, source, total), longest_stall(write_mmap, source, total))
            for _ in range(1 if quick else 3)
        ]
        ours, peer = (min(side) for side in zip(*rounds, strict=True))
        name = f"stall while {total // MIB} MiB are written"
        yield Result(
            "threads", name, "the same into an mmap", ours, peer, "ms", None, 10, ours < 10
        )
    if len(os.sched_getaffinity(0)) > 1:
        ours, peer = two_at_once(quick)
        name = "two threads copy, 1 MiB blocks"
        yield Result("threads", name, "two processes", ours, peer, "x", None, 1.8, ours >= 1.8)


def write_ours(source: bytes, total: int) -> None:
    with MemoryMapping(total) as ram:
        for offset in range(0, total, len(source)):
            ram.write_slice(source, offset)


def write_mmap(source: bytes, total: int) -> None:
    with mmap.mmap(-1, total) as ram, memoryview(ram) as view:
        for offset in range(0, total, len(source)):
            view[offset : offset + len(source)] = source


def longest_stall(write: Callable[[bytes, int], None], source: bytes, total: int) -> float:
    """Milliseconds between two ticks of a thread that wants one every millisecond."""
    writing = threading.Event()
    ticks: list[float] = []

    def tick() -> None:
        while not writing.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)
        ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    write(source, total)
    writing.set()
    ticker.join()
    return max(b - a for a, b in itertools.pairwise(ticks)) * 1e3


def two_at_once(quick: bool) -> tuple[float, float]:
    """How many times what one thread copies two copy, and two processes: what the machine allows.

    Of the best rounds, because whoever else needs a core only takes away.
    """
    write = split(BANDWIDTH)[0][1]
    loops = [make_loop(write, copy_values(MIB)) for _ in range(2)]
    count, rounds = (20, 2) if quick else (1000, 15)
    factors = []
    for context in threading.Thread, multiprocessing.get_context("fork").Process:
        best = [min(together(context, loops[:n], count) for _ in range(rounds)) for n in (1, 2)]
        factors.append(2 * best[0] / best[1])
    return factors[0], factors[1]


def together(worker: Any, loops: list[Loop], count: int) -> float:
    """Seconds that the loops take, each in a thread or process of its own."""
    workers = [worker(target=loop, args=(count,)) for loop in loops]
    began = time.perf_counter()
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    return time.perf_counter() - began


def start(quick: bool) -> Iterator[Result]:
    """What an import costs: children in turn, with it and without."""

    def child(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-c", code], check=True)
        return (time.perf_counter() - began) * 1e3

    codes = ("import guestmem", "import ctypes", "pass")
    rounds = [[child(code) for code in codes] for _ in range(3 if quick else 25)]
    ours, peer = median(r[0] - r[2] for r in rounds), median(r[1] - r[2] for r in rounds)
    yield Result("start", codes[0], codes[1], ours, peer, "ms", None, 2, ours < 2)
    code = "import guestmem, sys; print(len({'ctypes', 'struct'} & set(sys.modules)))"
    extra = int(subprocess.check_output([sys.executable, "-I", "-c", code]))
    yield Result(
        "start", "of ctypes and struct it imports", "", extra, None, "", None, 0, not extra
    )


def wheel(path: str) -> Iterator[Result]:
    size = os.stat(path).st_size / 1000
    yield Result("start", "the wheel", "", size, None, "KB", None, 150, size < 150)
