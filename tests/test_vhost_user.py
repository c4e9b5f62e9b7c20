"""The vhost-user back end of tests/hypervisor: QEMU boots from it, and front ends misbehave."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from struct import Struct
from typing import TYPE_CHECKING

import pytest

import boot_sector
import vhost_user
from block import FLUSH, GET_ID, ID, IN, SECTOR, BlockDevice
from boot_sector import DISK_SIZE, FAILED, PASSED
from guestmem import GuestMemoryError, MemoryMapping, le16
from vhost_user import NEED_REPLY, NO_FD, NUMBER, REPLY, STATE, Backend, ProtocolError, Request
from virtqueue import DESCRIPTOR, NEXT, USED, WRITE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.conftest import Backing

BLOCK = os.path.join(os.path.dirname(__file__), "hypervisor", "block.py")
QEMU = "qemu-system-x86_64"
TIMEOUT = 60  # seconds; a boot takes less than one
needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"there is no {QEMU}")


# --- QEMU ---

MACHINES = {
    "one region": (
        *("-machine", "pc,memory-backend=ram"),
        *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
    ),
    # Two parts of one file, on both sides of the hole below 4 GiB.
    "a hole": (
        *("-machine", "pc,memory-backend=ram,max-ram-below-4g=32M"),
        *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
    ),
    # Two files that adjoin.
    "two nodes": (
        *("-machine", "pc"),
        *("-object", "memory-backend-memfd,id=low,size=32M,share=on"),
        *("-object", "memory-backend-memfd,id=high,size=32M,share=on"),
        *("-numa", "node,memdev=low", "-numa", "node,memdev=high"),
    ),
}


def boot(directory: Path, image: bytes, machine: str = "one region") -> tuple[int, list[str]]:
    """Let QEMU boot from a disk; return its exit status and the lines that the guest printed."""
    (directory / "disk").write_bytes(image)
    with subprocess.Popen(
        [sys.executable, "-X", "dev", BLOCK, "disk", "socket"],  # -X dev: nothing is left open
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as backend:
        try:
            assert backend.stdout is not None
            assert backend.stdout.readline() == "block: disk at socket\n"
            result = subprocess.run(
                [
                    *(QEMU, "-accel", "tcg", "-m", "64", *MACHINES[machine]),
                    *("-nodefaults", "-display", "none", "-serial", "stdio"),
                    *("-chardev", "socket,id=disk,path=socket"),
                    *("-device", "vhost-user-blk-pci,chardev=disk"),
                    *("-device", "isa-debug-exit,iobase=0xf4"),
                ],
                cwd=directory,
                # A sanitizer that is preloaded into Python is none of QEMU's business.
                env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                text=True,
                timeout=TIMEOUT,
            )
            output, errors = backend.communicate(timeout=TIMEOUT)
        finally:
            backend.kill()
    assert (backend.returncode, output, errors) == (0, "", ""), result
    assert all(": warning: " in line for line in result.stderr.splitlines()), result.stderr
    assert not (directory / "socket").exists()
    return result.returncode, result.stdout.splitlines()


@needs_qemu
@pytest.mark.parametrize("machine", MACHINES)
def test_qemu_boots(tmp_path: Path, machine: str) -> None:
    image = boot_sector.image()
    status, lines = boot(tmp_path, image, machine)
    assert lines == [
        "first    hello from the boot sector",
        "second   read through the BIOS, its sum is 0",
        "third    inverted and written",
    ]
    assert status == PASSED
    second = image[SECTOR : 2 * SECTOR]
    written = bytes(byte ^ 0xFF for byte in second)
    assert (tmp_path / "disk").read_bytes() == image[: 2 * SECTOR] + written + image[3 * SECTOR :]


@needs_qemu
def test_qemu_sees_what_is_on_the_disk(tmp_path: Path) -> None:
    image = bytearray(boot_sector.image())
    image[2 * SECTOR - 3] ^= 1
    status, lines = boot(tmp_path, bytes(image))
    assert status == FAILED
    assert lines[1:] == ["failed   the BIOS or the checksum"]
    assert (tmp_path / "disk").read_bytes() == image


def test_block_that_cannot_start(tmp_path: Path) -> None:
    def complaint(*arguments: str) -> str:
        command = [sys.executable, "-X", "dev", BLOCK, *arguments]
        result = subprocess.run(
            command, cwd=tmp_path, capture_output=True, check=False, text=True, timeout=TIMEOUT
        )
        assert result.returncode == 2, result
        assert result.stdout == ""
        return result.stderr

    assert "IMAGE SOCKET" in complaint()
    assert complaint("none", "socket").startswith("block: [Errno 2]")
    (tmp_path / "disk").touch()
    assert complaint("disk", "disk").startswith("block: [Errno 98]")


# --- a front end in this process ---

RAM_SIZE = 0x10000
GUEST, USER = 0x10_0000, 0x7000_0000_0000  # where the RAM is for the guest, for the front end
RING, HEADER, DATA, STATUS = 0x0, 0x1000, 0x2000, 0x3000  # offsets in the RAM
AVAILABLE, USED_RING = 0x400, 0x800
FEATURES = vhost_user.VERSION_1 | vhost_user.INDIRECT_DESC | vhost_user.PROTOCOL_FEATURES


class FrontEnd:
    """Says what QEMU says, and whatever else it is told to."""

    def __init__(self, ram: Backing, disk: Backing) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(TIMEOUT)
        self.backing = ram
        self.ram = MemoryMapping.from_fd(ram.fd, RAM_SIZE)
        self.kick, self.call, self.error = (os.eventfd(0) for _ in range(3))
        self._pool = ThreadPoolExecutor(1)
        backend = Backend(theirs, BlockDevice(disk.fd))
        self.serving: Future[None] = self._pool.submit(backend.serve)

    def close(self) -> None:
        self.socket.close()
        self._pool.shutdown()
        for fd in self.kick, self.call, self.error:
            os.close(fd)

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1
    ) -> None:
        header = vhost_user.HEADER.pack(request, flags, len(payload))
        socket.send_fds(self.socket, [header + payload], fds)

    def receive(self, request: int) -> bytes:
        header = self.socket.recv(vhost_user.HEADER.size, socket.MSG_WAITALL)
        number, flags, size = vhost_user.HEADER.unpack(header)
        assert (number, flags) == (request, 1 | REPLY)
        return self.socket.recv(size, socket.MSG_WAITALL) if size else b""

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.send(request, payload)
        return self.receive(request)

    def tell(self, request: int, payload: bytes, fds: Sequence[int] = ()) -> int:
        """Send a message, return how it went: 0 is well."""
        self.send(request, payload, fds, 1 | NEED_REPLY)
        (status,) = NUMBER.unpack(self.receive(request))
        assert isinstance(status, int)
        return status

    def negotiate(self) -> None:
        (offered,) = NUMBER.unpack(self.ask(Request.GET_FEATURES))
        assert offered & FEATURES == FEATURES
        (offered,) = NUMBER.unpack(self.ask(Request.GET_PROTOCOL_FEATURES))
        self.send(Request.SET_PROTOCOL_FEATURES, NUMBER.pack(offered))
        self.send(Request.SET_OWNER)
        assert self.tell(Request.SET_FEATURES, NUMBER.pack(FEATURES)) == 0

    def set_memory(self) -> int:
        region = vhost_user.REGION.pack(GUEST, RAM_SIZE, USER, 0)
        table = vhost_user.TABLE.pack(1, 0) + region
        return self.tell(Request.SET_MEM_TABLE, table, [self.backing.fd])

    def set_ring(self, base: int = 0, descriptors: int = USER + RING) -> None:
        self.tell(Request.SET_VRING_NUM, STATE.pack(0, 8))
        self.tell(Request.SET_VRING_BASE, STATE.pack(0, base))
        addresses = descriptors, USER + USED_RING, USER + AVAILABLE
        self.tell(Request.SET_VRING_ADDR, vhost_user.ADDRESSES.pack(0, 0, *addresses, 0))
        self.tell(Request.SET_VRING_CALL, NUMBER.pack(0), [self.call])
        self.tell(Request.SET_VRING_ERR, NUMBER.pack(0), [self.error])
        self.tell(Request.SET_VRING_KICK, NUMBER.pack(0), [self.kick])
        self.tell(Request.SET_VRING_ENABLE, STATE.pack(0, 1))

    def make_available(self, kind: int, length: int = SECTOR, count: int = 1) -> None:
        """Make a request for sector 1 available, as often as count says."""
        self.ram.write_obj((kind, 0, 1), HEADER, Struct("<IIQ"))
        chain = (HEADER, 16, NEXT), (DATA, length, NEXT | WRITE), (STATUS, 1, WRITE)
        for i, (offset, size, flags) in enumerate(chain):
            self.ram.write_obj((GUEST + offset, size, flags, i + 1), RING + 16 * i, DESCRIPTOR)
        index = self.ram.read_obj(AVAILABLE + 2, le16)
        self.ram.write_obj((index + count) & 0xFFFF, AVAILABLE + 2, le16)
        os.eventfd_write(self.kick, 1)

    def wait(self, event: int) -> None:
        assert select.select([event], [], [], TIMEOUT)[0]
        os.eventfd_read(event)


@pytest.fixture
def disk(backing: Callable[[int], Backing]) -> Backing:
    disk = backing(DISK_SIZE)
    os.pwrite(disk.fd, boot_sector.image(), 0)
    return disk


@pytest.fixture
def front_end(backing: Callable[[int], Backing], disk: Backing) -> Iterator[FrontEnd]:
    front_end = FrontEnd(backing(RAM_SIZE), disk)
    yield front_end
    front_end.close()


def test_conversation(front_end: FrontEnd, disk: Backing) -> None:
    front_end.negotiate()
    asked = vhost_user.CONFIG.pack(0, 60, 0) + bytes(60)
    config = front_end.ask(Request.GET_CONFIG, asked)
    assert (config[:12], len(config)) == (asked[:12], 72)
    assert int.from_bytes(config[12:20], "little") == DISK_SIZE // SECTOR
    assert front_end.ask(Request.GET_CONFIG, vhost_user.CONFIG.pack(8, 4, 0))[12:] == bytes(4)
    assert front_end.ask(Request.GET_CONFIG, vhost_user.CONFIG.pack(255, 2, 0)) == b""

    assert front_end.set_memory() == 0
    front_end.set_ring()
    front_end.make_available(IN)
    front_end.wait(front_end.call)
    assert front_end.ram.read_bytes(DATA, SECTOR) == disk.read(SECTOR, SECTOR)
    assert front_end.ram.read_obj(USED_RING + 4, USED) == (0, SECTOR + 1)

    # The table may be replaced while the ring runs, and nothing keeps the old one mapped.
    assert front_end.set_memory() == 0
    assert front_end.backing.maps() == 2  # the back end, and we
    front_end.tell(Request.SET_VRING_ENABLE, STATE.pack(0, 0))  # from now on it waits
    front_end.make_available(GET_ID, len(ID))
    front_end.ask(Request.GET_FEATURES)
    assert front_end.ram.read_obj(USED_RING + 2, le16) == 1
    front_end.send(Request.SET_VRING_ENABLE, STATE.pack(0, 1))
    front_end.wait(front_end.call)
    assert front_end.ram.read_bytes(DATA, len(ID)) == ID

    assert front_end.ask(Request.GET_VRING_BASE, STATE.pack(0, 0)) == STATE.pack(0, 2)
    front_end.set_ring(2)
    front_end.make_available(FLUSH, 1, 8)  # a whole queue of them
    front_end.wait(front_end.call)
    assert front_end.ask(Request.GET_VRING_BASE, STATE.pack(0, 0)) == STATE.pack(0, 10)
    front_end.socket.close()
    front_end.serving.result(TIMEOUT)
    assert front_end.backing.maps() == 1


def test_no_interrupts(front_end: FrontEnd) -> None:
    front_end.negotiate()
    front_end.set_memory()
    front_end.set_ring()
    front_end.tell(Request.SET_VRING_CALL, NUMBER.pack(NO_FD))
    front_end.make_available(IN)
    while front_end.ram.read_obj(USED_RING + 2, le16) == 0:
        front_end.ask(Request.GET_FEATURES)
    assert not select.select([front_end.call], [], [], 0)[0]


@pytest.mark.parametrize("request_", [Request.RESET_DEVICE, Request.RESET_OWNER])
def test_reset(front_end: FrontEnd, request_: Request) -> None:
    front_end.negotiate()
    front_end.set_memory()
    front_end.set_ring()
    assert front_end.tell(request_, b"") == 0
    front_end.make_available(IN)
    front_end.ask(Request.GET_FEATURES)
    assert front_end.ram.read_obj(USED_RING + 2, le16) == 0
    front_end.negotiate()
    front_end.set_ring()
    front_end.wait(front_end.call)


@pytest.mark.parametrize("what", ["descriptor", "ring", "truncated", "features", "no memory"])
def test_broken_queues(front_end: FrontEnd, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The device says so, does nothing more, and goes on when the queue is set up anew."""
    front_end.negotiate()
    if what != "no memory":
        front_end.set_memory()
    front_end.set_ring(descriptors=USER + RAM_SIZE if what == "ring" else USER)
    if what == "features":
        front_end.tell(Request.SET_FEATURES, NUMBER.pack(vhost_user.PROTOCOL_FEATURES))
    front_end.make_available(IN, RAM_SIZE if what == "descriptor" else SECTOR)
    if what == "truncated":
        front_end.wait(front_end.call)
        os.ftruncate(front_end.backing.fd, 0)
        os.eventfd_write(front_end.kick, 1)
    front_end.wait(front_end.error)
    assert "the queue is broken" in capfd.readouterr().err
    os.ftruncate(front_end.backing.fd, RAM_SIZE)
    os.eventfd_write(front_end.kick, 1)
    front_end.ask(Request.GET_FEATURES)
    assert not select.select([front_end.error], [], [], 0)[0]
    assert front_end.ram.read_obj(USED_RING + 2, le16) == 0

    front_end.ask(Request.GET_VRING_BASE, STATE.pack(0, 0))
    front_end.negotiate()
    front_end.set_memory()
    front_end.ram.fill(0, 0, HEADER)
    front_end.set_ring()
    front_end.make_available(IN)
    front_end.wait(front_end.call)


