"""What a user finds by help(), dir() and inspect.signature(): the API and its documentation."""

import inspect
import pydoc
import re
from pathlib import Path

import pytest

import guestmem
from guestmem import (
    AtomicRef,
    DirtyBitmap,
    GuestMemory,
    GuestRegion,
    MemoryMapping,
    Ordering,
    Scalar,
    VolatileArrayRef,
    VolatileMemory,
    VolatileRef,
    VolatileSlice,
    errors,
)

TYPES = [VolatileMemory, MemoryMapping, VolatileSlice, VolatileRef, Scalar]
TYPES += [AtomicRef, VolatileArrayRef, DirtyBitmap, GuestMemory, GuestRegion, Ordering]
MODULES = {**dict.fromkeys(errors.__all__, "guestmem.errors"), "Ordering": "guestmem.ordering"}

# What there is: the signature, and the errors that help() must mention. The signature of a property
# is None.
MEMORY: dict[str, tuple[str | None, str]] = {
    "size": (None, ""),
    "closed": (None, ""),
    "as_ptr": ("(self, /)", "ClosedError"),
    "get_slice": ("(self, offset, count, /)", "AddressOverflowError OutOfBoundsError"),
    "get_ref": ("(self, offset, type, /)", "get_slice"),
    "get_atomic_ref": ("(self, offset, type, /)", "get_slice MisalignedError"),
    "get_array_ref": ("(self, offset, n, type, /)", "get_slice"),
    "read_obj": ("(self, offset, type, /)", "InvalidAddressError TypeError"),
    "write_obj": ("(self, val, offset, /, type=None)", "InvalidAddressError OverflowError"),
    "read_slice": ("(self, buf, offset, /)", "InvalidAddressError"),
    "write_slice": ("(self, buf, offset, /)", "InvalidAddressError"),
    "read_bytes": ("(self, offset, count, /)", "InvalidAddressError"),
    "read_exact": ("(self, buf, offset, /)", "InvalidAddressError"),
    "write_all": ("(self, buf, offset, /)", "InvalidAddressError"),
    "read_to_memory": (
        "(self, /, mem_offset, src, count, src_offset=None)",
        "InvalidRangeError ReadFromSourceError EOFError BlockingIOError WriteToMemoryError",
    ),
    "write_from_memory": (
        "(self, /, mem_offset, dst, count, dst_offset=None)",
        "InvalidRangeError WriteToDestinationError BlockingIOError ReadFromMemoryError",
    ),
    "fill": ("(self, byte, offset=0, count=None, /)", "InvalidAddressError OverflowError"),
    "remove_range": ("(self, mem_offset, count, /)", "InvalidRangeError SystemCallFailedError"),
    "__enter__": ("(self, /)", "ClosedError"),
    "__exit__": ("(self, exc_type=None, exc_value=None, traceback=None, /)", "BufferError"),
}
GUEST_ERRORS = "InvalidGuestAddressError AddressOverflowError"
API: dict[type, dict[str, tuple[str | None, str]]] = {
    VolatileMemory: MEMORY,
    MemoryMapping: MEMORY | {
        "dirty": (None, ""),
        "from_fd": ("(fd, size, *, track_dirty=False)", "SystemCallFailedError|from_fd_offset"),
        "from_fd_offset": (
            "(fd, size, offset, *, track_dirty=False)", "InvalidOffsetError SystemCallFailedError"
        ),
        "close": ("(self, /)", "BufferError"),
    },
    VolatileSlice: MEMORY | {
        "from_buffer": ("(obj)", "BufferError"),
        "offset": ("(self, count, /)", "OutOfBoundsError"),
        "copy_to": ("(self, buf, /)", "BufferError|ClosedError"),
        "copy_from": ("(self, buf, /)", "BufferError|ClosedError"),
        "copy_to_volatile_slice": ("(self, dst, /)", "ClosedError|TypeError"),
        "read_from": ("(self, src, count, /)", "read_to_memory InvalidRangeError"),
        "write_to": ("(self, dst, count, /)", "write_from_memory InvalidRangeError"),
        "release": ("(self, /)", "BufferError"),
    },
    VolatileRef: {
        "type": (None, ""),
        "size": (None, ""),
        "load": ("(self, /)", "TypeError"),  # of a Struct or class whose size has changed
        "store": ("(self, val, /)", "OverflowError"),
        "to_slice": ("(self, /)", ""),
        "as_ptr": ("(self, /)", ""),
    },
    AtomicRef: {
        "type": (None, ""),
        "size": (None, ""),
        "load": ("(self, order=None, /)", "ValueError"),
        "store": ("(self, val, order=None, /)", "ValueError OverflowError"),
        "exchange": ("(self, val, order=None, /)", "OverflowError"),
        "compare_exchange": ("(self, expected, desired, order=None, /)", "OverflowError"),
        **dict.fromkeys(
            ["fetch_add", "fetch_sub", "fetch_and", "fetch_or", "fetch_xor"],
            ("(self, val, order=None, /)", "OverflowError"),
        ),
        "to_slice": ("(self, /)", ""),
        "as_ptr": ("(self, /)", ""),
    },
    VolatileArrayRef: {
        "type": (None, ""),
        "size": (None, ""),
        "load": ("(self, i, /)", "OutOfBoundsError"),
        "store": ("(self, i, val, /)", "OutOfBoundsError"),
        "tolist": ("(self, /)", ""),
        "copy_to": ("(self, buf, /)", "BufferError"),
        "copy_from": ("(self, src, /)", ""),
        "to_slice": ("(self, /)", ""),
    },
    DirtyBitmap: {
        "page_size": (None, ""),
        "num_pages": (None, ""),
        "count": (None, ""),
        "mark": ("(self, offset, count, /)", "InvalidAddressError"),
        "is_dirty": ("(self, offset, /)", "InvalidAddressError"),
        "ranges": ("(self, /)", ""),
        "take": ("(self, /)", ""),
        "merge": (
            "(self, bitmap, offset=0, /)",
            "ValueError InvalidAddressError MisalignedError ReadFromMemoryError",
        ),
    },
    GuestMemory: {
        **dict.fromkeys(["regions", "num_regions", "size", "last_addr", "closed"], (None, "")),
        "from_ranges": ("(ranges, *, track_dirty=False)", ""),
        "find_region": ("(self, addr, /)", ""),
        "address_in_range": ("(self, addr, /)", ""),
        "check_range": ("(self, addr, count, /)", ""),
        "checked_offset": ("(self, addr, n, /)", ""),
        "get_host_address": ("(self, addr, /)", "InvalidGuestAddressError ClosedError"),
        "get_slice": ("(self, addr, count, /)", "OutOfBoundsError " + GUEST_ERRORS),
        "slices": ("(self, addr, count, /)", GUEST_ERRORS),
        "get_ref": ("(self, addr, type, /)", "get_slice"),
        "get_atomic_ref": ("(self, addr, type, /)", "get_slice MisalignedError"),
        "get_array_ref": ("(self, addr, n, type, /)", "get_slice"),
        "read_obj": ("(self, addr, type, /)", GUEST_ERRORS),
        "write_obj": ("(self, val, addr, /, type=None)", GUEST_ERRORS),
        "read_slice": ("(self, buf, addr, /)", GUEST_ERRORS),
        "write_slice": ("(self, buf, addr, /)", GUEST_ERRORS),
        "read_bytes": ("(self, addr, count, /)", GUEST_ERRORS),
        "read_exact": ("(self, buf, addr, /)", GUEST_ERRORS),
        "write_all": ("(self, buf, addr, /)", GUEST_ERRORS),
        "fill": ("(self, byte, addr=0, count=None, /)", "OverflowError " + GUEST_ERRORS),
        "remove_range": ("(self, addr, count, /)", "InvalidRangeError " + GUEST_ERRORS),
        "read_to_memory": ("(self, /, addr, src, count, src_offset=None)", GUEST_ERRORS),
        "write_from_memory": ("(self, /, addr, dst, count, dst_offset=None)", GUEST_ERRORS),
        "dirty_ranges": ("(self, /)", ""),
        "take_dirty": ("(self, /)", ""),
        "mark_dirty": ("(self, addr, count, /)", GUEST_ERRORS),
        "merge_dirty": (
            "(self, addr, bitmap, /)",
            "MisalignedError ValueError ReadFromMemoryError " + GUEST_ERRORS,
        ),
        "with_region": ("(self, addr, memory, /)", ""),
        "without_region": ("(self, addr, size, /)", "InvalidGuestAddressError InvalidRegionError"),
        "close": ("(self, /)", "BufferError ClosedError"),
        "__enter__": ("(self, /)", "ClosedError"),
        "__exit__": ("(self, exc_type=None, exc_value=None, traceback=None, /)", "BufferError"),
    },
    Scalar: {"name": (None, ""), "size": (None, "")},
}  # fmt: skip
MEMBERS = [(cls, name) for cls, members in API.items() for name in members]
each_member = pytest.mark.parametrize(
    ("cls", "name"), MEMBERS, ids=[f"{c.__name__}.{n}" for c, n in MEMBERS]
)

