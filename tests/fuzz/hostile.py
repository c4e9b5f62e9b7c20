"""Objects that strike back: each hook that guestmem may call runs other calls first."""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fuzz.arguments import Arguments as World


class Planned(Exception):
    """What hostile objects raise on purpose."""


class PlannedExit(BaseException):
    """The same, as Ctrl-C would be."""


class PlannedAttributeError(Planned, AttributeError):
    """Not to be taken for an attribute that is not there."""


class PlannedStopIteration(Planned, StopIteration):
    pass


def planned(world: World) -> BaseException:
    blocking = BlockingIOError(errno.EAGAIN, "planned")
    blocking.characters_written = world.choices.pick([0, 1, 2**31, 2**62])
    return world.choices.pick(
        [
            *(Planned(), PlannedExit(), PlannedAttributeError(), PlannedStopIteration(), blocking),
            *(OSError(errno.EFAULT, "planned"), OSError(), OSError("text", "for an errno")),
            *(ValueError("planned"), TypeError("planned"), MemoryError()),
        ]
    )


class Striker:
    def __init__(self, world: World) -> None:
        self.world = world

    def strike(self) -> None:
        world = getattr(self, "world", None)
        if world is None:
            return  # the garbage collector has cleared it
        world.tame = False
        world.run_some()
        if world.choices.one_in(6):
            raise planned(world)


class Hostile(Striker):
    """Has every special method that an argument of any kind is asked for."""

    def __index__(self) -> int:
        self.strike()
        return self.world.raw_number()

    def __float__(self) -> float:
        self.strike()
        return self.world.choices.pick([0.0, -1.5, 1e300, float("nan")])

    def __bool__(self) -> bool:
        self.strike()
        return True

    def __len__(self) -> int:
        self.strike()
        return self.world.choices.byte()

    def __eq__(self, other: object) -> bool:
        self.strike()
        return True

    __hash__ = None  # type: ignore[assignment]

    def __buffer__(self, flags: int) -> memoryview:
        """Only from 3.12 on does anybody ask."""
        self.strike()
        given: memoryview = self.world.view_for_hostile()
        return given

    def __release_buffer__(self, view: memoryview) -> None:
        self.strike()

    def fileno(self) -> int:
        self.strike()
        return self.world.fd()


class HostileSize(Hostile):
    """The size of a mapping: never so large that filling it takes the machine down."""

    def __index__(self) -> int:
        self.strike()
        return self.world.mapping_size()


class HostileInt(int):
    """An int, so none of these may be asked."""

    def __index__(self) -> int:
        raise PlannedExit

    __int__ = __index__


class HostileSequence(Striker):
    """Not a buffer, so it is asked for its items; how many it has, it does not know."""

    def __init__(self, world: World, items: list[Any]) -> None:
        super().__init__(world)
        self.items = items

    def __len__(self) -> int:
        self.strike()
        return self.world.choices.pick([len(self.items), 0, 3, 1000, 2**62, -1])

    def __getitem__(self, i: int) -> Any:
        self.strike()
        if not self.items or i >= 100:  # or it would be iterated over for ever
            raise IndexError
        return self.items[i % len(self.items)]


class HostileIterable(Striker):
    """Strikes before each item, and after the last one."""

    def __init__(self, world: World, items: list[Any]) -> None:
        super().__init__(world)
        self.items = items

    def __length_hint__(self) -> int:
        self.strike()
        return self.world.choices.pick([0, 1, 2**62, -1])

    def __iter__(self) -> Iterator[Any]:
        self.strike()
        return self

    def __next__(self) -> Any:
        self.strike()
        if not self.items:
            raise StopIteration
        return self.items.pop(0)


class HostilePair(tuple):  # type: ignore[type-arg] # noqa: SLOT001
    """A tuple, so none of these may be asked."""

    def __len__(self) -> int:
        raise PlannedExit

    def __getitem__(self, i: Any) -> Any:
        raise PlannedExit

    def __iter__(self) -> Any:
        raise PlannedExit


class HostileFile(Hostile):
    """A stream: what it does with the view, and what it says that it did, need not agree."""

    def claim(self, count: int) -> Any:
        choices = self.world.choices
        if not choices.one_in(3):
            return count
        return choices.pick([None, 0, 1, -1, count + 1, 2**70, "1", 1.0, True, Hostile(self.world)])

    def readinto(self, view: memoryview) -> Any:
        choices = self.world.choices
        what = choices.byte() % 6
        if what == 1:
            self.world.keep_view(view)
        elif what == 2:
            self.world.keep_view(memoryview(view))  # an export of its own
        elif what == 3:
            view.release()
        self.strike()
        count = 0
        if what != 3:
            count = self.world.some_of(len(view))
            view[:count] = bytes(count)
        return self.claim(count)

    def write(self, view: memoryview) -> Any:
        return self.readinto(view)


