"""What Python lets one try with any type: half-made objects, subclasses, copies, comparisons."""

import copy
import copyreg
import pickle
import types
import weakref
from collections.abc import Callable
from struct import Struct
from typing import Any

import pytest

from guestmem import MemoryMapping, Scalar, VolatileMemory, VolatileRef, VolatileSlice, u64

RECONSTRUCT: Callable[..., object] = vars(copyreg)["_reconstructor"]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
TYPES = [VolatileMemory, MemoryMapping, VolatileSlice, VolatileRef, Scalar]
FINAL = [MemoryMapping, VolatileSlice, VolatileRef, Scalar]


@pytest.mark.parametrize("cls", [VolatileMemory, VolatileSlice, VolatileRef, Scalar])
def test_no_instantiation(cls: Any) -> None:
    makers: list[Callable[[], object]] = [
        cls,
        lambda: cls(1),
        lambda: cls.__new__(cls),
        lambda: object.__new__(cls),
        lambda: MemoryMapping.__new__(cls, 1),
        lambda: type.__call__(cls),
        lambda: copyreg.__newobj__(cls),  # type: ignore[attr-defined]
        lambda: RECONSTRUCT(cls, object, None),
    ]
    for make in makers:
        with pytest.raises(TypeError):
            make()
    with pytest.raises(TypeError):
        object.__new__(MemoryMapping)
    with pytest.raises(TypeError):
        RECONSTRUCT(MemoryMapping, object, None)


@pytest.mark.parametrize("cls", FINAL)
def test_final_types_have_no_subclasses(cls: type) -> None:
    for bases in ((cls,), (cls, VolatileMemory), (cls, dict)):
        with pytest.raises(TypeError, match="base type|base class"):
            type("Sub", bases, {})


def subclasses() -> list[Any]:
    class Plain(VolatileMemory):
        pass

    class Slots(VolatileMemory):
        __slots__ = ()

    class New(VolatileMemory):
        def __new__(cls, *args: Any) -> Any:
            return super().__new__(cls)

    class NewOfObject(VolatileMemory):
        def __new__(cls, *args: Any) -> Any:
            return object.__new__(cls)

    class Mixin:
        def __new__(cls, *args: Any) -> Any:
            return super().__new__(cls)

    class Mixed(Mixin, VolatileMemory):
        pass

    class MixedLast(VolatileMemory, Mixin):
        pass

    return [Plain, Slots, New, NewOfObject, Mixed, MixedLast]


@pytest.mark.parametrize("cls", subclasses(), ids=lambda c: c.__name__)
def test_a_subclass_has_no_instances(cls: Any) -> None:
    class Donor:
        pass

    class DonorOfSlots:
        __slots__ = ()

    def reassign(other: Any) -> None:
        other.__class__ = cls

    makers: list[Callable[[], object]] = [
        cls,
        lambda: cls(1),
        lambda: cls(size=1),
        lambda: cls.__new__(cls, 1),
        lambda: object.__new__(cls),
        lambda: VolatileMemory.__new__(cls),
        lambda: MemoryMapping.__new__(cls, 1),
        lambda: type.__call__(cls, 1),
        lambda: copyreg.__newobj__(cls, 1),  # type: ignore[attr-defined]
        lambda: RECONSTRUCT(cls, object, None),
        lambda: cls.from_fd(-1, 1),
        lambda: vars(MemoryMapping)["from_fd"].__get__(None, cls)(-1, 1),
        lambda: vars(VolatileSlice)["from_buffer"].__get__(None, cls)(bytearray(1)),
        lambda: reassign(MemoryMapping(1)),
        lambda: reassign(MemoryMapping(1).get_slice(0, 1)),
        lambda: reassign(Donor()),
        lambda: reassign(DonorOfSlots()),
        lambda: setattr(cls, "__bases__", (MemoryMapping,)),
    ]
    for make in makers:
        with pytest.raises((TypeError, AttributeError)):
            make()


