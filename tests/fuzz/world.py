"""One sequence of calls: what exists meanwhile, how a call is judged, what must hold at the end.

As long as nothing hostile has run, each area of bytes has a model, and what calls return and
leave behind is compared with it.
"""

from __future__ import annotations

import array
import ctypes
import gc
import io
import os
import pickle
import re
import struct
import sys
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from tests.fuzz import hostile
from tests.fuzz.choices import Choices
from tests.fuzz.hostile import Hostile, Planned, PlannedExit

import guestmem
from guestmem import GuestMemoryError, MemoryMapping, VolatileMemory, VolatileSlice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Before, the garbage collector clears a memoryview while somebody has its buffer (CPython's
# gh-77894), so a cycle through one is left to live on: here nothing is made from one.
VIEWS_CAN_BE_CLEARED = sys.version_info >= (3, 12, 7)

PAGE = os.sysconf("SC_PAGESIZE")
SIZES = [1, 7, 8, 64, 123, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 123, 300_000]
FILE_SIZE = 76 * PAGE  # the largest of them, from the largest offset at which files are mapped
NO_SIZES = [0, -1, 2**47, 2**63 - 1, 2**63, 2**64 - 1, 2**64]  # none of them can be mapped
MOST = 8  # objects of a kind that live at once
DEEPEST = 3  # hostile calls inside hostile calls

ALLOWED = (
    *(GuestMemoryError, TypeError, ValueError, OverflowError, IndexError, BufferError),
    *(MemoryError, OSError, Planned, PlannedExit),
    struct.error,  # of a tuple that its Struct does not take
)
FAILED = object()
ADDRESS = re.compile(r"0x(55|56|7[a-f])[0-9a-f]{10}\b", re.IGNORECASE)

LAYOUTS = {
    "u8": "=B", "u16": "=H", "u32": "=I", "u64": "=Q", "usize": "=Q", "f32": "=f", "f64": "=d",
    "i8": "=b", "i16": "=h", "i32": "=i", "i64": "=q", "isize": "=q",
    "le16": "<H", "le32": "<I", "le64": "<Q", "be16": ">H", "be32": ">I", "be64": ">Q",
}  # fmt: skip
SCALARS = {getattr(guestmem, name): layout for name, layout in LAYOUTS.items()}


class Finding(BaseException):
    """Something that must not be. No "except Exception" on the way hides it."""


class Area:
    """Bytes that several objects may show, and what they should be."""

    def __init__(self, model: bytearray, *, shrinks: bool = False, fd: int = -1) -> None:
        self.model, self.shrinks, self.fd = model, shrinks, fd
        self.known = not shrinks


class Place:
    """An object that shows size bytes of an area, from start on."""

    def __init__(self, obj: Any, area: Area, start: int, size: int) -> None:
        self.obj, self.area, self.start, self.size = obj, area, start, size

    def at(self, offset: int, count: int) -> bytes:
        if offset + count > self.size:
            raise Finding(f"{offset:#x} + {count:#x} was accepted of {self.size:#x}")
        return bytes(self.area.model[self.start + offset :][:count])

    def put(self, offset: int, content: bytes) -> None:
        self.at(offset, len(content))
        start = self.start + offset
        self.area.model[start : start + len(content)] = content


class Host(bytearray):
    """A buffer that can be part of a cycle."""

    kept: Any = None


class World:
    def __init__(self, data: bytes) -> None:
        self.choices = Choices(data)
        self.tame = True
        self.over = False
        self.depth = 0
        self.memories: list[Place] = []
        self.refs: list[Place] = []
        self.buffers: list[Place] = []
        self.kept: list[Any] = []  # what hostile objects kept
        self.views: list[memoryview] = []
        self.ctypes_objects: list[Any] = []
        self.structs = [
            *(struct.Struct(f) for f in hostile.FORMATS),
            hostile.HostileStruct("<IQ"),
            struct.Struct.__new__(struct.Struct) if sys.version_info >= (3, 13) else None,
        ]
        self.files: list[Any] = []
        self.fds: list[int] = []
        self.shrinking_fds: list[int] = []

    # --- calls, and how they are judged ---

    def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return what it returned; FAILED where it raised what it may."""
        try:
            return function(*arguments, **named)
        except ALLOWED as error:
            self.judge(error)
            return FAILED

    def judge(self, error: BaseException) -> None:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, SystemError):
                raise Finding(f"the cause {cause!r} of {error!r}") from error
            cause = cause.__cause__
        if isinstance(error, GuestMemoryError):
            if ADDRESS.search(str(error)):
                raise Finding(f"a host address: {error}") from error
            again = pickle.loads(pickle.dumps(error))
            if (type(again), str(again)) != (type(error), str(error)):
                raise Finding(f"{error!r} pickles to {again!r}") from error

    def check(self, got: object, wanted: object) -> None:
        """Compare what a tame call returned; by repr, for which one NaN is like another."""
        if self.tame and repr(got) != repr(wanted):
            raise Finding(f"{got!r:.200} where it should be {wanted!r:.200}")

    def run(self, operations: Sequence[Callable[[World], None]]) -> None:
        self.operations = operations
        flags = self.choices.byte()
        thresholds = gc.get_threshold()
        unraisable = sys.unraisablehook
        unseen: list[BaseException] = []

        def see(what: Any) -> None:
            if not isinstance(what.exc_value, ALLOWED):
                unseen.append(what.exc_value)

        sys.unraisablehook = see
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if flags & 1:
                    gc.set_threshold(1)  # runs wherever it may run
                while self.choices.left:
                    self.step()
                self.compare()
                self.close()
        finally:
            gc.set_threshold(*thresholds)
            sys.unraisablehook = unraisable
            for fd in self.fds + self.shrinking_fds:
                os.close(fd)
        if unseen:
            raise unseen[0]

    def step(self) -> None:
        operation = self.choices.pick(self.operations)
        operation(self)

    def run_some(self) -> None:
        """Run a few calls inside of whatever runs now."""
        if self.over or self.depth == DEEPEST:
            return
        self.depth += 1
        try:
            for _ in range(self.choices.byte() % 4):
                self.step()
        finally:
            self.depth -= 1

    def compare(self) -> None:
        """Compare the contents of everything with its model."""
        for place in self.memories:
            if len(place.obj) != place.size or place.obj.size != place.size:
                raise Finding(f"{place.obj!r} should have size {place.size:#x}")
            if self.tame and place.area.known and not place.obj.closed:
                self.check(place.obj.read_bytes(0, place.size), place.at(0, place.size))
        for place in self.buffers:
            if place.area.known and isinstance(place.obj, bytearray):
                self.check(bytes(place.obj), bytes(place.area.model))

    def close(self) -> None:
        """Drop all that borrows: then nobody hinders anybody from closing, or from resizing."""
        self.over = True  # hostile objects that die now find nothing to strike
        hosts = [p.obj for p in self.buffers if isinstance(p.obj, bytearray)]
        mappings = [p.obj for p in self.memories if isinstance(p.obj, MemoryMapping)]
        slices = [weakref.ref(p.obj) for p in self.memories if isinstance(p.obj, VolatileSlice)]
        for some in (self.memories, self.refs, self.buffers, self.kept, self.views, self.files):
            some.clear()
        self.ctypes_objects.clear()
        for host in hosts:
            if isinstance(host, Host):
                host.kept = None
        gc.collect()
        for mapping in mappings:
            mapping.close()
            if not mapping.closed or " closed>" not in repr(mapping):
                raise Finding(f"{mapping!r} should be closed")
        if any(ref() is not None for ref in slices):
            raise Finding("a slice outlives all who knew it")
        for host in hosts:
            host.append(0)  # a BufferError if somebody still has its buffer

    # --- arguments ---

    def mapping_size(self) -> int:
        return self.choices.pick([*SIZES, *SIZES, *NO_SIZES])

    def raw_number(self, limit: int = PAGE) -> int:
        choices = self.choices
        kind, byte = choices.byte() % 8, choices.byte()
        if kind < 4:
            return byte
        if kind == 4:
            return limit - byte
        if kind == 5:
            return byte * limit // 256
        around = choices.pick([0, limit, PAGE, 2**31, 2**32, 2**63, 2**64, 2**70, -(2**63)])
        return around + byte - 128

    def some_of(self, count: int) -> int:
        """Return all of it, or less; all at the end of the input, or it would take very long."""
        byte = self.choices.byte()
        return count if byte < 64 else min(count, byte)

    def number(self, limit: int = PAGE) -> Any:
        """Return an offset, a count or a value: mostly one that fits in a limit."""
        if not self.choices.one_in(12):
            return self.raw_number(limit)
        return self.odd(hostile.HostileInt(self.choices.byte()), True, 1.0, float("nan"))

    def odd(self, *more: Any) -> Any:
        """Return what hardly any call takes."""
        some = [
            *(Hostile(self), None, "1", b"1", [], object(), hostile.NoMethods(self)),
            hostile.HostileFile(self),
        ]
        return self.choices.pick([*some, *more])

    def memory(self) -> Place:
        if not self.memories:
            self.add_mapping(MemoryMapping(2 * PAGE + 123), Area(bytearray(2 * PAGE + 123)), 0)
        return self.choices.pick(self.memories)

    def slice(self) -> Place:
        slices = [p for p in self.memories if isinstance(p.obj, VolatileSlice)]
        if slices:
            return self.choices.pick(slices)
        host = self.buffer()
        made = self.from_buffer(host.obj)
        if made is FAILED or made.size != host.size or not isinstance(host.obj, bytearray):
            host = self.memory()
            made = self.call(host.obj.get_slice, 0, host.size)
            if made is FAILED:
                model = bytearray(77)
                host = Place(Host(model), Area(model), 0, len(model))
                self.buffers.append(host)
                made = VolatileSlice.from_buffer(host.obj)
        return self.add_memory(Place(made, host.area, host.start, host.size))

    def from_buffer(self, obj: Any) -> Any:
        safe = isinstance(obj, (bytearray, bytes, ctypes.Array, VolatileMemory))
        if safe or VIEWS_CAN_BE_CLEARED:
            return self.call(VolatileSlice.from_buffer, obj)
        return FAILED

    def add_memory(self, place: Place) -> Place:
        if len(place.obj) != place.size:
            raise Finding(f"{place.obj!r} should have size {place.size:#x}")
        if len(self.memories) >= MOST:
            self.memories.pop(self.choices.byte() % MOST)
        self.memories.append(place)
        return place

    def add_mapping(self, mapping: MemoryMapping, area: Area, start: int) -> Place:
        return self.add_memory(Place(mapping, area, start, mapping.size))

    def add_buffer(self, obj: Any, area: Area, start: int, size: int) -> Place:
        place = Place(obj, area, start, size)
        if len(self.buffers) >= MOST:
            self.buffers.pop(self.choices.byte() % MOST)
        self.buffers.append(place)
        return place

    def buffer(self) -> Place:
        """Return an argument with a buffer: new, or one that others have."""
        choices = self.choices
        if self.buffers and not choices.one_in(4):
            return choices.pick(self.buffers)
        size = choices.pick([0, 1, 7, 8, 9, 31, 32, 33, 64, 100, 255, PAGE, PAGE + 9, 270_000])
        seed = choices.byte()
        model = bytearray(bytes((seed + i) % 256 for i in range(256)) * (size // 256 + 1))[:size]
        kind = choices.byte() % 5
        obj: Any = Host(model)
        if kind == 3:
            obj = bytes(model)
        elif kind == 4:
            obj = (ctypes.c_ubyte * size).from_buffer_copy(model)
        return self.add_buffer(obj, Area(model), 0, size)

    def buffer_or_odd(self) -> Place:
        if not self.choices.one_in(10):
            return self.buffer()
        cast = memoryview(bytearray(64))
        some: list[Any] = [
            *(cast[::2], cast[::-1], cast.cast("Q"), cast.cast("B", (8, 8)), cast.toreadonly()),
            *(array.array("I", [1, 2, 3]), self.memory_as_buffer(), Hostile(self)),
        ]
        obj = self.choices.pick([*some, self.odd()])
        self.tame = False  # nobody knows what it shows
        return Place(obj, Area(bytearray()), 0, 0)

    def memory_as_buffer(self) -> Any:
        place = self.memory()
        return bytearray(9) if place.area.shrinks else place.obj

    def view_for_hostile(self) -> Any:
        some: list[Any] = [memoryview(bytearray(40)), memoryview(b"readonly"), None]
        return self.choices.pick([*some, *self.views])

    def keep_view(self, view: memoryview) -> None:
        self.views.append(view)
        self.add_buffer(view, Area(bytearray()), 0, 0)

    def type(self) -> Any:
        choices = self.choices
        kind = choices.byte() % 8
        if kind < 4:
            return choices.pick(list(SCALARS))
        if kind < 6:
            return choices.pick(hostile.CLASSES)
        if kind == 6:
            return choices.pick(self.structs)
        return choices.pick([hostile.striking_class(self), int, MemoryMapping, self.odd()])

    def value(self, of: Any) -> Any:
        """Return a value: mostly one of that type."""
        choices = self.choices
        if choices.one_in(8):
            return self.odd(self.instance(choices.pick(hostile.CLASSES)))
        if issubclass(type(of), struct.Struct):
            count = choices.pick([1, 0, 2, 3, 9, 100])
            values = choices.pick([1, 0, -1, b"", b"abcde", 0.5, True, Hostile(self)])
            return (values,) * count
        if issubclass(type(of), type):
            return self.instance(of)
        if choices.one_in(4):
            return choices.pick([0.0, -2.5, 1e300, float("inf"), float("nan"), 2**1024])
        return self.number(2 ** choices.pick([8, 16, 32, 64, 63]))

    def instance(self, cls: Any) -> Any:
        try:
            made = hostile.odd() if cls is hostile.Odd else cls()
            if self.choices.one_in(5):
                # Its buffer is no longer of its class's size. Never later: that frees it under
                # whoever has it, and is the crash of ctypes alone.
                ctypes.resize(made, ctypes.sizeof(cls) + 64)
        except (*ALLOWED, AttributeError):
            return None
        self.ctypes_objects.append(made)
        return made

    # --- files ---

    def own(self, fd: int) -> int:
        self.fds.append(fd)
        return fd

    def memfd(self) -> int:
        """Return a file that holds every mapping of it: beyond its end would be a bus error."""
        fd = os.memfd_create("guestmem-fuzz")
        os.ftruncate(fd, FILE_SIZE)
        return fd

    def fd(self) -> int:
        """Return a descriptor that neither blocks nor belongs to anybody else."""
        choices = self.choices
        kind = choices.byte() % 8
        if kind == 0:
            return self.own(self.memfd())
        if kind == 1:
            ends = os.pipe2(os.O_NONBLOCK)
            os.write(self.own(ends[1]), b"from a pipe")
            return self.own(ends[0])
        if kind == 2:
            ends = os.pipe2(os.O_NONBLOCK)
            self.own(ends[0])
            return self.own(ends[1])
        if kind == 3:
            return self.own(os.open("/dev/zero", os.O_RDWR))
        if kind == 4:
            return self.own(os.open("/", os.O_RDONLY))
        if kind == 5 and self.fds:
            return choices.pick(self.fds)
        return choices.pick([-1, 1_000_000, 2**31, 2**63, -(2**70)])

    def stream(self) -> Any:
        """Return a source or destination of which nothing is known."""
        self.tame = False
        kind = self.choices.byte() % 8
        if kind == 0:
            return self.fd()
        if kind == 1:
            fd = self.fd()
            opened = self.call(open, fd, "r+b", self.choices.pick([0, 16]), closefd=False)
            if opened is FAILED:
                return fd
            self.files.append(opened)
            return opened
        if kind == 2:
            return io.BytesIO(bytes(range(self.choices.byte())))
        if kind == 3:
            return self.choices.pick([io.StringIO("text"), self.odd()])
        hostiles = [hostile.HostileFile, hostile.HostileReader, hostile.HostileText, Hostile]
        return self.choices.pick(hostiles)(self)
