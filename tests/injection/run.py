"""Make every public call while one after the other of the calls that it makes below fails.

test_injection.py runs this with the test-only build, in a process of its own; the calls are those
of test_leaks.py, and some more. Prints what was found as JSON.
"""

from __future__ import annotations

import _imp
import ctypes
import errno
import gc
import importlib.util
import io
import itertools
import json
import signal
import sys
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import guestmem
from guestmem import MemoryMapping, VolatileRef, VolatileSlice, _native

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    Call = Callable[[], object]
    Outcome = tuple[object, ...]

PYTHON, SYSTEM, ALLOCATOR = 1, 2, 4  # what is to fail: inject.c
KINDS = {PYTHON: "C-API", SYSTEM: "system", ALLOCATOR: "allocator"}
ERRNOS = errno.EIO, errno.EAGAIN, errno.EFAULT, errno.EINTR
EVER = 2**31

# Failures after which a call may go on as if there had been none.
SWALLOWED = {
    "EINTR": "an interrupted transfer is resumed",
    "fstatfs": "the pages are then taken to be of the usual size",
    "PyObject_GetBuffer": "of what has no buffer: a TypeError all the same",
    "PyObject_CallMethod": "release() of a view, after an exception that is not to be replaced",
    "munmap": "in a destructor: sys.unraisablehook is told",
    "PyErr_SetFromErrno": "in what it is told",
}

library = ctypes.PyDLL(_native.__file__)
library.inject_call.restype = ctypes.py_object
library.inject_call.argtypes = [
    *(ctypes.py_object, ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int),
    ctypes.c_char_p,
]
library.inject_reached.restype = ctypes.c_char_p


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


leaks = load(Path(__file__).parents[1] / "test_leaks.py")
SPEC = _native.__spec__
assert SPEC is not None


class Half(ctypes.Union):
    _fields_ = (("word", ctypes.c_uint16), ("char", ctypes.c_char * 2))


class Deep(ctypes.Structure):
    """One of each kind of field."""

    _fields_ = (
        *(("bits", ctypes.c_uint32, 3), ("real", ctypes.c_float), ("flag", ctypes.c_bool)),
        *(("halves", Half * 3), ("nested", ctypes.c_char * 2), ("none", ctypes.c_uint8 * 0)),
    )


class Flat(ctypes.BigEndianStructure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint16 * 2))


class Index:
    def __index__(self) -> int:
        return 7


def fresh() -> Any:
    """Import the extension as a new module, with a state of its own, without importlib."""
    module = _imp.create_dynamic(SPEC)
    _imp.exec_dynamic(module)
    return module


def more_calls(memory: Any) -> dict[str, list[Call]]:
    """Return what the table lacks: the first use of everything, and what ends in a destructor."""
    text, blocked = leaks.Raising(OSError, "text"), leaks.Raising(BlockingIOError, 11, "full", 3)
    writer = io.BufferedWriter(io.BytesIO())
    return {
        "import": [lambda: sorted(vars(fresh()))],
        "first use": [
            lambda: fresh().MemoryMapping(64).read_obj(0, Deep),
            lambda: fresh().MemoryMapping(64).write_obj(Flat(), 0),
            lambda: fresh().MemoryMapping(64).get_ref(0, leaks.LAYOUT).load(),
        ],
        "destructor": [
            lambda: bool(MemoryMapping(4096)),
            lambda: VolatileSlice.from_buffer(bytearray(8)).get_ref(0, Flat).size,
        ],
        "Struct that runs code": [lambda: memory.write_obj((1, Index()), 0, leaks.LAYOUT)],
        "SIGBUS": [claim],
        "large": [lambda: memory.read_obj(memory.size - 8, guestmem.u64)],
        "OSError": [
            lambda: memory.read_to_memory(0, text, 8),
            lambda: memory.write_from_memory(0, blocked, 8),
            lambda: memory.read_to_memory(0, writer, 8),
        ],
    }  # fmt: skip


