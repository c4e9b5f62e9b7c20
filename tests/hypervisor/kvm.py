"""The KVM engine (x86-64 only): one VM, one memslot, one vCPU, by plain ioctls on /dev/kvm."""

import ctypes
import errno
import os
import platform
import signal
import threading
from contextlib import ExitStack
from fcntl import ioctl
from struct import Struct

import guestmem
from guestmem import u8, u16, u32
from machine import GuestError, Serial, SetupError

KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE = 0xAE00, 0xAE01, 0xAE04
KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION, KVM_SET_TSS_ADDR = 0xAE41, 0x4020AE46, 0xAE47
KVM_RUN, KVM_GET_REGS, KVM_SET_REGS = 0xAE80, 0x8090AE81, 0x4090AE82
KVM_GET_SREGS, KVM_SET_SREGS = 0x8138AE83, 0x4138AE84
KVM_GET_DIRTY_LOG = 0x4010AE42

MEMORY_REGION = Struct("=IIQQQ")  # slot, flags, guest address, size, host address: whole pages
LOG_DIRTY_PAGES = 1  # a flag of it
DIRTY_LOG = Struct("=IIQ")  # slot, padding, host address of the bitmap
REGS = Struct("=18Q")  # rax rbx rcx rdx rsi rdi rsp rbp r8 to r15 rip rflags
RSP, RIP, RFLAGS = 6, 16, 17
SREGS_SIZE = 312
CODE_SEGMENT = Struct("=QIH")  # base, limit, selector: how struct kvm_sregs begins

# struct kvm_run: offsets, the member io, and the exits that are worth a name
IMMEDIATE_EXIT, EXIT_REASON, EXIT_DATA = 1, 8, 32
EXIT_IO = Struct("=BBHIQ")  # direction, size, port, count, offset of the data
KVM_EXIT_IO, KVM_EXIT_HLT, KVM_EXIT_IO_OUT = 2, 5, 1
EXITS = {6: "access outside the RAM", 8: "triple fault", 9: "failed entry", 17: "internal error"}

# Intel processors want three pages of guest addresses for real mode. Outside the RAM, and below
# 2 GiB because fcntl.ioctl passes a number as a C int.
TSS_ADDRESS = 0x7FFF_D000

# fcntl.ioctl of newer Pythons answers EINTR by calling again, and nothing could stop a KVM_RUN.
# ctypes calls once; both release the GIL meanwhile.
_libc = ctypes.CDLL(None, use_errno=True)


class KvmVcpu:
    def __init__(self, ram: guestmem.MemoryMapping, entry: int, serial: Serial) -> None:
        if platform.machine() != "x86_64":
            raise SetupError(f"kvm: this engine is for x86-64, not {platform.machine()}")
        self._serial = serial
        self._thread: int | None = None
        self._kicked = False
        with ExitStack() as stack:
            try:
                self._set_up(stack, ram, entry)
            except OSError as error:
                raise SetupError(f"/dev/kvm: {error.strerror}") from error
            self.close = stack.pop_all().close  # in the reverse order: the RAM comes last

    def _set_up(self, stack: ExitStack, ram: guestmem.MemoryMapping, entry: int) -> None:
        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        # as_ptr() holds nothing. This slice does: as long as the VM exists, nobody unmaps the RAM.
        whole = ram.get_slice(0, ram.size)
        stack.callback(whole.release)
        kvm = keep(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        if ioctl(kvm, KVM_GET_API_VERSION) != 12:
            raise SetupError("/dev/kvm: not the stable API, version 12")
        vm = keep(ioctl(kvm, KVM_CREATE_VM, 0))
        ioctl(vm, KVM_SET_TSS_ADDR, TSS_ADDRESS)
        self._vm, self._dirty = vm, ram.dirty
        flags = LOG_DIRTY_PAGES if ram.dirty is not None else 0
        region = MEMORY_REGION.pack(0, flags, 0, whole.size, whole.as_ptr())
        ioctl(vm, KVM_SET_USER_MEMORY_REGION, region)

        self._vcpu = keep(ioctl(vm, KVM_CREATE_VCPU, 0))
        # struct kvm_run is memory that the kernel changes: guestmem maps it too.
        run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE)
        self._run = stack.enter_context(guestmem.MemoryMapping.from_fd(self._vcpu, run_size))

        sregs = bytearray(SREGS_SIZE)
        ioctl(self._vcpu, KVM_GET_SREGS, sregs)
        CODE_SEGMENT.pack_into(sregs, 0, 0, 0xFFFF, 0)  # instead of the reset vector
        ioctl(self._vcpu, KVM_SET_SREGS, sregs)
        regs = [0] * 18
        regs[RSP], regs[RIP], regs[RFLAGS] = entry, entry, 2  # bit 1 is always set
        ioctl(self._vcpu, KVM_SET_REGS, REGS.pack(*regs))

        # That the signal comes is what ends KVM_RUN; there is nothing to do in the handler.
        signal.signal(signal.SIGUSR1, lambda number, frame: None)

    def run(self) -> None:
        self._thread = threading.get_ident()
        while not self._kicked:
            if _libc.ioctl(self._vcpu, KVM_RUN, 0) < 0:
                if ctypes.get_errno() != errno.EINTR:
                    raise self._error(f"KVM_RUN: {os.strerror(ctypes.get_errno())}")
                continue  # a signal: for us if we were kicked
            reason = self._run.read_obj(EXIT_REASON, u32)
            if reason == KVM_EXIT_HLT:
                return
            if reason != KVM_EXIT_IO:
                raise self._error(EXITS.get(reason, f"KVM exit {reason}"))
            self._port_io()

    def merge_dirty(self) -> None:
        """Mark what the guest has written since the last time, in RAM that is tracked."""
        assert self._dirty is not None
        bits = bytearray(len(memoryview(self._dirty)))
        with guestmem.VolatileSlice.from_buffer(bits) as log:
            ioctl(self._vm, KVM_GET_DIRTY_LOG, DIRTY_LOG.pack(0, 0, log.as_ptr()))
        self._dirty.merge(bits)

    def _port_io(self) -> None:
        direction, size, port, count, data = self._run.read_obj(EXIT_DATA, EXIT_IO)
        scalar = {1: u8, 2: u16, 4: u32}[size]
        for offset in range(data, data + size * count, size):  # count > 1: rep ins, rep outs
            if direction == KVM_EXIT_IO_OUT:
                self._serial.write(port, self._run.read_obj(offset, scalar))
            else:
                self._run.write_obj(self._serial.read(port, size), offset, scalar)

    def _error(self, what: str) -> GuestError:
        regs, sregs = bytearray(REGS.size), bytearray(SREGS_SIZE)
        ioctl(self._vcpu, KVM_GET_REGS, regs)
        ioctl(self._vcpu, KVM_GET_SREGS, sregs)
        cs, ip = CODE_SEGMENT.unpack_from(sregs)[2], REGS.unpack(regs)[RIP]
        return GuestError(f"the guest stopped at {cs:04x}:{ip:04x}: {what}")

    def kick(self) -> None:
        self._kicked = True
        # The signal ends a KVM_RUN that has begun, immediate_exit one that is about to.
        self._run.write_obj(1, IMMEDIATE_EXIT, u8)
        if self._thread is not None:
            signal.pthread_kill(self._thread, signal.SIGUSR1)
