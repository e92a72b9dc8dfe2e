"""What is remembered of a lane between the halves of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from eptransport.host_counts import Counts, HostCounts

if TYPE_CHECKING:
    import torch

    from eptransport._calls import Unpacking
    from eptransport.dispatched import Layout

__all__ = ["Lane", "Sent", "Summed"]


class Lane:
    """What the second half must know of the first."""

    def __init__(self) -> None:
        self.sent: Sent | None = None
        self.summed: Summed | None = None
        self._mirrored: Counts | None = None

    def mirror(self, counts: torch.Tensor, rows: int, timeout_s: float) -> HostCounts:
        """As a GPU's receiving kernel leaves it: here all is known when the call returns."""
        epoch = 1 if self._mirrored is None else self._mirrored.epoch + 1
        self._mirrored = Counts(epoch, counts.clone(), rows, False)
        return HostCounts(self._look, epoch, timeout_s)

    def _look(self) -> tuple[int, Counts] | None:
        at = self._mirrored
        return None if at is None else (at.epoch, replace(at, counts=at.counts.clone()))

    def clear(self) -> None:
        self.sent = self.summed = None


@dataclass(frozen=True)
class Sent:
    tokens: int
    count: int
    layout: Layout
    unpacking: Unpacking
    keep: Any
    """What native code may still read: a whole dispatch is packed while it is received."""


@dataclass(frozen=True)
class Summed:
    tokens: int
    count: int
    row_weights: bool
    keep: Any
