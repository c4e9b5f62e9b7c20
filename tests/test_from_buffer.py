"""Volatile slices of other objects' buffers: exported for exactly as long as they are used."""

from __future__ import annotations

import array
import ctypes
import gc
import itertools
import mmap
import struct
import sys
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from guestmem import ClosedError, MemoryMapping, VolatileSlice, le32, u8, u16, u64

if TYPE_CHECKING:
    from collections.abc import Callable


def is_exported(owner: bytearray) -> bool:
    """Try to resize it."""
    try:
        owner.append(0)
    except BufferError:
        return True
    owner.pop()
    return False


def test_exported_in_every_order_of_deletion() -> None:
    kinds = ("slice", "slice of slice", "rest", "ref", "memoryview")
    for order in itertools.permutations(kinds):
        owner = bytearray(64)
        part = VolatileSlice.from_buffer(owner)
        holders: dict[str, object] = {
            "slice": part,
            "slice of slice": part.get_slice(8, 8),
            "rest": part.offset(64),
            "ref": part.get_ref(8, u64),
            "memoryview": memoryview(part),
        }
        del part
        for kind in order:
            assert is_exported(owner), order
            del holders[kind]
        assert not is_exported(owner), order


def test_release_ends_the_export() -> None:
    owner = bytearray(8)
    part = VolatileSlice.from_buffer(owner)
    inner = part.get_slice(0, 1)
    part.release()
    assert part.closed
    assert is_exported(owner)
    inner.release()
    assert not is_exported(owner)
    with pytest.raises(ClosedError):
        part.read_obj(0, u8)


def test_with_ends_the_export() -> None:
    owner = bytearray(8)
    with VolatileSlice.from_buffer(owner) as part:
        part.write_obj(258, 0, le32)
        assert is_exported(owner)
    assert not is_exported(owner)
    assert owner == b"\2\1" + bytes(6)
    with pytest.raises(ZeroDivisionError):
        with VolatileSlice.from_buffer(obj=owner) as part:
            view = memoryview(part)
            1 / 0
    assert is_exported(owner)
    view.release()
    assert not is_exported(owner)


def test_a_failing_use_leaves_no_export() -> None:
    owner = bytearray(8)
    part = VolatileSlice.from_buffer(owner)
    with pytest.raises(IndexError):
        part.get_slice(0, 9)
    with pytest.raises(IndexError):
        part.get_ref(8, u8)
    with pytest.raises(TypeError):
        part.get_ref(0, int)  # type: ignore[type-var]
    del part
    assert not is_exported(owner)


def exporters() -> list[Any]:
    shared = mmap.mmap(-1, 64)
    return [
        pytest.param(bytearray(64), id="bytearray"),
        pytest.param(array.array("Q", [0] * 8), id="array"),
        pytest.param((ctypes.c_uint32 * 16)(), id="ctypes"),
        pytest.param(np.zeros((4, 2), np.uint64), id="numpy"),
        pytest.param(shared, id="mmap"),
        pytest.param(memoryview(bytearray(80))[16:], id="memoryview"),
        pytest.param(
            memoryview(bytearray(64)).cast("Q", (2, 4)), id="memoryview of two dimensions"
        ),
        pytest.param(MemoryMapping(64), id="mapping"),
        pytest.param(MemoryMapping(128).get_slice(3, 64), id="slice"),
        pytest.param(VolatileSlice.from_buffer(bytearray(64)), id="slice of a bytearray"),
    ]


@pytest.mark.parametrize("exporter", exporters())
def test_exporters(exporter: Any) -> None:
    part = VolatileSlice.from_buffer(exporter)
    assert type(part) is VolatileSlice
    assert part.size == len(part) == 64
    part.fill(0xAB)
    part.write_obj(0x0102, 62, u16)
    expected = b"\xab" * 62 + struct.pack("=H", 0x0102)
    assert bytes(memoryview(exporter).cast("B")) == expected
    assert part.read_bytes(0, 64) == expected
    part.release()


def test_a_mapping_counts_a_slice_of_its_buffer_as_an_export() -> None:
    mapping = MemoryMapping(64)
    part = VolatileSlice.from_buffer(mapping)
    ref = part.get_ref(0, u64)
    with pytest.raises(BufferError, match="held by 1 exported buffer$"):
        mapping.close()
    del part
    with pytest.raises(BufferError, match="held by 1 exported buffer$"):
        mapping.close()
    del ref
    mapping.close()
    with pytest.raises(ClosedError, match="the mapping has been closed"):
        VolatileSlice.from_buffer(mapping)


def test_an_empty_buffer() -> None:
    part = VolatileSlice.from_buffer(bytearray())
    assert part.size == 0
    assert part.read_bytes(0, 0) == b""
    assert part.get_slice(0, 0).size == 0
    part.fill(1)
    part.remove_range(0, 0)
    assert memoryview(part).nbytes == 0


BUFFER_ERROR = r"^obj must be a writable contiguous buffer, not a read-only or non-contiguous one$"


