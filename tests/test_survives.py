"""The table "What it survives" of the README: what the standard library does, and what we do.

Each in a process of its own, with the same file, page or object. The rows whose tests stand
elsewhere (tearing, core dumps) are looked for by name.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text()

COMMON = """
import ctypes, io, mmap, os, sys
import guestmem
PAGE = mmap.PAGESIZE
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 4 * PAGE)
if sys.argv[2] == "mmap":
    memory = mmap.mmap(fd, 4 * PAGE)
else:
    memory = guestmem.MemoryMapping.from_fd(fd, 4 * PAGE)
"""


def end_of(kind: str, code: str, path: Path) -> int | str:
    """Return what the code prints, or the signal that ends it."""
    child = subprocess.run(
        [sys.executable, "-c", COMMON + textwrap.dedent(code), str(path), kind],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if child.returncode < 0:
        return -child.returncode
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


# What it does; how mmap ends; what guestmem prints. PATH is on an ordinary file system.
CASES = {
    "a load from a truncated file": (
        """
        os.ftruncate(fd, PAGE)
        try:
            print(memory[PAGE] if sys.argv[2] == "mmap" else memory.read_obj(PAGE, guestmem.u8))
        except guestmem.ReadFromMemoryError as error:
            print(error.offset == PAGE)
        """,
        signal.SIGBUS,
        "True",
    ),
    "a copy to a truncated file": (
        """
        os.ftruncate(fd, PAGE)
        try:
            if sys.argv[2] == "mmap":
                memory[:] = bytes(4 * PAGE)
            else:
                memory.write_slice(bytes(4 * PAGE), 0)
        except guestmem.WriteToMemoryError as error:
            print(error.offset == PAGE)
        """,
        signal.SIGBUS,
        "True",
    ),
    "an atomic operation on a truncated file": (
        """
        os.ftruncate(fd, PAGE)
        try:
            if sys.argv[2] == "mmap":
                ctypes.c_uint64.from_buffer(memory, PAGE).value += 1
            else:
                memory.get_atomic_ref(PAGE, guestmem.u64).fetch_add(1)
        except guestmem.WriteToMemoryError as error:
            print(error.offset == 0)  # of the integer
        """,
        signal.SIGBUS,
        "True",
    ),
    "an array in a truncated file": (
        """
        os.ftruncate(fd, PAGE)
        try:
            if sys.argv[2] == "mmap":
                print(len(memoryview(memory).cast("Q").tolist()))
            else:
                print(len(memory.get_array_ref(0, PAGE // 2, guestmem.u64).tolist()))
        except guestmem.ReadFromMemoryError as error:
            print(error.offset == PAGE)
        """,
        signal.SIGBUS,
        "True",
    ),
    "a guest's address in a truncated file": (
        """
        os.ftruncate(fd, PAGE)
        try:
            if sys.argv[2] == "mmap":  # a guest's RAM by hand: a region, and another
                low, high = bytearray(PAGE), memory
                low[-4:], high[PAGE:PAGE + 4] = b"1234", b"5678"
            else:
                low = guestmem.MemoryMapping(PAGE)
                guest = guestmem.GuestMemory([(0, low), (PAGE, memory.get_slice(PAGE, PAGE))])
                guest.write_all(b"12345678", PAGE - 4)
        except guestmem.WriteToMemoryError as error:
            print(error.offset == PAGE)
        """,
        signal.SIGBUS,
        "True",
    ),
    "a file object that reads into it": (
        """
        os.ftruncate(fd, PAGE)
        source = io.BytesIO(bytes(4 * PAGE))
        try:
            if sys.argv[2] == "mmap":
                source.readinto(memory)
            else:
                memory.read_to_memory(0, source, 4 * PAGE)
        except guestmem.WriteToMemoryError as error:
            print(error.offset == PAGE)
        """,
        signal.SIGBUS,
        "True",
    ),
    "a pointer that the guest wrote": (
        """
        class Request(ctypes.Structure):
            _fields_ = [("data", ctypes.POINTER(ctypes.c_char))]
        memory.write(b"A" * 8) if sys.argv[2] == "mmap" else memory.fill(0x41)
        try:
            if sys.argv[2] == "mmap":
                print(Request.from_buffer(memory).data[0])
            else:
                print(memory.read_obj(0, Request).data[0])
        except TypeError:
            print("refused")
        """,
        signal.SIGSEGV,
        "refused",
    ),
    "a source that ends early": (
        """
        source = io.BytesIO(bytes(10))
        try:
            if sys.argv[2] == "mmap":
                print(source.readinto(memory), "of", PAGE)
            else:
                memory.read_to_memory(0, source, PAGE)
        except guestmem.ReadFromSourceError as error:
            print(error.transferred)
        """,
        f"10 of {mmap.PAGESIZE}",
        "10",
    ),
    "a range that passes the end": (
        """
        try:
            end = len(memory)
            if sys.argv[2] == "mmap":
                print(len(memory[end - 2:end + 6]), "of 8")
            else:
                memory.read_bytes(end - 2, 8)
        except guestmem.InvalidAddressError:
            print("refused")
        """,
        "2 of 8",
        "refused",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_survives(case: str, tmp_path: Path) -> None:
    code, theirs, ours = CASES[case]
    assert end_of("mmap", code, tmp_path / "file") == theirs
    assert end_of("guestmem", code, tmp_path / "file") == ours


def test_survives_a_full_tmpfs(tmp_path: Path) -> None:
    """The file may grow; its file system has no page for it."""
    code = """
    try:
        if sys.argv[2] == "mmap":
            memory[:] = bytes(4 * PAGE)
        else:
            memory.write_slice(bytes(4 * PAGE), 0)
    except guestmem.WriteToMemoryError as error:
        print(error.offset // PAGE)
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(tmp_path), b"tmpfs", 0, b"size=%d" % (2 * mmap.PAGESIZE)):
        pytest.skip(f"no tmpfs can be mounted: {os.strerror(ctypes.get_errno())}")
    try:
        assert end_of("mmap", code, tmp_path / "one") == signal.SIGBUS
        (tmp_path / "one").unlink()
        assert end_of("guestmem", code, tmp_path / "two") == "2"
    finally:
        libc.umount2(os.fsencode(tmp_path), 2)


ROWS = {  # of the README that name test_survives: the cases behind them
    "the file is truncated under its mapping; a load, a copy": {
        "a load from a truncated file",
        "a copy to a truncated file",
    },
    "the same; an atomic operation, an array, a guest's address": {
        "an atomic operation on a truncated file",
        "an array in a truncated file",
        "a guest's address in a truncated file",
    },
    "a file object reads into such memory": {"a file object that reads into it"},
    "the guest forges a pointer in a ctypes structure": {"a pointer that the guest wrote"},
    "a source ends early": {"a source that ends early"},
    "a range passes the end": {"a range that passes the end"},
}


def test_each_row_of_the_readme_names_a_test() -> None:
    table = README.split("## What it survives")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!what happens)(.*)\|$", table, re.MULTILINE)
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"\[`(\w+)`\]\(tests/(\w+\.py)\)", row)
        assert named, row
        for test, file in named:
            assert f"def {test}(" in (TESTS / file).read_text(), (file, test)
    ours = {row.split(" |")[0] for row in rows if "[`test_survives`]" in row}
    assert ours == ROWS.keys()
    assert set().union(*ROWS.values()) == CASES.keys()
