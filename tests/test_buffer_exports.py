"""What others are given by the buffer protocol: all the bytes, writable, while they live."""

from __future__ import annotations

import ctypes
import io
import os
import socket
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest

from guestmem import ClosedError, MemoryMapping, VolatileMemory, VolatileSlice, le32, u8, u64

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 100
PATTERN = bytes(range(SIZE))


@pytest.fixture(params=["mapping", "slice", "slice of a bytearray"])
def memory(request: pytest.FixtureRequest) -> Iterator[VolatileMemory]:
    mapping = MemoryMapping(SIZE + 7)
    if request.param == "mapping":
        yield MemoryMapping(SIZE)
    elif request.param == "slice":
        yield mapping.get_slice(3, SIZE)
        assert mapping.read_bytes(0, 3) == mapping.read_bytes(SIZE + 3, 4).ljust(3)[:3] == bytes(3)
    else:
        yield VolatileSlice.from_buffer(bytearray(SIZE))


def test_memoryview(memory: VolatileMemory) -> None:
    view = memoryview(memory)
    assert view.obj is memory
    assert (view.format, view.itemsize, view.nbytes, view.shape) == ("B", 1, SIZE, (SIZE,))
    assert (view.ndim, view.strides, view.suboffsets) == (1, (1,), ())
    assert not view.readonly
    assert view.contiguous
    assert view.c_contiguous
    view[:] = PATTERN
    assert memory.read_bytes(0, SIZE) == PATTERN
    memory.write_obj(0xFF, SIZE - 1, u8)
    assert view[-1] == 0xFF
    with pytest.raises(IndexError):
        view[SIZE]


def test_memoryview_casts(memory: VolatileMemory) -> None:
    memory.write_all(PATTERN, 0)
    words = memoryview(memory)[4:20].cast("I")
    assert words.tolist() == list(struct.unpack("=4I", PATTERN[4:20]))
    words[0] = 0x01020304
    assert memory.read_bytes(4, 4) == struct.pack("=I", 0x01020304)
    table = memoryview(memory)[:96].cast("B", (8, 12))
    assert table[1, 1] == 13
    assert memoryview(memory).toreadonly().readonly
    assert memoryview(memory)[::-1].tobytes()[:1] == PATTERN[-1:]


def test_every_kind_of_buffer_that_can_be_asked_for(memory: VolatileMemory) -> None:
    """ctypes calls PyObject_GetBuffer with each set of flags and looks at what comes."""

    class View(ctypes.Structure):
        _fields_ = (
            ("buf", ctypes.c_void_p),
            ("obj", ctypes.c_void_p),
            ("len", ctypes.c_ssize_t),
            ("itemsize", ctypes.c_ssize_t),
            ("readonly", ctypes.c_int),
            ("ndim", ctypes.c_int),
            ("format", ctypes.c_char_p),
            ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
            ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
            ("suboffsets", ctypes.c_void_p),
            ("internal", ctypes.c_void_p),
        )

    get = ctypes.pythonapi.PyObject_GetBuffer
    get.argtypes = (ctypes.py_object, ctypes.POINTER(View), ctypes.c_int)
    release = ctypes.pythonapi.PyBuffer_Release
    release.argtypes = (ctypes.POINTER(View),)
    writable, form, nd, strides = 0x1, 0x4, 0x8, 0x18
    contiguous = {"c": 0x38, "f": 0x58, "any": 0x98, "indirect": 0x118}
    for flags in (0, writable, form, nd, strides, nd | form | writable, *contiguous.values()):
        view = View()
        assert get(memory, ctypes.byref(view), flags) == 0
        assert view.buf == memory.as_ptr()
        assert (view.len, view.itemsize, view.readonly, view.ndim) == (SIZE, 1, 0, 1)
        assert view.format == (b"B" if flags & form else None)
        assert bool(view.shape) == bool(flags & nd)
        if flags & nd:
            assert view.shape[0] == SIZE
        assert bool(view.strides) == (flags & strides == strides)
        assert view.suboffsets is None
        release(ctypes.byref(view))
    if isinstance(memory, VolatileSlice):
        memory.release()  # every one was given back


def test_numpy(memory: VolatileMemory) -> None:
    array = np.frombuffer(memory, "<u4", count=4, offset=8)
    assert array.flags.writeable
    array[:] = [1, 2, 3, 4]
    assert [memory.read_obj(8 + 4 * n, le32) for n in range(4)] == [1, 2, 3, 4]
    memory.write_obj(5, 8, le32)
    assert int(array[0]) == 5
    assert np.frombuffer(memory, np.uint8).sum() == 5 + 2 + 3 + 4
    assert np.asarray(memory).shape == (SIZE,)


def test_ctypes(memory: VolatileMemory) -> None:
    class Header(ctypes.LittleEndianStructure):
        _pack_ = 1
        _layout_ = "ms"
        _fields_ = (("magic", ctypes.c_uint16), ("length", ctypes.c_uint64))

    header = Header.from_buffer(memory, 3)
    header.magic, header.length = 0x1AF4, 2**40
    assert memory.read_bytes(3, 10) == struct.pack("<HQ", 0x1AF4, 2**40)
    assert bytes(Header.from_buffer_copy(memory, 3)) == memory.read_bytes(3, 10)
    with pytest.raises(ValueError, match="too small"):
        Header.from_buffer(memory, SIZE - 9)