def table(*regions: tuple[int, int, int, int]) -> bytes:
    head = vhost_user.TABLE.pack(len(regions), 0)
    return head + b"".join(vhost_user.REGION.pack(*region) for region in regions)


WHOLE = (GUEST, RAM_SIZE, USER, 0)
BAD_MESSAGES: dict[str, tuple[int, bytes, int]] = {  # request, payload, file descriptors
    "unknown": (99, b"", 0),
    "not for this device": (20, NUMBER.pack(0), 0),
    "features that were not offered": (Request.SET_FEATURES, NUMBER.pack(1 << 63), 0),
    "short payload": (Request.SET_FEATURES, bytes(7), 0),
    "long payload": (Request.SET_VRING_NUM, bytes(9), 0),
    "no payload": (Request.SET_VRING_ADDR, b"", 0),
    "no such ring": (Request.SET_VRING_NUM, STATE.pack(1, 8), 0),
    "no such ring to kick": (Request.SET_VRING_KICK, NUMBER.pack(1), 1),
    "no fd": (Request.SET_VRING_CALL, NUMBER.pack(0), 0),
    "two fds": (Request.SET_VRING_CALL, NUMBER.pack(0), 2),
    "fd where there should be none": (Request.SET_VRING_CALL, NUMBER.pack(NO_FD), 1),
    "polling": (Request.SET_VRING_KICK, NUMBER.pack(NO_FD), 0),
    "no table": (Request.SET_MEM_TABLE, b"", 0),
    "fewer fds than regions": (Request.SET_MEM_TABLE, table(WHOLE), 0),
    "more regions than it says": (Request.SET_MEM_TABLE, table(WHOLE) + bytes(32), 1),
    "a region of no bytes": (Request.SET_MEM_TABLE, table((GUEST, 0, USER, 0)), 1),
    "overlapping regions": (Request.SET_MEM_TABLE, table(WHOLE, WHOLE), 2),
    "beyond 2**64": (Request.SET_MEM_TABLE, table(((1 << 64) - 4096, 8192, USER, 0)), 1),
    "misaligned in the file": (Request.SET_MEM_TABLE, table((GUEST, 4096, USER, 1)), 1),
    "beyond off_t": (Request.SET_MEM_TABLE, table((GUEST, 4096, USER, (1 << 64) - 4096)), 1),
    "larger than any address space": (Request.SET_MEM_TABLE, table((0, 1 << 63, USER, 0)), 1),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages(front_end: FrontEnd, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Refused, where the front end wants to know; else the connection ends. No fd stays behind."""
    number, payload, count = BAD_MESSAGES[name]
    front_end.negotiate()
    front_end.set_memory()
    front_end.set_ring()
    before = len(os.listdir("/proc/self/fd"))
    assert front_end.tell(number, payload, [front_end.backing.fd] * count) == 1
    assert capfd.readouterr().err.startswith(f"vhost-user: message {number}: ")
    front_end.make_available(IN)
    front_end.wait(front_end.call)  # all is as it was
    assert len(os.listdir("/proc/self/fd")) == before

    front_end.send(number, payload, [front_end.backing.fd] * count)
    with pytest.raises((ProtocolError, GuestMemoryError)):
        front_end.serving.result(TIMEOUT)
    assert front_end.socket.recv(1) == b""
    assert len(os.listdir("/proc/self/fd")) == before - 4  # the connection, three eventfds


@pytest.mark.parametrize(
    "message",
    [
        vhost_user.HEADER.pack(1, 0, 0),  # version 0
        vhost_user.HEADER.pack(1, 1, 4097),
        vhost_user.HEADER.pack(1, 1, 0xFFFFFFFF),
        vhost_user.HEADER.pack(2, 1, 8) + bytes(7),
        vhost_user.HEADER.pack(2, 1, 8),
        b"\1\0\0",
    ],
)
def test_not_a_message(front_end: FrontEnd, message: bytes) -> None:
    front_end.socket.sendall(message)
    front_end.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError):
        front_end.serving.result(TIMEOUT)


def test_too_many_fds(front_end: FrontEnd) -> None:
    before = len(os.listdir("/proc/self/fd"))
    front_end.send(Request.SET_OWNER, fds=[front_end.kick] * 9)
    with pytest.raises(ProtocolError, match="more than 8"):
        front_end.serving.result(TIMEOUT)
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_front_end_that_goes_without_reading(front_end: FrontEnd) -> None:
    front_end.send(Request.GET_FEATURES)
    select.select([front_end.socket], [], [], TIMEOUT)
    front_end.socket.close()
    front_end.serving.result(TIMEOUT)
