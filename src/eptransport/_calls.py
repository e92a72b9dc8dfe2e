"""What a caller says to a step, as AllToAll hands it on to those who make it, on a CPU or a GPU. Named tuples: each
step makes three, and frozen dataclasses of as many fields take microseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from eptransport.dispatched import Dispatched, Layout, Routing

__all__ = ["AS_TOLD", "CombineCall", "DispatchCall", "Unpacking"]


class Unpacking(NamedTuple):
    """How this rank wants what arrives. `dispatch_send` may say it, and `dispatch_recv` otherwise. None: not said."""

    layout: Layout | None = None
    host_counts: bool | None = None
    mirror_counts: bool | None = None
    max_rows: int | None = None
    out: torch.Tensor | Dispatched | None = None

    def over(self, said: Unpacking) -> Unpacking:
        """What is said here, and for the rest what was said there."""
        if self is AS_TOLD:
            return said
        return Unpacking(
            said.layout if self.layout is None else self.layout,
            said.host_counts if self.host_counts is None else self.host_counts,
            said.mirror_counts if self.mirror_counts is None else self.mirror_counts,
            said.max_rows if self.max_rows is None else self.max_rows,
            said.out if self.out is None else self.out,
        )


AS_TOLD = Unpacking()
"""Of a second half that says nothing by itself."""


class DispatchCall(NamedTuple):
    """The arguments of `dispatch_send`, and of the `dispatch` that is both halves."""

    x: torch.Tensor
    topk_ids: torch.Tensor | None
    topk_weights: torch.Tensor | None
    scales: torch.Tensor | None
    routing: Routing | None
    num_tokens: int | None
    lane: int
    unpacking: Unpacking
    whole: bool
    """Both halves are one call."""


class CombineCall(NamedTuple):
    """The arguments of `combine_send`, and of the `combine` that is both halves but where the sums go."""

    expert_out: torch.Tensor
    got: Dispatched | Routing
    topk_weights: torch.Tensor | None
    weights_applied: bool
    row_weights: torch.Tensor | None
    lane: int
    whole: bool
    """Both halves are one call."""
