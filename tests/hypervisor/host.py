"""The host's side of the conversation with the built-in guest."""

import time
from concurrent.futures import Future

import guest
import guestmem
from guestmem import le32

WORD = 0xC0FFEE


def say(label: str, text: str) -> None:
    print(f"{label:<8} {text}", flush=True)


def check(label: str, passed: bool, text: str) -> bool:
    say(label, f"{text:<60} {'ok' if passed else 'FAILED'}")
    return passed


def converse(ram: guestmem.MemoryMapping, running: Future[None]) -> bool:
    """Talk with the guest, which runs meanwhile. True if every step came out right."""
    counter = ram.get_ref(guest.MAILBOX + guest.Mailbox.counter.offset, le32)
    word = ram.get_ref(guest.MAILBOX + guest.Mailbox.word.offset, le32)

    values = follow(counter, running)
    text = " -> ".join(map(str, values))
    passed = check("counter", len(values) == 4, f"{text}, while we look")

    # It counts only once these fields are there, and x86 keeps its stores in order.
    result = ram.read_obj(guest.RESULT, guest.Result)
    n = guest.FIBONACCI_INDEX
    right = result.fibonacci == result.seen_before == fibonacci(n)
    passed &= check("result", right, f"F({n}) = {result.fibonacci}, and 64 KiB filled with it")

    ram.remove_range(guest.FILLED, guest.FILLED_SIZE)
    zeros = not any(ram.read_bytes(guest.FILLED, guest.FILLED_SIZE))
    passed &= check("remove", zeros, "those 64 KiB given back; the host sees zeros")

    word.store(WORD)
    running.result()
    result = ram.read_obj(guest.RESULT, guest.Result)
    passed &= check("word", result.word == WORD, f"stored {WORD:#x}; the guest has read it")
    passed &= check("zeros", result.seen_after == 0, "the guest looks again: zeros")
    return passed


def follow(counter: guestmem.VolatileRef[int], running: Future[None]) -> list[int]:
    """Return four values of the guest's counter, each later than the one before."""
    values: list[int] = []
    while len(values) < 4 and not running.done():
        time.sleep(0.001)
        if (value := counter.load()) not in (0, *values):
            values.append(value)
    return values


def fibonacci(n: int) -> int:
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a
