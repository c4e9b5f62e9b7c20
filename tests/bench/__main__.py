"""Measures guestmem against what Python has for the same work, and says what misses its target.

    python tests/bench [--only PATTERN] [--json FILE] [--wheel FILE] [--quick]

A ratio is guestmem's time by the peer's, the median of interleaved rounds: less is better. Times
hold the loop; bound methods and arguments are local variables on both sides. The exit status says
nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for tests.bench, however it is run

from tests.bench import system
from tests.bench.rows import rows, size_name
from tests.bench.timing import QUICK, THOROUGH, Result, compare

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE = "  {:<38} {:>10} {:>10} {:>8} {:>7}  {:<5} {}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help='of "group: operation"')
    parser.add_argument("--json", metavar="FILE", help="write the results to FILE")
    parser.add_argument("--wheel", metavar="FILE", help="judge the size of this wheel, too")
    parser.add_argument("--quick", action="store_true", help="20 seconds; the figures mean little")
    options = parser.parse_args()

    machine = system.machine()
    print("\n".join(f"{key:<9} {value}" for key, value in machine.items()))
    results: list[Result] = []
    for result in measure(options):
        if not results or results[-1].group != result.group:
            print(
                "\n"
                + LINE.format(result.group, "guestmem", "peer", "ratio", "target", "", "").rstrip()
            )
        print(line(result), flush=True)
        results.append(result)
    over = sum(not result.ok for result in results)
    print(f"\n{len(results)} rows, {over} over their targets")

    report: dict[str, Any] = {"machine": machine, "rows": [asdict(result) for result in results]}
    if not options.only:
        effort = QUICK if options.quick else THOROUGH
        report |= {"latency": system.latency(effort), "bandwidth": system.bandwidth(effort)}
        print_limits(report["latency"], report["bandwidth"])
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


def print_limits(latency: dict[str, float], bandwidth: dict[str, list[Any]]) -> None:
    """Print what the pictures show, with what the machine allows."""
    print("\nreading one u64, ns with the loop")
    for name, nanoseconds in latency.items():
        print(f"  {name:<38} {nanoseconds:>7.1f}")
    sizes = [size_name(int(size)) for size in bandwidth["bytes"]]
    print("\ncopying, GB/s".ljust(32) + "".join(f"{name:>8}" for name in sizes))
    for name, speeds in bandwidth.items():
        if name != "bytes":
            cells = ["" if speed is None else f"{speed:.1f}" for speed in speeds]
            print(f"  {name:<29}" + "".join(f"{cell:>8}" for cell in cells))


def measure(options: argparse.Namespace) -> Iterator[Result]:
    effort = QUICK if options.quick else THOROUGH

    def wanted(group: str, name: str = "") -> bool:
        return re.search(options.only, f"{group}: {name}") is not None

    for row in rows():
        if wanted(row.group, row.name):
            yield compare(row, effort)
    if wanted("threads"):
        yield from system.threads(options.quick)
    if wanted("start"):
        yield from system.start(options.quick)
        if options.wheel:
            yield from system.wheel(options.wheel)


def line(result: Result) -> str:
    def number(value: float | None) -> str:
        if value is None:
            return ""
        digits = 0 if value >= 1000 else 1 if result.unit == "ns" else 2
        return f"{value:,.{digits}f} {result.unit}"

    ratio = "" if result.ratio is None else f"{result.ratio:.3f}"
    verdict = "ok" if result.ok else "over"
    return LINE.format(
        *(result.name, number(result.ours), number(result.peer), ratio, f"{result.target:.2f}"),
        *(verdict, f"vs {result.peer_name}" if result.peer_name else ""),
    ).rstrip()


if __name__ == "__main__":
    main()
