"""What a dispatch brought, and by which way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from eptransport._call import ffi, lib
from eptransport.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

    from eptransport.host_counts import HostCounts

__all__ = ["Dispatched", "Layout", "Routing", "routing_of"]

Layout = Literal["rows", "by_rank", "contiguous", "masked"]


@dataclass(frozen=True)
class Dispatched:
    """What a dispatch brought. Its tensors are the caller's own, never views of memory that peers write.

    By layout, with `n` rows of room (`host_counts=True`: exactly as many as needed):

    `rows`        x [n, hidden]               one row a token, by source rank; topk_ids, topk_weights [n, top_k]
    `by_rank`     x [ranks, n, hidden]        the same, padded for each source rank
    `contiguous`  x [n, hidden]               by local expert, each group padded to `alignment`; topk_weights [n]
    `masked`      x [local experts, n, hidden]   counts[e] rows are filled; topk_weights [local experts, n]
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    """As x without `hidden`, then one scale a block; None where the payload has none."""
    counts: torch.Tensor
    """[local experts] int32: rows of each."""
    offsets: torch.Tensor | None
    """[local experts + 1] int32, `contiguous` only: where each group starts, padding included."""
    topk_ids: torch.Tensor | None
    """int32, `rows` and `by_rank` only: local expert, -1 where the expert is not here."""
    topk_weights: torch.Tensor | None
    """float32; None where dispatch was called without weights."""
    source: torch.Tensor
    """[..., 2] int32: rank and token of each row; -1 where there is none."""
    routing: Routing
    num_rows: int
    """Rows that came: of all ranks, or in the `contiguous` layout with padding."""
    lost: torch.Tensor | None = None
    """[tokens, top_k] bool, of this rank's own tokens: True where the expert is at a masked rank, so that its share is
    missing in what combine gives. None where every rank takes part."""
    lost_ranks: tuple[int, ...] = ()
    """The ranks that were masked when the step began."""
    counts_host: HostCounts | None = None
    """counts and num_rows as the host sees them, without waiting for a stream; None where nobody has asked
    (`mirror_counts=True`)."""

    @property
    def layout(self) -> Layout:
        return self.routing.layout

    @property
    def lane(self) -> int:
        return self.routing.lane


class Routing:
    """Where the rows of a dispatch came from and went: token, experts and weights of each. It outlives the memory that
    they came in, and serves a dispatch of other rows by the same routing, any number of combines, and backward in any
    order."""

    def __init__(self, native: Any, layout: Layout, lane: int, tokens: int, num_tokens: int) -> None:
        self._native = ffi.gc(native, lib.ept_routing_release)
        self.layout = layout
        """How the rows were unpacked; combine takes them so."""
        self.lane = lane
        self.tokens = tokens
        """Rows of the x that was dispatched here."""
        self.num_tokens = num_tokens
        """How many of those were sent."""

    def lost_ranks(self, world_size: int) -> tuple[int, ...]:
        """The ranks that were masked when the step began."""
        ranks = ffi.new("uint8_t[]", world_size)
        lib.ept_routing_lost(self._native, ffi.NULL, ranks, ffi.NULL)
        return tuple(rank for rank in range(world_size) if ranks[rank])

    def lost(self, top_k: int) -> torch.Tensor:
        """[tokens, top_k] bool: True where the expert was at one of those."""
        import torch

        lost = torch.zeros(self.tokens, top_k, dtype=torch.uint8, device="cpu")
        lib.ept_routing_lost(self._native, ffi.NULL, ffi.NULL, ffi.cast("uint8_t *", lost.data_ptr()))
        return lost.bool()


def routing_of(got: Dispatched | Routing) -> Routing:
    """What combine goes by, of either that it takes."""
    if isinstance(got, Dispatched):
        return got.routing
    if isinstance(got, Routing):
        return got
    raise InvalidArgument(f"got is a {type(got).__name__}, must be what dispatch gave, or its routing")
