"""Tensors that a dispatch is unpacked into: the caller's, which are checked, or new ones."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from eptransport._call import sized
from eptransport._convert import check, dtype_of, fill
from eptransport._moe_config import one_of
from eptransport._shapes import LAYOUTS, Shapes
from eptransport.dispatched import Dispatched, Layout
from eptransport.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

__all__ = ["Outputs", "check_out", "make_outputs"]

SCALE_ALIGNMENT = 16
"""Bytes: columns of scales in the column layout start so aligned."""


@dataclass(frozen=True)
class Outputs:
    """Fields as those of Dispatched."""

    x: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    offsets: torch.Tensor | None
    topk_ids: torch.Tensor | None
    topk_weights: torch.Tensor | None
    source: torch.Tensor

    def native(self, layout: Layout) -> Any:
        outputs = sized("ept_dispatch_outputs")
        outputs.layout = LAYOUTS[layout]
        for each in fields(self):
            fill(getattr(outputs, each.name), getattr(self, each.name))
        return outputs


def check_out(shapes: Shapes, layout: Layout | None, default: Layout, out: torch.Tensor | Dispatched | None) -> Layout:
    """The layout that is unpacked as, which `out` must fit."""
    if layout is not None:
        one_of("layout", layout, LAYOUTS)
    if isinstance(out, Dispatched):
        if layout is not None and layout != out.layout:
            raise InvalidArgument(f"layout={layout!r}, but out was unpacked as {out.layout!r}")
        return out.layout
    chosen = layout or default
    if out is not None:
        check(
            "out",
            out,
            shapes.of(chosen, None, shapes.payload_columns),
            (shapes.types.dispatch,),
            rows_aligned=True,
            device=shapes.device,
        )
    return chosen


def make_outputs(
    shapes: Shapes, layout: Layout, arrival: Any, exact: bool, bound: int | None, out: torch.Tensor | Dispatched | None
) -> Outputs:
    """Tensors to unpack into: the caller's, else new ones."""
    import torch

    given = out if isinstance(out, Dispatched) else None
    payload = dtype_of(arrival.payload_format)
    x = given.x if given is not None else out
    if x is None:
        needed = {
            "rows": arrival.rows,
            "by_rank": arrival.max_rank_rows,
            "contiguous": arrival.contiguous_rows,
            "masked": arrival.max_expert_rows,
        }[layout]
        room = shapes.room(layout, bound)
        if exact:
            limit = shapes.limit(bound)
            room = needed if limit is None else min(needed, limit)
        x = torch.empty(shapes.of(layout, room, shapes.payload_columns), dtype=payload, device=shapes.place)
    lead = tuple(x.shape[:-1])  # type: ignore[union-attr]

    def pick(old: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if old is not None and tuple(old.shape) == shape and old.dtype == dtype:
            return old
        return torch.empty(shape, dtype=dtype, device=shapes.place)

    experts = shapes.local_experts
    by_token = layout in ("rows", "by_rank")
    one = (*lead, shapes.top_k) if by_token else lead
    return Outputs(
        x=x,  # type: ignore[arg-type]
        scales=_scales(shapes, lead, arrival, given.scales if given is not None else None),
        counts=pick(given.counts if given else None, (experts,), torch.int32),
        offsets=pick(given.offsets if given else None, (experts + 1,), torch.int32) if layout == "contiguous" else None,
        topk_ids=pick(given.topk_ids if given else None, one, torch.int32) if by_token else None,
        topk_weights=pick(given.topk_weights if given else None, one, torch.float32) if arrival.has_weights else None,
        source=pick(given.source if given else None, (*lead, 2), torch.int32),
    )


def _scales(shapes: Shapes, lead: tuple[int, ...], arrival: Any, old: torch.Tensor | None) -> torch.Tensor | None:
    if not arrival.scale_bytes:
        return None
    import torch

    dtype = dtype_of(arrival.scale_format)
    count = arrival.scale_bytes // dtype.itemsize
    if old is not None and tuple(old.shape) == (*lead, count) and old.dtype == dtype:
        return old
    if shapes.scale_layout == "row":
        return torch.empty(*lead, count, dtype=dtype, device=shapes.place)
    step = SCALE_ALIGNMENT // dtype.itemsize
    rows = -(-lead[-1] // step) * step
    return torch.empty(*lead[:-1], count, rows, dtype=dtype, device=shapes.place)[..., : lead[-1]].transpose(-1, -2)
