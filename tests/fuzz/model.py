"""What memory should hold: the bytes of areas, the pages that were written, guest addresses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.fuzz.choices import Choices

PAGE = os.sysconf("SC_PAGESIZE")
TOP = 2**64


class Finding(BaseException):
    """Something that must not be. No "except Exception" on the way hides it."""


class Area:
    """Bytes that several objects may show, and what they should be."""

    def __init__(self, model: bytearray, *, shrinks: bool = False, fd: int = -1) -> None:
        self.model, self.shrinks, self.fd = model, shrinks, fd
        self.known = not shrinks


class Tracked:
    """A DirtyBitmap, and the pages that should be marked in it."""

    def __init__(self, obj: Any, start: int, size: int, *, exact: bool) -> None:
        self.obj, self.start, self.size = obj, start, size  # start: of the mapping in its area
        self.pages: set[int] = set()
        self.exact = exact  # whether nothing else is marked
        # What was in memory when the marks were last taken: what differs from it has been
        # marked since, whatever hostile objects did. None where others could write, too.
        self.before: bytes | None = None

    def forget(self) -> None:
        """Those who show its pages know the model still, and do not keep the object alive."""
        self.obj = None

    def mark(self, offset: int, count: int) -> None:
        if count:
            self.pages.update(range(offset // PAGE, (offset + count - 1) // PAGE + 1))

    def ranges(self, pages: set[int]) -> list[tuple[int, int]]:
        return joined((p * PAGE, min(self.size - p * PAGE, PAGE)) for p in sorted(pages))


def exactly(number: int) -> int:
    """Return what a bool is, or an int whose methods must not be asked."""
    return int.__index__(number)


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Make those that adjoin one."""
    made: list[tuple[int, int]] = []
    for start, count in ranges:
        if made and sum(made[-1]) == start:
            start, count = made[-1][0], made.pop()[1] + count  # noqa: PLW2901
        made.append((start, count))
    return made


class Place:
    """An object that shows size bytes of an area, from start on."""

    def __init__(
        self, obj: Any, area: Area, start: int, size: int, tracked: Tracked | None = None
    ) -> None:
        self.obj, self.area, self.start, self.size = obj, area, start, size
        self.tracked = tracked

    @property
    def known(self) -> bool:
        return self.area.known

    @property
    def areas(self) -> list[Area]:
        return [self.area]

    def doubt(self, known: bool) -> None:
        self.area.known &= known

    def lend(self) -> None:
        """Somebody gets its bare bytes: what is written to them is not tracked."""
        if self.tracked is not None:
            self.tracked.before = None

    def half_done(self) -> None:
        """A call failed, but of a range that is checked as a whole before it is touched."""

    def more_is_marked(self) -> None:
        """A call failed, and may have marked all that it was asked for."""
        if self.tracked is not None:
            self.tracked.exact = False

    def origin(self, choices: Choices) -> tuple[int, int]:
        """Return from where offsets are counted, and how many there are."""
        return 0, self.size

    def left(self, offset: int) -> int:
        return self.size - offset

    def at(self, offset: int, count: int) -> bytes:
        if offset + count > self.size:
            raise Finding(f"{offset:#x} + {count:#x} was accepted of {self.size:#x}")
        return bytes(self.area.model[self.start + offset :][:count])

    def put(self, offset: int, content: bytes) -> None:
        self.at(offset, len(content))
        start = self.start + offset
        self.area.model[start : start + len(content)] = content
        if self.tracked is not None:
            self.tracked.mark(start - self.tracked.start, len(content))

    def derive(self, obj: Any, offset: int, size: int) -> Place:
        """Return the place of an object that was made of a part of it."""
        self.at(offset, size)
        return Place(obj, self.area, self.start + offset, size, self.tracked)


class Guest:
    """A GuestMemory: places by guest address. It has what a Place has."""

    def __init__(self, obj: Any, regions: list[tuple[int, Place]]) -> None:
        self.obj, self.regions = obj, sorted(regions, key=lambda region: region[0])

    @property
    def size(self) -> int:
        return sum(place.size for _, place in self.regions)

    @property
    def known(self) -> bool:
        return all(area.known for area in self.areas)

    @property
    def areas(self) -> list[Area]:
        return [place.area for _, place in self.regions]

    def doubt(self, known: bool) -> None:
        for area in self.areas:
            area.known &= known

    def lend(self) -> None:
        for _, place in self.regions:
            place.lend()

    def half_done(self) -> None:
        """A call failed: where pages can be missing, after it was done in other regions."""
        if any(area.shrinks for area in self.areas):
            self.doubt(False)
            self.more_is_marked()

    def more_is_marked(self) -> None:
        for _, place in self.regions:
            place.more_is_marked()

    def origin(self, choices: Choices) -> tuple[int, int]:
        if not self.regions:
            return 0, PAGE
        start, place = choices.pick(self.regions)
        return start, place.size

    def find(self, addr: int) -> tuple[int, Place] | None:
        for start, place in self.regions:
            if 0 <= addr - start < place.size:
                return start, place
        return None

    def pieces(self, addr: int, count: int) -> Iterator[tuple[Place, int, int]]:
        """Give a place, an offset and a count for each region, up to the first hole."""
        addr, count = exactly(addr), exactly(count)
        while count > 0 and (found := self.find(addr)) is not None:
            offset = addr - found[0]
            step = min(count, found[1].size - offset)
            yield found[1], offset, step
            addr, count = addr + step, count - step

    def left(self, addr: int) -> int:
        return sum(step for _, _, step in self.pieces(addr, self.size))

    def has(self, addr: int, count: int) -> bool:
        if count == 0:  # the end of a region will do
            return any(0 <= addr - start <= place.size for start, place in self.regions)
        return count <= self.left(addr)

    def at(self, addr: int, count: int) -> bytes:
        if not self.has(addr, count):
            raise Finding(f"{addr:#x} + {count:#x} was accepted of {self.regions}")
        return b"".join(place.at(offset, step) for place, offset, step in self.pieces(addr, count))

    def put(self, addr: int, content: bytes) -> None:
        self.at(addr, len(content))
        for place, offset, step in self.pieces(addr, len(content)):
            place.put(offset, content[:step])
            content = content[step:]

    def derive(self, obj: Any, addr: int, size: int) -> Place:
        for start, place in self.regions:
            if 0 <= addr - start <= place.size - size:
                return place.derive(obj, addr - start, size)
        raise Finding(f"{addr:#x} + {size:#x} is in no region of {self.regions}")

    def dirty(self) -> list[tuple[int, int]]:
        """Return the ranges that should be dirty, by guest address."""
        found: list[tuple[int, int]] = []
        for addr, place in self.regions:
            if (tracked := place.tracked) is None:
                continue
            since = place.start - tracked.start  # where the region begins in the mapping
            for page in sorted(tracked.pages):
                start = max(page * PAGE, since)
                stop = min((page + 1) * PAGE, since + place.size)
                if start < stop:
                    found.append((addr + start - since, stop - start))
        return joined(found)

    def clean(self) -> None:
        """Take the marks of all pages that a region lies in."""
        for _, place in self.regions:
            if place.tracked is not None:
                since = place.start - place.tracked.start
                last = (since + place.size - 1) // PAGE
                place.tracked.pages -= set(range(since // PAGE, last + 1))
