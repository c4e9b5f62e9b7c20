"""The unicorn engine: QEMU's emulator, from PyPI, over the very same memory. Any host will do.

It delivers no interrupts: a guest that causes one ends there, as after a triple fault.
"""

import importlib

import guestmem
from machine import GuestError, Serial, SetupError


class UnicornVcpu:
    def __init__(self, ram: guestmem.MemoryMapping, entry: int, serial: Serial) -> None:
        try:
            self._unicorn = unicorn = importlib.import_module("unicorn")
            self._x86 = x86 = importlib.import_module("unicorn.x86_const")
        except ImportError as error:
            raise SetupError(f"unicorn: {error} (pip install unicorn)") from error
        self._entry = entry
        self._kicked = False
        # as_ptr() holds nothing. This slice does: nobody unmaps the RAM before close().
        self._ram = ram.get_slice(0, ram.size)
        self._cpu = cpu = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_16)
        cpu.mem_map_ptr(0, self._ram.size, unicorn.UC_PROT_ALL, self._ram.as_ptr())
        cpu.reg_write(x86.UC_X86_REG_SP, entry)

        def port_in(_cpu: object, port: int, size: int, _data: object) -> int:
            return serial.read(port, size)

        def port_out(_cpu: object, port: int, _size: int, value: int, _data: object) -> None:
            serial.write(port, value)

        cpu.hook_add(unicorn.UC_HOOK_INSN, port_in, None, 1, 0, x86.UC_X86_INS_IN)
        cpu.hook_add(unicorn.UC_HOOK_INSN, port_out, None, 1, 0, x86.UC_X86_INS_OUT)

    def run(self) -> None:
        if self._kicked:
            return
        try:
            # Called through ctypes, so without the GIL. Returns at a hlt: the second address would
            # end it as well, but no guest gets there.
            self._cpu.emu_start(self._entry, (1 << 64) - 1)
        except self._unicorn.UcError as error:
            cs, ip = map(self._cpu.reg_read, (self._x86.UC_X86_REG_CS, self._x86.UC_X86_REG_IP))
            raise GuestError(f"the guest stopped at {cs:04x}:{ip:04x}: {error}") from error

    def kick(self) -> None:
        self._kicked = True
        self._cpu.emu_stop()

    def close(self) -> None:
        self._cpu.mem_unmap(0, self._ram.size)
        self._ram.release()
