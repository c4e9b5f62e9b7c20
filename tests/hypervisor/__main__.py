"""A small hypervisor: runs a guest in memory that guestmem has mapped.

    python tests/hypervisor [IMAGE] [--engine auto|kvm|unicorn] [--memory MIB] [--dump FILE]

IMAGE is 16-bit real mode code. A boot sector (55 aa at byte 510) is loaded at 0x7c00, anything else
at 0x1000; it starts at its first byte, with cs = 0 and the stack below it. What it writes to the
serial port at 0x3f8 is printed, and it ends by halting. Without IMAGE a built-in guest runs, and
each step is checked. Exit status: 0 all is well, 1 the guest or a check failed, 2 it could not
start, 130 interrupted.
"""

import argparse
import os
import signal
import stat
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

import guest
import guestmem
from emulator import UnicornVcpu
from host import check, converse, say
from kvm import KvmVcpu
from machine import GuestError, Serial, SetupError, Vcpu

ENGINES: dict[str, type[KvmVcpu | UnicornVcpu]] = {"kvm": KvmVcpu, "unicorn": UnicornVcpu}
BOOT_SECTOR, FLAT_BINARY = 0x7C00, 0x1000  # where an image is loaded
MIB = 1 << 20


def main() -> int:
    try:
        return hypervise(parse_arguments())
    except (SetupError, guestmem.SystemCallFailedError) as error:
        print(f"hypervisor: {error}", file=sys.stderr)
        return 2
    except GuestError as error:
        print(f"hypervisor: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hypervisor: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # the dump cannot be written, or nobody reads our output any more
        print(f"hypervisor: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1


def parse_arguments() -> argparse.Namespace:
    def mebibytes(text: str) -> int:
        if text.isdecimal() and 1 <= int(text) <= 1024:
            return int(text) * MIB
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1024")

    parser = argparse.ArgumentParser(
        prog="hypervisor",
        usage=argparse.SUPPRESS,  # it is in the description
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", nargs="?", metavar="IMAGE")
    parser.add_argument("--engine", choices=("auto", *ENGINES), default="auto")
    parser.add_argument("--memory", type=mebibytes, default="4", metavar="MIB", help="default: 4")
    parser.add_argument("--dump", metavar="FILE", help="write the RAM to FILE after the run")
    return parser.parse_args()


def hypervise(options: argparse.Namespace) -> int:
    started = time.monotonic()
    serial = Serial(sys.stdout.buffer)
    # However this ends, the stack is unwound from its top: the vCPU stops, its thread ends, the
    # engine gives the RAM back, and only then is the RAM unmapped.
    with ExitStack() as stack:
        ram = stack.enter_context(guestmem.MemoryMapping(options.memory))
        entry, size = load(ram, options.image)
        vcpu = choose_engine(options.engine, ram, entry, serial)
        stack.callback(vcpu.close)
        what = options.image or "the built-in guest"
        say("memory", f"{ram.size // MIB} MiB; {what}, {size} bytes, at {entry:#x}")

        # No Ctrl-C between the start of the vCPU's thread and the promise to stop it. The thread
        # inherits the mask, which is right: the main thread is the one to be interrupted.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        running = stack.enter_context(ThreadPoolExecutor(1)).submit(vcpu.run)
        stack.callback(stop, vcpu, running)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        passed = options.image is not None or converse(ram, running)
        try:
            # Not without an end: a Ctrl-C that comes just before it sleeps would not wake it.
            while not running.done():
                wait([running], timeout=0.1)
            running.result()
        finally:
            serial.end_line()
        if options.dump or not options.image:
            passed &= write_dump(ram, options.dump)
        verdict = "" if passed else ", but not every check passed"
        say("halted", f"after {time.monotonic() - started:.2f} s{verdict}")
        return 0 if passed else 1


def load(ram: guestmem.MemoryMapping, path: str | None) -> tuple[int, int]:
    """Put the guest into RAM; return the address to start it at, and its size."""
    if path is None:
        ram.write_all(guest.CODE, guest.ENTRY)
        return guest.ENTRY, len(guest.CODE)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SetupError(f"{path}: not a regular file")
        with open(path, "rb") as image:
            size = os.fstat(image.fileno()).st_size
            is_boot_sector = os.pread(image.fileno(), 2, 510) == b"\x55\xaa"
            entry = BOOT_SECTOR if is_boot_sector else FLAT_BINARY
            if size == 0:
                raise SetupError(f"{path}: the image is empty")
            if size > ram.size - entry:
                room = f"the RAM has {ram.size - entry} from {entry:#x} on (see --memory)"
                raise SetupError(f"{path}: the image has {size} bytes, {room}")
            ram.read_to_memory(entry, image, size)
            return entry, size
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror or error}") from error


def choose_engine(name: str, ram: guestmem.MemoryMapping, entry: int, serial: Serial) -> Vcpu:
    if name != "auto":
        vcpu: Vcpu = ENGINES[name](ram, entry, serial)
        say("engine", name)
        return vcpu
    try:
        vcpu = KvmVcpu(ram, entry, serial)
        say("engine", "kvm (auto: /dev/kvm can be used)")
    except SetupError as no_kvm:
        try:
            vcpu = UnicornVcpu(ram, entry, serial)
        except SetupError as no_unicorn:
            raise SetupError(f"no engine: {no_kvm}; {no_unicorn}") from no_unicorn
        say("engine", f"unicorn (auto: {no_kvm})")
    return vcpu


def stop(vcpu: Vcpu, running: Future[None]) -> None:
    while not running.done():
        vcpu.kick()
        wait([running], timeout=0.01)


def write_dump(ram: guestmem.MemoryMapping, path: str | None) -> bool:
    with open(path, "w+b") if path else tempfile.TemporaryFile() as file:
        ram.write_from_memory(0, file, ram.size)
        file.seek(0)
        same = all(file.read(MIB) == ram.read_bytes(at, MIB) for at in range(0, ram.size, MIB))
    return check("dump", same, f"{ram.size} bytes of RAM, in a {'' if path else 'temporary '}file")


if __name__ == "__main__":
    sys.exit(main())
