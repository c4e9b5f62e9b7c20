"""With blocks: left in good order, with borrowers, and by exceptions that must not be replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guestmem import ClosedError, MemoryMapping, u8, u64

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Backing

    Backings = Callable[[int], Backing]

PAGE = 4096


class Boom(Exception):
    """What ends a with block here."""


def test_with_closes_and_releases(backing: Backings) -> None:
    file = backing(PAGE)
    with MemoryMapping.from_fd(file.fd, PAGE) as mapping:
        with mapping.get_slice(0, 8) as part:
            assert not part.closed
        assert part.closed
        assert not mapping.closed
    assert mapping.closed
    assert file.maps() == 0


def test_with_around_closed_memory_is_fine_inside_and_an_error_outside() -> None:
    with MemoryMapping(PAGE) as mapping, mapping.get_slice(0, 8) as part:
        part.release()
        mapping.close()
    with pytest.raises(ClosedError), mapping:
        pytest.fail("the block must not run")
    with pytest.raises(ClosedError), part:
        pytest.fail("the block must not run")


def test_with_and_borrowers_left_is_a_buffer_error(backing: Backings) -> None:
    file = backing(PAGE)
    with pytest.raises(BufferError, match="held by 1 slice$"):
        with MemoryMapping.from_fd(file.fd, PAGE) as mapping:
            part = mapping.get_slice(0, 8)
    assert not mapping.closed
    mapping.fill(1)
    with pytest.raises(BufferError, match="held by 1 exported buffer$"), part:
        view = memoryview(part)
    assert not part.closed
    assert part.read_bytes(0, 1) == b"\1"
    view.release()
    part.release()
    mapping.close()


def test_an_exception_that_leaves_a_with_block_is_not_replaced(backing: Backings) -> None:
    file = backing(PAGE)
    boom = Boom()
    with pytest.raises(Boom) as caught:
        with MemoryMapping.from_fd(file.fd, PAGE) as mapping:
            part = mapping.get_slice(0, 8)
            ref = mapping.get_ref(0, u64)
            view = memoryview(mapping)
            raise boom
    assert caught.value is boom
    assert boom.__context__ is None
    assert boom.__cause__ is None
    assert mapping.closed
    with pytest.raises(ClosedError):
        mapping.read_obj(0, u64)
    mapping.close()  # closed already: nothing to refuse

    ref.store(5)
    assert part.read_obj(0, u64) == 5
    assert view[0] == 5
    inner = part.get_slice(0, 1)  # who borrows may lend
    holders: list[object] = [part, ref, view, inner]
    del part, ref, view, inner
    while holders:
        assert file.maps() == 1
        holders.pop()
    assert file.maps() == 0
    assert mapping.closed


@pytest.mark.parametrize("first", ["mapping", "view"])
def test_the_last_of_mapping_and_export_unmaps(backing: Backings, first: str) -> None:
    file = backing(PAGE)
    with pytest.raises(Boom):
        with MemoryMapping.from_fd(file.fd, PAGE) as mapping:
            view = memoryview(mapping)
            raise Boom
    if first == "mapping":
        del mapping  # the view keeps the object
        assert file.maps() == 1
        assert view[0] == 0
        del view
    else:
        del view
        assert mapping.closed
    assert file.maps() == 0


def test_a_slice_left_by_an_exception_is_given_back_by_its_last_export(backing: Backings) -> None:
    file = backing(PAGE)
    mapping = MemoryMapping.from_fd(file.fd, PAGE)
    with pytest.raises(Boom):
        with mapping.get_slice(0, 8) as part:
            view = memoryview(part)
            raise Boom
    assert part.closed
    with pytest.raises(ClosedError):
        part.read_obj(0, u8)
    view[0] = 9
    assert mapping.read_obj(0, u8) == 9
    with pytest.raises(BufferError, match="held by 1 slice$"):
        mapping.close()
    view.release()
    mapping.close()  # although the slice object lives
    assert file.maps() == 0
    del part


def test_a_slice_without_exports_is_given_back_at_once() -> None:
    mapping = MemoryMapping(PAGE)
    with pytest.raises(Boom):
        with mapping.get_slice(0, 8):
            raise Boom
    mapping.close()


def test_a_running_call_outlives_a_with_block_that_an_exception_leaves(backing: Backings) -> None:
    file = backing(PAGE)

    class Leaving:
        def read(self, count: int) -> bytes:
            mapping.__exit__(Boom, Boom(), None)
            assert mapping.closed
            assert file.maps() == 1
            return b"x" * count

    mapping = MemoryMapping.from_fd(file.fd, PAGE)
    mapping.read_to_memory(0, Leaving(), 8)
    assert file.maps() == 0
    assert file.read(0, 8) == b"x" * 8
