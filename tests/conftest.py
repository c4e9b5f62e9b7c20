"""What several test files share, as fixtures: there is no tests package to import from."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

numbers = itertools.count(1)
RACE_SECONDS = float(os.environ.get("GUESTMEM_RACE_SECONDS", "0.4"))  # for each of the races


class Backing:
    """A memfd with a name of its own, by which /proc/self/maps tells who maps it."""

    def __init__(self, size: int) -> None:
        self.name = f"guestmem-{os.getpid()}-{next(numbers)}"
        self.size = size
        self.fd = os.memfd_create(self.name)
        os.ftruncate(self.fd, size)

    def maps(self) -> int:
        """Count the mappings of it in this process."""
        with open("/proc/self/maps") as file:
            return sum(f"/memfd:{self.name} " in line for line in file)

    def blocks(self) -> int:
        """Return how many bytes of memory it takes."""
        return os.fstat(self.fd).st_blocks * 512

    def read(self, offset: int = 0, count: int | None = None) -> bytes:
        return os.pread(self.fd, self.size if count is None else count, offset)


@pytest.fixture
def backing() -> Iterator[Callable[[int], Backing]]:
    """Make memfds; they are closed after the test."""
    made: list[Backing] = []

    def make(size: int) -> Backing:
        made.append(Backing(size))
        return made[-1]

    yield make
    for one in made:
        os.close(one.fd)


def run(
    code: str,
    *arguments: object,
    options: tuple[str, ...] = (),
    status: int = 0,
    stderr: str = "",
    skip: int | None = None,
    timeout: float = 60,
    **popen: object,
) -> str:
    """Run code in an interpreter of its own; return what it printed.

    Its exit status and its stderr must be those given. Exit status `skip` says that the machine
    lacks what the child needs; it has printed what.
    """
    result = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **popen,  # type: ignore[call-overload]
    )
    if skip is not None and result.returncode == skip:
        pytest.skip(result.stdout.strip())
    assert (result.returncode, result.stderr) == (status, stderr), result
    assert isinstance(result.stdout, str)
    return result.stdout


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe's ends, the reading one first; closed after the test."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.fixture
def run_child() -> Callable[..., str]:
    return run


def run_race(*workers: Callable[[], object], enough: Callable[[], bool] = lambda: True) -> None:
    """Run each again and again, all at once, for some time and until there was enough of it.

    What one of them raises ends the test.
    """
    errors: list[BaseException] = []
    begin = time.monotonic()
    start = threading.Barrier(len(workers))

    def work(worker: Callable[[], object]) -> None:
        start.wait()
        try:
            while not errors and (time.monotonic() < begin + RACE_SECONDS or not enough()):
                worker()
                assert time.monotonic() < begin + 60, "it takes too long to race"
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


@pytest.fixture
def race() -> Callable[..., None]:
    return run_race


@pytest.fixture
def mortal_classes() -> None:
    """Skip where this Python makes classes immortal: free-threaded 3.13, after a first thread."""
    control = weakref.ref(type("Control", (), {}))
    gc.collect()
    if control() is not None:
        pytest.skip("this Python makes classes immortal")
