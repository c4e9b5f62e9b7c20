"""A signal may cut any system call short: its handler runs, and no byte is lost or repeated."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from guestmem import MemoryMapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 1 << 20


class Alarm(Exception):
    """What a handler raises here."""


@pytest.fixture
def on_alarm() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Have a handler run in a moment, while the main thread waits in a system call."""
    before = signal.getsignal(signal.SIGALRM)

    def arm(handler: Callable[[], object], interval: float = 0) -> None:
        signal.signal(signal.SIGALRM, lambda _number, _frame: handler())
        signal.setitimer(signal.ITIMER_REAL, 0.05, interval)

    yield arm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def memory() -> MemoryMapping:
    return MemoryMapping(SIZE)


@pytest.mark.parametrize("before", [b"", b"abc"])
@pytest.mark.parametrize("buffering", [None, 0, -1])
def test_a_waiting_read_runs_the_handler_and_goes_on(
    memory: MemoryMapping,
    pipe: tuple[int, int],
    on_alarm: Callable[[Callable[[], object]], None],
    before: bytes,
    buffering: int | None,
) -> None:
    """Only the handler writes what the read waits for: a read that slept through it never ends."""
    os.write(pipe[1], before)
    on_alarm(lambda: os.write(pipe[1], b"defgh"))
    if buffering is None:
        memory.read_to_memory(2, pipe[0], len(before) + 5)
    else:
        with open(pipe[0], "rb", buffering=buffering, closefd=False) as source:
            memory.read_to_memory(2, source, len(before) + 5)
    assert memory.read_bytes(0, len(before) + 8) == b"\0\0" + before + b"defgh\0"


def test_a_waiting_write_runs_the_handler_and_goes_on(
    memory: MemoryMapping, pipe: tuple[int, int], on_alarm: Callable[..., None]
) -> None:
    """Only the handler drains the pipe. A write cut short is a success, not EINTR: all the same
    the handler runs before the next one, which would wait for ever.
    """
    memory.fill(1, 0, SIZE // 2)
    memory.fill(2, SIZE // 2)
    got = bytearray()
    on_alarm(lambda: got.extend(os.read(pipe[0], 1 << 18)), 0.01)
    memory.write_from_memory(0, pipe[1], SIZE)
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.set_blocking(pipe[0], False)
    while len(got) < SIZE:
        got += os.read(pipe[0], SIZE)
    assert got == b"\1" * (SIZE // 2) + b"\2" * (SIZE // 2)


@pytest.mark.parametrize("before", [b"", b"abc"])
def test_a_handler_that_raises_ends_the_read(
    memory: MemoryMapping, pipe: tuple[int, int], on_alarm: Callable[..., None], before: bytes
) -> None:
    boom = Alarm()

    def handler() -> None:
        raise boom

    os.write(pipe[1], before)
    on_alarm(handler)
    with pytest.raises(Alarm) as caught:
        memory.read_to_memory(0, pipe[0], 8)
    assert caught.value is boom
    assert boom.__cause__ is None
    assert memory.read_bytes(0, 4) == before.ljust(4, b"\0")  # what arrived stays
    memory.close()  # no call is left inside


def test_a_handler_that_raises_ends_the_write(
    memory: MemoryMapping, pipe: tuple[int, int], on_alarm: Callable[..., None]
) -> None:
    def handler() -> None:
        raise Alarm

    on_alarm(handler)
    with pytest.raises(Alarm):
        memory.write_from_memory(0, pipe[1], SIZE)
    memory.close()


def test_a_handler_cannot_close_what_is_being_read(
    memory: MemoryMapping, pipe: tuple[int, int], on_alarm: Callable[..., None]
) -> None:
    said: list[str] = []

    def handler() -> None:
        try:
            memory.close()
        except BufferError as error:
            said.append(str(error))
        os.write(pipe[1], b"12345678")

    on_alarm(handler)
    memory.read_to_memory(0, pipe[0], 8)
    assert said == ["cannot close the mapping: it is held by 1 running call"]
    memory.close()


def test_many_signals_lose_nothing(
    memory: MemoryMapping, pipe: tuple[int, int], on_alarm: Callable[..., None]
) -> None:
    ticks = 0

    def handler() -> None:
        nonlocal ticks
        ticks += 1

    data = bytes(n % 253 for n in range(SIZE))

    def feed() -> None:
        for n in range(0, SIZE, 10_000):
            os.write(pipe[1], data[n : n + 10_000])
            time.sleep(0.001)

    thread = threading.Thread(target=feed)
    on_alarm(handler, 0.001)
    thread.start()
    memory.read_to_memory(0, pipe[0], SIZE)
    thread.join()
    assert ticks > 3
    assert memory.read_bytes(0, SIZE) == data


def test_interrupt_key(memory: MemoryMapping, pipe: tuple[int, int]) -> None:
    """KeyboardInterrupt, from a real SIGINT, ends a read that waits for ever."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            memory.read_to_memory(0, pipe[0], 1)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    memory.read_to_memory(0, io.BytesIO(b"x"), 1)
    memory.close()
