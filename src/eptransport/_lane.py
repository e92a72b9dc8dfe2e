"""What is remembered of a lane between the halves of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from eptransport.dispatched import Dispatched, Layout

__all__ = ["Lane", "Sent", "Summed"]


class Lane:
    """What the second half must know of the first."""

    def __init__(self) -> None:
        self.sent: Sent | None = None
        self.summed: Summed | None = None

    def clear(self) -> None:
        self.sent = self.summed = None


@dataclass(frozen=True)
class Sent:
    tokens: int
    count: int
    layout: Layout
    host_counts: bool
    max_rows: int | None
    out: torch.Tensor | Dispatched | None
    keep: Any
    """What native code may still read: a whole dispatch is packed while it is received."""


@dataclass(frozen=True)
class Summed:
    tokens: int
    count: int
    row_weights: bool
    keep: Any
