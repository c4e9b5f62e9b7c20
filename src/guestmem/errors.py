"""The errors of guestmem.

Each is both a :class:`GuestMemoryError` and the built-in exception that Python code
expects in its place, carries its fields as attributes, and pickles. The texts are
written here and nowhere else; no text ever shows a host address.
"""

from __future__ import annotations

__all__ = [
    "AddressOverflowError",
    "ClosedError",
    "CoreDumpWarning",
    "GuestMemoryError",
    "InvalidAddressError",
    "InvalidGuestAddressError",
    "InvalidOffsetError",
    "InvalidRangeError",
    "InvalidRegionError",
    "MemoryRegionOverlapError",
    "MisalignedError",
    "MmapError",
    "OutOfBoundsError",
    "ReadFromMemoryError",
    "ReadFromSourceError",
    "SystemCallFailedError",
    "VolatileMemoryError",
    "WriteToDestinationError",
    "WriteToMemoryError",
]


class GuestMemoryError(Exception):
    """Base of every error that guestmem defines."""


class MmapError(GuestMemoryError):
    """Base of the errors of a mapping: making it, its ranges, its I/O."""


class VolatileMemoryError(GuestMemoryError):
    """Base of the errors of what borrows (slices, refs, arrays), and of guest addresses."""


class _RangeError(MmapError, IndexError):
    def __init__(self, offset: int, count: int, size: int, *more: object) -> None:
        super().__init__(offset, count, size, *more)
        self.offset = offset
        self.count = count
        self.size = size

    def _asked(self) -> str:
        return f"offset {self.offset:#x} + count {self.count:#x}"


class InvalidAddressError(_RangeError):
    """Requested memory is out of range: offset and count do not fit in size (bytes)."""

    def __init__(self, offset: int, count: int, size: int) -> None:
        super().__init__(offset, count, size)

    def __str__(self) -> str:
        if self.count == 0 and self.offset == self.size:
            return f"{self._asked()} does not begin within memory of size {self.size:#x}"
        return f"{self._asked()} is not within memory of size {self.size:#x}"


class InvalidRangeError(_RangeError):
    """The range of an I/O or of remove_range() passes the end, or cannot be removed.

    Where it cannot be removed, reason says why and ``__cause__`` is the
    SystemCallFailedError; else reason is None.
    """

    def __init__(self, offset: int, count: int, size: int, reason: str | None = None) -> None:
        super().__init__(offset, count, size, reason)
        self.reason = reason

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self._asked()} cannot be removed: {self.reason}"
        return f"{self._asked()} passes the end of memory of size {self.size:#x}"


class InvalidOffsetError(MmapError, ValueError):
    """The offset in a file, or the end of the range from there, does not fit off_t.

    off_t goes from 0 to 2**63 - 1. count is 0 where the offset alone does not fit.
    """

    def __init__(self, offset: int, count: int = 0) -> None:
        super().__init__(offset, count)
        self.offset = offset
        self.count = count

    def __str__(self) -> str:
        plus = f" + count {self.count:#x}" if self.count else ""
        return f"file offset {self.offset:#x}{plus} is not from 0 to 0x7fffffffffffffff (off_t)"


class _OSError(MmapError, OSError):
    """An OSError with one field more, which it keeps when it is pickled."""

    _field: str

    def __init__(self, errno: int | None, strerror: str, field: object) -> None:
        super().__init__(errno, strerror)
        setattr(self, self._field, field)

    def __reduce__(self) -> tuple[object, ...]:
        fields = (self.errno, self.strerror, getattr(self, self._field))
        return type(self), fields, self.__dict__


class SystemCallFailedError(_OSError):
    """A system call failed: errno, strerror, and syscall, its name."""

    _field = "syscall"
    syscall: str

    def __init__(self, errno: int, strerror: str, syscall: str) -> None:
        super().__init__(errno, strerror, syscall)

    def __str__(self) -> str:
        return f"[Errno {self.errno}] {self.syscall}: {self.strerror}"


class _TransferError(_OSError):
    _field = "transferred"
    transferred: int

    def __init__(self, errno: int | None, strerror: str, transferred: int) -> None:
        super().__init__(errno, strerror, transferred)


class ReadFromSourceError(_TransferError):
    """read_to_memory(), read_from(), preadv(): the source failed or would block.

    Or, of read_to_memory(), it ended early. transferred is the count of bytes that arrived
    before; they are in memory. errno is None where no system call failed.
    """

    def __str__(self) -> str:
        return f"the source failed after {self.transferred} bytes: {self.strerror}"