SCALARS = [
    *("u8", "u16", "u32", "u64", "usize", "i8", "i16", "i32", "i64", "isize", "f32", "f64"),
    *("le16", "le32", "le64", "be16", "be32", "be64"),
]
NAMES = {*(cls.__name__ for cls in TYPES), *SCALARS, *errors.__all__, "fence", "preadv", "pwritev"}


README = (Path(__file__).parent.parent / "README.md").read_text()
ORDERS = {name for name, value in vars(Ordering).items() if isinstance(value, Ordering)}
TABLES = README.split("## The API")[1].split("\n## ")[0]


def help_of(thing: object) -> str:
    """Return what help() shows, without the overstrikes that stand for bold."""
    return re.sub(".\b", "", pydoc.render_doc(thing))


def test_public_names() -> None:
    assert set(guestmem.__all__) == NAMES | {"__version__"}
    assert len(guestmem.__all__) == len(set(guestmem.__all__))
    public = {n for n, v in vars(guestmem).items() if n[0] != "_" and not inspect.ismodule(v)}
    assert public == NAMES


def test_star_import() -> None:
    namespace: dict[str, object] = {}
    exec("from guestmem import *", namespace)
    assert set(namespace) - {"__builtins__"} == NAMES | {"__version__"}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(guestmem, name)
    text = inspect.getdoc(thing)
    assert text is not None
    assert re.match(r"[A-Z_a-z+ ]+\S", text)
    if isinstance(thing, type):
        assert thing.__module__ == MODULES.get(name, "guestmem")
        assert thing.__qualname__ == name
        assert "guestmem" in help_of(thing)
    assert guestmem.__doc__


