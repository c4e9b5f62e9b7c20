"""The table of operations: what is measured, against what, and what it should reach.

A line is: operation | its statement | peer's statement | largest ratio of the times | peer's name,
where it is not its statement. Both statements see the same names, as local variables, and all
memory was touched before. Scalars of the peers lie in an mmap.mmap. Copies of the peers work on the
very pages that guestmem maps, through a memoryview: nothing but the way of copying differs.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import mmap
import os
import random
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guestmem import GuestMemory, MemoryMapping, Ordering, u64

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB, MIB = 1 << 10, 1 << 20
VALUE = 0x1234_5678_9ABC  # like a guest physical address: more than one digit of an int
REGION_SIZE = 64 * KIB
REGION_STARTS = {  # where 512 regions lie
    "512 regions": [i * REGION_SIZE for i in range(512)],
    "512 in two halves": [  # side by side below the 32-bit hole, and from 4 GiB on
        i % 256 * REGION_SIZE + (i // 256 << 32) for i in range(512)
    ],
}

OBJECTS = """
ref.load(), u64          | load()                 | words[i]                | 0.80 | memoryview.cast
ref.store(v), u64        | store(v)               | words[i] = v            | 0.65 | memoryview.cast
read_obj(off, u64)       | read_obj(off, u64)     | words[i]                | 1.00 | memoryview.cast
write_obj(v, off, u64)   | write_obj(v, off, u64) | words[i] = v            | 1.00 | memoryview.cast
read_obj(off, u64)       | read_obj(off, u64)     | unpack_from(mm, off)[0] | 0.50 | Struct("<Q")
write_obj(v, off, u64)   | write_obj(v, off, u64) | pack_into(mm, off, v)   | 0.50 | Struct("<Q")
read_obj(off, Struct)    | read_obj(off, layout)  | layout_from(mm, off)    | 1.10 | its unpack_from
read_obj(off, Structure) | read_obj(off, Entry)   | entry_from(mm, off)     | 1.00 | its from_buffer
read_bytes, 8 B          | read_bytes(off, 8)     | mm[off:end8]            | 0.75 | mmap[a:b]
read_bytes, 64 B         | read_bytes(off, 64)    | mm[off:end64]           | 0.75 | mmap[a:b]
read_bytes, 4 KiB        | read_bytes(off, 4096)  | mm[off:end4096]         | 0.85 | mmap[a:b]
get_ref                  | get_ref(off, u64)      | view[off:end8]          | 0.60 | memoryview[a:b]
get_slice                | get_slice(off, 64)     | view[off:end64]         | 0.60 | memoryview[a:b]
"""
FAULTS = """
ref.load(), u64          | file_load()             | load()             | 1.05 | on anonymous memory
read_obj(off, u64)       | file_read_obj(off, u64) | read_obj(off, u64) | 1.05 | on anonymous memory
read_slice, 64 B         | file_read_slice(b, off) | read_slice(b, off) | 1.05 | on anonymous memory
"""
GUESTS = """
read_obj, 1 region       | one_read_obj(off, u64) | read_obj(off, u64) | 1.15 | of a mapping
write_obj, 1 region      | one_write_obj(v, off, u64) | write_obj(v, off, u64) | 1.15 | of a mapping
tolist(), 1,024 u64      | to_list()             | words_to_list()    | 1.00 | memoryview.cast
array[i], u64            | array[i]              | words[i]           | 1.00 | memoryview.cast
store(v), tracked        | tracked_store(v)      | store(v)           | 2.00 | not tracked
"""
# At 1,024 random addresses, one after the other; the peer's are where those lie in its mapping.
REGIONS = """
1,024 read_obj, {regions} | for at in addresses: find_obj(at, u64) | {peer} | 1.40 | of a mapping
"""
ATOMICS = """
AtomicRef.load(), u64    | atomic_load()         | load()             | 1.10 | VolatileRef.load
AtomicRef.load(ACQUIRE)  | atomic_load(acquire)  | load()             | 1.10 | VolatileRef.load
"""
ATOMICSHM = """
AtomicRef.load(), u64    | atomic_load()         | shm_load()         | 1.00 | atomicshm
AtomicRef.load(ACQUIRE)  | atomic_load(acquire)  | shm_load(theirs)   | 1.00 | atomicshm
AtomicRef.store(v)       | atomic_store(v)       | shm_store(v)       | 1.00 | atomicshm
AtomicRef.fetch_add(1)   | atomic_add(1)         | shm_add(1)         | 1.00 | atomicshm
"""
WRITE = "write_slice, {} | write_slice(buf, a) | view[a:b] = buf | {} | memoryview[a:b] = buf"
READ = "read_slice, {}  | read_slice(buf, a)  | buf[:] = view[a:b] | {} | buf[:] = memoryview[a:b]"
COPY = "slice to slice, {} | copy(dst) | low[:] = high | {} | memoryview to memoryview"
OVERLAPPING = """
1 MiB up by {size}       | up(high)  | move(apart, 0, n) | 1.20 | mmap.move
1 MiB down by {size}     | down(low) | move(0, apart, n) | 1.20 | mmap.move
"""
MAPPINGS = """
make and close, {size}   | MemoryMapping(n).close() | mmap(-1, n).close() | 1.10 | mmap.mmap
"""
FILES = """
pread 512 B to memory    | read_to(0, fd, 512, 0)    | preadv(fd, [sector], 0)  | 0.90 | os.preadv
pread 1 MiB to memory    | read_to(0, fd, n, 0)      | preadv(fd, [view], 0)    | 1.02 | os.preadv
write 512 B to /dev/null | write_from(0, null, 512)  | write(null, view[a:b])   | 0.80 | os.write
pwrite 512 B to a memfd  | write_from(0, fd, 512, 0) | pwrite(fd, view[a:b], 0) | 0.80 | os.pwrite
read 1 MiB by a FileIO   | seek(0); read_to(0, f, n) | seek(0); readinto(view)  | 1.05 | f.readinto
"""
# For the pictures: every way to read a u64, and the ways to copy.
LATENCY = """
guestmem ref.load()            | load()
guestmem read_obj              | read_obj(off, u64)
memoryview.cast("Q")[i]        | words[i]
ctypes, bound once             | bound.value
NumPy array[i]                 | array[i]
Struct.unpack_from             | unpack_from(mm, off)[0]
int.from_bytes(mmap[a:b])      | from_bytes(mm[off:end8], "little")
ctypes from_buffer, each time  | from_buffer(mm, off).value
an empty C call                | empty()
"""
BANDWIDTH = """
guestmem write_slice   | write_slice(buf, a)
guestmem read_slice    | read_slice(buf, a)
memoryview[a:b] = buf  | view[a:b] = buf
NumPy array[a:b] = buf | array[a:b] = numpy_buf
memcpy                 | memmove(guest_address, host_address, b)
a call of memcpy       | memmove(guest_address, host_address, 0)
"""


@dataclass(frozen=True)
class Row:
    group: str
    name: str
    peer_name: str
    ours: str
    peer: str
    target: float
    values: dict[str, Any]


class Entry(ctypes.LittleEndianStructure):
    _fields_ = (
        ("addr", ctypes.c_uint64),
        ("len", ctypes.c_uint32),
        ("flags", ctypes.c_uint16),
        ("next", ctypes.c_uint16),
    )


def split(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def make(group: str, table: str, values: dict[str, Any]) -> Iterator[Row]:
    for name, ours, peer, target, *peer_name in split(table):
        yield Row(group, name, "".join(peer_name) or peer, ours, peer, float(target), values)


def rows() -> Iterator[Row]:
    """Make the rows one by one, so that their memory goes when the next ones need theirs."""
    yield from make("objects", OBJECTS, object_values())
    yield from make("memory that can fault", FAULTS, fault_values())
    yield from make("guests", GUESTS, guest_values())
    for regions, starts in REGION_STARTS.items():
        peer = "for at in offsets: read_obj(at, u64)"
        table = REGIONS.format(regions=regions, peer=peer)
        yield from make("guests", table, region_values(starts))
    yield from make("atomics", ATOMICS, atomic_values())
    if importlib.util.find_spec("atomicshm") is not None:
        yield from make("atomics", ATOMICSHM, atomicshm_values())
    for size, write, read in (64, 0.60, 0.35), (512, 0.75, 0.45):
        values, name = copy_values(size) | {"buf": bytearray(size)}, size_name(size)
        for line, target in (WRITE, write), (READ, read), (COPY, 1.00):
            yield from make("small copies", line.format(name, target), values)
    for size, target in (4 * KIB, 0.85), (64 * KIB, 1.00), (MIB, 1.03), (64 * MIB, 0.80):
        for alignment in 0, 1, 8, 31:
            values, name = copy_values(size, alignment), f"{size_name(size)}, buf at +{alignment}"
            read = 1.10 if size == MIB and alignment else target
            yield from make("copies", WRITE.format(name, target), values)
            yield from make("copies", READ.format(name, read), values)
        yield from make("copies", COPY.format(size_name(size), 1.00), values)
    for apart in 4 * KIB, 8, 1:
        table = OVERLAPPING.format(size=size_name(apart))
        yield from make("slice to slice, overlapping", table, overlap_values(apart))
    for n in 4 * KIB, MIB:
        values = {"MemoryMapping": MemoryMapping, "mmap": mmap.mmap, "n": n}
        yield from make("mappings", MAPPINGS.format(size=size_name(n)), values)
    yield from make("files", FILES, file_values())


def size_name(count: int) -> str:
    unit, name = (MIB, "MiB") if count >= MIB else (KIB, "KiB") if count >= KIB else (1, "B")
    return f"{count // unit} {name}"


def guest_memory(size: int) -> MemoryMapping:
    ram = MemoryMapping(size)
    ram.fill(0xAA)
    return ram


def host_memory(size: int) -> mmap.mmap:
    """Return what a buffer of the host lies in, from a page's start on."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"\x55" * size
    return memory


