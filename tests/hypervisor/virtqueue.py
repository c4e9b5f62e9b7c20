"""The device's side of a split virtqueue (virtio 1.x, section 2.7).

The driver is not trusted: whatever it writes into the rings ends in a RingError or a
guestmem.GuestMemoryError, and nothing is written but the used ring and the descriptors that it
made writable. It may change its mind at any moment, so each field is read once.
"""

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from guestmem import GuestMemory, Ordering, VolatileSlice, fence, le16

DESCRIPTOR = Struct("<QIHH")  # address, length, flags, index of the next
NEXT, WRITE, INDIRECT = 1, 2, 4  # flags: the chain goes on; for the device to write; a table

# Both rings begin with two 16-bit fields, flags and index. Their entries follow.
FLAGS, INDEX, ENTRIES = 0, 2, 4
NO_INTERRUPT = 1  # in the available ring's flags
USED = Struct("<II")  # head of the chain, bytes written to it

MAX_SIZE = 1 << 15  # entries


class RingError(Exception):
    """The driver broke the rules: the queue must be set up anew."""


class Chain(NamedTuple):
    """A request: what the device reads, and what it writes.

    Each is the memory of all its descriptors, side by side from address 0 on, however they are
    scattered: no access to it can leave them. None where the chain has no such descriptor.
    """

    head: int
    readable: GuestMemory | None
    writable: GuestMemory | None


class Virtqueue:
    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        descriptors: int,
        available: int,
        used: int,
        *,
        next_available: int = 0,
        indirect: bool = False,
    ) -> None:
        """Take over the queue that has its three parts at these guest addresses."""
        if not 1 <= size <= MAX_SIZE or size & (size - 1):
            raise RingError(f"a queue of {size} entries")
        if descriptors % 16 or available % 2 or used % 4:
            raise RingError(f"misaligned rings: {descriptors:#x}, {available:#x}, {used:#x}")
        self.size = size
        self.next_available = next_available  # indices run from 0 to 0xffff, then from 0 again
        self._memory = memory
        self._indirect = indirect
        self._descriptors = memory.get_array_ref(descriptors, size, DESCRIPTOR)
        ring = memory.get_slice(available, ENTRIES + 2 * size)
        self._flags = ring.get_ref(FLAGS, le16)
        self._available_index = ring.get_atomic_ref(INDEX, le16)
        self._available = ring.get_array_ref(ENTRIES, size, le16)
        ring = memory.get_slice(used, ENTRIES + USED.size * size)
        self._used_index = ring.get_atomic_ref(INDEX, le16)
        self._used = ring.get_array_ref(ENTRIES, size, USED)
        self._next_used = self._used_index.load(Ordering.RELAXED)  # ours alone to write

    def pop(self) -> Chain | None:
        """Return the next request, None if there is none for now."""
        # Acquire: the entry and the descriptors are those that the driver wrote before the index.
        waiting = (self._available_index.load(Ordering.ACQUIRE) - self.next_available) & 0xFFFF
        if waiting == 0:
            return None
        if waiting > self.size:
            raise RingError(f"{waiting} requests in a queue of {self.size}")
        head = self._available[self.next_available % self.size]
        chain = self._follow(head)
        self.next_available = (self.next_available + 1) & 0xFFFF
        return chain

    def push(self, chain: Chain, written: int) -> None:
        """Give a request back, with the number of bytes written from its writable start on."""
        self._used[self._next_used % self.size] = chain.head, written
        self._next_used = (self._next_used + 1) & 0xFFFF
        # Release: who sees the index sees the entry, and what the request wrote.
        self._used_index.store(self._next_used, Ordering.RELEASE)

    def wants_interrupt(self) -> bool:
        """Return whether the driver wants to be told of what was pushed."""
        # It sets the flags, then looks at the index; we have set the index, and look at the flags.
        # Only a full fence between the two keeps both sides from missing each other.
        fence(Ordering.SEQ_CST)
        return not self._flags.load() & NO_INTERRUPT

    def _follow(self, head: int) -> Chain:
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        table, index, in_table = self._descriptors, head, False
        while len(readable) + len(writable) < self.size:
            if index >= len(table):
                raise RingError(f"descriptor {index} of {len(table)}")
            address, length, flags, following = table[index]
            if flags & INDIRECT:  # the last of the queue's own descriptors: the table has the rest
                if not self._indirect or in_table or flags & NEXT or length % DESCRIPTOR.size:
                    raise RingError(f"a table of {length} bytes, flags {flags:#x}")
                table = self._memory.get_array_ref(address, length // DESCRIPTOR.size, DESCRIPTOR)
                index, in_table = 0, True
                continue
            if flags & WRITE:
                writable.append((address, length))
            elif writable:
                raise RingError("a readable descriptor after a writable one")
            else:
                readable.append((address, length))
            if not flags & NEXT:
                return Chain(head, self._join(readable), self._join(writable))
            index = following
        raise RingError(f"a chain of more than {self.size} descriptors")

    def _join(self, parts: Sequence[tuple[int, int]]) -> GuestMemory | None:
        pieces: list[tuple[int, VolatileSlice]] = []
        size = 0
        for address, length in parts:
            if length == 0:
                raise RingError(f"a descriptor of 0 bytes, at {address:#x}")
            for piece in self._memory.slices(address, length):
                pieces.append((size, piece))
                size += piece.size
        if size >= 1 << 32:
            raise RingError(f"descriptors of {size} bytes: the used ring counts 32 bits")
        return GuestMemory(pieces) if pieces else None
