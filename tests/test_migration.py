"""Live migration: memory is copied while it is written; in the end the copy is the source."""

from __future__ import annotations

import io
import itertools
import os
import platform
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import guestmem
from guestmem import DirtyBitmap, GuestMemory, MemoryMapping, VolatileSlice, u32, u64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
README = (Path(__file__).parent.parent / "README.md").read_text()


def copy(source: GuestMemory, target: GuestMemory) -> int:
    """Copy what is dirty; return how many bytes that was."""
    ranges = source.take_dirty()
    for addr, count in ranges:
        at = addr
        for part in source.slices(addr, count):
            at += target.write_slice(part, at)
    return sum(count for _, count in ranges)


def same(source: GuestMemory, target: GuestMemory) -> bool:
    return all(
        target.read_bytes(region.start, region.size) == source.read_bytes(region.start, region.size)
        for region in source.regions
    )


def tracked(size: int) -> tuple[MemoryMapping, DirtyBitmap]:
    memory = MemoryMapping(size, track_dirty=True)
    assert memory.dirty is not None
    return memory, memory.dirty


def start(*workers: Callable[[], object]) -> Callable[[], None]:
    """Run each in a thread; return what waits for all, and raises what one of them raised."""
    errors: list[BaseException] = []

    def work(worker: Callable[[], object]) -> None:
        try:
            worker()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()

    def join() -> None:
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    return join


# Everything that writes, and a migration at the same time

