"""struct.Struct as the type of objects in memory: tuples, subclasses, and Structs that change."""

import os
import struct
import warnings
import weakref
from collections.abc import Callable
from struct import Struct
from typing import Any

import pytest

from guestmem import InvalidAddressError, MemoryMapping, OutOfBoundsError, VolatileRef

SIZE = 64
PATTERN = bytes(range(1, SIZE + 1))

VALUES: dict[str, tuple[Any, ...]] = {
    "": (),
    "0s": (b"",),
    "3x": (),
    "?": (True,),
    "=B": (255,),
    "<Q": (2**64 - 1,),
    ">hhl": (-1, 2, -3),
    "=Hxx5sdf": (1, b"abcde", 0.5, -0.5),
    "@bq": (1, -(2**63)),
    "@P": (2**64 - 2,),  # a number here: nothing follows it
    "8p3c": (b"pascal", b"a", b"b", b"c"),
}
each_format = pytest.mark.parametrize("fmt", VALUES)


def init_again(s: Struct, fmt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.15 on
        Struct.__init__(s, fmt)


def filled() -> MemoryMapping:
    m = MemoryMapping(SIZE)
    m.write_all(PATTERN, 0)
    return m


@each_format
def test_tuples(fmt: str) -> None:
    s, values = Struct(fmt), VALUES[fmt]
    data = s.pack(*values)
    m = MemoryMapping(SIZE)
    for offset in (0, 1, 8, SIZE - s.size):
        ref: VolatileRef[Any] = m.get_ref(offset, s)
        assert (ref.size, ref.type) == (s.size, s)
        writes: list[Callable[[], object]] = [
            lambda: m.write_obj(values, offset, s),  # noqa: B023
            lambda: m.write_obj(values, offset, type=s),  # noqa: B023
            lambda: ref.store(values),  # noqa: B023
        ]
        for write in writes:
            m.fill(0x55)
            write()
            around = b"\x55" * offset, b"\x55" * (SIZE - offset - s.size)
            assert m.read_bytes(0, SIZE) == data.join(around)
            for got in (m.read_obj(offset, s), ref.load()):
                assert type(got) is tuple
                assert got == s.unpack(data)
    past = SIZE - s.size + 1
    calls: list[Callable[[], object]] = [
        lambda: m.read_obj(past, s),
        lambda: m.write_obj(values, past, s),
    ]
    for call in calls:
        with pytest.raises(InvalidAddressError) as caught:
            call()
        assert (caught.value.offset, caught.value.count) == (past, s.size)
    with pytest.raises(OutOfBoundsError):
        m.get_ref(past, s)


def test_a_subclass_of_tuple() -> None:
    class Pair(tuple[int, int]):
        __slots__ = ()

        def __iter__(self) -> Any:
            raise AssertionError("it is a tuple: take its items")

    m = MemoryMapping(8)
    m.write_obj(Pair((1, 2)), 0, Struct("<HH"))
    assert m.read_obj(0, Struct("<HH")) == (1, 2)


@pytest.mark.parametrize("value", [5, [5], b"\5", "5", None, iter((5,)), {5: 5}, range(5, 6)])
def test_only_tuples(value: Any) -> None:
    m = filled()
    calls: list[Callable[[], object]] = [
        lambda: m.write_obj(value, 0, Struct("B")),
        lambda: m.get_ref(0, Struct("B")).store(value),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="val must be a tuple for a struct.Struct, not '"):
            call()
    assert m.read_bytes(0, SIZE) == PATTERN


@pytest.mark.parametrize("value", [(), (1,), (1, 2, 3), (256, 1), (1, "2"), (-1, 0), (None, None)])
def test_values_that_do_not_fit(value: Any) -> None:
    m = filled()
    calls: list[Callable[[], object]] = [
        lambda: m.write_obj(value, 0, Struct("BB")),
        lambda: m.get_ref(0, Struct("BB")).store(value),
    ]
    for call in calls:
        with pytest.raises(struct.error):
            call()
    assert m.read_bytes(0, SIZE) == PATTERN


def test_what_a_subclass_says_does_not_count() -> None:
    class Liar(Struct):
        size = 1
        format = "B"

        def _never(self, *args: Any) -> Any:
            raise AssertionError("a subclass was asked")

        pack = unpack = pack_into = unpack_from = iter_unpack = _never  # type: ignore[assignment]
        __sizeof__ = __len__ = _never

        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"a subclass was asked for {name}")

    m, s = filled(), Liar("<QQ")
    ref = m.get_ref(0, s)
    assert ref.size == 16
    assert m.read_obj(0, s) == ref.load() == struct.unpack("<QQ", PATTERN[:16])
    m.write_obj((1, 2), 0, s)
    ref.store((3, 4))
    assert m.read_bytes(0, SIZE) == struct.pack("<QQ", 3, 4) + PATTERN[16:]
    with pytest.raises(InvalidAddressError) as caught:
        m.read_obj(SIZE - 1, s)
    assert caught.value.count == 16


