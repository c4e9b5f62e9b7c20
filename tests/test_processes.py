"""Memory shared with other processes: what one writes, the other sees."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

from guestmem import MemoryMapping, u32, u64

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Backing

    Backings = Callable[[int], Backing]

PAGE = 4096


def in_fork(action: Callable[[], object]) -> None:
    """Run it in a forked child, which must end well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_second_process_sees_and_changes_the_memory(backing: Backings) -> None:
    file = backing(2 * PAGE)
    mapping = MemoryMapping.from_fd(file.fd, 2 * PAGE)
    mapping.write_all(b"from the parent", PAGE)
    request, reply = mapping.get_ref(0, u32), mapping.get_ref(64, u32)
    code = """
    import sys, time
    from guestmem import MemoryMapping, u32
    memory = MemoryMapping.from_fd(int(sys.argv[1]), 8192)
    assert memory.read_bytes(4096, 15) == b"from the parent"
    request, reply = memory.get_ref(0, u32), memory.get_ref(64, u32)
    seen = 0
    while seen < 100:
        now = request.load()
        if now != seen:
            assert now == seen + 1, (now, seen)
            seen = now
            memory.write_all(b"answer %d" % seen, 100)
            reply.store(seen)
        else:
            time.sleep(0)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(file.fd)], pass_fds=[file.fd]
    )
    try:
        for n in range(1, 101):
            request.store(n)
            while reply.load() != n:
                assert child.poll() is None or reply.load() == n
                os.sched_yield()
            assert mapping.read_bytes(100, len(f"answer {n}")) == b"answer %d" % n
        assert child.wait(timeout=60) == 0
    finally:
        child.kill()
        child.wait()


def test_fork_inherits_anonymous_memory() -> None:
    mapping = MemoryMapping(PAGE)
    part = mapping.get_slice(8, 8)
    ref = mapping.get_ref(16, u64)
    view = memoryview(mapping)
    mapping.write_obj(41, 0, u64)

    def child() -> None:
        assert mapping.read_obj(0, u64) == 41
        mapping.write_obj(42, 0, u64)
        part.write_obj(43, 0, u64)
        ref.store(44)
        view[24] = 45

    in_fork(child)
    assert [mapping.read_obj(n, u64) for n in (0, 8, 16, 24)] == [42, 43, 44, 45]


def test_closing_in_a_child_leaves_the_parent_alone(backing: Backings) -> None:
    file = backing(PAGE)
    mapping = MemoryMapping.from_fd(file.fd, PAGE)
    anonymous = MemoryMapping(PAGE)
    anonymous.fill(1)

    def child() -> None:
        mapping.write_obj(7, 0, u64)
        mapping.close()
        anonymous.close()
        assert file.maps() == 0

    in_fork(child)
    assert file.maps() == 1
    assert mapping.read_obj(0, u64) == 7
    assert anonymous.read_bytes(0, 2) == b"\1\1"
    mapping.close()
    anonymous.close()


def test_closing_in_the_parent_leaves_a_child_alone(backing: Backings) -> None:
    file = backing(PAGE)
    mapping = MemoryMapping.from_fd(file.fd, PAGE)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.read(read_end, 1)  # until the parent has closed it
            mapping.write_obj(9, 0, u64)
            status = 0
        finally:
            os._exit(status)
    mapping.close()
    os.write(write_end, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert file.read(0, 8) == (9).to_bytes(8, sys.byteorder)
    os.close(read_end)
    os.close(write_end)


def test_what_a_child_removes_is_gone_here() -> None:
    mapping = MemoryMapping(4 * PAGE)
    mapping.fill(5)
    in_fork(lambda: mapping.remove_range(PAGE, 2 * PAGE))
    assert mapping.read_bytes(0, 4 * PAGE) == b"\5" * PAGE + bytes(2 * PAGE) + b"\5" * PAGE
