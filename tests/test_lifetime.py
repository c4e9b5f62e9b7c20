"""Memory that is unmapped too early crashes, and memory that is unmapped too late leaks."""

from __future__ import annotations

import ctypes
import gc
import itertools
import struct
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest

from guestmem import ClosedError, GuestMemory, MemoryMapping, VolatileSlice, _native, u8, u32, u64

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Backing

    Backings = Callable[[int], Backing]

PAGE = 4096


def test_pages_stay_in_every_order_of_deletion(backing: Backings) -> None:
    file = backing(PAGE)
    kinds = ("mapping", "slice", "slice of slice", "ref", "memoryview", "array")
    for order in itertools.permutations(kinds):
        mapping = MemoryMapping.from_fd(file.fd, PAGE)
        mapping.write_obj(0x1122334455667788, 16, u64)
        part = mapping.get_slice(8, 64)
        look: dict[str, Callable[[], object]] = {
            "mapping": partial(mapping.read_obj, 16, u64),
            "slice": partial(part.read_obj, 8, u64),
            "slice of slice": partial(part.get_slice(8, 8).read_obj, 0, u64),
            "ref": part.get_ref(8, u64).load,
            "memoryview": partial(int.from_bytes, memoryview(mapping)[16:24], sys.byteorder),
            "array": np.frombuffer(mapping, np.uint64)[2:3].item,
        }
        del mapping, part
        for kind in order[:-1]:
            del look[kind]
        assert file.maps() == 1, order
        assert look[order[-1]]() == 0x1122334455667788
        del look[order[-1]]
        assert file.maps() == 0, order


def test_drop_unmaps_at_once(backing: Backings) -> None:
    file = backing(PAGE)
    gc.disable()  # no collector needed
    try:
        mapping = MemoryMapping.from_fd(file.fd, PAGE)
        assert file.maps() == 1
        del mapping
        assert file.maps() == 0
    finally:
        gc.enable()


def test_close_unmaps_at_once_and_twice_is_fine(backing: Backings) -> None:
    file = backing(PAGE)
    mapping = MemoryMapping.from_fd(file.fd, PAGE - 1)
    assert not mapping.closed
    mapping.close()
    assert file.maps() == 0
    for _ in range(3):
        mapping.close()
        assert mapping.closed
    assert mapping.size == len(mapping) == PAGE - 1
    assert repr(mapping) == "<guestmem.MemoryMapping size=0xfff closed>"


def use_everything(memory: MemoryMapping | VolatileSlice) -> list[Callable[[], object]]:
    calls: list[Callable[[], object]] = [
        memory.as_ptr,
        memory.__enter__,
        lambda: memory.get_slice(0, 0),
        lambda: memory.get_ref(0, u8),
        lambda: memory.read_obj(0, u8),
        lambda: memory.write_obj(0, 0, u8),
        lambda: memory.read_slice(bytearray(1), 0),
        lambda: memory.write_slice(b"x", 0),
        lambda: memory.read_bytes(0, 0),
        lambda: memory.read_exact(bytearray(), 0),
        lambda: memory.write_all(b"", 0),
        lambda: memory.read_to_memory(0, 0, 0),
        lambda: memory.write_from_memory(0, 0, 0),
        lambda: memory.fill(0),
        lambda: memory.remove_range(0, 0),
        lambda: memoryview(memory),
    ]
    if isinstance(memory, VolatileSlice):
        other = MemoryMapping(1).get_slice(0, 1)
        calls += [
            lambda: memory.offset(0),
            lambda: memory.copy_to(bytearray(1)),
            lambda: memory.copy_from(b"x"),
            lambda: memory.copy_to_volatile_slice(other),
            lambda: other.copy_to_volatile_slice(memory),
        ]
    return calls


def test_every_access_to_closed_memory_is_an_error() -> None:
    mapping = MemoryMapping(PAGE)
    part = mapping.get_slice(0, 8)
    part.release()
    mapping.close()
    for call in use_everything(mapping):
        with pytest.raises(ClosedError, match=r"^the mapping has been closed$"):
            call()
    for call in use_everything(part):
        with pytest.raises(ClosedError, match=r"^the slice has been released$"):
            call()
    assert part.closed
    assert part.size == len(part) == 8
    assert repr(part) == "<guestmem.VolatileSlice size=0x8 released>"


def listed(count: int, what: str) -> list[str]:
    return [f"{count} {what}{'' if count == 1 else 's'}"] if count else []


@pytest.mark.parametrize("slices", [0, 1, 2])
@pytest.mark.parametrize("refs", [0, 1, 2])
@pytest.mark.parametrize("exports", [0, 1, 2])
def test_close_is_refused_and_says_who_holds(
    backing: Backings, slices: int, refs: int, exports: int
) -> None:
    file = backing(PAGE)
    mapping = MemoryMapping.from_fd(file.fd, PAGE)
    holders: list[object] = [mapping.get_slice(0, 8) for _ in range(slices)]
    holders += [mapping.get_ref(8 * n, u64) for n in range(refs)]
    holders += [memoryview(mapping) for _ in range(exports)]
    who = listed(slices, "slice") + listed(refs, "ref") + listed(exports, "exported buffer")
    if who:
        for _ in range(2):  # refusing changes nothing
            with pytest.raises(BufferError) as caught:
                mapping.close()
            assert str(caught.value) == "cannot close the mapping: it is held by " + ", ".join(who)
            assert not mapping.closed
            mapping.write_obj(1, 0, u64)
    holders.clear()
    mapping.close()
    assert file.maps() == 0


