"""What stands in a lane of a GPU arena between the halves of a step, and the routing that a dispatch leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eptransport._calls import Unpacking
from eptransport.dispatched import Layout, Routing

if TYPE_CHECKING:
    import torch

    from eptransport._gpu_steps import GpuSteps
    from eptransport._shapes import Shapes

__all__ = ["GpuRouting", "Lane", "Sent", "Summed"]


class GpuRouting(Routing):
    """A routing that is kept on the GPU, in the caller's memory."""

    def __init__(
        self, of: Shapes, memory: torch.Tensor, layout: Layout, lane: int, tokens: int, num_tokens: int
    ) -> None:
        self.of = of
        """Those of the AllToAll whose dispatch it is, and of no other."""
        self._memory = memory
        self._native = None
        self.layout = layout
        self.lane = lane
        self.tokens = tokens
        self.num_tokens = num_tokens
        self.weighed = False
        self.leading = 0
        """Rows of the layout that was unpacked: of all, of a rank, or of an expert."""
        self.membership = 0
        """That the dispatch was begun under; a captured one is replayed under the lane's."""
        self._lost_ranks: tuple[int, ...] = ()
        self._lost_experts: torch.Tensor | None = None
        self._ids: Callable[[], torch.Tensor] = lambda: memory

    def lost_ranks(self, world_size: int) -> tuple[int, ...]:
        return tuple(rank for rank in self._lost_ranks if rank < world_size)

    def lost(self, top_k: int) -> torch.Tensor:
        import torch

        lost = torch.zeros(self.tokens, top_k, dtype=torch.bool, device=self._memory.device)
        if self._lost_experts is not None:
            ids = self._ids()
            lost[: self.num_tokens] = self._lost_experts[ids.clamp(min=0)] & (ids >= 0)
        return lost


@dataclass
class Lane:
    """What the second half must know of the first. A lane is of all AllToAlls that share its memory: what one of them
    has sent and not received, another one must clear away before it sends."""

    sent: Sent | None = None
    summed: Summed | None = None
    stream: Any = None
    """The last one that it was on."""
    captured: bool = False
    """Graphs have steps of it, which may be replayed on any stream."""


@dataclass(frozen=True)
class Sent:
    by: GpuSteps
    routing: GpuRouting
    layout: Layout
    unpacking: Unpacking
    scales: tuple[int, int]
    """Bytes a row, and their format."""
    keep: tuple[torch.Tensor | None, ...] = ()
    """Of a streamed call: what is sent with the second half, or when the next call drops it."""


@dataclass(frozen=True)
class Summed:
    by: GpuSteps
    routing: GpuRouting
    row_weights: bool
    keep: tuple[torch.Tensor | None, ...] = ()
    """As of Sent."""