@pytest.mark.parametrize(
    ("before", "after"), [("<Q", "<I"), ("<I", "<Q"), ("<I", "32Q"), ("<I", "")]
)
def test_initialised_again(before: str, after: str) -> None:
    m, s = filled(), Struct(before)
    ref = m.get_ref(SIZE - s.size, s)
    init_again(s, after)
    values = (0,) * len(s.unpack(bytes(s.size)))
    calls: list[Callable[[], object]] = [ref.load, lambda: ref.store(values)]
    for call in calls:
        with pytest.raises(TypeError, match="bytes now, and had"):
            call()
    assert m.read_bytes(0, SIZE) == PATTERN
    assert ref.size == struct.calcsize(before)
    init_again(s, before)
    ref.store((1,))
    assert ref.load() == (1,)


@pytest.mark.parametrize("before", ["<I", "<Q", "<HH", "", "4s"])
@pytest.mark.parametrize("after", ["<I", "<Q", "<HH", "", "4s", "65s"])
def test_read_obj_takes_a_struct_as_it_is_now(before: str, after: str) -> None:
    m, s = filled(), Struct(before)
    for offset in (0, SIZE - 8, SIZE - 4, SIZE):
        for fmt in (before, after, before):
            init_again(s, fmt)
            size = struct.calcsize(fmt)
            if offset + size <= SIZE:
                assert m.read_obj(offset, s) == struct.unpack_from(fmt, PATTERN, offset)
            else:
                with pytest.raises(InvalidAddressError) as caught:
                    m.read_obj(offset, s)
                assert caught.value.count == size


def test_a_struct_is_not_kept() -> None:
    class Mine(Struct):
        pass

    m, s = filled(), Mine("<I")
    gone = weakref.ref(s)
    m.read_obj(0, s)
    m.write_obj((1,), 0, s)
    m.get_ref(0, s).load()
    del s
    assert gone() is None


def test_initialised_again_with_the_same_size() -> None:
    m, s = MemoryMapping(8), Struct("<Q")
    ref = m.get_ref(0, s)
    ref.store((1,))
    init_again(s, "<ii")
    assert ref.load() == m.read_obj(0, s) == (1, 0)


def test_a_last_value_that_initialises_it_again() -> None:
    """What struct makes of this is its own; in memory nothing outside the range changes."""
    m, s = filled(), Struct("<BB")
    ref = m.get_ref(SIZE // 2, s)

    class Hostile:
        def __init__(self, to: Callable[[], None]) -> None:
            self.to = to

        def __index__(self) -> int:
            self.to()
            return 7

    class Pack(Struct):
        pass

    p = Pack("<BB")
    other = m.get_ref(SIZE // 2, p)
    # Another Struct, and the memory itself, change while the value is turned into bytes.
    other.store((1, Hostile(lambda: init_again(s, "<QQ"))))
    assert m.read_bytes(0, SIZE) == PATTERN[:32] + b"\1\7" + PATTERN[34:]
    with pytest.raises(TypeError, match="bytes now"):
        ref.load()


def test_a_first_value_that_initialises_it_again(run_child: Callable[..., str]) -> None:
    code = """
        import struct, warnings, guestmem

        warnings.simplefilter("ignore", DeprecationWarning)
        m = guestmem.MemoryMapping(4096)
        for write in (
            lambda v, s: m.write_obj(v, 0, s),
            lambda v, s: m.get_ref(0, s).store(v),
        ):
            s = struct.Struct("<" + "QH" * 50)

            class Hostile:
                def __index__(self):
                    s.__init__("B")
                    return 1

            try:
                write((Hostile(), *[1] * 99), s)
            except (TypeError, struct.error):
                pass
            assert not any(m.read_bytes(500, 4096 - 500))
        print("alive")
    """
    assert run_child(code, env=os.environ | {"PYTHONMALLOC": "debug"}) == "alive\n"


def test_never_initialised() -> None:
    makes: list[Any] = [Struct, type("Sub", (Struct,), {})]
    for make in makes:
        s = make.__new__(make, "<I")  # a later CPython may initialise here
        if s.size == 4:
            continue
        m = filled()
        calls: list[Callable[[], object]] = [
            lambda: m.read_obj(0, s),  # noqa: B023
            lambda: m.get_ref(0, s),  # noqa: B023
            lambda: m.write_obj((1,), 0, s),  # noqa: B023
        ]
        for call in calls:
            with pytest.raises(TypeError, match="never initialised"):
                call()
        assert m.read_bytes(0, SIZE) == PATTERN


def test_a_value_that_closes() -> None:
    m = MemoryMapping(SIZE)

    class Closes:
        def __index__(self) -> int:
            m.close()
            return 1

    with pytest.raises(ValueError, match="the mapping has been closed"):
        m.write_obj((Closes(),), 0, Struct("B"))
    assert m.closed


def test_no_other_struct_decides_what_is_read(run_child: Callable[..., str]) -> None:
    """A Struct often takes the address of the one before. The page after the file is gone."""
    code = """
        import os, struct, guestmem
        page = os.sysconf("SC_PAGESIZE")
        fd = os.memfd_create("page")
        os.ftruncate(fd, page)
        m = guestmem.MemoryMapping.from_fd(fd, 2 * page)
        for _ in range(100):
            assert m.read_obj(0, struct.Struct("<100s")) == (bytes(100),)
            assert m.read_obj(page - 4, struct.Struct("<I")) == (0,)
        print("alive")
    """
    assert run_child(code) == "alive\n"
