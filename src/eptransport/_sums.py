"""Tensors that a combine writes its sums into: the caller's, which is checked, or new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from eptransport._call import ffi
from eptransport._convert import fill
from eptransport._inputs import check_y

if TYPE_CHECKING:
    import torch

    from eptransport._shapes import Shapes

__all__ = ["Sums", "make_sums"]


class Sums(NamedTuple):
    """Of the first `num_tokens` tokens; the rest of the batch gets zeros."""

    y: torch.Tensor
    row_weights: torch.Tensor | None
    num_tokens: int

    def native(self) -> tuple[Any, Any]:
        """As `ept_tensor`s."""
        y, row_weights = ffi.new("ept_tensor *"), ffi.new("ept_tensor *")
        fill(y, self.y[: self.num_tokens])
        fill(row_weights, None if self.row_weights is None else self.row_weights[: self.num_tokens])
        return y, row_weights

    def answer(self) -> Any:
        """What `combine` returns, when they are written or launched to be."""
        for tensor in (self.y, self.row_weights):
            if tensor is not None and self.num_tokens < len(tensor):
                tensor[self.num_tokens :].zero_()
        return self.y if self.row_weights is None else (self.y, self.row_weights)


def make_sums(shapes: Shapes, tokens: int, num_tokens: int, row_weights: bool, out: torch.Tensor | None) -> Sums:
    """Of a batch of `tokens`."""
    import torch

    y = out
    if y is None:
        y = torch.empty(tokens, shapes.hidden, dtype=shapes.types.dtype, device=shapes.place)
    else:
        check_y(shapes, tokens, y)
    weights = None
    if row_weights:
        weights = torch.empty(tokens, shapes.top_k, dtype=torch.float32, device=shapes.place)
    return Sums(y, weights, num_tokens)
