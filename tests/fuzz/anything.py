"""What any object has, wrong calls, and garbage."""

from __future__ import annotations

import contextlib
import copy
import pickle
import struct
import sys
import weakref
from typing import TYPE_CHECKING, Any

from tests.fuzz import hostile
from tests.fuzz.arguments import FAILED, SCALARS
from tests.fuzz.arrays import array
from tests.fuzz.atomics import atomic
from tests.fuzz.dirty import bitmap
from tests.fuzz.model import Finding, Place, Tracked
from tests.fuzz.objects import ref

from guestmem import (
    AtomicRef,
    DirtyBitmap,
    GuestMemory,
    MemoryMapping,
    Scalar,
    VolatileArrayRef,
    VolatileMemory,
    VolatileRef,
    VolatileSlice,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuzz.world import World


def any_place(w: World) -> Any:
    """Return what has an obj: of any type that there is."""
    kinds: list[Callable[[], Any]] = [
        *(w.memory, w.slice, w.guest),
        *(lambda: ref(w), lambda: atomic(w), lambda: array(w), lambda: bitmap(w)[1]),
    ]
    return w.choices.pick(kinds)()


def look(w: World) -> None:
    obj = w.choices.pick(list(SCALARS)) if w.choices.one_in(8) else any_place(w).obj
    # None of them is looked up before it is called: a ref has not all of it.
    looks: list[Any] = [
        lambda: repr(obj),
        lambda: copy.copy(obj),
        lambda: copy.deepcopy(obj),
        lambda: pickle.dumps(obj),
        lambda: obj.__reduce_ex__(w.choices.byte() % 6),
        lambda: (hash(obj), obj == obj, obj != None, obj < obj),  # noqa: E711, PLR0124
        lambda: (obj.size, sys.getsizeof(obj), dir(obj)),
        lambda: obj.as_ptr(*w.choices.pick([(), (1,)])),
        lambda: obj[w.number()],
        lambda: (len(obj), bool(obj), obj.closed),
        lambda: w.kept.append(weakref.ref(obj, lambda _: hostile.Hostile(w).strike())),
        lambda: setattr(obj, w.choices.pick(["size", "__class__", "new"]), w.odd(VolatileSlice)),
        lambda: (VolatileRef[int], Scalar.__class_getitem__(w.odd())),
        lambda: type(obj).__enter__(obj),
        lambda: obj.__release_buffer__(memoryview(b"not of it")),
    ]
    with contextlib.suppress(AttributeError):
        w.call(w.choices.pick(looks))


def of_subclass(cls: Any, *arguments: Any) -> Any:
    return type("Sub", (cls,), {})(*arguments)


def construct(w: World) -> None:
    """Nobody makes one but by the documented ways."""
    made_by_others = [VolatileSlice, VolatileRef, AtomicRef, VolatileArrayRef, DirtyBitmap]
    cls: Any = w.choices.pick([VolatileMemory, *made_by_others, Scalar])
    ways: list[Any] = [
        cls,
        lambda: object.__new__(cls),
        lambda: cls.__new__(cls),
        lambda: MemoryMapping.__new__(cls, 8),
        lambda: GuestMemory.__new__(cls, []),
        lambda: of_subclass(cls),
        lambda: of_subclass(MemoryMapping, 8),
        lambda: of_subclass(GuestMemory, []),
        lambda: setattr(cls, "size", 1),
    ]
    if w.call(w.choices.pick(ways)) is not FAILED:
        raise Finding(f"{cls} was made, or changed")


def wrong_count(w: World) -> None:
    """Any method, with any number of any arguments, and with keywords."""
    place = any_place(w)
    obj = place.obj
    names = [n for n in dir(obj) if not n.startswith("_") and callable(getattr(type(obj), n, None))]
    name = w.choices.pick(names)
    if name.startswith("from_"):
        return  # not of any file, nor of any buffer: see the operations for them
    w.tame = False
    if not isinstance(place, Tracked):
        place.lend()
    arguments: list[Any] = []
    for _ in range(w.choices.byte() % 6):
        some: list[Any] = [w.odd, w.number, w.type, w.buffer, w.memory]
        one = w.choices.pick(some)()
        if type(one) is Place:
            one.lend()
        arguments.append(one.obj if type(one) is Place else one)
    # What is meant to be a file could be somebody else's fd.
    at = 1 if "memory" in name else 0 if name in {"read_from", "write_to"} else 6
    if len(arguments) > at and issubclass(type(arguments[at]), int):
        arguments[at] = w.stream()
    keywords = [{}, {}, {"type": w.type()}, {"src": w.stream()}, {"x": 1}]
    got = w.call(getattr(obj, name), *arguments, **w.choices.pick(keywords))
    if got is not FAILED and w.choices.one_in(2):
        w.kept.append(got)


def plant(w: World) -> None:
    """Garbage that strikes when it is collected, and that holds what others use."""
    kept = w.choices.pick([w.memory, w.slice, w.buffer])().obj
    hostile.Dying(w, kept)


def init_struct_again(w: World) -> None:
    """Between calls only: in the middle of its own unpack, Struct itself crashes."""
    some = w.choices.pick(w.structs)
    if w.depth == 0 and some is not None:
        w.call(struct.Struct.__init__, some, w.choices.pick(hostile.FORMATS))
