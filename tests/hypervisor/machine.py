"""What both engines share: the shape of a virtual CPU, the serial port, the two ways to fail."""

from typing import BinaryIO, Protocol


class SetupError(Exception):
    """Something the user can put right: one line on stderr, exit status 2."""


class GuestError(Exception):
    """The guest went wrong: one line on stderr, exit status 1."""


class Vcpu(Protocol):
    """One virtual CPU in 16-bit real mode, over RAM at guest physical address 0."""

    def run(self) -> None:
        """Run until the guest halts, or raise GuestError. Belongs in a thread of its own."""

    def kick(self) -> None:
        """Make run() return, from another thread. To be repeated until it has."""

    def close(self) -> None:
        """Take the CPU apart and give the RAM back. Not while run() is running."""


class Serial:
    """The sending half of a 16550 UART (COM1): what the guest writes goes straight to a file."""

    DATA, LINE_CONTROL, LINE_STATUS = 0x3F8, 0x3FB, 0x3FD
    DIVISOR_LATCH = 0x80  # in LINE_CONTROL: for now, DATA takes the baud rate
    TRANSMITTER_EMPTY = 0x60  # in LINE_STATUS: ready for the next byte

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._line_control = 0
        self._last = b"\n"

    def read(self, port: int, size: int) -> int:
        if port == self.LINE_STATUS:
            return self.TRANSMITTER_EMPTY
        if port == self.LINE_CONTROL:
            return self._line_control
        return (1 << 8 * size) - 1  # nobody drives the bus

    def write(self, port: int, value: int) -> None:
        if port == self.LINE_CONTROL:
            self._line_control = value & 0xFF
        elif port == self.DATA and not self._line_control & self.DIVISOR_LATCH:
            self._send(bytes([value & 0xFF]))

    def end_line(self) -> None:
        """Begin a new line, where the guest has left one unfinished."""
        if self._last != b"\n":
            self._send(b"\n")

    def _send(self, byte: bytes) -> None:
        self._last = byte
        self._out.write(byte)
        self._out.flush()