class Action(ctypes.Structure):
    """struct sigaction of the C library."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


ACTION = Action()  # the default one
# Beforehand: where it lacks memory for it, CPython may crash.
set_action = ctypes.CDLL(None).sigaction


def claim() -> object:
    """Find somebody at SIGBUS who was never there before."""
    number = int.from_bytes(ACTION.mask, "little") + 2
    ACTION.mask[:] = number.to_bytes(128, "little")
    set_action(signal.SIGBUS, ctypes.byref(ACTION), None)
    return len(VolatileSlice.from_buffer(bytearray(8)))


def describe(value: object) -> object:
    """Return what is in a result, so that two can be compared."""
    if isinstance(value, list | tuple):
        return type(value), [describe(item) for item in value]
    if isinstance(value, MemoryMapping | VolatileSlice):
        return repr(value), None if value.closed else hash(value.read_bytes(0, value.size))
    if isinstance(value, VolatileRef):
        return repr(value), bytes(memoryview(value.to_slice()))
    if isinstance(value, memoryview | ctypes.Structure | ctypes.Union | ctypes.Array):
        return type(value), bytes(value)
    return type(value) if isinstance(value, weakref.ref) else repr(value)


def outcome(call: Call) -> Outcome:
    try:
        return "returns", describe(call())
    except Exception as error:  # its cause in a variable would be a cycle
        return "raises", type(error), str(error), type(error.__cause__), str(error.__cause__)


class Failure(NamedTuple):
    """What fails below a call: the n-th call of a kind (and all after it), with this errno."""

    kind: int
    err: int = 0
    lasting: bool = False
    broken: str | None = None  # a system call that always fails

    def __str__(self) -> str:
        parts = KINDS[self.kind], self.err and errno.errorcode[self.err], self.lasting and "lasting"
        return ", ".join(part for part in (*parts, self.broken) if part)

    def inject(self, call: Call, n: int) -> tuple[Outcome, str | None]:
        """Make the call; also say what failed, if so many calls are made."""
        last = EVER if self.lasting else n
        broken = self.broken and self.broken.encode()
        result = outcome(lambda: library.inject_call(call, self.kind, n, last, self.err, broken))
        reached: bytes | None = library.inject_reached()
        if reached is None:
            return result, None
        return result, reached.decode().removeprefix("_").removesuffix("_SizeT")


def is_typed(result: Outcome, plain: Outcome, failure: Failure) -> bool:
    """Whether a call may end like this because something below it has failed."""
    if result[0] != "raises":
        return False
    error: Any = result[1]
    if failure.kind == SYSTEM:
        if error is guestmem.InvalidRangeError:
            return result[3] is guestmem.SystemCallFailedError
        return error is guestmem.CoreDumpWarning or (
            issubclass(error, guestmem.GuestMemoryError) and issubclass(error, OSError)
        )
    if error is MemoryError:
        return True
    if failure.kind != ALLOCATOR:
        return False
    # CPython 3.11 makes instances of exceptions late: without memory there is another cause.
    if result[:3] == plain[:3] and result[3] is MemoryError:
        return True
    # And it loses an exception that it has no memory to trace back through Python code.
    lost = "error return without exception set", "<function "
    return error is SystemError and str(result[2]).startswith(lost)


class Checker:
    def __init__(self) -> None:
        self.w = leaks.World()
        self.pattern = bytes(n % 251 for n in range(self.w.m.size - 8)) + bytes([255] * 8)
        self.unraisable: list[type[BaseException]] = []
        sys.unraisablehook = lambda report: self.unraisable.append(report.exc_type)
        self.failures: list[str] = []
        self.swallowed: set[str] = set()
        self.reached: set[str] = set()
        self.calls = 0
        self.injections = dict.fromkeys(KINDS.values(), 0)
        self.borrowed = self.borrowers()

    def borrowers(self) -> list[str]:
        """Return who holds the memory: what close() and release() say, and a bytearray."""
        texts = []
        view = memoryview(self.w.s)
        for refused in self.w.m.close, self.w.s.release, lambda: self.w.buffer.append(0):
            try:
                refused()
            except BufferError as error:
                texts.append(str(error))
        view.release()
        if len(self.w.buffer) > 64:
            self.w.buffer.pop()
        return texts

    def prepare(self) -> None:
        self.w.m.write_all(self.pattern, 0)
        self.w.buffer[:] = bytes(64)
        self.unraisable.clear()

    def content(self) -> bytes:
        return bytes(self.w.m.read_bytes(0, self.w.m.size))

    def problems(
        self,
        call: Call,
        failure: Failure,
        plain: Outcome,
        after: bytes,
        result: Outcome,
        *,
        partial: bool,
    ) -> list[object]:
        """Say what is wrong after a call in which something has failed."""
        found: list[object] = []
        if result != plain and not is_typed(result, plain, failure):
            found.append(("it", result, "without failures it", plain))
        if not partial and self.content() not in (self.pattern, after):
            found.append("other memory has changed")
        if self.borrowers() != self.borrowed:
            found.append(self.borrowers())
        expected = OSError, *([] if failure.kind == SYSTEM else [MemoryError])
        if not all(issubclass(error, expected) for error in self.unraisable):
            found.append(("sys.unraisablehook is told", self.unraisable))
        self.prepare()
        if (again := failure.inject(call, EVER)[0]) != plain:
            found.append(("the next call", again, "the first", plain))
        return found

    def check(self, name: str, call: Call, failure: Failure) -> set[str]:
        """Let the first, second, ... fail, until there are no more; return what has failed."""
        all_reached: set[str] = set()
        outcome(call)  # what is remembered of a class is, from now on
        self.prepare()
        plain, _ = failure.inject(call, EVER)
        after = self.content()
        for n in itertools.count(1):
            self.prepare()
            result, reached = failure.inject(call, n)
            if reached is None:
                break
            self.injections[KINDS[failure.kind]] += 1
            all_reached.add(reached)
            if result == plain and failure.kind != ALLOCATOR:
                self.swallowed.add("EINTR" if failure.err == errno.EINTR else reached)
            partial = name.startswith("guest transfers")  # what came into one region stays
            found = self.problems(call, failure, plain, after, result, partial=partial)
            self.failures += [f"{name}: {failure}, {n}: {reached}: {what}" for what in found]
        if result != plain:
            self.failures.append(f"{name}: {failure}: {result}, not {plain}")
        self.reached |= all_reached
        if not failure.lasting and failure.kind != ALLOCATOR:
            self.check_leaks(name, call, failure, n)
        return all_reached

    def check_leaks(self, name: str, call: Call, failure: Failure, end: int) -> None:
        rounds = max(6, 200 // end)
        grown: dict[str, int] = {}
        for _ in range(10):  # caches fill, and free lists now and then
            before = leaks.counts()
            for _ in range(rounds):
                for n in range(1, end):
                    failure.inject(call, n)
            after = leaks.counts()
            grown = {key: after[key] - before[key] for key in after}
            grown = {key: more for key, more in grown.items() if more >= rounds}
            if leaks.no_blocks():
                grown.pop("blocks", None)
            if not grown:
                return
        self.failures.append(f"{name}: {failure}: {grown} more in {rounds} rounds")

    def check_call(self, name: str, call: Call, *, makes_classes: bool) -> None:
        self.calls += 1
        self.check(name, call, Failure(PYTHON))
        self.check(name, call, Failure(PYTHON, lasting=True))
        if not makes_classes:
            self.check(name, call, Failure(ALLOCATOR))
        for err in ERRNOS:
            broken = self.check(name, call, Failure(SYSTEM, err))
            if not broken:
                break
            if err != errno.EINTR:  # a transfer would go on for ever
                self.check(name, call, Failure(SYSTEM, err, lasting=True))
            if err == errno.EIO:
                for function in broken:
                    self.check(name, call, Failure(PYTHON, err, broken=function))


def main() -> None:
    warnings.simplefilter("error")
    checker = Checker()
    leaks.test_every_public_method_is_in_the_table(checker.w)
    gc.freeze()  # what is here is not looked at, hundreds of times
    for name, row in {**leaks.calls(checker.w), **more_calls(checker.w.m)}.items():
        for number, call in enumerate(row):
            # CPython may crash where it lacks memory for a class.
            makes_classes = name in ("import", "first use")
            checker.check_call(f"{name} [{number}]", call, makes_classes=makes_classes)
    report = {
        "calls": checker.calls,
        "injections": checker.injections,
        "failures": checker.failures,
        "reached": sorted(checker.reached),
        "swallowed": sorted(checker.swallowed - SWALLOWED.keys()),
        "not swallowed": sorted(SWALLOWED.keys() - checker.swallowed),
    }
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