def test_methods_refuse_other_objects() -> None:
    checked = 0
    for cls in TYPES:
        for member in vars(cls).values():
            for other in (5, object(), MemoryMapping, "u64"):
                if isinstance(member, types.MethodDescriptorType | types.WrapperDescriptorType):
                    with pytest.raises(TypeError):
                        member(other)
                elif isinstance(member, types.GetSetDescriptorType):
                    with pytest.raises(TypeError):
                        member.__get__(other)
                else:
                    continue
                checked += 1
    assert checked > 100


def test_types_are_immutable() -> None:
    for cls in TYPES:
        with pytest.raises(TypeError, match="immutable"):
            setattr(cls, "size", 5)  # noqa: B010
        with pytest.raises(TypeError, match="immutable"):
            delattr(cls, "size")
    for thing in objects().values():
        for name in ("size", "closed", "type", "other"):
            with pytest.raises(AttributeError):
                setattr(thing, name, 5)


# Instances


def objects() -> dict[str, Any]:
    m = MemoryMapping(64)
    return {
        "mapping": m,
        "slice": m.get_slice(8, 16),
        "slice of a buffer": VolatileSlice.from_buffer(bytearray(8)),
        "ref": m.get_ref(8, u64),
        "ref of a Struct": m.get_ref(8, Struct("<Q")),
    }


each_object = pytest.mark.parametrize("what", objects())


@each_object
def test_no_copies(what: str) -> None:
    thing = objects()[what]
    name = type(thing).__name__
    for copier in (copy.copy, copy.deepcopy, lambda x: copy.deepcopy([x])):
        with pytest.raises(TypeError, match=f"cannot copy or pickle {name} objects"):
            copier(thing)
    for protocol in PROTOCOLS:
        for target in (thing, [thing]):
            with pytest.raises(TypeError, match=f"cannot copy or pickle {name} objects"):
                pickle.dumps(target, protocol)
        with pytest.raises(TypeError, match=f"cannot copy or pickle {name} objects"):
            thing.__reduce_ex__(protocol)


@each_object
def test_repr_shows_no_address(what: str) -> None:
    thing = objects()[what]
    text = repr(thing)
    assert text.startswith(f"<guestmem.{type(thing).__name__} ")
    assert f"{thing.as_ptr():x}" not in text
    assert " at 0x" not in text
    assert str(thing) == text


def test_repr_shows_the_size() -> None:
    m = MemoryMapping(0x1388)
    assert repr(m) == "<guestmem.MemoryMapping size=0x1388>"
    assert repr(m.get_slice(0, 0)) == "<guestmem.VolatileSlice size=0>"
    assert repr(m.get_slice(1, 17)) == "<guestmem.VolatileSlice size=0x11>"


@each_object
def test_equality_is_identity(what: str) -> None:
    one, two = objects()[what], objects()[what]
    assert one == one  # noqa: PLR0124
    assert one != two
    assert {one: 1}[one] == 1
    assert len({one, two, one}) == 2
    with pytest.raises(TypeError):
        sorted([one, two])


def test_equality_of_the_same_memory() -> None:
    m = MemoryMapping(64)
    assert m.get_slice(0, 8) != m.get_slice(0, 8)
    assert m.get_ref(0, u64) != m.get_ref(0, u64)


@pytest.mark.parametrize("what", [w for w in objects() if not w.startswith("ref")])
def test_weak_references(what: str) -> None:
    thing = objects()[what]
    gone: list[object] = []
    ref = weakref.ref(thing, gone.append)
    assert ref() is thing
    del thing
    assert ref() is None
    assert gone == [ref]


@each_object
def test_neither_items_nor_iteration(what: str) -> None:
    thing = objects()[what]
    calls: list[Callable[[], object]] = [
        lambda: thing[0],
        lambda: thing[0:1],
        lambda: iter(thing),
        lambda: list(thing),
        lambda: 0 in thing,
        lambda: reversed(thing),
        lambda: thing.__setitem__(0, 1),
    ]
    for call in calls:
        with pytest.raises((TypeError, AttributeError)):
            call()
    if isinstance(thing, VolatileMemory):
        assert len(thing) == thing.size
        assert memoryview(thing)[0] == 0
    else:
        with pytest.raises(TypeError):
            len(thing)