# What the statements name, as the local variables of these functions.


def object_values() -> dict[str, Any]:
    ram, mm = guest_memory(64 * KIB), mmap.mmap(-1, 64 * KIB)
    mm[:] = ram.read_bytes(0, ram.size)
    off, v, word, layout = 0x100, VALUE, struct.Struct("<Q"), struct.Struct("<QIHH")
    i, end8, end64, end4096 = off // 8, off + 8, off + 64, off + 4096
    ram.write_obj(v, off, u64)
    word.pack_into(mm, off, v)
    ref = ram.get_ref(off, u64)
    load, store, read_obj, write_obj = ref.load, ref.store, ram.read_obj, ram.write_obj
    read_bytes, get_slice, get_ref = ram.read_bytes, ram.get_slice, ram.get_ref
    unpack_from, pack_into, layout_from = word.unpack_from, word.pack_into, layout.unpack_from
    view, words = memoryview(mm), memoryview(mm).cast("Q")
    entry_from, from_buffer = Entry.from_buffer_copy, ctypes.c_uint64.from_buffer
    bound, from_bytes, empty = from_buffer(mm, off), int.from_bytes, (1).conjugate
    return globals() | locals()


def fault_values() -> dict[str, Any]:
    fd, off, b = os.memfd_create("bench"), 0x100, bytearray(64)
    os.ftruncate(fd, 64 * KIB)
    file, ram = MemoryMapping.from_fd(fd, 64 * KIB), guest_memory(64 * KIB)
    os.close(fd)
    file.write_obj(VALUE, off, u64)
    ram.write_obj(VALUE, off, u64)
    file_load, load = file.get_ref(off, u64).load, ram.get_ref(off, u64).load
    file_read_obj, file_read_slice = file.read_obj, file.read_slice
    read_obj, read_slice = ram.read_obj, ram.read_slice
    return globals() | locals()


