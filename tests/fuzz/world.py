"""One sequence of calls: what exists meanwhile, how a call is judged, what must hold at the end.

As long as nothing hostile has run, each area of bytes has a model, and what calls return and
leave behind is compared with it.
"""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import re
import sys
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from tests.fuzz.arguments import ALLOWED, FAILED, Arguments, Host
from tests.fuzz.model import PAGE, Finding

from guestmem import GuestMemoryError, MemoryMapping, VolatileSlice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.fuzz.model import Guest, Tracked

DEEPEST = 3  # hostile calls inside hostile calls

ADDRESS = re.compile(r"0x(55|56|7[a-f])[0-9a-f]{10}\b", re.IGNORECASE)


class World(Arguments):
    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.depth = 0

    # --- calls, and how they are judged ---

    def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return what it returned; FAILED where it raised what it may."""
        try:
            return function(*arguments, **named)
        except ALLOWED as error:
            self.judge(error)
            return FAILED

    def judge(self, error: BaseException) -> None:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, SystemError):
                raise Finding(f"the cause {cause!r} of {error!r}") from error
            cause = cause.__cause__
        if isinstance(error, GuestMemoryError):
            if ADDRESS.search(str(error)):
                raise Finding(f"a host address: {error}") from error
            again = pickle.loads(pickle.dumps(error))
            if (type(again), str(again)) != (type(error), str(error)):
                raise Finding(f"{error!r} pickles to {again!r}") from error

    def check(self, got: object, wanted: object) -> None:
        """Compare what a tame call returned; by repr, for which one NaN is like another."""
        if self.tame and repr(got) != repr(wanted):
            raise Finding(f"{got!r:.200} where it should be {wanted!r:.200}")

    def run(self, operations: Sequence[Callable[[World], None]]) -> None:
        self.operations = operations
        flags = self.choices.byte()
        thresholds = gc.get_threshold()
        unraisable = sys.unraisablehook
        unseen: list[BaseException] = []

        def see(what: Any) -> None:
            if not isinstance(what.exc_value, ALLOWED):
                unseen.append(what.exc_value)

        sys.unraisablehook = see
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if flags & 1:
                    gc.set_threshold(1)  # runs wherever it may run
                for count in itertools.count(1):
                    self.step()
                    if not self.choices.left:
                        break
                    if self.tame and count % 8 == 0:
                        self.compare()  # before something hostile hides what was wrong
                self.compare()
                self.close()
        finally:
            gc.set_threshold(*thresholds)
            sys.unraisablehook = unraisable
            for fd in self.fds + self.shrinking_fds:
                os.close(fd)
        if unseen:
            raise unseen[0]

    def step(self) -> None:
        operation = self.choices.pick(self.operations)
        operation(self)

    def run_some(self) -> None:
        """Run a few calls inside of whatever runs now."""
        if self.over or self.depth == DEEPEST:
            return
        self.depth += 1
        try:
            for _ in range(self.choices.byte() % 4):
                self.step()
        finally:
            self.depth -= 1

    def compare(self) -> None:
        """Compare the contents of everything with its model, and let nobody strike meanwhile."""
        self.over = True
        self.compare_memory()
        for guest in self.guests:
            self.compare_guest(guest)
        for tracked in self.tracked:
            self.compare_marks(tracked.obj, tracked)
        self.over = False

    def compare_memory(self) -> None:
        for place in self.memories:
            if len(place.obj) != place.size or place.obj.size != place.size:
                raise Finding(f"{place.obj!r} should have size {place.size:#x}")
            if self.tame and place.area.known and not place.obj.closed:
                self.check(place.obj.read_bytes(0, place.size), place.at(0, place.size))
            if place.tracked is not None and isinstance(place.obj, MemoryMapping):
                self.compare_marks(place.obj.dirty, place.tracked)
                self.compare_written(place.obj, place.tracked)
        for place in self.buffers:
            if place.area.known and isinstance(place.obj, bytearray):
                self.check(bytes(place.obj), bytes(place.area.model))
        for place in [*self.refs, *self.atomics, *self.arrays]:
            if self.tame and place.known:
                shown = place.obj.to_slice().read_bytes(0, place.size)
                self.check(shown, place.at(0, place.size))

    def compare_marks(self, bitmap: Any, tracked: Tracked) -> None:
        ranges, bits = bitmap.ranges(), int.from_bytes(bytes(bitmap), "little")
        pages = {page for page in range(bits.bit_length()) if bits >> page & 1}
        if tracked.ranges(pages) != ranges or bitmap.count != len(pages):
            raise Finding(f"{bitmap!r} has {ranges} of the pages {pages}")
        if self.tame and (tracked.pages - pages or (tracked.exact and pages != tracked.pages)):
            raise Finding(f"{tracked.pages} were written, {pages} are marked")

    def compare_written(self, mapping: Any, tracked: Tracked) -> None:
        """What differs from what was there before has been marked, whoever wrote it."""
        if tracked.before is None or mapping.closed:
            return
        now = mapping.read_bytes(0, mapping.size)
        for page in range(0, mapping.size, PAGE):
            same = tracked.before[page : page + PAGE] == now[page : page + PAGE]
            if not same and not mapping.dirty.is_dirty(page):
                raise Finding(f"the page at {page:#x} was written and is not marked")

    def compare_guest(self, guest: Guest) -> None:
        """What is read by guest address is what its regions show."""
        for start, place in [] if guest.obj.closed else guest.regions:
            if guest.obj.find_region(start + place.size - 1)[3] is not place.obj:
                raise Finding(f"{guest.obj!r} does not find {place.obj!r}")
            if not place.obj.closed:
                by_address = self.call(guest.obj.read_bytes, start, place.size)
                # Pages that are missing are so for both.
                if by_address != self.call(place.obj.read_bytes, 0, place.size):
                    raise Finding(f"{guest.obj!r} shows another {place.obj!r}")

    def close(self) -> None:
        """Drop all that borrows: then nobody hinders anybody from closing, or from resizing."""
        self.over = True  # hostile objects that die now find nothing to strike
        hosts = [p.obj for p in self.buffers if isinstance(p.obj, bytearray)]
        shown = [*self.memories, *(p for guest in self.guests for _, p in guest.regions)]
        mappings = [p.obj for p in shown if isinstance(p.obj, MemoryMapping)]
        borrowers = [p.obj for p in shown if isinstance(p.obj, VolatileSlice)]
        gone = [weakref.ref(one) for one in [*borrowers, *(g.obj for g in self.guests)]]
        bitmaps = [tracked.obj for tracked in self.tracked]
        everything: list[list[Any]] = [
            *(shown, borrowers, self.memories, self.guests, self.refs, self.atomics, self.arrays),
            *(self.tracked, self.buffers, self.kept, self.views, self.files, self.ctypes_objects),
        ]
        for some in everything:
            some.clear()
        for host in hosts:
            if isinstance(host, Host):
                host.kept = None
        gc.collect()
        for mapping in mappings:
            mapping.close()
            if not mapping.closed or " closed>" not in repr(mapping):
                raise Finding(f"{mapping!r} should be closed")
        if any(ref() is not None for ref in gone):
            raise Finding("a slice or a guest memory outlives all who knew it")
        for host in hosts:
            host.append(0)  # a BufferError if somebody still has its buffer
        mappings.clear()
        mapping = None  # type: ignore[assignment]
        while bitmaps:
            bitmap = bitmaps.pop()
            if sys.getrefcount(bitmap) > 2:
                raise Finding(f"{bitmap!r} is left to others")
