"""Hot calls run no more instructions than they did: the guard of speed on a noisy machine."""

import runpy
import shutil
from pathlib import Path

import pytest

INSTRUCTIONS = Path(__file__).parent / "bench" / "instructions.py"
ALLOWED = 1.05


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_hot_calls_take_no_more_instructions() -> None:
    bench = runpy.run_path(str(INSTRUCTIONS))
    if bench["is_instrumented"]():
        pytest.skip("a sanitizer's or coverage build")
    record = bench["recorded"]().get(bench["key"]())
    if record is None:
        pytest.skip(f"instructions.json has no counts for {bench['key']()}")
    if record["build"] != bench["build"]():
        pytest.skip(f"instructions.json counted {record['build']}; this is {bench['build']()}")
    grown = {
        name: f"{record['counts'][name]} to {count}"
        for name, count in bench["count"]().items()
        if count > record["counts"][name] * ALLOWED
    }
    assert not grown, (
        f"more instructions than on record: {grown}. Where that is worth it, say why in the commit "
        "and update the record: python tests/bench/instructions.py --record"
    )
