"""Live migration: a guest runs while its memory is copied; in the end the copy is the source."""

from __future__ import annotations

import os
from typing import Any

import pytest

from guestmem import DirtyBitmap, GuestMemory, MemoryMapping, u32, u64

PAGE = 4096
CODE, DATA, PAGES = 0x1000, 0x100000, 64
# A counter in each page of a window that moves on: 32-bit code, position-independent.
PROGRAM = bytes.fromhex(
    "ff07"  # inc dword [edi]
    "81c700100000"  # add edi, 0x1000
    "39f7"  # cmp edi, esi
    "72f4"  # jb to the start
    "89df"  # mov edi, ebx
    "ebf0"  # jmp to the start
)


def copy(source: GuestMemory, target: GuestMemory) -> int:
    """Copy what is dirty; return how many bytes that was."""
    ranges = source.take_dirty()
    for addr, count in ranges:
        at = addr
        for part in source.slices(addr, count):
            at += target.write_slice(part, at)
    return sum(count for _, count in ranges)


def test_the_copy_equals_the_source() -> None:
    if "LD_PRELOAD" in os.environ:
        pytest.skip("unicorn's library and a sanitizer do not share a process")
    unicorn = pytest.importorskip("unicorn")
    low = MemoryMapping(0x10000, track_dirty=True)
    high = MemoryMapping(PAGES * PAGE, track_dirty=True)
    dirty = high.dirty
    assert dirty is not None
    source = GuestMemory([(0, low), (DATA, high)])
    target = GuestMemory.from_ranges([(0, 0x10000), (DATA, PAGES * PAGE)])
    source.write_all(PROGRAM, CODE)
    cpu: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
    for region in source.regions:
        address = source.get_host_address(region.start)
        cpu.mem_map_ptr(region.start, region.size, unicorn.UC_PROT_ALL, address)
    # What the guest writes goes past guestmem: its log is merged.
    written: list[int] = []

    def log(_cpu: Any, _access: int, addr: int, *_: object) -> None:
        written.append(addr)

    cpu.hook_add(unicorn.UC_HOOK_MEM_WRITE, log)

    def run(first: int, pages: int, steps: int, dirty: DirtyBitmap = dirty) -> None:
        start = DATA + first * PAGE
        for register, value in (("EDI", start), ("EBX", start), ("ESI", start + pages * PAGE)):
            cpu.reg_write(getattr(unicorn.x86_const, f"UC_X86_REG_{register}"), value)
        cpu.emu_start(CODE, 0, count=steps)
        bitmap = bytearray(len(memoryview(dirty)))
        for addr in written:
            page = (addr - DATA) // PAGE
            bitmap[page // 8] |= 1 << page % 8
        written.clear()
        dirty.merge(bitmap)

    sizes = []
    for round_, pages in enumerate([PAGES, 32, 16, 8, 4, 2, 1]):  # it writes less and less
        run(round_, min(pages, PAGES - round_), 5000)
        source.write_obj(round_, 0x8000, u64)  # a device, through guestmem
        sizes.append(copy(source, target))
    assert sizes == sorted(sizes, reverse=True), "it does not converge"
    assert sizes[-1] < sizes[0] / 10
    run(0, PAGES, 1000)  # the last time before it stops
    source.write_obj(0x5A, DATA + 8, u32)
    assert copy(source, target) > 0
    assert source.take_dirty() == []
    for region in source.regions:
        theirs = target.read_bytes(region.start, region.size)
        assert theirs == source.read_bytes(region.start, region.size)
    assert source.read_obj(DATA, u32) > 0
