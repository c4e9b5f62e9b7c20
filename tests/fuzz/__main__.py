"""Runs sequences of public calls with any arguments, hostile objects among them.

    python tests/fuzz --replay FILE...     these inputs, without a fuzzer; folders give their files
    python tests/fuzz [libFuzzer's options and corpora]

tests/fuzz/run.sh does the second with sanitizers. A finding ends the process.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for tests.fuzz, however it is run

from tests.fuzz.operations import OPERATIONS
from tests.fuzz.world import World


def run_one(data: bytes) -> None:
    World(data).run(OPERATIONS)


def replay(names: list[str]) -> None:
    count = 0
    for name in names:
        path = Path(name)
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            print(file, flush=True)  # before it can kill the process
            run_one(file.read_bytes())
            count += 1
    print(f"{count} inputs, no finding")


def main() -> None:
    gc.collect()
    gc.freeze()  # so that a collection in each sequence is a short one
    if sys.argv[1:2] == ["--replay"]:
        replay(sys.argv[2:])
        return
    import atheris

    sys.argv[0] = f"{sys.executable} {sys.argv[0]}"  # by which libFuzzer starts itself, to merge
    atheris.Setup(sys.argv, run_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
