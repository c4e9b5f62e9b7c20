"""A virtio block device (virtio 1.x, section 5.2), for QEMU and other virtual machine monitors.

    python tests/hypervisor/block.py IMAGE SOCKET

IMAGE is the disk, a file. One VM is served: it connects to SOCKET and speaks vhost-user; when it
closes the connection, this ends. For QEMU:

    qemu-system-x86_64 -m 64 -machine pc,memory-backend=ram
        -object memory-backend-memfd,id=ram,size=64M,share=on
        -chardev socket,id=disk,path=SOCKET -device vhost-user-blk-pci,chardev=disk

Exit status: 0 the connection was closed, 1 it failed, 2 it could not start, 130 interrupted.
"""

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from struct import Struct
from typing import TypeAlias

from guestmem import (
    GuestMemory,
    GuestMemoryError,
    ReadFromMemoryError,
    VolatileSlice,
    WriteToMemoryError,
    preadv,
    pwritev,
    u8,
)
from vhost_user import Backend, ProtocolError
from virtqueue import Chain, RingError

SECTOR = 512
HEADER = Struct("<IIQ")  # type, reserved, sector
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8  # types: read, write, make durable, name the disk
OK, IO_ERROR, UNSUPPORTED = 0, 1, 2  # the status: the last byte of what is writable
ID = b"guestmem".ljust(20, b"\0")

CONFIG = Struct("<QII")  # sectors, and two limits of a request: of a buffer, of their number
MAX_BUFFERS = 126  # with header and status the 128 that QEMU's queues have room for
SEG_MAX, CAN_FLUSH = 1 << 2, 1 << 9  # features

Transfer: TypeAlias = Callable[[int, Iterator[VolatileSlice], int], int]  # preadv or pwritev


class BlockDevice:
    features = SEG_MAX | CAN_FLUSH

    def __init__(self, disk: int) -> None:
        """Make a device of a file descriptor, which stays the caller's."""
        self._disk = disk
        self._sectors = os.fstat(disk).st_size // SECTOR
        self.config = CONFIG.pack(self._sectors, 0, MAX_BUFFERS)

    def handle(self, chain: Chain) -> int:
        """Do what a request asks for; return the number of bytes written to it."""
        readable, writable = chain.readable, chain.writable
        if readable is None or readable.size < HEADER.size or writable is None:
            raise RingError("a request without a header, or without room for the status")
        kind, _, sector = readable.read_obj(0, HEADER)
        room = writable.size - 1
        status, filled = OK, 0
        try:
            if kind == IN:
                self._transfer(preadv, writable, 0, room, sector)
                filled = room
            elif kind == OUT:
                self._transfer(pwritev, readable, HEADER.size, readable.size, sector)
            elif kind == FLUSH:
                os.fdatasync(self._disk)
            elif kind == GET_ID:
                filled = writable.write_slice(ID[:room], 0)
            else:
                status = UNSUPPORTED
        except (ReadFromMemoryError, WriteToMemoryError):
            raise  # not the disk's fault
        except OSError:
            status = IO_ERROR
        writable.write_obj(status, room, u8)
        # What counts is written without a gap, so the status only after a full buffer.
        return filled + 1 if filled == room else filled

    def _transfer(
        self, transfer: Transfer, data: GuestMemory, begin: int, end: int, sector: int
    ) -> None:
        """Move [begin, end) of a request: one system call, however the driver has scattered it."""
        size = end - begin
        if size % SECTOR or sector + size // SECTOR > self._sectors:
            raise OSError(errno.EIO, f"{size} bytes at sector {sector} of {self._sectors}")
        done = 0
        while done < size:  # a call may be short: it takes at most 1,024 pieces, and 2 GiB
            pieces = data.slices(begin + done, size - done)
            moved = transfer(self._disk, pieces, sector * SECTOR + done)
            if moved == 0:
                raise OSError(errno.EIO, f"the disk ends after {done} of {size} bytes")
            done += moved


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    image, path = sys.argv[1:]
    try:
        disk = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
    except OSError as error:
        print(f"block: {error}", file=sys.stderr)
        return 2
    try:
        print(f"block: {image} at {path}", flush=True)  # who reads this can connect
        connection, _ = listener.accept()
        Backend(connection, BlockDevice(disk)).serve()
    except (ProtocolError, GuestMemoryError, OSError) as error:
        print(f"block: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        listener.close()
        os.unlink(path)
        os.close(disk)
    return 0


if __name__ == "__main__":
    sys.exit(main())