class WriteToDestinationError(_TransferError):
    """write_from_memory(), write_to(), pwritev(): the destination failed or would block.

    Or, of write_from_memory(), it took nothing. transferred is the count of bytes that it took
    before. errno is None where no system call failed.
    """

    def __str__(self) -> str:
        return f"the destination failed after {self.transferred} bytes: {self.strerror}"


class _FaultError(_OSError):
    _field = "offset"
    offset: int
    piece: int | None

    def __init__(self, errno: int, strerror: str, offset: int, piece: int | None = None) -> None:
        super().__init__(errno, strerror, offset)
        self.piece = piece

    def _where(self) -> str:
        return f"at offset {self.offset:#x}" + (
            "" if self.piece is None else f" of piece {self.piece}"
        )


class ReadFromMemoryError(_FaultError):
    """The memory itself faulted while it was read: a page of it is gone.

    offset is the first byte that faulted. Of pwritev() piece is the index of the memory that it
    lies in, else None.
    """

    def __str__(self) -> str:
        return f"memory faulted while it was read {self._where()}: {self.strerror}"


class WriteToMemoryError(_FaultError):
    """The memory itself faulted while it was written: a page of it is gone.

    offset is the first byte that faulted. Of preadv() piece is the index of the memory that it
    lies in, else None.
    """

    def __str__(self) -> str:
        return f"memory faulted while it was written {self._where()}: {self.strerror}"


class ClosedError(MmapError, ValueError):
    """The mapping has been closed, or the slice released."""


class OutOfBoundsError(VolatileMemoryError, IndexError):
    """addr, the end of the range that was asked for, passes the size (bytes).

    Of a guest's memory size is the guest address at which a region ends, and the next begins: what
    borrows lies in one of them (border is True then).
    """

    def __init__(self, addr: int, size: int, border: bool = False) -> None:
        super().__init__(addr, size, border)
        self.addr = addr
        self.size = size
        self.border = border

    def __str__(self) -> str:
        if self.border:
            return (
                f"a range that ends at {self.addr:#x} crosses into another region at {self.size:#x}"
            )
        return f"a range that ends at {self.addr:#x} is not within memory of size {self.size:#x}"


class InvalidGuestAddressError(VolatileMemoryError, IndexError):
    """No region of the guest's memory holds addr: the first address that is in a hole."""

    def __init__(self, addr: int) -> None:
        super().__init__(addr)
        self.addr = addr

    def __str__(self) -> str:
        return f"no region of guest memory holds address {self.addr:#x}"


class InvalidRegionError(VolatileMemoryError, ValueError):
    """A region of guest memory at start cannot have this size (bytes), or has another one.

    actual is the size that the region has; None where there is none: a region cannot be empty.
    """

    def __init__(self, start: int, size: int, actual: int | None = None) -> None:
        super().__init__(start, size, actual)
        self.start = start
        self.size = size
        self.actual = actual

    def __str__(self) -> str:
        if self.actual is None:
            return f"a region of guest memory cannot be empty: that at {self.start:#x} is"
        return f"the region at {self.start:#x} has {self.actual:#x} bytes, not {self.size:#x}"


class MemoryRegionOverlapError(VolatileMemoryError, ValueError):
    """Two regions of guest memory overlap: start and size, other_start and other_size."""

    def __init__(self, start: int, size: int, other_start: int, other_size: int) -> None:
        super().__init__(start, size, other_start, other_size)
        self.start = start
        self.size = size
        self.other_start = other_start
        self.other_size = other_size

    def __str__(self) -> str:
        return (
            f"the region at {self.start:#x} of size {self.size:#x} overlaps that at "
            f"{self.other_start:#x} of size {self.other_size:#x}"
        )


class AddressOverflowError(VolatileMemoryError, OverflowError):
    """base + offset passes 2**64 - 1."""

    def __init__(self, base: int, offset: int) -> None:
        super().__init__(base, offset)
        self.base = base
        self.offset = offset

    def __str__(self) -> str:
        return f"{self.base:#x} + {self.offset:#x} passes 0xffffffffffffffff"


class MisalignedError(VolatileMemoryError, ValueError):
    """addr, an offset (bytes) or a guest address, is not at a multiple of alignment in memory.

    What counts is where the byte lies in the host's memory: a slice that begins at an odd offset
    makes even ones odd. Where a log of dirty pages is merged, alignment is the size of a page.
    """

    def __init__(self, addr: int, alignment: int) -> None:
        super().__init__(addr, alignment)
        self.addr = addr
        self.alignment = alignment

    def __str__(self) -> str:
        return f"{self.addr:#x} is not at a multiple of {self.alignment} in memory"


class CoreDumpWarning(RuntimeWarning):
    """madvise(MADV_DONTDUMP) failed: the mapping works, but core dumps will hold it."""
