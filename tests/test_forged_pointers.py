"""ctypes classes that hold a host pointer or a Python object: a guest could forge it."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from guestmem import MemoryMapping

SIZE = 256
PATTERN = bytes(range(SIZE))
REFUSED = "holds, a host pointer or a Python object|must be a Scalar, a ctypes class of plain data"


class OfPointer(ctypes.c_char_p):
    """A subclass of a pointer."""


POINTERS: dict[str, Any] = {
    "py_object": ctypes.py_object,
    "c_char_p": ctypes.c_char_p,
    "c_wchar_p": ctypes.c_wchar_p,
    "c_void_p": ctypes.c_void_p,
    "POINTER": ctypes.POINTER(ctypes.c_int),
    "POINTER to a pointer": ctypes.POINTER(ctypes.POINTER(ctypes.c_int)),
    "CFUNCTYPE": ctypes.CFUNCTYPE(ctypes.c_int),
    "PYFUNCTYPE": ctypes.PYFUNCTYPE(None, ctypes.py_object),
    "subclass": OfPointer,
}
each_pointer = pytest.mark.parametrize("pointer", POINTERS.values(), ids=POINTERS)


def structure(*types: Any, base: Any = ctypes.Structure) -> Any:
    fields = [(f"field{i}", t) for i, t in enumerate(types)]
    return type("Holder", (base,), {"_fields_": fields})


def union(*types: Any) -> Any:
    return structure(*types, base=ctypes.Union)


def subclass(cls: Any) -> Any:
    needed = [n for n in ("_type_", "_flags_", "_restype_") if hasattr(cls, n)]
    return type("Sub", (cls,), {n: getattr(cls, n) for n in needed})


# How a class can hold another.
HOLDERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda p: p,
    "subclass": subclass,
    "array": lambda p: p * 2,
    "array of arrays": lambda p: p * 2 * 3,
    "structure": lambda p: structure(ctypes.c_int, p),
    "union": lambda p: union(ctypes.c_uint64, p),
    "structure in structure": lambda p: structure(structure(structure(p))),
    "union in structure": lambda p: structure(ctypes.c_int, union(ctypes.c_uint64, p)),
    "structure in union": lambda p: union(ctypes.c_uint64, structure(p)),
    "array in structure": lambda p: structure(p * 2),
    "array of structures": lambda p: structure(p) * 2,
    "array of unions in structure": lambda p: structure(union(p, ctypes.c_uint64) * 2),
    "base": lambda p: structure(ctypes.c_int, base=structure(p)),
    "base of base": lambda p: structure(ctypes.c_int, base=subclass(structure(p))),
    "base without own fields": lambda p: subclass(structure(p)),
    "base of a field": lambda p: structure(structure(ctypes.c_int, base=structure(p))),
    "packed": lambda p: type(
        "Packed", (ctypes.Structure,), {"_pack_": 1, "_layout_": "ms", "_fields_": [("p", p)]}
    ),
    "anonymous": lambda p: type(
        "Anonymous", (ctypes.Structure,), {"_anonymous_": ["a"], "_fields_": [("a", structure(p))]}
    ),
}
each_holder = pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)


def check_refused(cls: Any, **values: Any) -> None:
    m = MemoryMapping(SIZE)
    m.write_all(PATTERN, 0)
    value = values.get("value", cls())
    calls: list[Callable[[], object]] = [
        lambda: m.read_obj(0, cls),
        lambda: m.get_ref(0, cls),
        lambda: m.write_obj(value, 0, cls),
        lambda: m.write_obj(value, 0, type=cls),
        lambda: m.write_obj(value, 0),
        lambda: m.read_obj(SIZE + 1, cls),  # whatever the range
    ]
    for _ in range(2):  # a verdict that is kept must be the same
        for call in calls:
            with pytest.raises(TypeError, match=f"{REFUSED}|val must be a ctypes instance"):
                call()
    assert m.read_bytes(0, SIZE) == PATTERN


@each_pointer
@each_holder
def test_refused(pointer: Any, hold: Callable[[Any], Any]) -> None:
    check_refused(hold(pointer))


@each_holder
def test_plain_data_is_not(hold: Callable[[Any], Any]) -> None:
    cls = hold(ctypes.c_uint64)
    m = MemoryMapping(SIZE)
    m.write_all(PATTERN, 0)
    assert bytes(m.read_obj(0, cls)) == PATTERN[: ctypes.sizeof(cls)]


def test_the_text_names_the_culprit() -> None:
    with pytest.raises(TypeError, match=r"c_void_p.* a guest could forge"):
        MemoryMapping(8).read_obj(0, structure(ctypes.c_void_p))


def test_a_pointer_that_comes_later() -> None:
    class Later(ctypes.Structure):
        pass

    m = MemoryMapping(SIZE)
    ref = m.get_ref(0, Later)
    Later._fields_ = (("p", ctypes.c_char_p),)
    calls: list[Callable[[], object]] = [
        ref.load,
        lambda: ref.store(Later()),
        lambda: m.read_obj(0, Later),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="could forge"):
            call()


def test_a_pointer_to_itself() -> None:
    class Node(ctypes.Structure):
        pass

    Node._fields_ = (("next", ctypes.POINTER(Node)),)
    check_refused(Node)


# What the attributes of a class say can be changed afterwards; what it holds cannot.


def test_a_metaclass_that_hides_the_fields() -> None:
    class Meta(type(ctypes.Structure)):  # type: ignore[misc]
        _fields_ = property(lambda cls: [("a", ctypes.c_uint64)])
        __mro__ = property(lambda cls: (ctypes.Structure, object))
        __dict__ = property(lambda cls: {})
        __bases__ = property(lambda cls: ())

        def __getattribute__(cls, name: str) -> Any:
            raise AttributeError(name)

        def __instancecheck__(cls, other: object) -> bool:
            return True

    cls = Meta("Hides", (structure(ctypes.c_char_p),), {})
    check_refused(cls, value=structure(ctypes.c_char_p)())


def test_a_metaclass_that_leaves_a_base_out() -> None:
    class Meta(type(ctypes.Structure)):  # type: ignore[misc]
        def mro(cls) -> Any:
            return [cls, *(c for c in super().mro()[1:] if c.__name__ != "Holder")]

    cls = Meta("LeavesOut", (structure(ctypes.c_char_p),), {"_fields_": [("a", ctypes.c_int)]})
    assert ctypes.sizeof(cls) == 16
    check_refused(cls)


def test_fields_that_are_changed_afterwards() -> None:
    fields: list[tuple[str, Any]] = [("p", ctypes.c_char_p)]
    cls = type("Changed", (ctypes.Structure,), {"_fields_": fields})
    fields[0] = ("p", ctypes.c_uint64)
    check_refused(cls)


def test_fields_that_are_deleted_afterwards() -> None:
    cls: Any = structure(ctypes.c_char_p)
    del cls._fields_
    check_refused(cls)


def test_a_field_whose_descriptor_is_taken_away() -> None:
    cls: Any = structure(ctypes.c_char_p)
    field = cls.field0
    del cls.field0
    assert field.__get__(cls()) is None  # it reads the pointer all the same
    check_refused(cls)


def test_fields_and_descriptors_that_are_deleted_afterwards() -> None:
    cls: Any = structure(ctypes.py_object)
    field = cls.field0
    del cls._fields_, cls.field0
    check_refused(cls)
    cls.field0 = field


def test_fields_beyond_the_layout(run_child: Callable[..., str]) -> None:
    """Only one base lays out memory; the getters of another would look past the instance."""
    code = """
        import ctypes, guestmem
        class Small(ctypes.Structure):
            _fields_ = [("a", ctypes.c_uint32)]
        class Big(ctypes.Structure):
            _fields_ = [("b", ctypes.c_uint8 * (64 << 20)), ("c", ctypes.c_uint32)]
        class Both(Small, Big):
            pass
        try:
            guestmem.MemoryMapping(4096).read_obj(0, Both)
        except TypeError as error:
            assert "on which its layout does not build" in str(error)
            print("refused")
    """
    assert run_child(code) == "refused\n"


def test_a_field_of_another_class(run_child: Callable[..., str]) -> None:
    code = """
        import ctypes, guestmem
        class Big(ctypes.Structure):
            _fields_ = [("b", ctypes.c_uint8 * (1 << 30)), ("c", ctypes.c_uint32)]
        class Small(ctypes.Structure):
            _fields_ = [("a", ctypes.c_uint8)]
        Small.c = Big.c
        try:
            guestmem.MemoryMapping(4096).read_obj(0, Small)
        except TypeError as error:
            assert "is not a field of" in str(error)
            print("refused")
    """
    assert run_child(code) == "refused\n"


def test_nesting_takes_no_time() -> None:
    cls: Any = ctypes.c_uint8
    for _ in range(40):
        cls = type("Nest", (ctypes.Union,), {"_fields_": [("a", cls), ("b", cls)]})
    assert MemoryMapping(8).read_obj(0, cls) is not None


def test_a_letter_that_is_changed_afterwards() -> None:
    cls: Any = subclass(ctypes.c_char_p)
    cls._type_ = "Q"
    check_refused(cls)


def test_items_that_are_changed_afterwards() -> None:
    cls: Any = subclass(ctypes.c_char_p * 2)
    cls._type_ = ctypes.c_uint64
    check_refused(cls)


def test_a_verdict_is_not_that_of_a_class_with_the_same_id() -> None:
    m = MemoryMapping(SIZE)
    for _ in range(500):
        plain, forged = structure(ctypes.c_uint64), None
        m.read_obj(0, plain)
        del plain
        forged = structure(ctypes.c_char_p)
        with pytest.raises(TypeError, match="could forge"):
            m.read_obj(0, forged)
        del forged
