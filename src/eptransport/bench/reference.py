"""Dispatch and combine in plain torch, on one rank's own tokens: what y must be, to the bit.

Every expert computes another function, so a row that went to the wrong one shows: expert e multiplies by
2 ** (e % 7 - 3), which is exact in every dtype. Needs no other rank: a token's way is known from its own ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eptransport.bench.shapes import FP8_BLOCK, Shape

if TYPE_CHECKING:
    from eptransport import Dispatched

__all__ = ["dequantise", "expected", "expert_factors", "quantise", "serve_experts"]

E4M3_MAX = 448.0
EPSILON = 1e-4


def expert_factors(ids: torch.Tensor) -> torch.Tensor:
    """What each of these global experts multiplies by, fp32."""
    return torch.exp2((ids % 7 - 3).float())


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, hidden] as e4m3 with an fp32 scale a block of 128: scale = max(amax, 1e-4) / 448, q = e4m3(x / scale)."""
    rows, hidden = x.shape
    blocks = -(-hidden // FP8_BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, blocks * FP8_BLOCK - hidden)).view(rows, blocks, FP8_BLOCK)
    scales = padded.abs().amax(dim=2).clamp_(min=EPSILON) / E4M3_MAX
    q = (padded / scales[:, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return q.view(rows, -1)[:, :hidden].contiguous(), scales


def dequantise(q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    hidden = q.shape[-1]
    spread = scales.float().repeat_interleave(FP8_BLOCK, dim=-1)[..., :hidden]
    return (q.float() * spread).to(dtype)


def expected(shape: Shape, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """y [tokens, hidden]: each rank sums its experts' rows in the order of k and rounds; ranks are added in order."""
    dtype, combine = shape.torch_dtype(shape.dtype), shape.torch_dtype(shape.combine_dtype)
    seen = dequantise(*quantise(x), dtype) if shape.dispatch_dtype == "fp8" else x
    y = torch.zeros(shape.tokens, shape.hidden)
    for rank in range(shape.ranks):
        held = shape.experts_of(rank)
        here = (ids >= held.start) & (ids < held.stop)
        y += _one_rank(seen, ids, weights, here, dtype).to(combine).float()
    return y.to(dtype)


def serve_experts(shape: Shape, rank: int, layout: str, got: Dispatched) -> torch.Tensor:
    """What this rank's experts make of the rows that came, in their layout."""
    dtype = shape.torch_dtype(shape.dtype)
    x = got.x if got.scales is None else dequantise(got.x, got.scales, dtype)
    held = shape.experts_of(rank)
    factors = expert_factors(torch.arange(held.start, held.stop))
    if layout == "masked":
        return (x.float() * factors[:, None, None]).to(dtype)
    if layout == "contiguous":
        out = torch.zeros_like(x, dtype=dtype)
        assert got.offsets is not None
        starts, counts = got.offsets.tolist(), got.counts.tolist()
        for expert, count in enumerate(counts):
            rows = slice(starts[expert], starts[expert] + count)
            out[rows] = (x[rows].float() * factors[expert]).to(dtype)
        return out
    # rows, by_rank: the caller weighs and sums; combine only adds.
    assert got.topk_ids is not None
    assert got.topk_weights is not None
    flat = x.reshape(-1, shape.hidden)
    local = got.topk_ids.reshape(-1, shape.top_k).long()
    weights = got.topk_weights.reshape(-1, shape.top_k)
    ids = torch.where(local >= 0, local + held.start, -1)
    return _one_rank(flat, ids, weights, local >= 0, dtype).to(dtype).view_as(x)


def _one_rank(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, here: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The fused multiply-adds of one rank, fp32. In fp64 a product of fp32 is exact, and so is the sum but for a tie
    that the multiples of 1/256 (shapes.routing) keep out; so rounding once to fp32 is what fma does."""
    total = torch.zeros(x.shape, dtype=torch.float32)
    factors = expert_factors(ids)
    for k in range(ids.shape[1]):
        out = (x.float() * factors[:, k, None]).to(dtype)
        added = (total.double() + weights[:, k, None].double() * out.double()).float()
        total = torch.where(here[:, k, None], added, total)
    return total