class HostileReader(Hostile):
    """A stream that has only read()."""

    def read(self, count: int) -> Any:
        self.strike()
        kind = self.world.choices.byte() % 12
        if kind < 4:
            return b"x" * self.world.some_of(count)
        if kind == 4:
            return self.world.buffer().obj
        odd = [b"x" * (count + 1), b"", None, "text", memoryview(b"abcd")[::2], bytearray(count)]
        return [*odd, Hostile(self.world)][kind - 5]


class HostileText(HostileFile):
    @property
    def encoding(self) -> str:
        self.strike()
        return "utf-8"


class NoMethods:
    """A stream whose lookup of methods strikes."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __getattr__(self, name: str) -> NoReturn:
        Hostile.strike(self)  # type: ignore[arg-type]
        raise AttributeError(name)


class Dying:
    """Strikes when it dies, in the middle of whatever runs the garbage collector."""

    def __init__(self, world: World, *kept: object) -> None:
        self.world, self.kept = world, [*kept, self]  # a cycle

    def __del__(self) -> None:
        Hostile.strike(self)  # type: ignore[arg-type]


class HostileStruct(struct.Struct):
    """None of these may be asked."""

    size = -1
    format = None  # type: ignore[assignment]

    def pack(self, *values: Any) -> bytes:
        return b"?" * 1000

    def unpack(self, data: Any) -> tuple[Any, ...]:
        return ()

    def __getattribute__(self, name: str) -> Any:
        raise PlannedExit


class Little(ctypes.LittleEndianStructure):
    _fields_ = (("a", ctypes.c_uint8), ("b", ctypes.c_uint32), ("c", ctypes.c_uint16 * 3))


class Big(ctypes.BigEndianStructure):
    _fields_ = (("a", ctypes.c_uint16), ("b", ctypes.c_uint64))


class Either(ctypes.Union):
    _fields_ = (("a", ctypes.c_double), ("b", Little), ("c", ctypes.c_char * 5))


class Bits(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32, 3), ("b", ctypes.c_uint32, 29), ("c", ctypes.c_bool))


class Forged(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint64), ("p", ctypes.POINTER(Little)))


class Stranger(Little, Forged):  # type: ignore[misc]
    """Has fields that its layout does not build on."""


class Borrower(ctypes.Structure):
    """Has a field of another class, which lies beyond its end."""

    _fields_ = (("a", ctypes.c_uint8),)
    p = Forged.p


class Odd(ctypes.c_uint32):
    """None of these may be asked either."""

    def __init__(self, *args: object) -> None:
        raise PlannedExit

    def __getattribute__(self, name: str) -> Any:
        raise PlannedExit

    def __new__(cls, *args: object) -> Any:
        raise PlannedExit


def size_of(cls: Any) -> int:
    return ctypes.sizeof(cls)


def struct_size(some: struct.Struct) -> int:
    """Return its size, whatever a subclass says."""
    size: int = struct.Struct.__dict__["size"].__get__(some)
    return size


def odd() -> Odd:
    made: Odd = ctypes.c_uint32.__new__(Odd)
    return made


# None of them is plain data.
REFUSED: list[Any] = [
    *(Forged, Stranger, Borrower, ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p * 2),
    ctypes.Structure,
]
CLASSES: list[Any] = [
    *(ctypes.c_uint8, ctypes.c_uint16, ctypes.c_int64, ctypes.c_float, ctypes.c_longdouble),
    *(ctypes.c_bool, ctypes.c_wchar, ctypes.c_uint64.__ctype_be__, ctypes.c_ubyte * 33),
    *(Little, Big, Either, Bits, Little * 3, ctypes.c_uint8 * 0, ctypes.c_uint8 * 5000, Odd),
    *REFUSED,
]
FORMATS = ["", "<Q", "=hxI", "@P", "0s", "5p3cd", ">e?", "4090s9B", "100q"]


def striking_class(world: World) -> Any:
    """Make a class whose every attribute strikes, and which has no fields yet."""
    made = False

    class Meta(type(ctypes.Structure)):  # type: ignore[misc]
        def __getattribute__(cls, name: str) -> Any:
            if made and not name.startswith("__"):
                Hostile(world).strike()
            return super().__getattribute__(name)

    class Late(ctypes.Structure, metaclass=Meta):
        pass

    made = True
    return Late
