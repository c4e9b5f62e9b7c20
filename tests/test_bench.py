"""The benchmark runs and tells all that it should. Never its times: this machine is busy."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # and NumPy and matplotlib leave at exit what a leak detector reports

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {
    *("objects", "memory that can fault", "small copies", "copies", "slice to slice, overlapping"),
    *("guests", "atomics", "mappings", "files", "threads", "start"),
}


def run(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, ""), result
    return result.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench") / "results.json"


@pytest.fixture(scope="module")
def printed(results: Path) -> str:
    return run("tests/bench", "--quick", "--json", str(results), "--wheel", __file__)


def test_rows(printed: str, results: Path) -> None:
    report = json.loads(results.read_text())
    needed = set(GROUPS)
    if len(os.sched_getaffinity(0)) < 2:
        needed.discard("threads")
    assert {row["group"] for row in report["rows"]} >= needed
    assert len(report["rows"]) >= 78
    for row in report["rows"]:
        assert row["name"] in printed
        if row["ratio"] is not None:
            assert row["ours"] > 0
            assert row["peer"] > 0
            assert row["ratio"] > 0
            assert row["ok"] == (row["ratio"] <= row["target"])
    over = sum(not row["ok"] for row in report["rows"])
    assert f"{len(report['rows'])} rows, {over} over their targets" in printed


def test_what_is_drawn(printed: str, results: Path) -> None:
    report = json.loads(results.read_text())
    assert all(report["machine"].values())
    assert all(nanoseconds > 0 for nanoseconds in report["latency"].values())
    assert {"guestmem ref.load()", "an empty C call"} <= set(report["latency"])
    sizes = report["bandwidth"]["bytes"]
    assert (sizes[0], sizes[-1]) == (64, 64 << 20)
    assert all(len(speeds) == len(sizes) for speeds in report["bandwidth"].values())


def test_only_some_rows_as_a_module() -> None:
    printed = run("-m", "tests.bench", "--quick", "--only", "^objects: ref")
    assert "ref.load()" in printed
    assert "2 rows, " in printed


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_pictures(printed: str, results: Path, tmp_path: Path) -> None:
    machine = json.loads(results.read_text())["machine"]
    run("tests/bench/plot.py", str(results), str(tmp_path))
    for name in "bandwidth", "latency":
        picture = (tmp_path / f"{name}.svg").read_text()
        assert "guestmem" in picture
        assert machine["cpu"] in picture
        assert machine["python"] in picture