@pytest.mark.parametrize(
    "exporter",
    [
        pytest.param(b"bytes", id="bytes"),
        pytest.param(memoryview(bytearray(8)).toreadonly(), id="memoryview"),
        pytest.param(memoryview(bytearray(8))[::2], id="steps"),
        pytest.param(memoryview(bytearray(8))[::-1], id="backwards"),
    ],
)
def test_a_buffer_that_will_not_do_is_a_buffer_error(exporter: Any) -> None:
    with pytest.raises(BufferError, match=BUFFER_ERROR) as caught:
        VolatileSlice.from_buffer(exporter)
    assert type(caught.value.__cause__) is BufferError


def test_numpy_says_value_error_and_that_is_the_cause() -> None:
    read_only = np.zeros(8, np.uint8)
    read_only.flags.writeable = False
    stepped = np.zeros(8, np.uint8)[::2]
    columns = np.zeros((2, 2), np.uint8, order="F")
    for exporter in (read_only, stepped, columns):
        with pytest.raises(BufferError, match=BUFFER_ERROR) as caught:
            VolatileSlice.from_buffer(exporter)
        assert type(caught.value.__cause__) is ValueError
    mapping = MemoryMapping(8)
    with pytest.raises(
        BufferError, match="^buf must be a contiguous buffer, not a non-contiguous one$"
    ) as caught:
        mapping.write_slice(stepped, 0)
    assert type(caught.value.__cause__) is ValueError
    assert mapping.read_bytes(0, 8) == bytes(8)


@pytest.mark.parametrize("thing", [None, 1, "text", [1], object()])
def test_what_has_no_buffer_is_a_type_error(thing: Any) -> None:
    with pytest.raises(TypeError, match="must be a writable contiguous buffer, not"):
        VolatileSlice.from_buffer(thing)


# Cycles


class Bytes(bytearray):
    """With a __dict__, as all below."""


class Array(array.array):  # type: ignore[type-arg]
    pass


class Pages(mmap.mmap):
    pass


class Numbers(np.ndarray[Any, Any]):
    pass


class Words(ctypes.Array[ctypes.c_uint64]):
    _type_ = ctypes.c_uint64
    _length_ = 8


EXPORTERS: dict[str, Callable[[], Any]] = {
    "bytearray": lambda: Bytes(64),
    "array": lambda: Array("Q", [0] * 8),
    "mmap": lambda: Pages(-1, 64),
    "numpy": lambda: Numbers(64, np.uint8),
    "ctypes": lambda: Words(),  # noqa: PLW0108
}

# No NumPy array: the collector cannot look into those.
HOLDERS: dict[str, Callable[[VolatileSlice], object]] = {
    "slice": lambda part: part,
    "slice of slice": lambda part: part.get_slice(8, 8),
    "offset": lambda part: part.offset(8),
    "ref": lambda part: part.get_ref(8, u64),
    "slice of ref": lambda part: part.get_ref(8, u64).to_slice(),
    "memoryview": lambda part: memoryview(part)[8:],
    "slice of memoryview": lambda part: VolatileSlice.from_buffer(memoryview(part)),
    "method": lambda part: part.read_obj,
    "all": lambda part: [make(part) for name, make in HOLDERS.items() if name != "all"],
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_cycle_through_the_exporter_is_collected(exporter: str, holder: str) -> None:
    if holder in ("slice of memoryview", "all") and sys.version_info < (3, 12, 7):
        pytest.skip("the collector of this Python clears memoryviews that are in use (gh-77894)")
    owner = EXPORTERS[exporter]()
    owner.held = HOLDERS[holder](VolatileSlice.from_buffer(owner))
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None
    assert gc.garbage == []


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint32))


@pytest.mark.usefixtures("mortal_classes")
def test_a_cycle_through_the_type_of_a_ref_is_collected() -> None:
    class Fresh(Point):
        held: object

    class Format(struct.Struct):
        held: object

    mapping = MemoryMapping(64)
    Fresh.held = mapping.get_ref(0, Fresh)
    layout = Format("<II")
    layout.held = mapping.get_ref(8, layout)
    gone = weakref.ref(Fresh), weakref.ref(layout)
    del Fresh, layout, Format
    gc.collect()
    assert [to() for to in gone] == [None, None]
    mapping.close()  # no ref is left


def test_what_is_not_part_of_a_cycle_is_not_collected() -> None:
    owner = Bytes(64)
    ref = VolatileSlice.from_buffer(owner).get_ref(0, u64)
    owner.held = ref  # type: ignore[attr-defined]
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is not None
    ref.store(5)
    assert ref.load() == 5
    del ref
    gc.collect()
    assert gone() is None


def test_a_cycle_through_a_memoryview(run_child: Callable[..., str]) -> None:
    """CPython before 3.12.7 clears a memoryview whose buffer is held: gh-77894."""
    run_child(
        """
        import gc
        from guestmem import VolatileSlice

        class Device:
            pass

        class Exporter:
            def __buffer__(self, flags):
                return memoryview(self.data)

        gc.disable()
        data, device = bytearray(64), Device()
        gc.collect(0)
        device.view = memoryview(data)
        device.memory = VolatileSlice.from_buffer(device.view)
        device.me = device
        del device, data
        gc.collect()
        exporter = Exporter()
        exporter.data = bytearray(64)
        gc.collect(0)
        try:
            exporter.memory = VolatileSlice.from_buffer(exporter)
        except TypeError:
            pass  # __buffer__ came with 3.12
        del exporter
        gc.collect()
        """
    )
