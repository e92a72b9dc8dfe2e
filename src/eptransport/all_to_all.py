"""Dispatch and combine: tokens to the ranks that hold their experts, and the weighted results back.

    moe = AllToAll(group, num_experts=256, top_k=8, hidden=7168, max_tokens=128)
    got = moe.dispatch(x, topk_ids, topk_weights)       # got.x: the rows of the experts here
    y = moe.combine(experts(got.x, got.counts), got)    # the weighted sum of each token's experts

A lane carries one micro-batch at a time: every rank makes the same sequence of calls in a lane. Halves
(`dispatch_send`, `dispatch_recv`, ...) let the work of one lane go on between those of another.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from eptransport._call import call, ffi, lib, new_error, size, sized, text, timeout_ns
from eptransport._convert import check, code_of, dtype_of, fill, refuse_grad
from eptransport._guard import Guard
from eptransport.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

    from eptransport._trace import Trace
    from eptransport.group import Group

__all__ = ["AllToAll", "Dispatched", "Layout", "Plan", "Routing", "Stats"]

logger = logging.getLogger("eptransport")

Layout = Literal["rows", "by_rank", "contiguous", "masked"]

_LAYOUTS = {
    "rows": lib.EPT_LAYOUT_ROWS,
    "by_rank": lib.EPT_LAYOUT_BY_RANK,
    "contiguous": lib.EPT_LAYOUT_CONTIGUOUS,
    "masked": lib.EPT_LAYOUT_MASKED,
}
_SCALE_FORMATS = {"fp32": lib.EPT_SCALES_FP32, "ue8m0": lib.EPT_SCALES_UE8M0}
_SCALE_LAYOUTS = ("row", "column")
_NAMES_OF_IDS = ("int32", "int64")
_NAMES_OF_OUT = ("float32", "float16", "bfloat16")
_NAMES_OF_SCALES = ("float32", "float16", "bfloat16", "float8_e8m0fnu", "float8_e4m3fn", "uint8")

SCALE_ALIGNMENT = 16
"""Bytes: columns of scales in the column layout start so aligned."""


@dataclass(frozen=True)
class Plan:
    """Bytes that an AllToAll takes, to the byte what is allocated; nothing is allocated to tell it.

    A slot has four halves; a lane has two slots, padded to pages; the arena has all lanes. All AllToAlls of a group
    share one arena, as large as the largest needs. `device_bytes`, `pinned_bytes` and `host_bytes` split `arena_bytes`
    by kind. `str(plan)` shows all of it with the formula.
    """

    world: int
    top_k: int
    max_tokens: int
    lanes: int
    local_experts: int
    max_local_experts: int
    """The most of any rank."""
    chunk_tokens: int
    """A call of at most so many tokens fits its region and has real halves; a longer one is streamed."""
    dispatch_row: int
    combine_row: int
    dispatch_header: int
    combine_header: int
    dispatch_recv: int
    """Of one slot, as the three below."""
    dispatch_send: int
    combine_recv: int
    combine_send: int
    lane_bytes: int
    arena_bytes: int
    device_bytes: int
    pinned_bytes: int
    host_bytes: int
    max_rows: int
    """The most rows that one dispatch can bring."""
    max_contiguous_rows: int
    """The same in the contiguous layout, padding included."""

    @property
    def formula(self) -> str:
        """How the bytes of a slot come about."""
        tokens = min(self.chunk_tokens, self.max_tokens)
        return (
            f"a slot, with W = {self.world} ranks, T = {tokens} tokens, K = {self.top_k} experts a token, rows of "
            f"d = {self.dispatch_row} and c = {self.combine_row} bytes, and headers of {self.dispatch_header} and "
            f"{self.combine_header} bytes a peer: "
            "dispatch receive W T d, dispatch send T min(K, W) d, combine send W T c, combine receive T min(K, W) c"
        )

    def __str__(self) -> str:
        rows = [
            ("dispatch receive, a slot", self.dispatch_recv),
            ("dispatch send, a slot", self.dispatch_send),
            ("combine receive, a slot", self.combine_recv),
            ("combine send, a slot", self.combine_send),
            ("a lane: two slots, padded to pages", self.lane_bytes),
            (f"the arena: {self.lanes} lanes", self.arena_bytes),
            ("  device", self.device_bytes),
            ("  pinned", self.pinned_bytes),
            ("  host", self.host_bytes),
        ]
        return "\n".join([self.formula, *(f"{name:<36}{count:>16,} bytes" for name, count in rows)])


@dataclass(frozen=True)
class Stats:
    """What an AllToAll has done so far. Pairs are (dispatch, combine)."""

    generations: tuple[int, int]
    messages: tuple[int, int]
    """Writes to other ranks."""
    bytes: tuple[int, int]
    rows: tuple[int, int]
    grants: int
    acks: int
    ack_waits: int
    """Sends that had to wait for a free slot."""


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

    @property
    def layout(self) -> Layout:
        return self.routing.layout

    @property
    def lane(self) -> int:
        return self.routing.lane


class AllToAll:
    """Dispatch and combine for the layers of one shape, over a group.

    Collective: every rank makes the same ones in the same order, with the same arguments but `layout`, `max_rows`,
    `scale_layout` and `threads`; MismatchError names what differs, on every rank. Blocks; all memory is allocated
    here, or shared with the other AllToAlls of the group.

    num_experts     physical experts of all ranks
    top_k           experts a token, 1 to 32
    hidden          elements of a token; a row must be a multiple of 16 bytes
    max_tokens      the largest batch of one call on one rank
    dtype           of x and y: float32, float16, bfloat16 (the default)
    dispatch_dtype  on the wire: `dtype` (the default), float8_e4m3fn (quantised inside dispatch, blocks of 128), or a
                    format that the caller quantises to: float8_e5m2, int8, uint8, float4_e2m1fn_x2
    combine_dtype   of the rows that come back: float32, float16, bfloat16; `dtype` if not given
    layout          how dispatch unpacks unless the call says otherwise; see Dispatched
    alignment       in the contiguous layout each expert's group is padded to it
    lanes           micro-batches that may be under way at once
    buffer_bytes    budget of a lane's registered memory; longer batches are streamed through it; None: none is
    max_rows        most rows that a call unpacks: of all ranks (rows, contiguous), of one rank (by_rank), of one
                    expert (masked). None: the worst case, which `str(moe)` tells; masked: that of tokens whose ids
                    differ
    placement       [num_experts] the rank of each expert; None: blocks in rank order, the first ones hold one more
    scale_format    of our own quantisation: fp32 or ue8m0
    scale_layout    of got.scales: row ([n, blocks] contiguous) or column (strides (1, n), 16-byte aligned columns)
    scale_epsilon   scale = max(amax, scale_epsilon) / 448
    caller_scale_bytes  most bytes of scales a row that the caller brings with an x that is quantised already; 0: as
                    our own take
    threads         of this object; None: those of the settings, else the cores of this rank

    A context manager. Errors of the arguments raise before anything is sent, and the group goes on. A call that met an
    expired deadline, a lost peer or a full output leaves its lane faulted: LaneFault from then on, until `reset`.
    """

    def __init__(
        self,
        group: Group,
        *,
        num_experts: int,
        top_k: int,
        hidden: int,
        max_tokens: int,
        dtype: torch.dtype | None = None,
        dispatch_dtype: torch.dtype | None = None,
        combine_dtype: torch.dtype | None = None,
        layout: Layout = "contiguous",
        alignment: int = 1,
        lanes: int = 2,
        buffer_bytes: int | None = None,
        max_rows: int | None = None,
        placement: Sequence[int] | None = None,
        scale_format: Literal["fp32", "ue8m0"] = "fp32",
        scale_layout: Literal["row", "column"] = "row",
        scale_epsilon: float = 1e-4,
        caller_scale_bytes: int = 0,
        threads: int | None = None,
    ) -> None:
        _one_of("layout", layout, _LAYOUTS)
        _one_of("scale_layout", scale_layout, _SCALE_LAYOUTS)
        config, keep, self._types = _config(
            world=group.world_size,
            rank=group.rank,
            num_experts=num_experts,
            top_k=top_k,
            hidden=hidden,
            max_tokens=max_tokens,
            dtype=dtype,
            dispatch_dtype=dispatch_dtype,
            combine_dtype=combine_dtype,
            alignment=alignment,
            lanes=lanes,
            buffer_bytes=buffer_bytes,
            placement=placement,
            scale_format=scale_format,
            scale_epsilon=scale_epsilon,
            caller_scale_bytes=caller_scale_bytes,
            threads=threads or group.threads,
        )
        self.group = group
        self.num_experts = num_experts
        self.top_k = top_k
        self.hidden = hidden
        self.max_tokens = max_tokens
        self.lanes = lanes
        self.layout: Layout = layout
        self.max_rows = None if max_rows is None else size("max_rows", max_rows)
        self.scale_layout = scale_layout
        self._native = _create(group, config)
        del keep
        self._finalizer = weakref.finalize(self, self._native.close)
        self.plan_ = _plan(config)
        """The plan of this object."""
        self.local_experts = self._find_local_experts(placement)
        """The global ids of the experts here: a range, or a tuple if `placement` was given."""
        self._lanes = [_Lane() for _ in range(lanes)]
        self._trace: Trace | None = group.trace
        self._announce()

    @staticmethod
    def plan(
        *,
        world: int,
        num_experts: int,
        top_k: int,
        hidden: int,
        max_tokens: int,
        rank: int = 0,
        dtype: torch.dtype | None = None,
        dispatch_dtype: torch.dtype | None = None,
        combine_dtype: torch.dtype | None = None,
        alignment: int = 1,
        lanes: int = 2,
        buffer_bytes: int | None = None,
        placement: Sequence[int] | None = None,
        scale_format: Literal["fp32", "ue8m0"] = "fp32",
        caller_scale_bytes: int = 0,
        **layouts: Any,
    ) -> Plan:
        """The bytes that an AllToAll of these arguments would take on `rank` of `world`. Allocates and connects
        nothing. Arguments that cost no memory on the wire (`layout`, `max_rows`, `scale_layout`, ...) are taken and
        have no effect."""
        unknown = sorted(layouts.keys() - _FREE_OF_BYTES)
        if unknown:
            raise InvalidArgument(f"plan has no argument {', '.join(unknown)}")
        config, keep, _ = _config(
            world=world,
            rank=rank,
            num_experts=num_experts,
            top_k=top_k,
            hidden=hidden,
            max_tokens=max_tokens,
            dtype=dtype,
            dispatch_dtype=dispatch_dtype,
            combine_dtype=combine_dtype,
            alignment=alignment,
            lanes=lanes,
            buffer_bytes=buffer_bytes,
            placement=placement,
            scale_format=scale_format,
            scale_epsilon=1e-4,
            caller_scale_bytes=caller_scale_bytes,
            threads=1,
        )
        found = _plan(config)
        del keep
        return found

    # -- whole steps --

    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        scales: torch.Tensor | None = None,
        routing: Routing | None = None,
        layout: Layout | None = None,
        num_tokens: int | None = None,
        host_counts: bool = False,
        max_rows: int | None = None,
        lane: int = 0,
        out: torch.Tensor | Dispatched | None = None,
    ) -> Dispatched:
        """Sends each token to the ranks of its experts, once a rank, and brings the rows of the experts here.

        Collective in its lane; blocks until the rows of all ranks are here. Any rank may bring zero tokens.

        x             [tokens, hidden] `dtype`, or `dispatch_dtype` if quantised already; unit inner stride, rows
                      16-byte aligned
        topk_ids      [tokens, top_k] int32 or int64: global experts, -1 for none; absent with `routing`
        topk_weights  [tokens, top_k] float32; without them they are 1, or come with combine
        scales        [tokens, any] the caller's, with an x that is quantised
        routing       of an earlier dispatch: x goes the same way; its tokens must be as many
        layout        how this rank unpacks; ranks may differ
        num_tokens    only the first so many rows of x are sent
        host_counts   outputs have exactly the size that is needed
        max_rows      bound of this call's outputs; see AllToAll
        out           where x goes, or everything: a tensor, or what an earlier dispatch gave

        InvalidArgument, UnsupportedError, CapacityError (more rows than fit: none is dropped or written outside),
        Timeout, PeerLost, MismatchError (ranks call different objects), LaneFault.
        """
        with self._span("dispatch", lane):
            self._dispatch_send(
                x, topk_ids, topk_weights, scales, routing, layout, num_tokens, host_counts, max_rows, lane, out, True
            )
            return self._dispatch_recv(lane, None, None, None, None)

    @overload
    def combine(
        self,
        expert_out: torch.Tensor,
        got: Dispatched | Routing,
        *,
        topk_weights: torch.Tensor | None = ...,
        weights_applied: bool = ...,
        row_weights: None = ...,
        out: torch.Tensor | None = ...,
        lane: int | None = ...,
    ) -> torch.Tensor: ...

    @overload
    def combine(
        self,
        expert_out: torch.Tensor,
        got: Dispatched | Routing,
        *,
        topk_weights: torch.Tensor | None = ...,
        weights_applied: bool = ...,
        row_weights: torch.Tensor,
        out: torch.Tensor | None = ...,
        lane: int | None = ...,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def combine(
        self,
        expert_out: torch.Tensor,
        got: Dispatched | Routing,
        *,
        topk_weights: torch.Tensor | None = None,
        weights_applied: bool = False,
        row_weights: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lane: int | None = None,
    ) -> Any:
        """Sends the experts' outputs back, summed over the experts of a rank before and over ranks after: y [tokens,
        hidden], of `dtype` or as `out`; rows behind `num_tokens` are zero. Bitwise the same on every run.

        Collective in its lane (`lane`, or that of `got`); blocks. A dispatch may have none, one or several combines.

        expert_out       shaped as got.x with `hidden` last; float32, float16 or bfloat16; unit inner stride, rows
                         16-byte aligned. `contiguous` and `masked`: a row an expert, which combine weighs. `rows` and
                         `by_rank`: a row a token, weighed and summed over the experts here already
        topk_weights     [tokens, top_k] float32, of this rank's own tokens: win over those of dispatch
        weights_applied  `contiguous`, `masked`: rows are weighed already; add only
        row_weights      `rows`, `by_rank`: [..., top_k] float32 that are summed beside; then (y, sums [tokens, top_k])
                         is returned. All ranks give them or none does

        Errors as dispatch.
        """
        where = _routing(got).lane if lane is None else lane
        with self._span("combine", where):
            self._combine_send(expert_out, got, topk_weights, weights_applied, row_weights, where, True)
            return self._combine_recv(where, out)

    # -- halves --

    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        scales: torch.Tensor | None = None,
        routing: Routing | None = None,
        layout: Layout | None = None,
        num_tokens: int | None = None,
        host_counts: bool = False,
        max_rows: int | None = None,
        lane: int = 0,
        out: torch.Tensor | Dispatched | None = None,
    ) -> None:
        """The first half of `dispatch`: packs and posts. x may be reused when it returns. Waits only for a slot that
        peers still read. At most `plan_.chunk_tokens` tokens; a longer batch has no halves. Collective in its lane."""
        with self._span("dispatch_send", lane):
            self._dispatch_send(
                x, topk_ids, topk_weights, scales, routing, layout, num_tokens, host_counts, max_rows, lane, out, False
            )

    def dispatch_recv(
        self,
        *,
        lane: int = 0,
        layout: Layout | None = None,
        host_counts: bool | None = None,
        max_rows: int | None = None,
        out: torch.Tensor | Dispatched | None = None,
    ) -> Dispatched:
        """The second half: blocks until the rows of all ranks are here, and unpacks them. What isn't given is as
        `dispatch_send` was told. Collective in its lane."""
        with self._span("dispatch_recv", lane):
            return self._dispatch_recv(lane, layout, host_counts, max_rows, out)

    def combine_send(
        self,
        expert_out: torch.Tensor,
        got: Dispatched | Routing,
        *,
        topk_weights: torch.Tensor | None = None,
        weights_applied: bool = False,
        row_weights: torch.Tensor | None = None,
        lane: int | None = None,
    ) -> None:
        """The first half of `combine`: sums and posts. expert_out may be reused when it returns. Collective in its
        lane."""
        where = _routing(got).lane if lane is None else lane
        with self._span("combine_send", where):
            self._combine_send(expert_out, got, topk_weights, weights_applied, row_weights, where, False)

    def combine_recv(
        self, got: Dispatched | Routing | None = None, *, out: torch.Tensor | None = None, lane: int | None = None
    ) -> Any:
        """The second half: blocks until the sums of all ranks are here; returns what `combine` does. Collective in its
        lane, which is `lane`, else that of `got`, else 0."""
        where = lane if lane is not None else 0 if got is None else _routing(got).lane
        with self._span("combine_recv", where):
            return self._combine_recv(where, out)

    # -- state --

    def check(self, lane: int | None = None) -> None:
        """Raises LaneFault, with its first cause, if the lane (None: any) is faulted. Not collective, doesn't block."""
        for number in range(self.lanes) if lane is None else (self._lane_number(lane),):
            self._call(lib.ept_moe_check, number)

    def reset(self, timeout: float | None = None) -> None:
        """Brings every lane of the group to a common, empty state; faults are gone, steps under way are abandoned.
        Collective over the ranks that are up, and for all AllToAlls of the group at once; blocks."""
        self._call(lib.ept_moe_reset, timeout_ns(timeout))
        for lane in self._lanes:
            lane.clear()
        self.group.fault.zero_()

    def stats(self) -> Stats:
        """What it has done so far. Not collective, doesn't block."""
        stats = sized("ept_moe_stats")
        self._native.guard.enter()
        try:
            lib.ept_moe_stats_get(self._native.pointer, stats)
        finally:
            self._native.guard.leave()
        pairs = {name: tuple(getattr(stats, name)) for name in ("generations", "messages", "bytes", "rows")}
        return Stats(**pairs, grants=stats.grants, acks=stats.acks, ack_waits=stats.ack_waits)

    def close(self) -> None:
        """Gives it back; the arena stays the group's. Not collective; closing twice is fine. `group.close` does it
        too."""
        self._finalizer()

    def __enter__(self) -> AllToAll:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<AllToAll of {self.num_experts} experts, top-{self.top_k}, hidden {self.hidden}, on {self.group!r}>"

    def __str__(self) -> str:
        rooms = ", ".join(f"{layout} {self._most(layout, None):,}" for layout in _LAYOUTS)
        return f"{self!r}\n{self.plan_}\nrows that outputs have room for: {rooms}"

    # -- how it is done --

    def _dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        routing: Routing | None,
        layout: Layout | None,
        num_tokens: int | None,
        host_counts: bool,
        max_rows: int | None,
        lane: int,
        out: torch.Tensor | Dispatched | None,
        whole: bool,
    ) -> None:
        refuse_grad(x=x, topk_weights=topk_weights)
        state = self._lanes[self._lane_number(lane)]
        chosen = self._check_outputs(layout, out)
        tokens, count = self._check_x(x, scales, num_tokens)
        if (topk_ids is None) == (routing is None):
            raise InvalidArgument("dispatch needs topk_ids or routing, one of the two")
        for name, tensor, names in (
            ("topk_ids", topk_ids, _NAMES_OF_IDS),
            ("topk_weights", topk_weights, ("float32",)),
        ):
            if tensor is not None:
                check(name, tensor, (tokens, self.top_k), _dtypes(names))
        arguments = sized("ept_dispatch_args")
        arguments.lane, arguments.whole = lane, whole
        fill(arguments.x, x[:count])
        fill(arguments.topk_ids, None if topk_ids is None else topk_ids[:count])
        fill(arguments.topk_weights, None if topk_weights is None else topk_weights[:count])
        fill(arguments.scales, None if scales is None else scales[:count])
        if routing is not None:
            arguments.routing = routing._native
        self._call(lib.ept_moe_dispatch_send, arguments, lane=lane)
        state.sent = _Sent(tokens, count, chosen, host_counts, max_rows, out, (x, scales) if whole else None)

    def _dispatch_recv(
        self,
        lane: int,
        layout: Layout | None,
        host_counts: bool | None,
        max_rows: int | None,
        out: torch.Tensor | Dispatched | None,
    ) -> Dispatched:
        state = self._lanes[self._lane_number(lane)]
        sent = state.sent
        if sent is None:
            raise InvalidArgument(f"dispatch_recv on lane {lane}, where no dispatch_send is to be received")
        where = sent.out if out is None else out
        chosen = sent.layout if layout is None else self._check_outputs(layout, where)
        arrival = sized("ept_arrival")
        self._call(lib.ept_moe_dispatch_wait, lane, arrival, lane=lane)
        exact = sent.host_counts if host_counts is None else host_counts
        bound = max_rows if max_rows is not None else sent.max_rows
        outputs = self._outputs(chosen, arrival, exact, bound, where)
        native = outputs.native(_LAYOUTS[chosen])
        handle = ffi.new("ept_routing **")
        self._call(lib.ept_moe_dispatch_recv, lane, native, handle, lane=lane)
        state.sent = None
        routing = Routing(handle[0], chosen, lane, sent.tokens, sent.count)
        rows = arrival.contiguous_rows if chosen == "contiguous" else arrival.rows
        return Dispatched(**outputs.__dict__, routing=routing, num_rows=rows)

    def _combine_send(
        self,
        expert_out: torch.Tensor,
        got: Dispatched | Routing,
        topk_weights: torch.Tensor | None,
        weights_applied: bool,
        row_weights: torch.Tensor | None,
        lane: int,
        whole: bool,
    ) -> None:
        refuse_grad(expert_out=expert_out, topk_weights=topk_weights, row_weights=row_weights)
        state = self._lanes[self._lane_number(lane)]
        routing = _routing(got)
        check(
            "expert_out",
            expert_out,
            self._shape(routing.layout, None, self.hidden),
            _dtypes(_NAMES_OF_OUT),
            rows_aligned=True,
        )
        if row_weights is not None:
            if routing.layout not in ("rows", "by_rank"):
                raise InvalidArgument(f"row_weights need the layout rows or by_rank, not {routing.layout}")
            check("row_weights", row_weights, (*expert_out.shape[:-1], self.top_k), _dtypes(("float32",)))
        if topk_weights is not None:
            check("topk_weights", topk_weights, (routing.tokens, self.top_k), _dtypes(("float32",)))
            topk_weights = topk_weights[: routing.num_tokens]
        arguments = sized("ept_combine_args")
        arguments.lane, arguments.routing, arguments.layout = lane, routing._native, _LAYOUTS[routing.layout]
        arguments.weights_applied, arguments.whole = weights_applied, whole
        fill(arguments.expert_out, expert_out)
        fill(arguments.topk_weights, topk_weights)
        fill(arguments.row_weights, row_weights)
        self._call(lib.ept_moe_combine_send, arguments, lane=lane)
        keep = (expert_out, row_weights) if whole else None
        state.summed = _Summed(routing.tokens, routing.num_tokens, row_weights is not None, keep)

    def _combine_recv(self, lane: int, out: torch.Tensor | None) -> Any:
        import torch

        state = self._lanes[self._lane_number(lane)]
        summed = state.summed
        if summed is None:
            raise InvalidArgument(f"combine_recv on lane {lane}, where no combine_send is to be received")
        if out is None:
            y = torch.empty(summed.tokens, self.hidden, dtype=self._types.dtype)
        else:
            check("out", out, (summed.tokens, self.hidden), _dtypes(_NAMES_OF_OUT), rows_aligned=True)
            y = out
        weights = torch.empty(summed.tokens, self.top_k, dtype=torch.float32) if summed.row_weights else None
        native_y, native_weights = ffi.new("ept_tensor *"), ffi.new("ept_tensor *")
        fill(native_y, y[: summed.count])
        fill(native_weights, None if weights is None else weights[: summed.count])
        self._call(lib.ept_moe_combine_recv, lane, native_y, native_weights, lane=lane)
        state.summed = None
        for tensor in (y, weights):
            if tensor is not None and summed.count < summed.tokens:
                tensor[summed.count :].zero_()
        return y if weights is None else (y, weights)

    # -- arguments --

    def _check_x(self, x: Any, scales: Any, num_tokens: int | None) -> tuple[int, int]:
        """Tokens in x, and how many of them are sent."""
        types = self._types
        quantised = getattr(x, "dtype", None) == types.dispatch and types.dispatch != types.dtype
        columns = types.payload_columns(self.hidden) if quantised else self.hidden
        check("x", x, (None, columns), types.accepted(), rows_aligned=True)
        tokens = int(x.shape[0])
        if tokens > self.max_tokens:
            raise InvalidArgument(
                f"x has {tokens} tokens; this AllToAll was made for at most max_tokens={self.max_tokens}"
            )
        if scales is not None:
            if not quantised:
                raise InvalidArgument(
                    f"scales came with an x of {x.dtype}, which isn't quantised ({types.dispatch} would be)"
                )
            check("scales", scales, (tokens, None), _dtypes(_NAMES_OF_SCALES))
        count = tokens if num_tokens is None else int(num_tokens)
        if not 0 <= count <= tokens:
            raise InvalidArgument(f"num_tokens={count}: x has {tokens}")
        return tokens, count

    def _check_outputs(self, layout: Layout | None, out: torch.Tensor | Dispatched | None) -> Layout:
        if layout is not None:
            _one_of("layout", layout, _LAYOUTS)
        if isinstance(out, Dispatched):
            if layout is not None and layout != out.layout:
                raise InvalidArgument(f"layout={layout!r}, but out was unpacked as {out.layout!r}")
            return out.layout
        chosen = layout or self.layout
        if out is not None:
            columns = self._types.payload_columns(self.hidden)
            check("out", out, self._shape(chosen, None, columns), (self._types.dispatch,), rows_aligned=True)
        return chosen

    def _outputs(
        self, layout: Layout, arrival: Any, exact: bool, bound: int | None, out: torch.Tensor | Dispatched | None
    ) -> _Outputs:
        """Tensors to unpack into: the caller's, else new ones."""
        import torch

        given = out if isinstance(out, Dispatched) else None
        payload = dtype_of(arrival.payload_format)
        columns = self._types.payload_columns(self.hidden)
        x = given.x if given is not None else out
        if x is None:
            needed = {
                "rows": arrival.rows,
                "by_rank": arrival.max_rank_rows,
                "contiguous": arrival.contiguous_rows,
                "masked": arrival.max_expert_rows,
            }[layout]
            room = self._most(layout, bound)
            if exact:
                limit = self._limit(bound)
                room = needed if limit is None else min(needed, limit)
            x = torch.empty(self._shape(layout, room, columns), dtype=payload)
        lead = tuple(x.shape[:-1])  # type: ignore[union-attr]

        def pick(old: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            if old is not None and tuple(old.shape) == shape and old.dtype == dtype:
                return old
            return torch.empty(shape, dtype=dtype)

        experts = len(self.local_experts)
        by_token = layout in ("rows", "by_rank")
        one = (*lead, self.top_k) if by_token else lead
        return _Outputs(
            x=x,  # type: ignore[arg-type]
            scales=self._scales(lead, arrival, given.scales if given is not None else None),
            counts=pick(given.counts if given else None, (experts,), torch.int32),
            offsets=pick(given.offsets if given else None, (experts + 1,), torch.int32)
            if layout == "contiguous"
            else None,
            topk_ids=pick(given.topk_ids if given else None, one, torch.int32) if by_token else None,
            topk_weights=pick(given.topk_weights if given else None, one, torch.float32)
            if arrival.has_weights
            else None,
            source=pick(given.source if given else None, (*lead, 2), torch.int32),
        )

    def _scales(self, lead: tuple[int, ...], arrival: Any, old: torch.Tensor | None) -> torch.Tensor | None:
        if not arrival.scale_bytes:
            return None
        import torch

        dtype = dtype_of(arrival.scale_format)
        count = arrival.scale_bytes // dtype.itemsize
        if old is not None and tuple(old.shape) == (*lead, count) and old.dtype == dtype:
            return old
        if self.scale_layout == "row":
            return torch.empty(*lead, count, dtype=dtype)
        step = SCALE_ALIGNMENT // dtype.itemsize
        rows = -(-lead[-1] // step) * step
        return torch.empty(*lead[:-1], count, rows, dtype=dtype)[..., : lead[-1]].transpose(-1, -2)

    def _shape(self, layout: Layout, rows: int | None, last: int) -> tuple[Any, ...]:
        if layout == "by_rank":
            return (self.group.world_size, rows, last)
        if layout == "masked":
            return (len(self.local_experts), rows, last)
        return (rows, last)

    def _most(self, layout: str, bound: int | None) -> int:
        """Rows that outputs have room for, where nobody counts first."""
        limit = self._limit(bound)
        if layout == "masked":
            # A token that names an expert twice has two rows there. That is too rare to make every expert's room
            # top_k times as large for; max_rows can, and a row too many is a CapacityError.
            return self.plan_.max_rows if limit is None else min(self.plan_.max_rows * self.top_k, limit)
        worst = {
            "rows": self.plan_.max_rows,
            "by_rank": self.max_tokens,
            "contiguous": self.plan_.max_contiguous_rows,
        }[layout]
        return worst if limit is None else min(worst, limit)

    def _limit(self, bound: int | None) -> int | None:
        """What the call or this object says that outputs may hold at most."""
        return self.max_rows if bound is None else size("max_rows", bound)

    def _lane_number(self, lane: int) -> int:
        if not 0 <= lane < self.lanes:
            raise InvalidArgument(f"lane={lane}: this AllToAll has lanes 0 to {self.lanes - 1}")
        return lane

    # -- calls --

    def _call(self, function: Callable[..., int], *args: Any, lane: int | None = None) -> None:
        native = self._native
        native.guard.enter()
        try:
            call(function, native.pointer, *args)
        except BaseException:  # also KeyboardInterrupt: the lane is faulted all the same
            self._note_fault(lane)
            raise
        finally:
            native.guard.leave()

    def _note_fault(self, lane: int | None) -> None:
        """A failed call may have faulted its lane: `group.fault` says so from then on."""
        self.group.engine.drain_log()
        if lane is None:
            return
        error = new_error()
        if lib.ept_moe_check(self._native.pointer, lane, error) < 0:
            self.group.fault.fill_(error.code or lib.EPT_E_FAULT)
            self._lanes[lane].clear()

    def _find_local_experts(self, placement: Sequence[int] | None) -> range | tuple[int, ...]:
        count = self.plan_.local_experts
        ids = ffi.new("int32_t[]", max(count, 1))
        lib.ept_moe_local_experts(self._native.pointer, ids)
        held = tuple(ids[index] for index in range(count))
        return held if placement is not None else range(held[0], held[0] + count) if held else range(0)

    def _span(self, name: str, lane: int) -> AbstractContextManager[None]:
        return _NOTHING if self._trace is None else self._trace.span(name, lane)

    def _announce(self) -> None:
        logger.info(
            "rank %d: AllToAll of %d experts, top-%d, hidden %d, %d tokens, %d lanes: arena of %d bytes, %d bytes "
            "registered; outputs have room for %s",
            self.group.rank,
            self.num_experts,
            self.top_k,
            self.hidden,
            self.max_tokens,
            self.lanes,
            self.plan_.arena_bytes,
            self.group.engine.info().registered_bytes,
            ", ".join(f"{layout} {self._most(layout, None)}" for layout in _LAYOUTS),
        )


# ---- what is remembered between halves -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sent:
    tokens: int
    count: int
    layout: Layout
    host_counts: bool
    max_rows: int | None
    out: torch.Tensor | Dispatched | None
    keep: Any
    """What native code may still read: a whole dispatch is packed while it is received."""


@dataclass(frozen=True)
class _Summed:
    tokens: int
    count: int
    row_weights: bool
    keep: Any


class _Lane:
    """What the second half must know of the first."""

    def __init__(self) -> None:
        self.sent: _Sent | None = None
        self.summed: _Summed | None = None

    def clear(self) -> None:
        self.sent = self.summed = None


@dataclass(frozen=True)
class _Outputs:
    x: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    offsets: torch.Tensor | None
    topk_ids: torch.Tensor | None
    topk_weights: torch.Tensor | None
    source: torch.Tensor

    def native(self, layout: int) -> Any:
        outputs = sized("ept_dispatch_outputs")
        outputs.layout = layout
        for each in fields(self):
            fill(getattr(outputs, each.name), getattr(self, each.name))
        return outputs


@dataclass(frozen=True)
class _Types:
    dtype: torch.dtype
    dispatch: torch.dtype
    combine: torch.dtype

    def payload_columns(self, hidden: int) -> int:
        """Elements of a row on the wire: two of 4 bits are one of torch's."""
        return hidden // 2 if "x2" in str(self.dispatch) else hidden

    def accepted(self) -> tuple[torch.dtype, ...]:
        """What x may be: we quantise to one format only."""
        import torch

        if self.dispatch in (self.dtype, torch.float8_e4m3fn):
            return tuple(dict.fromkeys((self.dtype, self.dispatch)))
        return (self.dispatch,)


# ---- native ----------------------------------------------------------------------------------------------------------


class _Native:
    """The `ept_moe`, and its place among the engine's children: closed before the arena, which is closed before the
    engine."""

    def __init__(self, pointer: Any, children: dict[int, Callable[[], None]], rank: int) -> None:
        self.pointer = pointer
        self.guard = Guard("this AllToAll")
        self._children = children
        self._rank = rank
        children[id(self)] = self.close

    def close(self) -> None:
        if self.guard.forked or not self.guard.shut():
            return
        if not self.guard.wait_idle(CLOSE_S):
            logger.error("rank %d: a thread is still inside an AllToAll, which is left open", self._rank)
            return
        self._children.pop(id(self), None)
        error = new_error()
        if lib.ept_moe_close(self.pointer, error) < 0:
            logger.warning("rank %d: closing an AllToAll: %s", self._rank, text(error.text))


CLOSE_S = 5.0

_FREE_OF_BYTES = frozenset({"layout", "max_rows", "scale_layout", "scale_epsilon", "threads"})
_NOTHING = contextlib.nullcontext()


def _create(group: Group, config: Any) -> _Native:
    engine = group.engine._native
    arena = group.arena()
    handle = ffi.new("ept_moe **")
    engine.guard.enter()
    try:
        call(lib.ept_moe_create, arena, config, handle)
    except Exception:
        engine.drain_log()
        raise
    finally:
        engine.guard.leave()
    return _Native(handle[0], engine.children, group.rank)


def _plan(config: Any) -> Plan:
    plan = sized("ept_moe_plan")
    call(lib.ept_moe_plan_get, config, plan)
    here = {"world", "top_k", "max_tokens", "lanes"}
    split = {"device_bytes": 0, "pinned_bytes": 0, "host_bytes": plan.arena_bytes}
    names = [each.name for each in fields(Plan) if each.name not in here | split.keys()]
    return Plan(
        **{name: getattr(config, name) for name in here}, **split, **{name: getattr(plan, name) for name in names}
    )


def _config(
    *,
    world: int,
    rank: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    max_tokens: int,
    dtype: torch.dtype | None,
    dispatch_dtype: torch.dtype | None,
    combine_dtype: torch.dtype | None,
    alignment: int,
    lanes: int,
    buffer_bytes: int | None,
    placement: Sequence[int] | None,
    scale_format: str,
    scale_epsilon: float,
    caller_scale_bytes: int,
    threads: int,
) -> tuple[Any, Any, _Types]:
    """The native config, what must outlive it, and the dtypes."""
    import torch

    _one_of("scale_format", scale_format, _SCALE_FORMATS)
    own = torch.bfloat16 if dtype is None else dtype
    types = _Types(
        own, own if dispatch_dtype is None else dispatch_dtype, own if combine_dtype is None else combine_dtype
    )
    config = sized("ept_moe_config")
    numbers = {
        "world": world,
        "rank": rank,
        "num_experts": num_experts,
        "top_k": top_k,
        "hidden": hidden,
        "max_tokens": max_tokens,
        "lanes": lanes,
        "alignment": alignment,
        "caller_scale_bytes": caller_scale_bytes,
        "threads": threads,
    }
    for name, value in numbers.items():
        setattr(config, name, size(name, int(value), 2**32 - 1))
    config.dtype = code_of("dtype", types.dtype)
    config.dispatch_dtype = code_of("dispatch_dtype", types.dispatch)
    config.combine_dtype = code_of("combine_dtype", types.combine)
    config.scale_format = _SCALE_FORMATS[scale_format]
    config.scale_epsilon = scale_epsilon
    config.buffer_bytes = 0 if buffer_bytes is None else size("buffer_bytes", buffer_bytes)
    ranks = None
    if placement is not None:
        if len(placement) != num_experts:
            raise InvalidArgument(f"placement names {len(placement)} ranks, there are num_experts={num_experts}")
        ranks = config.placement = ffi.new("int32_t[]", [int(each) for each in placement])
    return config, ranks, types


def _routing(got: Dispatched | Routing) -> Routing:
    if isinstance(got, Dispatched):
        return got.routing
    if isinstance(got, Routing):
        return got
    raise InvalidArgument(f"got is a {type(got).__name__}, must be what dispatch gave, or its routing")


def _one_of(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise InvalidArgument(f"{name}={value!r}: must be one of {', '.join(known)}")


def _dtypes(names: Sequence[str]) -> tuple[torch.dtype, ...]:
    import torch

    return tuple(getattr(torch, name) for name in names if hasattr(torch, name))
