"""A vhost-user back end: a device in a process of its own, for a VM that another process runs.

That one, the front end, connects through a Unix socket, sends file descriptors for the memory of
the VM and eventfds for each queue (kick: the driver has made requests available; call: the device
has used them up; error), and then stays out of the way.
https://qemu.readthedocs.io/en/latest/interop/vhost-user.html has the messages.
"""

import os
import select
import socket
import sys
from contextlib import suppress
from enum import IntEnum
from struct import Struct
from typing import NamedTuple, Protocol

from guestmem import GuestMemory, GuestMemoryError, MemoryMapping
from virtqueue import Chain, RingError, Virtqueue


class Request(IntEnum):
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    RESET_DEVICE = 34


# A message: request, flags, size of the payload. All is in the host's byte order.
HEADER = Struct("=III")
VERSION, VERSION_MASK, REPLY, NEED_REPLY = 1, 3, 4, 8
MAX_PAYLOAD, MAX_REGIONS, MAX_CONFIG = 4096, 8, 256

NUMBER = Struct("=Q")
STATE = Struct("=II")  # of a ring: its number, a value
ADDRESSES = Struct("=IIQQQQ")  # ring, flags; descriptors, used ring, available ring; log
RING_MASK, NO_FD = 0xFF, 0x100  # in the payload of SET_VRING_KICK, CALL, ERR
TABLE = Struct("=II")  # number of regions, padding
REGION = Struct("=QQQQ")  # guest address, size, address in the front end, offset in the file
CONFIG = Struct("=III")  # offset, size, flags

INDIRECT_DESC, PROTOCOL_FEATURES, VERSION_1 = 1 << 28, 1 << 30, 1 << 32  # features
REPLY_ACK, CONFIG_SPACE, DEVICE_RESET = 1 << 3, 1 << 9, 1 << 13  # features of the protocol
PROTOCOL_OFFER = REPLY_ACK | CONFIG_SPACE | DEVICE_RESET


class ProtocolError(Exception):
    """The front end sent what this back end does not understand."""


class Device(Protocol):
    @property
    def features(self) -> int: ...
    @property
    def config(self) -> bytes: ...
    def handle(self, chain: Chain) -> int:
        """Carry out a request, return how many bytes were written. RingError breaks the queue."""


class Region(NamedTuple):
    guest_address: int
    size: int
    user_address: int
    offset: int


class Ring:
    """What the front end has said of a queue, and the queue itself while it runs."""

    def __init__(self) -> None:
        self.size = 0
        self.addresses: tuple[int, int, int] | None = None  # in the front end's address space
        self.next_available = 0
        self.enabled = False
        self.broken = False
        self.fds: dict[Request, int] = {}
        self.queue: Virtqueue | None = None

    @property
    def kick(self) -> int | None:
        """The eventfd to wait for, None while the ring must not run."""
        ready = self.enabled and not self.broken
        return self.fds.get(Request.SET_VRING_KICK) if ready else None

    def set_fd(self, request: Request, fd: int | None) -> None:
        if (old := self.fds.pop(request, None)) is not None:
            os.close(old)
        if fd is not None:
            self.fds[request] = fd

    def notify(self, request: Request) -> None:
        if request in self.fds:
            os.eventfd_write(self.fds[request], 1)

    def suspend(self) -> None:
        """Give the memory back; the next request starts the queue where it was."""
        if self.queue is not None:
            self.next_available = self.queue.next_available
            self.queue = None

    def stop(self) -> None:
        self.suspend()
        self.set_fd(Request.SET_VRING_KICK, None)
        self.set_fd(Request.SET_VRING_CALL, None)
        self.broken = False


