"""The bytes of an input, as decisions: each byte that the fuzzer changes changes one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")


class Choices:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def left(self) -> bool:
        return self.at < len(self.data)

    def byte(self) -> int:
        """Return the next byte; 0 where there is none."""
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def pick(self, some: Sequence[T]) -> T:
        return some[self.byte() % len(some)]

    def one_in(self, count: int) -> bool:
        """Say yes to one byte of so many; never at the end of the input."""
        return self.byte() % count == count - 1
