"""The memory orders of atomic accesses and fences, as C11 (7.17.3) defines them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Self

__all__ = ["Ordering"]


class Ordering:
    """How an atomic access or a fence orders the accesses around it.

    RELAXED orders nothing. ACQUIRE: what comes after it stays after it; RELEASE: what comes
    before it stays before it; ACQ_REL is both. SEQ_CST is both, and all such accesses have one
    order that every processor sees. There are these five and no others; they compare by
    identity, and copy and pickle to themselves. (Not an enum.Enum: importing that would double
    what importing guestmem costs.)
    """

    __slots__ = ("_name",)
    _name: str

    RELAXED: ClassVar[Ordering]
    ACQUIRE: ClassVar[Ordering]
    RELEASE: ClassVar[Ordering]
    ACQ_REL: ClassVar[Ordering]
    SEQ_CST: ClassVar[Ordering]

    def __new__(cls) -> Self:
        raise TypeError("cannot create 'guestmem.Ordering' instances")

    @property
    def name(self) -> str:
        """The name: 'SEQ_CST'."""
        return self._name

    def __repr__(self) -> str:
        return f"guestmem.Ordering.{self._name}"

    def __reduce__(self) -> str:
        return f"Ordering.{self._name}"


def _make(name: str) -> Ordering:
    ordering = object.__new__(Ordering)
    ordering._name = name  # pyright: ignore[reportPrivateUsage]
    setattr(Ordering, name, ordering)
    return ordering


# In the order of the C extension's table.
_ALL = tuple(map(_make, ("RELAXED", "ACQUIRE", "RELEASE", "ACQ_REL", "SEQ_CST")))
