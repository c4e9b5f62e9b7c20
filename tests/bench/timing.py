"""Times statements against each other, so that what a noisy machine does hits them alike.

Each statement is put into the same loop. The loops run in turn, A B, B A, A B ...; a ratio is the
median of the ratios of the rounds. A loop is shorter than the time that the kernel gives a process,
and rounds in which another process got the core are left out where enough others remain.
"""

from __future__ import annotations

import gc
import resource
from dataclasses import dataclass
from itertools import repeat
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tests.bench.rows import Row

    Loop = Callable[[int], float]  # runs that often; returns the seconds that it took

# Names are parameters: local variables, the fastest that Python has, on both sides.
TEMPLATE = """
def loop(repetitions, {names}):
    start = perf_counter()
    for _ in repeat(None, repetitions):
        {statement}
    return perf_counter() - start
"""


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float  # of one loop in one round


THOROUGH = Effort(rounds=50, seconds=0.002)
QUICK = Effort(rounds=3, seconds=0.001)


def make_loop(statement: str, values: Mapping[str, Any]) -> Loop:
    used = compile(statement, "<bench>", "exec").co_names
    names = [name for name in values if name in used]
    namespace: dict[str, Any] = {"perf_counter": perf_counter, "repeat": repeat}
    exec(TEMPLATE.format(names=", ".join(names), statement=statement), namespace)
    function, arguments = namespace["loop"], [values[name] for name in names]

    def loop(n: int) -> float:
        seconds: float = function(n, *arguments)
        return seconds

    return loop


def calibrate(loop: Loop, seconds: float) -> int:
    """Return how often to run the loop for it to take so long. This also warms it up."""
    n = 1
    while (taken := loop(n)) < seconds / 8 and n < 1 << 30:
        n *= 4
    return max(1, round(n * seconds / taken))


def interleave(loops: Sequence[Loop], effort: Effort) -> list[tuple[float, ...]]:
    """Return, for each loop, the seconds of one run of its statement in each round."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        counts = [calibrate(loop, effort.seconds) for loop in loops]
        rounds: list[tuple[int, list[float]]] = []
        order = range(len(loops))
        for number in range(effort.rounds):
            taken, before = [0.0] * len(loops), preemptions()
            for i in order if number % 2 == 0 else reversed(order):
                taken[i] = loops[i](counts[i]) / counts[i]
            rounds.append((preemptions() - before, taken))
    finally:
        if collecting:
            gc.enable()
    quiet = [taken for disturbed, taken in rounds if not disturbed]
    enough = len(quiet) >= max(3, effort.rounds // 5)
    return list(zip(*(quiet if enough else (taken for _, taken in rounds)), strict=True))


def preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def times(statements: Iterable[str], values: Mapping[str, Any], effort: Effort) -> list[float]:
    """Return the nanoseconds of each statement in its best round: others only take time away."""
    loops = [make_loop(statement, values) for statement in statements]
    return [min(taken) * 1e9 for taken in interleave(loops, effort)]


@dataclass(frozen=True)
class Result:
    group: str
    name: str
    peer_name: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None  # None: the target is for ours itself
    target: float
    ok: bool


def compare(row: Row, effort: Effort) -> Result:
    loops = [make_loop(statement, row.values) for statement in (row.ours, row.peer)]
    a, b = interleave(loops, effort)
    ratio = median(x / y for x, y in zip(a, b, strict=True))
    ours, peer, ok = median(a) * 1e9, median(b) * 1e9, ratio <= row.target
    return Result(row.group, row.name, row.peer_name, ours, peer, "ns", ratio, row.target, ok)
