"""Checks of the tensors that a caller brings to dispatch and combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eptransport._call import whole
from eptransport._convert import check, refuse_grad
from eptransport._outputs import check_out
from eptransport.dispatched import Layout, Routing
from eptransport.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

    from eptransport._calls import CombineCall, DispatchCall
    from eptransport._shapes import Shapes

__all__ = ["Asked", "check_combine", "check_dispatch", "check_y"]

_NAMES_OF_IDS = ("int32", "int64")
_NAMES_OF_WEIGHTS = ("float32",)
_NAMES_OF_OUT = ("float32", "float16", "bfloat16")
_NAMES_OF_SCALES = ("float32", "float16", "bfloat16", "float8_e8m0fnu", "float8_e4m3fn", "uint8")


@dataclass(frozen=True)
class Asked:
    """What a dispatch asks for, checked."""

    tokens: int
    """Rows of x."""
    count: int
    """How many of them are sent."""
    layout: Layout


def check_dispatch(shapes: Shapes, default: Layout, given: DispatchCall) -> Asked:
    """The arguments of `dispatch_send`, on whatever device. `default`: the layout where none is asked for."""
    refuse_grad(x=given.x, topk_weights=given.topk_weights)
    chosen = check_out(shapes, given.unpacking.layout, default, given.unpacking.out)
    tokens, count = _check_x(shapes, given.x, given.scales, given.num_tokens)
    _check_topk(shapes, tokens, given.topk_ids, given.topk_weights, given.routing)
    return Asked(tokens, count, chosen)


def _check_x(shapes: Shapes, x: Any, scales: Any, num_tokens: int | None) -> tuple[int, int]:
    """Tokens in x, and how many of them are sent."""
    types = shapes.types
    quantised = getattr(x, "dtype", None) == types.dispatch and types.dispatch != types.dtype
    columns = shapes.payload_columns if quantised else shapes.hidden
    check("x", x, (None, columns), types.accepted(), rows_aligned=True, device=shapes.device)
    tokens = int(x.shape[0])
    if tokens > shapes.max_tokens:
        raise InvalidArgument(
            f"x has {tokens} tokens; this AllToAll was made for at most max_tokens={shapes.max_tokens}"
        )
    if scales is not None:
        if not quantised:
            raise InvalidArgument(
                f"scales came with an x of {x.dtype}, which isn't quantised ({types.dispatch} would be)"
            )
        check("scales", scales, (tokens, None), _dtypes(_NAMES_OF_SCALES), device=shapes.device)
    count = tokens if num_tokens is None else whole("num_tokens", num_tokens)
    if not 0 <= count <= tokens:
        raise InvalidArgument(f"num_tokens={count}: x has {tokens}")
    return tokens, count


def _check_topk(shapes: Shapes, tokens: int, topk_ids: Any, topk_weights: Any, routing: Routing | None) -> None:
    """What says where the tokens go."""
    if (topk_ids is None) == (routing is None):
        raise InvalidArgument("dispatch needs topk_ids or routing, one of the two")
    if routing is not None and not isinstance(routing, Routing):
        raise InvalidArgument(f"routing is a {type(routing).__name__}, must be the routing of a dispatch")
    for name, tensor, names in (
        ("topk_ids", topk_ids, _NAMES_OF_IDS),
        ("topk_weights", topk_weights, _NAMES_OF_WEIGHTS),
    ):
        if tensor is not None:
            check(name, tensor, (tokens, shapes.top_k), _dtypes(names), device=shapes.device)


def check_combine(shapes: Shapes, routing: Routing, given: CombineCall) -> None:
    """What is summed, and by which weights."""
    expert_out = given.expert_out
    refuse_grad(expert_out=expert_out, topk_weights=given.topk_weights, row_weights=given.row_weights)
    wanted = shapes.of(routing.layout, None, shapes.hidden)
    check("expert_out", expert_out, wanted, _dtypes(_NAMES_OF_OUT), rows_aligned=True, device=shapes.device)
    if given.row_weights is not None:
        if routing.layout not in ("rows", "by_rank"):
            raise InvalidArgument(f"row_weights need the layout rows or by_rank, not {routing.layout}")
        beside = (*expert_out.shape[:-1], shapes.top_k)
        check("row_weights", given.row_weights, beside, _dtypes(_NAMES_OF_WEIGHTS), device=shapes.device)
    if given.topk_weights is not None:
        own = (routing.tokens, shapes.top_k)
        check("topk_weights", given.topk_weights, own, _dtypes(_NAMES_OF_WEIGHTS), device=shapes.device)


def check_y(shapes: Shapes, tokens: int, out: Any) -> None:
    """Where combine is to put the sums."""
    check("out", out, (tokens, shapes.hidden), _dtypes(_NAMES_OF_OUT), rows_aligned=True, device=shapes.device)


def _dtypes(names: Sequence[str]) -> tuple[torch.dtype, ...]:
    import torch

    return tuple(getattr(torch, name) for name in names if hasattr(torch, name))
