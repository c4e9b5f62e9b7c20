"""What exists in a sequence of calls, and what arguments are drawn from it."""

from __future__ import annotations

import array
import ctypes
import io
import os
import random
import struct
import sys
from typing import TYPE_CHECKING, Any

from tests.fuzz import hostile
from tests.fuzz.choices import Choices
from tests.fuzz.hostile import Hostile, Planned, PlannedExit
from tests.fuzz.model import PAGE, TOP, Area, Finding, Guest, Place, Tracked

import guestmem
from guestmem import (
    GuestMemory,
    GuestMemoryError,
    MemoryMapping,
    Ordering,
    VolatileMemory,
    VolatileSlice,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# Before, the garbage collector clears a memoryview while somebody has its buffer (CPython's
# gh-77894), so a cycle through one is left to live on: here nothing is made from one.
VIEWS_CAN_BE_CLEARED = sys.version_info >= (3, 12, 7)

SIZES = [1, 7, 8, 64, 123, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 123, 300_000]
FILE_SIZE = 76 * PAGE  # the largest of them, from the largest offset at which files are mapped
NO_SIZES = [0, -1, 2**47, 2**63 - 1, 2**63, 2**64 - 1, 2**64]  # none of them can be mapped
ALL_BYTES = bytes(range(256))
CONTENT = random.Random(1).randbytes(700)
MOST = 8  # objects of a kind that live at once

ALLOWED = (
    *(GuestMemoryError, TypeError, ValueError, OverflowError, IndexError, BufferError),
    *(MemoryError, OSError, Planned, PlannedExit),
    struct.error,  # of a tuple that its Struct does not take
)
FAILED = object()

LAYOUTS = {
    "u8": "=B", "u16": "=H", "u32": "=I", "u64": "=Q", "usize": "=Q", "f32": "=f", "f64": "=d",
    "i8": "=b", "i16": "=h", "i32": "=i", "i64": "=q", "isize": "=q",
    "le16": "<H", "le32": "<I", "le64": "<Q", "be16": ">H", "be32": ">I", "be64": ">Q",
}  # fmt: skip
SCALARS = {getattr(guestmem, name): layout for name, layout in LAYOUTS.items()}
ORDERS = [
    *(Ordering.RELAXED, Ordering.ACQUIRE, Ordering.RELEASE, Ordering.ACQ_REL, Ordering.SEQ_CST),
]


class Host(bytearray):
    """A buffer that can be part of a cycle."""

    kept: Any = None


class Arguments:
    def __init__(self, data: bytes) -> None:
        self.choices = Choices(data)
        self.tame = True
        self.over = False
        self.memories: list[Place] = []
        self.guests: list[Guest] = []
        self.refs: list[Place] = []
        self.atomics: list[Place] = []
        self.arrays: list[Place] = []
        self.tracked: list[Tracked] = []
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

    def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError

    def run_some(self) -> None:
        raise NotImplementedError

    # --- numbers ---

    def mapping_size(self) -> int:
        return self.choices.pick([*SIZES, *SIZES, *NO_SIZES])

    def raw_number(self, limit: int = PAGE) -> int:
        choices = self.choices
        kind, byte = choices.byte() % 8, choices.byte()
        if kind < 4:
            return byte
        if kind == 4:  # around the limit itself more often than not
            return limit - byte if byte < 96 else limit + byte % 4 - 2
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

    def offset(self, place: Place | Guest) -> Any:
        """Return an offset in memory; of a guest's an address, mostly in one of its regions."""
        base, limit = place.origin(self.choices)
        offset = self.number(limit)
        return base + offset if type(offset) is int else offset

    def odd(self, *more: Any) -> Any:
        """Return what hardly any call takes."""
        some = [
            *(Hostile(self), None, "1", b"1", [], object(), hostile.NoMethods(self)),
            hostile.HostileFile(self),
        ]
        return self.choices.pick([*some, *more])

    def order(self) -> tuple[Any, ...]:
        """Return the last argument of an atomic operation, or nothing."""
        if self.choices.one_in(8):
            self.tame = False
            return (self.odd("SEQ_CST", 5, object.__new__(Ordering), Ordering),)
        return self.choices.pick([(), (None,), *((order,) for order in ORDERS)])

    # --- memory ---

    def memory(self) -> Place:
        if not self.memories:
            size = 2 * PAGE + 123
            mapping = MemoryMapping(size, track_dirty=self.choices.one_in(2))
            self.write_something(self.add_mapping(mapping, Area(bytearray(size)), 0))
        return self.choices.pick(self.memories)

    def write_something(self, place: Place) -> None:
        """Zeros look alike wherever they are."""
        content = CONTENT[: place.size]
        if self.call(place.obj.write_all, content, 0) is not FAILED and self.tame:
            place.put(0, content)

    def guest(self) -> Guest:
        if not self.guests:
            # Two regions that adjoin, but not in their mapping, the end of which is in none;
            # they have a page in common. A hole; another one.
            one, other = self.memory(), self.memory()
            middle, rest = one.size // 2, one.size // 4
            parts = [self.call(one.obj.get_slice, 0, middle)]
            parts.append(self.call(one.obj.get_slice, middle, rest))
            if FAILED in parts or rest == 0 or other.obj.closed:
                return self.add_guest(GuestMemory([]), [])
            places = [one.derive(parts[0], 0, middle), one.derive(parts[1], middle, rest)]
            made = self.call(
                GuestMemory, [(PAGE, parts[1]), (PAGE + rest, parts[0]), (2**40, other.obj)]
            )
            if made is FAILED:  # the other one is empty
                return self.add_guest(GuestMemory([]), [])
            return self.add_guest(made, [*places, other])
        return self.choices.pick(self.guests)

    def target(self) -> Place | Guest:
        """Return what has the accessors."""
        return self.guest() if self.choices.one_in(3) else self.memory()

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
        return self.add_memory(host.derive(made, 0, host.size))

    def from_buffer(self, obj: Any) -> Any:
        safe = isinstance(obj, (bytearray, bytes, ctypes.Array, VolatileMemory))
        if safe or VIEWS_CAN_BE_CLEARED:
            return self.call(VolatileSlice.from_buffer, obj)
        return FAILED

    def new_area(self, size: int) -> Area:
        return Area(bytearray(size))

    def add_memory(self, place: Place) -> Place:
        if len(place.obj) != place.size:
            raise Finding(f"{place.obj!r} should have size {place.size:#x}")
        self.keep(self.memories, place)
        return place

    def add_mapping(self, mapping: MemoryMapping, area: Area, start: int) -> Place:
        return self.add_memory(self.mapped(mapping, area, start))

    def mapped(self, mapping: MemoryMapping, area: Area, start: int) -> Place:
        """Return the place of a new mapping."""
        place = Place(mapping, area, start, mapping.size)
        if mapping.dirty is not None:
            # A write that fails half-way marks more than the model knows.
            exact = not area.shrinks
            place.tracked = Tracked(mapping.dirty, start, mapping.size, exact=exact)
            self.keep(self.tracked, place.tracked)
            if self.choices.one_in(2):
                self.tracked.pop().forget()  # then it lives as long as its mapping needs it
        return place

    def keep(self, some: list[Any], one: Any) -> None:
        if len(some) >= MOST:
            self.forget(some)
        some.append(one)

    def forget(self, some: list[Any]) -> None:
        gone = some.pop(self.choices.byte() % len(some))
        if type(gone) is Tracked:
            gone.forget()

    def derived(self, place: Place | Guest, made: Any, offset: Any) -> Place:
        """Return the place of what was made of a part of another one."""
        if self.tame:
            return place.derive(made, offset, made.size)
        if isinstance(place, Place):
            return Place(made, place.area, place.start, made.size, place.tracked)
        area = Area(bytearray(), shrinks=any(area.shrinks for area in place.areas))
        area.known = False
        place.lend()  # nobody knows of which region it is
        return Place(made, area, 0, made.size)

    def add_guest(self, obj: GuestMemory, places: list[Place]) -> Guest:
        """Its regions say which of the places it has; of others nothing is known."""
        regions = []
        for start, size, last, memory in obj.regions:
            if size != len(memory) or last != start + size - 1 or start + size > TOP:
                raise Finding(f"a region {start:#x} + {size:#x} to {last:#x} of {memory!r}")
            unknown = Place(memory, Area(bytearray()), 0, size)
            unknown.area.known, unknown.area.shrinks = False, True
            regions.append((start, next((p for p in places if p.obj is memory), unknown)))
        guest = Guest(obj, regions)
        if guest.regions != regions or obj.num_regions != len(regions) or obj.size != guest.size:
            raise Finding(f"{obj!r} has the regions {obj.regions!r}")
        self.keep(self.guests, guest)
        return guest

    def add_buffer(self, obj: Any, area: Area, start: int, size: int) -> Place:
        place = Place(obj, area, start, size)
        self.keep(self.buffers, place)
        return place

    def buffer(self) -> Place:
        """Return an argument with a buffer: new, or one that others have."""
        choices = self.choices
        if self.buffers and not choices.one_in(4):
            return choices.pick(self.buffers)
        size = choices.pick([0, 1, 7, 8, 9, 31, 32, 33, 64, 100, 255, PAGE, PAGE + 9, 270_000])
        seed = choices.byte()
        model = bytearray(ALL_BYTES[seed:] + ALL_BYTES * (size // 256 + 1))[:size]
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
            *(one.obj for one in self.tracked[:1]),
        ]
        obj = self.choices.pick([*some, self.odd()])
        self.tame = False  # nobody knows what it shows
        return Place(obj, Area(bytearray()), 0, 0)

    def memory_as_buffer(self) -> Any:
        place = self.memory()
        place.lend()
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
