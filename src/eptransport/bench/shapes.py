"""What a layer looks like, how its tokens are routed, and what an exchange of it must cost.

The bytes are worked out here from the drawing in wire.h, apart from the library, so that the counters can be held
against them: a row too many, and the two differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eptransport.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "PRESETS", "Cost", "Preset", "Shape", "routing", "tokens"]

DTYPES = ("bf16", "fp16", "fp32")
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}
_TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn"}
FP8_BLOCK = 128
HEADER_BYTES = 128


@dataclass(frozen=True)
class Preset:
    """The mixture-of-experts layer of a published model."""

    hidden: int
    experts: int
    top_k: int
    dispatch_dtype: str


PRESETS = {
    "deepseek-v3": Preset(hidden=7168, experts=256, top_k=8, dispatch_dtype="fp8"),
    "kimi-k2": Preset(hidden=7168, experts=384, top_k=8, dispatch_dtype="fp8"),
    "qwen3-235b": Preset(hidden=4096, experts=128, top_k=8, dispatch_dtype="bf16"),
    "mixtral": Preset(hidden=4096, experts=8, top_k=2, dispatch_dtype="bf16"),
}


@dataclass(frozen=True)
class Cost:
    """What one rank sends to others in one dispatch and combine."""

    messages: int
    dispatch_bytes: tuple[int, ...]
    """To each rank; 0 to itself."""
    combine_bytes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return sum(self.dispatch_bytes) + sum(self.combine_bytes)


@dataclass(frozen=True)
class Shape:
    ranks: int
    tokens: int
    """A rank."""
    hidden: int
    experts: int
    top_k: int
    dtype: str = "bf16"
    dispatch_dtype: str = "bf16"
    combine_dtype: str = "bf16"

    def check(self) -> None:
        """InvalidArgument for what is no layer."""
        for name in ("ranks", "tokens", "hidden", "experts", "top_k"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.top_k > self.experts:
            raise InvalidArgument(f"top-k is {self.top_k}, but there are {self.experts} experts")

    def experts_of(self, rank: int) -> range:
        """Blocks in rank order; the first experts % ranks hold one more."""
        each, more = divmod(self.experts, self.ranks)
        start = rank * each + min(rank, more)
        return range(start, start + each + (rank < more))

    def torch_dtype(self, name: str) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, _TORCH[name])
        return found

    @property
    def scale_blocks(self) -> int:
        """Scales of a dispatch row."""
        return -(-self.hidden // FP8_BLOCK) if self.dispatch_dtype == "fp8" else 0

    @property
    def dispatch_row(self) -> int:
        payload = _align(self.hidden * _BYTES[self.dispatch_dtype], 16)
        return _align(payload + _align(4 * self.scale_blocks, 16) + 8 + 12 * self.top_k, 16)

    @property
    def combine_row(self) -> int:
        return _align(self.hidden * _BYTES[self.combine_dtype], 16)

    def dispatch_message(self, rows: int, to: int) -> int:
        return HEADER_BYTES + _align(4 * len(self.experts_of(to)), 64) + rows * self.dispatch_row

    def combine_message(self, rows: int) -> int:
        return HEADER_BYTES + rows * self.combine_row

    def cost(self, rank: int, rows: Sequence[Sequence[int]]) -> Cost:
        """`rows[s][r]`: tokens of rank s that have an expert at rank r."""
        others = [r for r in range(self.ranks) if r != rank]
        return Cost(
            messages=2 * len(others),
            dispatch_bytes=tuple(
                self.dispatch_message(rows[rank][r], r) if r != rank else 0 for r in range(self.ranks)
            ),
            combine_bytes=tuple(self.combine_message(rows[r][rank]) if r != rank else 0 for r in range(self.ranks)),
        )

    def rows(self, ids: torch.Tensor) -> list[int]:
        """Of these tokens, how many go to each rank."""
        return [self.tokens_to(ids, [rank]) for rank in range(self.ranks)]

    def tokens_to(self, ids: torch.Tensor, ranks: Sequence[int]) -> int:
        """Of these tokens, how many go to any of those ranks."""
        held = [self.experts_of(rank) for rank in ranks]
        goes = [((ids >= own.start) & (ids < own.stop)).any(dim=1) for own in held]
        return sum(any(token) for token in zip(*(tokens.tolist() for tokens in goes), strict=True))


def routing(shape: Shape, rank: int, skew: float, seed: int) -> tuple[Any, Any]:
    """Ids [tokens, top_k] int64, all of a token different, and weights that add up to about 1 [tokens, top_k] fp32.

    `skew`: the e-th most popular expert is chosen in proportion to 1 / e ** skew (0: all alike); which experts are the
    popular ones is drawn at random, alike on all ranks. Weights are multiples of 1/256, so that sums of a few products
    can be checked to the bit.
    """
    import torch

    common = torch.Generator().manual_seed(seed)
    popularity = torch.arange(1, shape.experts + 1, dtype=torch.float64) ** -skew
    popularity = popularity[torch.randperm(shape.experts, generator=common)]
    own = torch.Generator().manual_seed(seed * 1_000_003 + rank + 1)
    uniform = torch.rand(shape.tokens, shape.experts, generator=own, dtype=torch.float64).clamp_(1e-300, 1 - 1e-16)
    # Gumbel's trick: the k largest of log p - log(-log u) are k draws without putting back.
    ids = (popularity.log() - (-uniform.log()).log()).topk(shape.top_k, dim=1).indices
    weights = torch.rand(shape.tokens, shape.top_k, generator=own) + 0.25
    weights = (weights / weights.sum(dim=1, keepdim=True) * 256).round().clamp_(min=1) / 256
    return ids, weights.float()


def tokens(shape: Shape, rank: int, seed: int) -> torch.Tensor:
    """[tokens, hidden] of normal random numbers: never zeros, which some networks and caches treat better."""
    import torch

    own = torch.Generator().manual_seed(seed * 1_000_003 + rank + 500_001)
    x = torch.randn(shape.tokens, shape.hidden, generator=own)
    return x.to(shape.torch_dtype(shape.dtype))


def _align(value: int, to: int) -> int:
    return -(-value // to) * to