def guest_values() -> dict[str, Any]:
    ram, tracked = guest_memory(64 * KIB), MemoryMapping(64 * KIB, track_dirty=True)
    off, v = 0x100, VALUE
    ram.get_array_ref(0, 1024, u64).copy_from([VALUE] * 1024)
    one = GuestMemory([(0, ram)])
    one_read_obj, one_write_obj = one.read_obj, one.write_obj
    read_obj, write_obj = ram.read_obj, ram.write_obj
    i, array, words = off // 8, ram.get_array_ref(0, 1024, u64), memoryview(ram).cast("Q")
    store, tracked_store = ram.get_ref(off, u64).store, tracked.get_ref(off, u64).store
    to_list, words_to_list = array.tolist, words[:1024].tolist
    return globals() | locals()


def region_values(starts: list[int]) -> dict[str, Any]:
    """Make a guest of pieces of one mapping, at these guest addresses."""
    ram, choose = guest_memory(REGION_SIZE * len(starts)), random.Random(5)
    pieces = [ram.get_slice(REGION_SIZE * i, REGION_SIZE) for i in range(len(starts))]
    find_obj = GuestMemory(zip(starts, pieces, strict=True)).read_obj
    places = [
        (choose.randrange(len(starts)), choose.randrange(0, REGION_SIZE, 8)) for _ in range(1024)
    ]
    addresses = [starts[i] + at for i, at in places]
    offsets, read_obj = [REGION_SIZE * i + at for i, at in places], ram.read_obj
    return globals() | locals()


