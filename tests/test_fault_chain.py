"""SIGBUS among libraries that want it, too: each gets its own; what is nobody's ends the process.

The libraries are tests/chain.c, and a second copy of the extension itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("chain.c")
ENV = {k: v for k, v in os.environ.items() if k not in ("CFLAGS", "LDFLAGS")}
SIGBUS = -signal.SIGBUS

CHILD = """
import ctypes, importlib.util, mmap, os, shutil, signal, sys
import faulthandler
import guestmem._native
from guestmem import GuestMemoryError, u64
library, work = ctypes.CDLL(sys.argv[1]), sys.argv[2]
PAGE = mmap.PAGESIZE

def second_copy():
    path = os.path.join(work, "copy", os.path.basename(guestmem._native.__file__))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    shutil.copy(guestmem._native.__file__, path)
    spec = importlib.util.spec_from_file_location("guestmem._native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

modules, memories = {"map": guestmem._native}, {}
file = os.memfd_create("file")

for step in sys.argv[3:]:
    name = step.removesuffix("2")
    if name == "map":
        if step == "map2" and "map2" not in modules:
            modules["map2"] = second_copy()
        os.ftruncate(file, 2 * PAGE)
        memory = modules[step].MemoryMapping.from_fd(file, 2 * PAGE)
        u = getattr(modules[step], "u64")
        memories[step] = memory, memory.get_ref(PAGE, u)
        os.ftruncate(file, PAGE)
    elif name == "fault":
        memory, ref = memories["map" + step[5:]]
        for call in ref.load, lambda: memory.read_bytes(0, 2 * PAGE), lambda: memory.fill(1):
            for _ in range(2):
                try:
                    call()
                except GuestMemoryError as error:
                    print(type(error).__name__, flush=True)
    elif name == "foreign" or name == "touch":
        os.ftruncate(file, 2 * PAGE)
        theirs = mmap.mmap(file, 2 * PAGE)
        os.ftruncate(file, PAGE)
        if name == "foreign":
            theirs[PAGE]
        else:
            address = ctypes.addressof(ctypes.c_char.from_buffer(theirs, 0))
            print("touched", library.touch(ctypes.c_void_p(address + PAGE)), flush=True)
    elif name == "kill":
        os.kill(os.getpid(), signal.SIGBUS)
        print("alive", flush=True)
    elif name == "poison":
        library.poison()
        print("alive", flush=True)
    elif name == "ignore":
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
    elif name == "handler":
        signal.signal(signal.SIGBUS, lambda *_: print("handler", flush=True))
    elif name == "faulthandler":
        faulthandler.enable(open(os.devnull, "w"))
    elif name == "no-faulthandler":
        faulthandler.disable()
    elif name == "called":
        print("called", library.called(), flush=True)
    else:
        library.install(name.encode())
"""
FAULT = ["ReadFromMemoryError"] * 4 + ["WriteToMemoryError"] * 2


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    target = tmp_path_factory.mktemp("chain") / "chain.so"
    command = [
        compiler,
        "-O1",
        "-Wall",
        "-Werror",
        "-fPIC",
        "-shared",
        "-o",
        str(target),
        str(SOURCE),
    ]
    env = {k: v for k, v in ENV.items() if k != "LD_PRELOAD"}
    subprocess.run(command, check=True, env=env)
    return target


@pytest.mark.parametrize(
    ("steps", "output", "status"),
    [
        # Above us: faults of ours come down to us, again and again.
        ("map chains fault fault called", [*FAULT, *FAULT, "called", "12"], 0),
        ("map jumps fault called", [*FAULT, "called", "6"], 0),
        ("map restores fault called", [*FAULT, "called", "1"], 0),
        # Below us: it gets what is not ours.
        ("chains map fault called", [*FAULT, "called", "0"], 0),
        ("jumps map fault touch touch fault", [*FAULT, "touched", "1", "touched", "1", *FAULT], 0),
        ("once map fault", FAULT, 0),
        # Above and below: they pass it to us, we to them.
        ("map chains map fault", FAULT, 0),
        ("map jumps map fault touch fault", [*FAULT, "touched", "1", *FAULT], 0),
        ("map jumps map touch kill", ["touched", "1"], SIGBUS),
        # What is nobody's ends the process, whoever is in the chain.
        *(
            (f"{chain} {end}", [], SIGBUS)
            for chain in (
                *("chains map", "map chains", "map chains map", "restores map", "map restores"),
                *("map restores map", "jumps map", "map jumps map", "once map"),
                *("map faulthandler map", "map faulthandler map no-faulthandler"),
                *("map map2", "map map2 map", "map map2 map map2", "map chains map2 map"),
            )
            for end in ("foreign", "kill")
            if (chain, end)
            not in (
                *(("once map", "kill"), ("once map", "foreign")),
                *(("restores map", "kill"), ("map restores map", "kill")),
                ("map faulthandler map no-faulthandler", "kill"),
                *(("jumps map", "kill"), ("chains map", "kill"), ("map restores", "kill")),
            )
        ),
        ("once map kill called kill", ["alive", "called", "1"], SIGBUS),
        ("once map foreign", [], SIGBUS),
        # Two copies of the extension.
        ("map map2 fault fault2 fault", [*FAULT, *FAULT, *FAULT], 0),
        ("map map2 map fault2 fault", [*FAULT, *FAULT], 0),
        ("handler map map2 fault kill", [*FAULT, "handler", "alive"], 0),
        # A page that nobody has touched.
        ("map poison", [], SIGBUS),
        ("ignore map poison poison fault", ["alive", "alive", *FAULT], 0),
        ("handler map poison fault", ["handler", "alive", *FAULT], 0),
    ],
)
def test_chains(library: Path, tmp_path: Path, steps: str, output: list[str], status: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, library, tmp_path, *steps.split()],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (sorted(child.stdout.split()), child.stderr) == (sorted(output), ""), child
    assert child.returncode == status


def test_signals_from_outside_arrive_during_a_guarded_access() -> None:
    code = """
import os, signal, sys
from guestmem import MemoryMapping
seen = []
signal.signal(signal.SIGBUS, lambda *_: seen.append(1))
fd = os.memfd_create("file")
os.ftruncate(fd, 1 << 28)
memory = MemoryMapping.from_fd(fd, 1 << 28)
print("ready", flush=True)
while len(seen) < 3:
    memory.fill(1)
# An interpreter that ends gives SIGBUS back its default, and the signals still come.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        for _ in range(300):
            try:
                child.wait(0.05)
                break
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGBUS)
        child.kill()
    assert child.returncode in (0, -signal.SIGKILL)
    assert child.returncode == 0, "no signal arrived"