class Closing:
    """A source that tries to close the memory that it is read into."""

    def __init__(self, memory: MemoryMapping | VolatileSlice) -> None:
        self.memory = memory
        self.refusal = ""

    def read(self, count: int) -> bytes:
        try:
            if isinstance(self.memory, MemoryMapping):
                self.memory.close()
            else:
                self.memory.release()
        except BufferError as error:
            self.refusal = str(error)
        return bytes(count)


def test_close_counts_running_calls() -> None:
    mapping = MemoryMapping(PAGE)
    part = mapping.get_slice(0, 8)
    refs = [mapping.get_ref(0, u64), part.get_ref(0, u32)]
    view = memoryview(mapping)
    source = Closing(mapping)
    mapping.read_to_memory(0, source, 8)
    assert source.refusal == (
        "cannot close the mapping: it is held by 1 slice, 2 refs, 1 exported buffer, 1 running call"
    )
    assert not mapping.closed

    source = Closing(part)
    export = memoryview(part)
    part.read_to_memory(0, source, 8)
    assert source.refusal == (
        "cannot release the slice: it is held by 1 exported buffer, 1 running call"
    )
    assert not part.closed
    del refs, view, export


def test_release_gives_the_borrow_back_at_once(backing: Backings) -> None:
    file = backing(PAGE)
    mapping = MemoryMapping.from_fd(file.fd, PAGE)
    part = mapping.get_slice(0, 64)
    for _ in range(3):
        part.release()
        assert part.closed
    mapping.close()
    assert file.maps() == 0


def test_what_was_made_from_a_slice_survives_its_release(backing: Backings) -> None:
    file = backing(PAGE)
    mapping = MemoryMapping.from_fd(file.fd, PAGE)
    part = mapping.get_slice(8, 64)
    inner, rest = part.get_slice(8, 8), part.offset(16)
    ref = part.get_ref(8, u64)
    again = ref.to_slice()
    part.release()
    with pytest.raises(BufferError, match="held by 3 slices, 1 ref$"):
        mapping.close()
    ref.store(7)
    assert inner.read_obj(0, u64) == again.read_obj(0, u64) == mapping.read_obj(16, u64) == 7
    assert rest.size == 48
    del mapping
    assert file.maps() == 1
    inner.release()
    rest.release()
    again.release()
    assert file.maps() == 1
    assert ref.load() == 7
    del ref
    assert file.maps() == 0


def test_release_is_refused_while_exported() -> None:
    part = MemoryMapping(PAGE).get_slice(0, 8)
    views = [memoryview(part), memoryview(part)]
    with pytest.raises(BufferError) as caught:
        part.release()
    assert str(caught.value) == "cannot release the slice: it is held by 2 exported buffers"
    assert not part.closed
    views[0].release()
    with pytest.raises(BufferError, match="held by 1 exported buffer$"):
        part.release()
    views[1].release()
    part.release()


def test_an_export_of_a_slice_keeps_the_mapping_open() -> None:
    mapping = MemoryMapping(PAGE)
    view = memoryview(mapping.get_slice(0, 8))
    with pytest.raises(BufferError, match="held by 1 slice$"):
        mapping.close()
    view.release()
    mapping.close()


# Weak references


def test_weak_references_to_mappings_and_slices() -> None:
    gone: list[str] = []
    mapping = MemoryMapping(PAGE)
    part = mapping.get_slice(0, 8)
    ref = mapping.get_ref(0, u64)
    to_mapping = weakref.ref(mapping, lambda _: gone.append("mapping"))
    to_part = weakref.ref(part, lambda _: gone.append("slice"))
    assert to_mapping() is mapping
    assert to_part() is part
    with pytest.raises(TypeError, match="weak reference"):
        weakref.ref(ref)
    del mapping
    assert gone == ["mapping"]
    assert to_mapping() is None
    ref.store(3)
    assert part.read_obj(0, u64) == 3
    del part
    assert gone == ["mapping", "slice"]
    assert to_part() is None
    assert ref.load() == 3


def test_close_in_the_callback_of_a_weak_reference(backing: Backings) -> None:
    file = backing(PAGE)
    mapping = MemoryMapping.from_fd(file.fd, PAGE)
    part = mapping.get_slice(0, 8)
    said: list[str] = []

    def close(_: weakref.ref[VolatileSlice]) -> None:
        try:
            mapping.close()
        except BufferError as error:
            said.append(str(error))

    keep = weakref.ref(part, close)
    del part
    assert keep() is None
    assert said == ["cannot close the mapping: it is held by 1 slice"]
    mapping.close()
    assert file.maps() == 0


def test_the_collector_sees_all_that_each_object_has() -> None:
    """And who looks for what refers to a thing finds the object: the search ends at it."""

    class Mine(ctypes.Structure):
        _fields_ = (("x", ctypes.c_uint32),)

    host = bytearray(64)
    part = VolatileSlice.from_buffer(host)
    layout = struct.Struct("<II")
    objects: list[object] = [
        *(part, part.get_ref(0, layout), part.get_ref(0, u32), part.get_array_ref(0, 2, Mine)),
        *(MemoryMapping(64).get_ref(0, Mine), GuestMemory([(0, part)])),
    ]
    if gc.is_tracked(_native):  # not without a GIL
        objects.append(_native)
    if part.as_ptr() % 4 == 0:
        objects.append(part.get_atomic_ref(0, u32))
    part.read_obj(0, layout)
    part.read_obj(0, Mine)
    for obj in objects:
        assert gc.is_tracked(obj)
        referents = gc.get_referents(obj)
        assert obj is _native or type(obj) in referents
        for referent in referents:
            assert any(one is obj for one in gc.get_referrers(referent)), (obj, referent)