def atomic_values() -> dict[str, Any]:
    ram, off, acquire = guest_memory(64 * KIB), 0x100, Ordering.ACQUIRE
    ram.write_obj(VALUE, off, u64)
    atomic_load, load = ram.get_atomic_ref(off, u64).load, ram.get_ref(off, u64).load
    return locals()


def atomicshm_values() -> dict[str, Any]:
    shm: Any = importlib.import_module("atomicshm")
    ram, off, v, acquire = guest_memory(64 * KIB), 0x100, VALUE, Ordering.ACQUIRE
    ref, cell = ram.get_atomic_ref(off, u64), shm.AtomicU64(shm.AtomicView(ram), off)
    atomic_load, atomic_store, atomic_add = ref.load, ref.store, ref.fetch_add
    shm_load, shm_store, shm_add, theirs = cell.load, cell.store, cell.fetch_add, shm.ACQUIRE
    atomic_store(v)
    return locals()


def copy_values(b: int, alignment: int = 0) -> dict[str, Any]:
    a, ram, host = 0, guest_memory(2 * b), memoryview(host_memory(b + 4 * KIB))
    buf, view = host[alignment : alignment + b], memoryview(ram)
    low, high, dst = view[:b], view[b:], ram.get_slice(0, b)
    copy, read_slice = ram.get_slice(b, b).copy_to_volatile_slice, ram.read_slice
    write_slice = ram.write_slice
    return locals()


def overlap_values(apart: int) -> dict[str, Any]:
    ram, n, move = guest_memory(2 * MIB), MIB, host_memory(2 * MIB).move
    low, high = ram.get_slice(0, n), ram.get_slice(apart, n)
    up, down = low.copy_to_volatile_slice, high.copy_to_volatile_slice
    return locals()


def file_values() -> dict[str, Any]:
    a, b, n, ram, fd = 0, 512, MIB, guest_memory(MIB), os.memfd_create("bench")
    read_to, write_from = ram.read_to_memory, ram.write_from_memory
    write_from(0, fd, n, 0)
    f, null = os.fdopen(fd, "rb", buffering=0), os.open(os.devnull, os.O_WRONLY)
    view, seek, readinto = memoryview(ram), f.seek, f.readinto
    sector, preadv, pwrite, write = view[a:b], os.preadv, os.pwrite, os.write
    return locals()
