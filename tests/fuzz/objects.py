"""Objects in memory, and refs to them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from tests.fuzz import hostile
from tests.fuzz.arguments import FAILED, SCALARS, Host
from tests.fuzz.model import Area, Finding, Place

from guestmem import Scalar, VolatileSlice, u8

if TYPE_CHECKING:
    from tests.fuzz.world import World


def packed(of: Any, value: Any) -> bytes | None:
    """Return what a value of that type is in memory; None where nobody can say."""
    if issubclass(type(of), Scalar):
        return struct.pack(SCALARS[of], value)
    if issubclass(type(of), struct.Struct):
        return struct.Struct.pack(of, *value)
    return bytes(value)[: hostile.size_of(of)]


def loaded(w: World, got: Any, of: Any, content: bytes) -> None:
    if not w.tame:
        return
    if issubclass(type(of), Scalar):
        w.check(got, struct.unpack(SCALARS[of], content)[0])
    elif issubclass(type(of), struct.Struct):
        w.check(got, struct.Struct.unpack(of, content))
    elif issubclass(type(of), type):
        w.check(bytes(got), content)


def size_of(of: Any) -> int:
    if issubclass(type(of), Scalar):
        return int(of.size)
    if issubclass(type(of), struct.Struct):
        return hostile.struct_size(of)
    return hostile.size_of(of)


def check_plain(of: Any) -> None:
    if any(of is cls for cls in hostile.REFUSED):
        raise Finding(f"{of} was accepted")


def read_obj(w: World) -> None:
    place, of = w.target(), w.type()
    offset = w.offset(place)
    got = w.call(place.obj.read_obj, offset, of)
    if got is not FAILED:
        check_plain(of)
    if got is not FAILED and w.tame and place.known:
        loaded(w, got, of, place.at(offset, size_of(of)))


def write_obj(w: World) -> None:
    place, of = w.target(), w.type()
    offset, value = w.offset(place), w.value(of)
    if of is None or w.choices.one_in(4):
        of = type(value)
        done = w.call(place.obj.write_obj, value, offset)
    elif w.choices.one_in(2):
        done = w.call(place.obj.write_obj, value, offset, type=of)
    else:
        done = w.call(place.obj.write_obj, value, offset, of)
    if done is FAILED:
        place.half_done()
    elif w.tame and (content := packed(of, value)) is not None:
        place.put(offset, content)


def get_ref(w: World) -> None:
    place, of = w.target(), w.type()
    offset = w.offset(place)
    made = w.call(place.obj.get_ref, offset, of)
    if made is not FAILED:
        check_plain(of)
        w.keep(w.refs, w.derived(place, made, offset))


def ref(w: World) -> Place:
    if not w.refs:
        place = w.memory()
        made = w.call(place.obj.get_ref, 0, w.choices.pick(list(SCALARS)))
        if made is FAILED:
            place = w.slice()
            host = Host(b"12345678")
            made = VolatileSlice.from_buffer(host).get_ref(0, u8)
            place = Place(host, Area(bytearray(host)), 0, 8)
        w.refs.append(place.derive(made, 0, made.size))
    return w.choices.pick(w.refs)


def load(w: World) -> None:
    place = ref(w)
    got = w.call(place.obj.load)
    if got is not FAILED and w.tame and place.area.known:
        loaded(w, got, place.obj.type, place.at(0, size_of(place.obj.type)))


def store(w: World) -> None:
    place = ref(w)
    value = w.value(place.obj.type)
    done = w.call(place.obj.store, value)
    if done is not FAILED and w.tame and (content := packed(place.obj.type, value)) is not None:
        place.put(0, content)


def to_slice(w: World) -> None:
    place = w.choices.pick([ref(w), *w.atomics, *w.arrays])
    made = w.call(place.obj.to_slice)
    if made is not FAILED:
        w.check(made.size, place.size)
        w.add_memory(w.derived(place, made, 0))
