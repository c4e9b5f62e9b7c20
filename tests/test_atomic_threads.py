"""Threads: atomics, arrays and dirty pages, used by all at once."""

from __future__ import annotations

import itertools
import random
import threading
from typing import TYPE_CHECKING

import pytest

from guestmem import GuestMemory, MemoryMapping, Ordering, le16, u32, u64

if TYPE_CHECKING:
    from collections.abc import Callable

    Race = Callable[..., None]

PAGE = 4096
PATTERNS = [0, 2**64 - 1, 0x0123456789ABCDEF]


# Atomics and arrays


def test_atomics_lose_nothing(race: Race) -> None:
    guest = GuestMemory.from_ranges([(0, PAGE)])
    total, swapped = guest.get_atomic_ref(0, u64), guest.get_atomic_ref(8, u32)
    bits, left = guest.get_atomic_ref(16, u64), guest.get_atomic_ref(24, u64)
    added = itertools.count()

    def add() -> None:
        for n in range(20):
            total.fetch_add(n, Ordering.RELAXED)
            next(added)
            while True:  # by hand
                before = swapped.load()
                if swapped.compare_exchange(before, (before + 1) % 2**32)[0]:
                    break

    def flip(bit: int) -> Callable[[], None]:
        def flip() -> None:
            assert not bits.fetch_or(1 << bit) & 1 << bit
            assert bits.fetch_xor(1 << bit) & 1 << bit
            left.exchange(bit)
            assert left.load() in (0, 1)

        return flip

    race(add, add, flip(0), flip(1))
    runs = next(added) // 20
    assert total.load() == runs * sum(range(20))
    assert swapped.load() == runs * 20 % 2**32
    assert bits.load() == 0


def test_what_was_released_is_there(race: Race) -> None:
    """A message, then its number by a release: who acquires the number finds the message."""
    memory = MemoryMapping(PAGE)
    slots = memory.get_array_ref(64, 64, u64)
    sent, received = memory.get_atomic_ref(0, u64), memory.get_atomic_ref(8, u64)

    def send() -> None:
        n = sent.load(Ordering.RELAXED)
        while n - received.load(Ordering.ACQUIRE) < 64:
            slots[n % 64] = n * 3
            n += 1
            sent.store(n, Ordering.RELEASE)

    def receive() -> None:
        n = received.load(Ordering.RELAXED)
        while n != sent.load(Ordering.ACQUIRE):
            assert slots[n % 64] == n * 3
            n += 1
            received.store(n, Ordering.RELEASE)

    race(send, receive, enough=lambda: received.load() > 100)


def test_an_array_in_many_threads(race: Race) -> None:
    """Elements are never torn, one by one or in bulk."""
    memory = MemoryMapping(64 * 1024)
    array = memory.get_array_ref(8, 4096, u64)
    fills = [value.to_bytes(8, "little") * 4096 for value in PATTERNS]

    def write() -> None:
        array.copy_from(random.choice(fills))
        array[100:200].copy_from([random.choice(PATTERNS)] * 100)
        array[random.randrange(4096)] = random.choice(PATTERNS)

    def read() -> None:
        assert set(array.tolist()) <= {*PATTERNS}
        assert set(array[5:300]) <= {*PATTERNS}
        assert array[random.randrange(4096)] in PATTERNS
        back = bytearray(4096 * 8)
        assert array.copy_to(back) == 4096
        assert set(memoryview(back).cast("Q")) <= {*PATTERNS}
        assert array[7:9].to_slice().size == 16

    race(write, read, write, read)


def test_refs_made_and_dropped_in_many_threads(race: Race) -> None:
    guest = GuestMemory.from_ranges([(0, PAGE), (PAGE, PAGE)])

    def make() -> None:
        refs = [guest.get_atomic_ref(n * 8, u64) for n in range(4)]
        arrays = [guest.get_array_ref(PAGE + n * 8, 8, le16)[2:6] for n in range(4)]
        parts = [ref.to_slice() for ref in refs] + [array.to_slice() for array in arrays]
        assert all(part.size == 8 for part in parts)

    race(make, make, make)
    memories = [region.memory for region in guest.regions]
    guest.close()  # all were counted
    assert all(memory.closed for memory in memories)


# Dirty pages


@pytest.mark.parametrize("way", ["store", "atomic", "array", "guest", "mark", "merge", "large"])
def test_each_mark_is_taken_once(way: str) -> None:
    """Two take while two write each page once: no page is missing, and none comes twice."""
    pages = 2048
    memory = MemoryMapping(pages * PAGE, track_dirty=True)
    guest, dirty = GuestMemory([(PAGE, memory)]), memory.dirty
    assert dirty is not None
    content = bytes(128 * PAGE)
    taken: list[int] = []  # append is atomic
    stop, begun = threading.Event(), threading.Barrier(4)

    def write(half: int) -> None:
        bits = bytearray(pages // 8)
        step = 128 if way == "large" else 1  # a copy of 512 KiB gives the GIL away
        for page in range(half * pages // 2, (half + 1) * pages // 2, step):
            at = page * PAGE + 8
            if way == "store":
                memory.get_ref(at, u64).store(1)
            elif way == "atomic":
                memory.get_atomic_ref(at, u64).fetch_add(1)
            elif way == "array":
                memory.get_array_ref(at, 2, u32)[1] = 1
            elif way == "guest":
                guest.write_all(b"1", PAGE + at)
            elif way == "mark":
                dirty.mark(at, 1)
            elif way == "large":
                memory.write_all(content, page * PAGE)
            else:
                bits[page // 8] = 1 << page % 8
                dirty.merge(bits)
                bits[page // 8] = 0

    def take(which: int) -> None:
        last = False
        while not last:
            last = stop.is_set()
            ranges = dirty.take() if which else [(at - PAGE, n) for at, n in guest.take_dirty()]
            for start, count in ranges:
                taken.extend(range(start // PAGE, (start + count) // PAGE))

    errors: list[BaseException] = []

    def work(action: Callable[[int], None], number: int) -> None:
        begun.wait()
        try:
            action(number)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=work, args=(write, n)) for n in range(2)]
    takers = [threading.Thread(target=work, args=(take, n)) for n in range(2)]
    for thread in writers + takers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in takers:
        thread.join()
    assert not errors, errors
    assert sorted(taken) == list(range(pages))
    assert dirty.count == 0


def test_looking_at_dirty_pages_in_many_threads(race: Race) -> None:
    """Whatever is asked while others mark and take: the answer is one that there could be."""
    memory = MemoryMapping(256 * PAGE, track_dirty=True)
    dirty = memory.dirty
    assert dirty is not None

    def write() -> None:
        memory.fill(1, random.randrange(250) * PAGE, random.randrange(6 * PAGE))

    def look() -> None:
        assert 0 <= dirty.count <= 256
        end = -1
        for start, count in dirty.ranges():
            assert start % PAGE == count % PAGE == 0 < count
            assert end < start  # in order, and never two side by side
            end = start + count
        assert end <= memory.size
        assert isinstance(dirty.is_dirty(random.randrange(memory.size)), bool)
        assert len(bytes(dirty)) == 32

    race(write, look, look, dirty.take)