def test_struct(memory: VolatileMemory) -> None:
    struct.pack_into("<IQ", memory, 5, 7, 2**63)
    assert struct.unpack_from("<IQ", memory, 5) == (7, 2**63)
    assert memory.read_obj(9, u64) == 2**63
    with pytest.raises(struct.error):
        struct.pack_into("<Q", memory, SIZE - 7, 1)


def test_positioned_file_calls(memory: VolatileMemory, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(PATTERN * 2)
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.preadv(fd, [memory], 10) == SIZE
        assert memory.read_bytes(0, SIZE) == (PATTERN * 2)[10 : 10 + SIZE]
        memory.fill(0x5A)
        assert os.pwritev(fd, [memory, memory], 0) == 2 * SIZE
        assert path.read_bytes() == b"Z" * (2 * SIZE)
    finally:
        os.close(fd)


def test_sockets(memory: VolatileMemory) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(PATTERN)
        assert right.recv_into(memory) == SIZE
        assert memory.read_bytes(0, SIZE) == PATTERN
        assert right.send(memory) == SIZE
        assert left.recv(SIZE) == PATTERN
        left.sendall(b"abc")
        assert right.recvmsg_into([memoryview(memory)[1:3], memoryview(memory)[8:]])[0] == 3
        assert memory.read_bytes(0, 9) == b"\0ab\3\4\5\6\7c"


def test_files_read_into_it(memory: VolatileMemory) -> None:
    assert io.BytesIO(b"12345").readinto(memory) == 5
    assert memory.read_bytes(0, 6) == b"12345\0"
    assert io.BufferedReader(io.BytesIO(b"abc")).readinto(memory) == 3
    assert io.BytesIO(memory).read(4) == b"abc4"
    assert bytes(memory) == memory.read_bytes(0, SIZE)
    assert bytearray(memory)[:4] == b"abc4"
    assert b"".join([memory, b"!"]) == bytes(memory) + b"!"


def test_the_memory_as_its_own_source_and_destination(memory: VolatileMemory) -> None:
    memory.write_all(PATTERN, 0)
    assert memory.write_slice(memory, 10) == SIZE - 10
    assert memory.read_bytes(0, SIZE) == PATTERN[:10] + PATTERN[:-10]
    assert memory.read_slice(memory, 10) == SIZE - 10
    assert memory.read_bytes(0, SIZE) == PATTERN[:-10] + PATTERN[-20:-10]


def test_buffers_of_other_shapes_count_in_bytes() -> None:
    mapping = MemoryMapping(SIZE)
    source = np.arange(6, dtype="<u4").reshape(2, 3)
    assert mapping.write_slice(source, 0) == 24
    assert mapping.read_bytes(0, 24) == source.tobytes()
    target = np.zeros((3, 2), "<u4")
    assert mapping.read_slice(target, 0) == 24
    assert target.ravel().tolist() == list(range(6))
    scalar = np.zeros((), "<u4")
    mapping.read_exact(scalar, 4)
    assert int(scalar) == 1


def test_a_slice_of_no_bytes_exports_none() -> None:
    mapping = MemoryMapping(SIZE)
    for offset in (0, 1, SIZE):
        part = mapping.get_slice(offset, 0)
        view = memoryview(part)
        assert (view.nbytes, view.shape, bytes(view)) == (0, (0,), b"")
        assert io.BytesIO(b"12").readinto(part) == 0
        with pytest.raises(BufferError, match="held by 1 exported buffer$"):
            part.release()
        view.release()
        part.release()


def test_closed_memory_exports_nothing() -> None:
    mapping = MemoryMapping(SIZE)
    part = mapping.get_slice(0, 8)
    part.release()
    mapping.close()
    for closed in (mapping, part):
        for use in (memoryview, bytes, np.frombuffer, io.BytesIO):
            with pytest.raises(ClosedError):
                use(closed)
        with pytest.raises(ClosedError):
            MemoryMapping(8).write_slice(closed, 0)
        with pytest.raises(TypeError):  # what CPython makes of any error here
            io.BytesIO(b"x").readinto(closed)


def test_a_refused_export_is_not_counted() -> None:
    mapping = MemoryMapping(SIZE)
    with pytest.raises(ValueError, match="too small"):
        ctypes.c_uint64.from_buffer(mapping, SIZE - 7)
    with pytest.raises(ValueError, match="negative"):
        ctypes.c_uint64.from_buffer(mapping, -1)
    with pytest.raises(TypeError):
        ctypes.c_char_p.from_buffer(mapping, 0, 0)  # type: ignore[call-arg]
    mapping.close()


def test_indexing_is_left_to_memoryview() -> None:
    mapping = MemoryMapping(SIZE)
    with pytest.raises(TypeError, match="not subscriptable"):
        mapping[0]  # type: ignore[index]
    with pytest.raises(TypeError, match="item assignment"):
        mapping[0] = 1  # type: ignore[index]
    with pytest.raises(TypeError, match="not iterable"):
        iter(mapping)  # type: ignore[call-overload]


def test_a_view_of_a_large_mapping_reaches_its_end() -> None:
    size = 2**32 + 5
    mapping = MemoryMapping(size)
    view = memoryview(mapping)
    assert view.nbytes == size
    view[size - 1] = 7
    assert mapping.read_obj(size - 1, u8) == 7
    assert int(np.frombuffer(mapping, np.uint8, offset=2**32)[-1]) == 7
