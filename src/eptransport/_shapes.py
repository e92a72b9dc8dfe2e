"""The shapes of an AllToAll: of what comes out of dispatch and goes into combine, and how many rows have room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eptransport._call import lib, size

if TYPE_CHECKING:
    import torch

    from eptransport._moe_config import Types
    from eptransport.dispatched import Layout
    from eptransport.plan import Plan

__all__ = ["LAYOUTS", "SCALE_LAYOUTS", "Shapes"]

LAYOUTS = {
    "rows": lib.EPT_LAYOUT_ROWS,
    "by_rank": lib.EPT_LAYOUT_BY_RANK,
    "contiguous": lib.EPT_LAYOUT_CONTIGUOUS,
    "masked": lib.EPT_LAYOUT_MASKED,
}
SCALE_LAYOUTS = ("row", "column")


@dataclass(frozen=True)
class Shapes:
    """What they come from: the arguments of the AllToAll, and its plan."""

    types: Types
    world: int
    local_experts: int
    """How many."""
    top_k: int
    hidden: int
    max_tokens: int
    max_rows: int | None
    scale_layout: str
    plan: Plan
    device: torch.device | None = None
    """None: the CPU."""

    @property
    def place(self) -> torch.device:
        """Where outputs are made, whatever torch.set_default_device says."""
        import torch

        return torch.device("cpu") if self.device is None else self.device

    @property
    def payload_columns(self) -> int:
        """Elements of a row on the wire."""
        return self.types.payload_columns(self.hidden)

    def of(self, layout: Layout, rows: int | None, last: int) -> tuple[Any, ...]:
        """Of rows in this layout; None: any number."""
        if layout == "by_rank":
            return (self.world, rows, last)
        if layout == "masked":
            return (self.local_experts, rows, last)
        return (rows, last)

    def room(self, layout: str, bound: int | None) -> int:
        """Rows that outputs have room for, where nobody counts first."""
        limit = self.limit(bound)
        if layout == "masked":
            # A token that names an expert twice has two rows there. That is too rare to make every expert's room
            # top_k times as large for; max_rows can, and a row too many is a CapacityError.
            return self.plan.max_rows if limit is None else min(self.plan.max_rows * self.top_k, limit)
        worst = {
            "rows": self.plan.max_rows,
            "by_rank": self.max_tokens,
            "contiguous": self.plan.max_contiguous_rows,
        }[layout]
        return worst if limit is None else min(worst, limit)

    def limit(self, bound: int | None) -> int | None:
        """What the call or this object says that outputs may hold at most."""
        return self.max_rows if bound is None else size("max_rows", bound)
