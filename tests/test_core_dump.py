"""A guest's secrets must not end up in a core dump, and where they may, there is a warning."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 4096
COUNT = 512  # bytes of secret


def secret(key: int) -> bytes:
    """The bytes that the child writes one by one, and never holds in one piece."""
    return bytes((n * n + n * 7 + key) % 251 for n in range(COUNT))


DUMP = """
import mmap, os, resource, sys
import guestmem
kind, key, fd = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
if kind == "anonymous":
    memory = guestmem.MemoryMapping(4096)
elif kind == "file":
    memory = guestmem.MemoryMapping.from_fd(fd, 4096)
else:
    memory = mmap.mmap(-1, 4096)
for n in range(512):
    value = (n * n + n * 7 + key) % 251
    if kind == "mmap":
        memory[n] = value
    else:
        memory.write_obj(value, n, guestmem.u8)
os.abort()
"""


def may_dump() -> str | None:
    """Return why no core dump is written into the working directory, None where one is."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith("|") or "/" in pattern or not pattern.startswith("core"):
        return f"core dumps go elsewhere: core_pattern is {pattern!r}"
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != resource.RLIM_INFINITY:
        return "the hard limit of core dumps is not unlimited"
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        return "AddressSanitizer's shadow memory would be in the core dump"
    return None


def dump(kind: str, directory: Path, key: int) -> bytes:
    """Return the core dump of a process whose memory of this kind holds the secret."""
    if reason := may_dump():
        pytest.skip(reason)
    fd = os.memfd_create("guestmem-dumped")
    os.ftruncate(fd, SIZE)
    try:
        result = subprocess.run(
            [sys.executable, "-c", DUMP, kind, str(key), str(fd)],
            cwd=directory,
            pass_fds=[fd],
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == -6, result
        if kind == "file":
            assert os.pread(fd, COUNT, 0) == secret(key)  # it was there
    finally:
        os.close(fd)
    cores = list(directory.glob("core*"))
    if not cores:
        pytest.skip("the kernel wrote no core dump")
    content = b"".join(core.read_bytes() for core in cores)
    for core in cores:
        core.unlink()
    assert content.startswith(b"\x7fELF")
    return content


def test_guest_memory_is_in_no_core_dump(tmp_path: Path) -> None:
    for key, kind in enumerate(("anonymous", "file")):
        core = dump(kind, tmp_path, key)
        assert core.find(secret(key)[:32]) == -1, kind
        assert core.find(secret(key)[-32:]) == -1, kind


def test_the_search_finds_what_the_standard_library_dumps(tmp_path: Path) -> None:
    assert dump("mmap", tmp_path, 9).find(secret(9)) != -1


# A madvise(2) that fails, really: by a seccomp filter.

FORBID = """
import ctypes, os, struct, sys, warnings

def maps():
    with open("/proc/self/maps") as file:
        return sum("/memfd:guestmem-forbidden " in line for line in file)

def forbid(advice, code):
    \"\"\"Let madvise(2) with this advice fail in this process from now on.\"\"\"
    madvise = {"x86_64": 28, "aarch64": 233}[os.uname().machine]
    program = b"".join(struct.pack("=HBBI", *step) for step in (
        (0x20, 0, 0, 0),  # load the number of the system call
        (0x15, 0, 3, madvise),
        (0x20, 0, 0, 32),  # load the low half of its third argument
        (0x15, 0, 1, advice),
        (0x06, 0, 0, 0x00050000 | code),  # SECCOMP_RET_ERRNO
        (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    ))
    steps = ctypes.create_string_buffer(program, len(program))
    filters = struct.pack("@HP", len(program) // 8, ctypes.addressof(steps))
    libc = ctypes.CDLL(None)
    prctl = libc.prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    address = ctypes.cast(ctypes.c_char_p(filters), ctypes.c_void_p).value
    if prctl(22, 2, address, 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        print("seccomp filters are not allowed here")
        sys.exit(77)

import guestmem
from guestmem import CoreDumpWarning, MemoryMapping, u64
fd = os.memfd_create("guestmem-forbidden")
os.ftruncate(fd, 8192)
"""


def forbidden(run_child: Callable[..., str], code: str, *options: str, stderr: str = "") -> str:
    if platform.machine() not in {"x86_64", "aarch64"}:
        pytest.skip(f"no seccomp filter is written for {platform.machine()}")
    return run_child(
        FORBID + textwrap.dedent(code), options=options, skip=77, stderr=stderr
    ).strip()


def test_failing_madvise_is_a_warning(run_child: Callable[..., str]) -> None:
    code = """
    forbid(16, 1)  # MADV_DONTDUMP, EPERM
    for make in (lambda: MemoryMapping(8192), lambda: MemoryMapping.from_fd(fd, 8192)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            memory = make()
        (warning,) = caught
        assert warning.category is CoreDumpWarning
        assert issubclass(CoreDumpWarning, RuntimeWarning)
        assert warning.filename == "<string>", warning.filename  # the caller's line
        print(warning.message)
        memory.write_obj(2**64 - 1, 8184, u64)
        assert memory.read_obj(8184, u64) == 2**64 - 1
        memory.close()
    assert maps() == 0
    """
    said = "guest memory will be part of core dumps: madvise(MADV_DONTDUMP): "
    assert forbidden(run_child, code).splitlines() == [said + "Operation not permitted"] * 2


def test_the_warning_as_an_error_leaves_no_mapping(run_child: Callable[..., str]) -> None:
    code = """
    forbid(16, 22)
    for _ in range(3):
        for make in (lambda: MemoryMapping(1 << 44), lambda: MemoryMapping.from_fd(fd, 8192)):
            try:
                make()
            except CoreDumpWarning as error:
                assert "Invalid argument" in str(error), error
            else:
                raise SystemExit("no error")
            assert maps() == 0
    # 64 of them would not fit into the address space
    for _ in range(64):
        try:
            MemoryMapping(1 << 44)
        except CoreDumpWarning:
            pass
    print("done")
    """
    assert forbidden(run_child, code, "-W", "error") == "done"


def test_by_default_the_warning_is_shown_once_for_a_line(run_child: Callable[..., str]) -> None:
    code = """
    forbid(16, 1)
    import io
    sys.stderr = io.StringIO()
    for _ in range(3):
        MemoryMapping(1)
    print(sys.stderr.getvalue().count("CoreDumpWarning"))
    """
    assert forbidden(run_child, code) == "1"


def test_another_failing_advice_does_not_warn(run_child: Callable[..., str]) -> None:
    """That the filter is what fails above; and a refused MADV_REMOVE changes nothing."""
    code = """
    forbid(9, 1)  # MADV_REMOVE
    memory = MemoryMapping.from_fd(fd, 8192)
    memory.fill(7)
    try:
        memory.remove_range(0, 4097)
    except guestmem.InvalidRangeError as error:
        print(error.__cause__.errno, error.__cause__.syscall)
    assert memory.read_bytes(0, 8192) == bytes([7]) * 8192
    """
    assert forbidden(run_child, code, "-W", "error") == "1 madvise"