def test_there_are_no_other_members() -> None:
    for cls, members in API.items():
        inherited = VolatileMemory if cls in (MemoryMapping, VolatileSlice) else object
        public = {n for n in dir(cls) if n[0] != "_" or (n in MEMORY and hasattr(inherited, n))}
        assert public | (set(MEMORY) & set(vars(cls))) == set(members)


@each_member
def test_signature(cls: type, name: str) -> None:
    expected, _ = API[cls][name]
    member = getattr(cls, name)
    if expected is None:
        assert inspect.isdatadescriptor(member)
    else:
        assert member.__text_signature__
        assert str(inspect.signature(member)) == expected


@each_member
def test_documentation(cls: type, name: str) -> None:
    text = inspect.getdoc(getattr(cls, name))
    assert text
    summary = text.split("\n\n")[0]
    assert re.match(r"[A-Z].*\.$", summary, re.DOTALL)
    assert len(summary) <= 140
    assert all(len(line) <= 88 for line in text.split("\n"))


@each_member
def test_help_mentions_the_errors(cls: type, name: str) -> None:
    _, needed = API[cls][name]
    text = help_of(getattr(cls, name))
    words = " ".join(text.split())
    for error in re.findall(r"[\w|]+", needed):
        assert any(e in words for e in error.split("|")), f"help() does not mention {error}"


ADDRESSES = [VolatileMemory.as_ptr, VolatileRef.as_ptr, AtomicRef.as_ptr]
ADDRESSES += [GuestMemory.get_host_address]


@pytest.mark.parametrize("method", ADDRESSES, ids=lambda method: method.__qualname__)
def test_an_address_says_that_it_holds_nothing(method: object) -> None:
    assert "It holds nothing: keep " in str(inspect.getdoc(method))


def test_the_readme_says_so_too() -> None:
    rows = [line for line in TABLES.split("\n") if re.search("as_ptr|get_host_address", line)]
    assert len(rows) == 4
    for row in rows:
        assert re.search("keeps nothing alive|as of a `VolatileRef`", row), row


@each_member
def test_the_readme_names_it(cls: type, name: str) -> None:
    assert name.startswith("_") or re.search(rf"\b{name}\b", TABLES), (cls, name)


@pytest.mark.parametrize("name", sorted(NAMES | ORDERS))
def test_the_readme_names_what_is_public(name: str) -> None:
    assert re.search(rf"\b{name}\b", TABLES)


def test_constructor() -> None:
    assert str(inspect.signature(MemoryMapping)) == "(size, *, track_dirty=False)"
    assert MemoryMapping(size=5).size == 5
    for args in ((), (1, 2)):
        with pytest.raises(TypeError, match="MemoryMapping"):
            MemoryMapping(*args)
    for kwargs in ({"length": 5}, {"size": 5, "x": 1}):
        with pytest.raises(TypeError, match="MemoryMapping"):
            MemoryMapping(**kwargs)
    with pytest.raises(TypeError, match="size"):
        MemoryMapping(5, size=5)  # type: ignore[misc]


def test_initialising_again_changes_nothing() -> None:
    m = MemoryMapping(5)
    m.write_all(b"12345", 0)
    address = m.as_ptr()
    for args in ((), (4096,)):
        try:
            m.__init__(*args)
        except TypeError:
            assert args
        assert (m.size, m.as_ptr(), m.read_bytes(0, 5)) == (5, address, b"12345")