class Backend:
    """Serves one front end with one device that has one queue."""

    def __init__(self, connection: socket.socket, device: Device) -> None:
        self._connection = connection
        self._device = device
        self._offered = device.features | VERSION_1 | INDIRECT_DESC | PROTOCOL_FEATURES
        self._features = 0
        self._protocol_features = 0
        self._regions: list[Region] = []
        self._memory: GuestMemory | None = None
        self._rings = [Ring()]

    def serve(self) -> None:
        """Serve until the front end closes the connection; then close it as well."""
        socket_fd = self._connection.fileno()
        try:
            connected = True
            while connected:
                kicks = {ring.kick: ring for ring in self._rings if ring.kick is not None}
                ready, _, _ = select.select([socket_fd, *kicks], [], [])
                # The queues first: a message may take their eventfds away.
                for fd in ready:
                    if fd != socket_fd:
                        self._run(kicks[fd])
                if socket_fd in ready:
                    connected = self._receive()
        finally:
            self._connection.close()
            for ring in self._rings:
                ring.stop()
                ring.set_fd(Request.SET_VRING_ERR, None)
            self._memory = None

    # --- the queues ---

    def _run(self, ring: Ring) -> None:
        """Handle the requests that a kick has told of."""
        with suppress(BlockingIOError):  # the front end has the eventfd too, and may have read it
            os.eventfd_read(ring.fds[Request.SET_VRING_KICK])
        try:
            if ring.queue is None:
                ring.queue = self._start(ring)
            queue = ring.queue
            handled = 0
            # A queue's worth at a time, or a busy driver keeps the front end's messages waiting.
            # Nothing is forgotten: what comes after the kick has a kick of its own.
            while handled < queue.size and (chain := queue.pop()) is not None:
                queue.push(chain, self._device.handle(chain))
                handled += 1
            if handled and queue.wants_interrupt():
                ring.notify(Request.SET_VRING_CALL)
        except (RingError, GuestMemoryError) as error:
            complain(f"the queue is broken: {error}")
            ring.suspend()
            ring.broken = True
            ring.notify(Request.SET_VRING_ERR)

    def _start(self, ring: Ring) -> Virtqueue:
        if not self._features & VERSION_1:
            raise RingError("the driver does not speak virtio 1.x")
        if self._memory is None or ring.addresses is None:
            raise RingError("nobody has said where it is")
        descriptors, available, used = map(self._guest_address, ring.addresses)
        return Virtqueue(
            self._memory,
            ring.size,
            descriptors,
            available,
            used,
            next_available=ring.next_available,
            indirect=bool(self._features & INDIRECT_DESC),
        )

    def _guest_address(self, user_address: int) -> int:
        for region in self._regions:
            if 0 <= user_address - region.user_address < region.size:
                return user_address - region.user_address + region.guest_address
        raise RingError(f"a ring at {user_address:#x}, which is in no region")

    # --- the messages ---

    def _receive(self) -> bool:
        """Receive a message and answer it; return False where the connection was closed."""
        fds: list[int] = []
        try:
            header, fds, flags, _ = socket.recv_fds(
                self._connection,
                HEADER.size,
                MAX_REGIONS,
                socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC,
            )
            if not header:
                return False
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError(f"a message with more than {MAX_REGIONS} file descriptors")
            self._answer(*self._receive_rest(header), fds)
        except ConnectionError:  # it went without reading what we have sent
            return False
        finally:
            for fd in fds:  # those that nobody took
                os.close(fd)
        return True

    def _receive_rest(self, header: bytes) -> tuple[int, bool, bytes]:
        """Return the request, whether it wants to know how it went, and the payload."""
        if len(header) < HEADER.size:
            raise ProtocolError("the connection ends within a message")
        number, flags, size = HEADER.unpack(header)
        if flags & VERSION_MASK != VERSION or size > MAX_PAYLOAD:
            raise ProtocolError(f"message {number}: flags {flags:#x}, {size} bytes")
        payload = self._connection.recv(size, socket.MSG_WAITALL) if size else b""
        if len(payload) < size:
            raise ProtocolError("the connection ends within a message")
        acknowledge = flags & NEED_REPLY and self._protocol_features & REPLY_ACK
        return number, bool(acknowledge), payload

    def _answer(self, number: int, acknowledge: bool, payload: bytes, fds: list[int]) -> None:
        try:
            reply = self._handle(number, payload, fds)
        except (ProtocolError, GuestMemoryError) as error:
            if not acknowledge:
                raise
            complain(f"message {number}: {error}")
            reply = NUMBER.pack(1)
        if reply is None and acknowledge:
            reply = NUMBER.pack(0)
        if reply is not None:
            header = HEADER.pack(number, VERSION | REPLY, len(reply))
            self._connection.sendall(header + reply)

    def _handle(self, number: int, payload: bytes, fds: list[int]) -> bytes | None:
        """Do what a message says; return the reply that it has of its own."""
        match number:
            case Request.GET_FEATURES:
                return NUMBER.pack(self._offered)
            case Request.SET_FEATURES:
                self._features = accept(payload, self._offered)
                if not self._features & PROTOCOL_FEATURES:  # then nobody will enable them
                    for ring in self._rings:
                        ring.enabled = True
            case Request.GET_PROTOCOL_FEATURES:
                return NUMBER.pack(PROTOCOL_OFFER)
            case Request.SET_PROTOCOL_FEATURES:
                self._protocol_features = accept(payload, PROTOCOL_OFFER)
            case Request.SET_OWNER:
                pass
            case Request.RESET_OWNER | Request.RESET_DEVICE:
                self._features = 0
                for ring in self._rings:
                    ring.stop()
                    ring.enabled = False
            case Request.SET_MEM_TABLE:
                self._set_memory(payload, fds)
            case Request.GET_CONFIG:
                return self._config(payload)
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                self._set_ring_fd(Request(number), payload, fds)
            case Request.SET_VRING_ADDR:
                index, _, descriptors, used, available, _ = unpack(ADDRESSES, payload)
                ring = self._ring(index)
                ring.suspend()
                ring.addresses = descriptors, available, used
            case _:
                return self._handle_state(number, payload)
        return None

    def _handle_state(self, number: int, payload: bytes) -> bytes | None:
        """Do the same for a message that tells or asks one number of a ring."""
        if number not in list(Request):
            raise ProtocolError(f"unknown message {number}")
        index, value = unpack(STATE, payload)
        ring = self._ring(index)
        match number:
            case Request.SET_VRING_NUM:
                ring.suspend()
                ring.size = value
            case Request.SET_VRING_BASE:
                ring.suspend()
                ring.next_available = value & 0xFFFF
            case Request.SET_VRING_ENABLE:
                ring.enabled = value == 1
            case Request.GET_VRING_BASE:
                ring.stop()
                return STATE.pack(index, ring.next_available)
        return None

    def _ring(self, index: int) -> Ring:
        if index >= len(self._rings):
            raise ProtocolError(f"ring {index} of {len(self._rings)}")
        return self._rings[index]

    def _set_ring_fd(self, request: Request, payload: bytes, fds: list[int]) -> None:
        (value,) = unpack(NUMBER, payload)
        ring = self._ring(value & RING_MASK)
        if len(fds) != (0 if value & NO_FD else 1):
            raise ProtocolError(f"{request.name} with {len(fds)} file descriptors")
        if request is Request.SET_VRING_KICK and not fds:
            raise ProtocolError("a ring that is to be polled")
        ring.set_fd(request, fds.pop() if fds else None)

    def _set_memory(self, payload: bytes, fds: list[int]) -> None:
        """Map what the front end has for its VM, in place of what it had."""
        count, _ = unpack(TABLE, payload[: TABLE.size])
        rest = payload[TABLE.size :]
        if count != len(fds) or len(rest) != count * REGION.size:
            raise ProtocolError(f"{count} regions, {len(fds)} fds, {len(rest)} bytes")
        regions = [Region(*fields) for fields in REGION.iter_unpack(rest)]
        memory = GuestMemory(
            (region.guest_address, MemoryMapping.from_fd_offset(fd, region.size, region.offset))
            for region, fd in zip(regions, fds, strict=True)
        )
        for ring in self._rings:
            ring.suspend()
        self._regions, self._memory = regions, memory  # nobody borrows the old one: it is unmapped

    def _config(self, payload: bytes) -> bytes:
        offset, size, _ = unpack(CONFIG, payload[: CONFIG.size])
        if offset + size > MAX_CONFIG:
            return b""  # which says that it failed
        space = self._device.config.ljust(MAX_CONFIG, b"\0")
        return payload[: CONFIG.size] + space[offset : offset + size]


def unpack(form: Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != form.size:
        raise ProtocolError(f"a payload of {len(payload)} bytes, not {form.size}")
    return form.unpack(payload)


def accept(payload: bytes, offered: int) -> int:
    (features,) = unpack(NUMBER, payload)
    if features & ~offered:
        raise ProtocolError(f"features {features:#x}, but {offered:#x} were offered")
    return features


def complain(text: str) -> None:
    print(f"vhost-user: {text}", file=sys.stderr, flush=True)
