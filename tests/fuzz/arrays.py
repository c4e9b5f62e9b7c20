"""Arrays in memory: items, parts, and all of it at once."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from tests.fuzz import hostile
from tests.fuzz.arguments import FAILED, SCALARS, Host
from tests.fuzz.copies import moved
from tests.fuzz.model import Area, Place, exactly
from tests.fuzz.objects import check_plain, loaded, packed, size_of

from guestmem import VolatileSlice, u8

if TYPE_CHECKING:
    from tests.fuzz.world import World

# A type without bytes makes longer ones of any memory: all of it at once is then slow.
LONGEST = 300_000


def get_array_ref(w: World) -> None:
    place, of = w.target(), w.type()
    offset, count = w.offset(place), w.number(w.choices.pick([8, 64, 8000]))
    made = w.call(place.obj.get_array_ref, offset, count, of)
    if made is not FAILED:
        check_plain(of)
        w.check(len(made), exactly(count) if w.tame else 0)
        keep(w, w.derived(place, made, offset))


def keep(w: World, place: Place) -> None:
    if len(place.obj) <= LONGEST:
        w.keep(w.arrays, place)


def array(w: World) -> Place:
    if not w.arrays:
        place, of = w.memory(), w.choices.pick(list(SCALARS))
        made = w.call(place.obj.get_array_ref, 0, place.size // of.size, of)
        if made is FAILED:
            host = Host(b"12345678")
            made = VolatileSlice.from_buffer(host).get_array_ref(0, 8, u8)
            place = Place(host, Area(bytearray(host)), 0, 8)
        w.arrays.append(place.derive(made, 0, made.size))
    return w.choices.pick(w.arrays)


def item(w: World, place: Place) -> tuple[Any, int]:
    """Return an index, and where the object would begin."""
    length = len(place.obj)
    i = w.number(length)
    if type(i) is int and w.choices.one_in(3):
        i = -i
    if not isinstance(i, int):
        return i, 0
    i = exactly(i) if isinstance(i, bool) else i
    return i, (i + length if i < 0 else i) * size_of(place.obj.type)


def array_load(w: World) -> None:
    place = array(w)
    i, at = item(w, place)
    by_index = w.choices.one_in(2)
    got = w.call(place.obj.__getitem__ if by_index else place.obj.load, i)
    if got is not FAILED and w.tame and place.known:
        loaded(w, got, place.obj.type, place.at(at, size_of(place.obj.type)))


def array_store(w: World) -> None:
    place = array(w)
    i, at = item(w, place)
    of = place.obj.type
    value = w.value(of)
    by_index = w.choices.one_in(2)
    done = w.call(place.obj.__setitem__ if by_index else place.obj.store, i, value)
    if done is not FAILED and w.tame and (content := packed(of, value)) is not None:
        place.put(at, content)


def array_part(w: World) -> None:
    """A slice of it, as of any sequence."""
    place = array(w)
    length = len(place.obj)
    start, stop = (w.choices.pick([None, w.number(length), -w.choices.byte()]) for _ in "12")
    key = slice(start, stop, w.choices.pick([None, None, 1, w.number(3)]))
    made = w.call(place.obj.__getitem__, key)
    if made is FAILED:
        return
    wanted = range(length)[key] if w.tame else range(len(made))
    w.check(len(made), len(wanted))
    keep(w, w.derived(place, made, wanted.start * size_of(place.obj.type)))


def array_items(w: World) -> None:
    """All of it as a list, or some by iteration, while other calls run in between."""
    place = array(w)
    length = len(place.obj)
    if w.choices.one_in(2):
        got = w.call(place.obj.tolist)
    else:
        step = 1 + w.choices.byte()

        def items() -> list[Any]:
            some = []
            for i, one in enumerate(itertools.islice(place.obj, 1000)):
                some.append(one)
                if i % step == step - 1:
                    w.tame = False
                    w.run_some()
            return some

        got, length = w.call(items), min(length, 1000)
    if got is FAILED or not w.tame or not place.known:
        return
    of, width = place.obj.type, size_of(place.obj.type)
    w.check(len(got), length)
    for i, one in enumerate(got[:100]):
        loaded(w, one, of, place.at(i * width, width))


def copy_array(w: World) -> None:
    """To or from a buffer: whole objects."""
    place, host = array(w), w.buffer_or_odd()
    width, length = size_of(place.obj.type), len(place.obj)
    count = min(host.size // width, length) if width else length
    into = w.choices.one_in(2)
    got = w.call(place.obj.copy_to if into else place.obj.copy_from, host.obj)
    if got is FAILED or not w.tame:
        return
    w.check(got, count)
    if into:
        moved(w, host, 0, place, 0, count * width)
    else:
        moved(w, place, 0, host, 0, count * width)


def copy_values(w: World) -> None:
    """From a sequence: all are looked at before the first is written."""
    place = array(w)
    of = place.obj.type
    values = [w.value(of) for _ in range(w.choices.byte() % 12)]
    kind = w.choices.byte() % 6
    some: Any = [list, tuple, list, tuple, list, list][kind](values)
    if kind == 4:
        some = hostile.HostileSequence(w, values)
    elif kind == 5:
        some = w.choices.pick([range(300), iter(values), {1: 2}, "text"])
        if w.choices.one_in(4):
            w.tame = False
            some = w.odd()
    got = w.call(place.obj.copy_from, some)
    if got is FAILED or not w.tame:
        return
    w.check(got, min(len(some), len(place.obj)))
    contents = [packed(of, value) for value in some[:got]]
    if None not in contents:
        place.put(0, b"".join(one for one in contents if one is not None))


def use_array(w: World) -> None:
    """What sequences can do, and what this one cannot."""
    obj = array(w).obj
    uses: list[Any] = [
        lambda: w.value(obj.type) in obj[:50],
        lambda: next(reversed(obj), None),
        lambda: obj.__delitem__(0),
        lambda: obj.__setitem__(slice(None), [1]),
        lambda: obj + obj,
        lambda: obj[w.odd()],
        lambda: obj[w.number()],
        lambda: w.kept.append(iter(obj)),
        lambda: next(w.choices.pick(w.kept or [None]), None),
        lambda: memoryview(obj),
        lambda: (bool(obj), obj == obj, obj.size, len(obj)),  # noqa: PLR0124
    ]
    w.call(w.choices.pick(uses))
