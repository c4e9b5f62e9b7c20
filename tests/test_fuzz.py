"""The fuzzer's inputs find nothing; and what would be a finding is one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

TESTS = os.path.dirname(__file__)
HEADER = f"""
import sys
sys.path.insert(0, {os.path.dirname(TESTS)!r})
"""


def test_inputs(run_child: Callable[..., str]) -> None:
    corpus = os.path.join(TESTS, "fuzz", "corpus")
    code = HEADER + "from tests.fuzz.__main__ import main; main()"
    printed = run_child(code, "--replay", corpus, timeout=300)
    assert printed.splitlines()[-1] == f"{len(os.listdir(corpus))} inputs, no finding"


PLANTED = {
    "w.call(exec, 'raise SystemError')": "SystemError",
    "w.call(exec, 'raise OSError from SystemError()')": "Finding",
    "w.call(exec, 'raise AttributeError')": "AttributeError",
    "w.memory().area.model[9] ^= 1": "Finding",
    "w.buffer().area.model.append(1)": "Finding",
    "w.memory().size += 1": "Finding",
    "leaks.append(w.memory().obj.get_slice(0, 1))": "BufferError",
    "leaks.append(w.slice().obj)": "Finding",
    "leaks.append(memoryview(w.add_buffer(host, Area(host[:]), 0, 9).obj))": "BufferError",
    "Broken()": "SystemError",
}


@pytest.mark.parametrize("planted", PLANTED)
def test_findings(run_child: Callable[..., str], planted: str) -> None:
    code = f"""
from tests.fuzz.model import Area
from tests.fuzz.world import World

leaks, host = [], bytearray(9)


class Broken:
    def __del__(self):
        raise SystemError


def operation(w):
    w.choices.at = len(w.choices.data)
    {planted}


try:
    World(bytes(2)).run([operation])
except BaseException as error:
    print(type(error).__name__)
"""
    assert run_child(HEADER + code) == f"{PLANTED[planted]}\n"