MIDDLE, CHUNK, CHUNKS = (
    8 << 20,
    300_000,
    54,
)  # a chunk of them crosses from one region into the next
CONTENT = bytes(range(1, 256)) * (CHUNK // 255) + bytes(range(1, CHUNK % 255 + 1))


def words(addr: int) -> range:
    """Return the addresses of some words of a chunk: one in every second page."""
    return range(addr + -addr % 8, addr + CHUNK - 8, 2 * PAGE)


def by_parts(guest: GuestMemory, addr: int) -> Iterator[tuple[VolatileSlice, bytes]]:
    done = 0
    for part in guest.slices(addr, CHUNK):
        yield part, CONTENT[done : done + part.size]
        done += part.size


def write_refs(guest: GuestMemory, addr: int, _fd: int) -> None:
    for at in words(addr):
        guest.get_ref(at, u64).store(at)


def write_atomics(guest: GuestMemory, addr: int, _fd: int) -> None:
    for at in words(addr):
        ref = guest.get_atomic_ref(at, u64)
        ref.store(at)
        assert ref.exchange(5) == at
        ref.fetch_add(at)


def write_objects(guest: GuestMemory, addr: int, _fd: int) -> None:
    for at in words(addr):
        guest.write_obj(at, at, u64)


def write_arrays(guest: GuestMemory, addr: int, _fd: int) -> None:
    for part in guest.slices(addr, CHUNK):
        array = part.get_array_ref(0, part.size // 8, u64)
        array.copy_from(range(len(array)))
        array[-1] = 7


def copy_slices(guest: GuestMemory, addr: int, _fd: int) -> None:
    for part, content in by_parts(guest, addr):
        with VolatileSlice.from_buffer(bytearray(content)) as other:
            other.copy_to_volatile_slice(part)


def read_once(guest: GuestMemory, addr: int, fd: int) -> None:
    os.lseek(fd, 0, os.SEEK_SET)
    for part in guest.slices(addr, CHUNK):
        part.read_from(fd, part.size)


WAYS: dict[str, Callable[[GuestMemory, int, int], object]] = {
    "fill": lambda guest, addr, fd: guest.fill(0x5A, addr, CHUNK),
    "write_all": lambda guest, addr, fd: guest.write_all(CONTENT, addr),
    "write_slice": lambda guest, addr, fd: guest.write_slice(CONTENT, addr),
    "read_to_memory": lambda guest, addr, fd: guest.read_to_memory(addr, fd, CHUNK, 0),
    "file object": lambda guest, addr, fd: guest.read_to_memory(addr, io.BytesIO(CONTENT), CHUNK),
    "preadv": lambda guest, addr, fd: guestmem.preadv(fd, guest.slices(addr, CHUNK), 0),
    "read_from": read_once,
    "copy_to_volatile_slice": copy_slices,
    "array.copy_from": write_arrays,
    "ref.store": write_refs,
    "atomics": write_atomics,
    "write_obj": write_objects,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_while_it_is_copied(way: str) -> None:
    """Each page is written once: a mark that came too early is not made up for later."""
    source = GuestMemory([(0, tracked(MIDDLE)[0]), (MIDDLE, tracked(MIDDLE)[0])])
    target = GuestMemory.from_ranges([(0, MIDDLE), (MIDDLE, MIDDLE)])
    fd = os.memfd_create("content")
    os.write(fd, CONTENT)

    def write() -> None:
        try:
            for n in range(CHUNKS):
                WAYS[way](source, n * CHUNK, fd)
                assert n or begun.wait(30)
        finally:
            stop.set()

    begun, stop = threading.Event(), threading.Event()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        join = start(write)
        while not stop.is_set():
            if copy(source, target):
                begun.set()
        join()
    finally:
        sys.setswitchinterval(interval)
        os.close(fd)
    copy(source, target)
    assert source.take_dirty() == []
    assert same(source, target)
    last = CHUNK * (CHUNKS - 1)
    assert any(target.read_bytes(last, CHUNK))  # it has written


def test_a_mark_comes_after_what_it_tells_of(pipe: tuple[int, int]) -> None:
    """Whoever takes while a call waits for its source gets nothing, or has it all again."""
    memory, dirty = tracked(8 * PAGE)
    guest = GuestMemory([(0, memory)])

    class Source:
        def readinto(self, buffer: memoryview) -> int:
            dirty.take()
            buffer[:8] = b"12345678"
            return 8

    source = Source()
    for read in (
        lambda: memory.read_to_memory(PAGE, source, 8),
        lambda: guest.read_to_memory(PAGE, source, 8),
        lambda: memory.get_slice(PAGE, 8).read_from(source, 8),
    ):
        read()
        assert dirty.take() == [(PAGE, PAGE)]

    receive, send = pipe
    for wait in (
        lambda: memory.read_to_memory(PAGE, receive, 8),
        lambda: guest.read_to_memory(PAGE, receive, 8),
        lambda: memory.get_slice(PAGE, 8).read_from(receive, 8),
        lambda: guestmem.preadv(receive, guest.slices(PAGE, 8)),
    ):
        join = start(wait)
        for _ in range(20):
            dirty.take()
            threading.Event().wait(0.001)
        os.write(send, b"12345678")
        join()
        assert dirty.take() == [(PAGE, PAGE)]


# A guest

CODE, DATA, PAGES, DEVICE = 0x1000, 0x100000, 64, 0x8000
# A counter in each page of a window that moves on: 32-bit code, position-independent.
PROGRAM = bytes.fromhex(
    "ff07"  # inc dword [edi]
    "81c700100000"  # add edi, 0x1000
    "39f7"  # cmp edi, esi
    "72f4"  # jb to the start
    "89df"  # mov edi, ebx
    "ebf0"  # jmp to the start
)


def test_the_copy_equals_the_source() -> None:
    """A guest and a device run while all is copied; they are slowed down until little is left."""
    if "LD_PRELOAD" in os.environ:
        pytest.skip("unicorn's library and a sanitizer do not share a process")
    unicorn = pytest.importorskip("unicorn")
    low, _ = tracked(0x10000)
    high, dirty = tracked(PAGES * PAGE)
    source = GuestMemory([(0, low), (DATA, high)])
    target = GuestMemory.from_ranges([(0, 0x10000), (DATA, PAGES * PAGE)])
    source.write_all(PROGRAM, CODE)
    cpu: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
    for region in source.regions:
        address = source.get_host_address(region.start)
        cpu.mem_map_ptr(region.start, region.size, unicorn.UC_PROT_ALL, address)
    # What the guest writes goes past guestmem: its log is merged, after it was written.
    written: list[int] = []

    def log(_cpu: Any, _access: int, addr: int, *_: object) -> None:
        written.append(addr)

    cpu.hook_add(unicorn.UC_HOOK_MEM_WRITE, log)
    window, stop = [PAGES], threading.Event()
    rounds = itertools.count()

    def run() -> None:
        while not stop.is_set():
            first, pages = next(rounds) % PAGES, window[0]
            begin = DATA + first * PAGE
            end = begin + min(pages, PAGES - first) * PAGE
            for register, value in (("EDI", begin), ("EBX", begin), ("ESI", end)):
                cpu.reg_write(getattr(unicorn.x86_const, f"UC_X86_REG_{register}"), value)
            cpu.emu_start(CODE, 0, count=200)
            bitmap = bytearray(len(memoryview(dirty)))
            for addr in written:
                page = (addr - DATA) // PAGE
                bitmap[page // 8] |= 1 << page % 8
            written.clear()
            dirty.merge(bitmap)
            stop.wait(0.001)

    def serve() -> None:
        total = source.get_atomic_ref(DEVICE + 8, u64)
        for n in itertools.count(1):
            source.write_obj(n, DEVICE, u64)
            total.fetch_add(n)
            source.write_all(bytes([n % 256]) * PAGE, DEVICE + n % window[0] * 16)
            if stop.wait(0.0005):
                return

    join = start(run, serve)
    sizes: list[int] = []
    try:
        while len(sizes) < 10_000:
            sizes.append(copy(source, target))
            if len(sizes) >= 8 and sizes[-1] <= 8 * PAGE:
                break  # little enough to stop for
            window[0] = max(window[0] // 2, 1)
            stop.wait(0.005)
    finally:
        stop.set()
        join()
    assert sizes[-1] <= 8 * PAGE < max(sizes), "it does not converge"
    source.write_obj(0x5A, DATA + 8, u32)
    assert copy(source, target) > 0
    assert source.take_dirty() == []
    assert same(source, target)
    assert source.read_obj(DATA, u32) > 0
    assert target.read_obj(DEVICE, u64) > 0


def need_kvm() -> None:
    if platform.machine() != "x86_64":
        pytest.skip(f"the KVM engine is for x86-64, not {platform.machine()}")
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"/dev/kvm: {error.strerror}")


def test_what_kvm_logs() -> None:
    """KVM's own log says in our layout which pages a guest wrote; reading it clears it."""
    need_kvm()
    from kvm import KvmVcpu
    from machine import Serial

    ram, dirty = tracked(300 * PAGE)
    source = GuestMemory([(0, ram)])
    target = GuestMemory.from_ranges([(0, ram.size)])
    for pages in ([2, 7, 8, 9, 63, 64, 127, 200, 255], [255], [3, 4, 5]):
        code = b"".join(
            b"\xb8" + (page << 8).to_bytes(2, "little")  # mov ax, the page's segment
            + b"\x8e\xc0\x26\xa2\x10\x00"  # mov es, ax; mov [es:0x10], al
            + b"\x26\xfe\x06\x20\x00"  # inc byte [es:0x20]
            for page in pages
        )  # fmt: skip
        ram.write_all(code + b"\xf4", PAGE)  # hlt
        assert copy(source, target)
        vcpu = KvmVcpu(ram, PAGE, Serial(io.BytesIO()))
        vcpu.merge_dirty()  # what KVM itself writes when a slot is new: nothing
        assert dirty.ranges() == []
        vcpu.run()
        assert dirty.ranges() == []  # guestmem has not seen it
        vcpu.merge_dirty()
        assert [page for page in range(300) if dirty.is_dirty(page * PAGE)] == pages
        assert copy(source, target) == len(pages) * PAGE
        vcpu.merge_dirty()
        assert dirty.ranges() == []
        assert same(source, target)
        vcpu.close()


def test_the_readme_with_kvm(run_child: Callable[..., str], tmp_path: Path) -> None:
    """Its blocks that are no doctests run one after the other."""
    need_kvm()
    section = README.split("## With KVM")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    (tmp_path / "boot.bin").write_bytes(bytes(512))
    printed = run_child("".join(blocks) + "print(ranges)\n", cwd=tmp_path)
    assert printed == f"[({0x7000}, {PAGE})]\n"
