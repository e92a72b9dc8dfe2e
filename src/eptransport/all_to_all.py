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
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from eptransport._call import call, ffi, lib, size, sized, timeout_ns
from eptransport._calls import AS_TOLD, CombineCall, DispatchCall, Unpacking
from eptransport._closing import Closing
from eptransport._cpu_steps import CpuSteps
from eptransport._gpu_arena import GpuArena, create_gpu_moe, cuda_device
from eptransport._gpu_steps import GpuSteps
from eptransport._moe_config import moe_config, one_of, plan_of
from eptransport._moe_native import NativeMoe, create_moe
from eptransport._shapes import LAYOUTS, SCALE_LAYOUTS, Shapes
from eptransport.dispatched import Dispatched, Layout, Routing, routing_of
from eptransport.errors import Code, InvalidArgument, PeerLost, Timeout
from eptransport.plan import Plan

if TYPE_CHECKING:
    import torch

    from eptransport._trace import Trace
    from eptransport.group import Group

__all__ = ["AllToAll", "Dispatched", "Layout", "Plan", "Routing", "Stats"]

logger = logging.getLogger("eptransport")

_FREE_OF_BYTES = frozenset({"layout", "max_rows", "scale_layout", "scale_epsilon", "threads"})
_NOTHING = contextlib.nullcontext()


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


Path = Literal["own", "mapped", "gpu", "engine"]


def _path(arena: GpuArena | None, own: int, rank: int) -> Path:
    if rank == own:
        return "own"
    if arena is None:
        return "engine"
    return "mapped" if arena.maps(rank) else "gpu" if arena.initiates(rank) else "engine"


class AllToAll(Closing):
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
    device          where all its tensors are: the CPU (None), or a CUDA device; the same kind on every rank. On a GPU
                    each call is a launch on torch's current stream, which must be one stream a lane, and doesn't
                    wait; docs/gpu.md has what differs

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
        device: torch.device | str | None = None,
    ) -> None:
        one_of("layout", layout, LAYOUTS)
        one_of("scale_layout", scale_layout, SCALE_LAYOUTS)
        config, keep, types = moe_config(
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
        self._members = group._members
        where = cuda_device(device)
        native = create_moe(group, config) if where is None else create_gpu_moe(group, config, where)
        self._native = native
        self._arena = arena = None if isinstance(native, NativeMoe) else native.arena
        self._members.made += 1
        del keep
        self._finalizer = weakref.finalize(self, self._native.close)
        self.plan_ = plan_of(config, where)
        """The plan of this object."""
        self.local_experts = self._find_local_experts(placement)
        """The global ids of the experts here: a range, or a tuple if `placement` was given."""
        self.paths: tuple[Path, ...] = self._find_paths()
        """How each rank is reached: its memory is mapped by this GPU, this GPU's kernels put into it by themselves
        (`gpu`, over NVSHMEM), or the engine writes to it. As of the last `reset`: a rank may come back elsewhere."""
        self.path_choice: str = "" if isinstance(native, NativeMoe) else native.way
        """Where both ways to ranks of other nodes were measured (EPT_GPU_PATH=auto, over NVSHMEM): the figures, and
        what was chosen by them, `gpu` or `engine` in `paths`. Empty where nothing was."""
        self.lane_memory: str = arena.home() if arena else ""
        """Of a rank on a GPU: where the lanes stand that the backend writes into, on the GPU or pinned on the host, and
        why. Empty where no rank is reached through the backend."""
        self._shapes = Shapes(
            types=types,
            world=group.world_size,
            local_experts=self.plan_.local_experts,
            top_k=top_k,
            hidden=hidden,
            max_tokens=max_tokens,
            max_rows=self.max_rows,
            scale_layout=scale_layout,
            plan=self.plan_,
            device=where,
        )
        self._steps = (
            CpuSteps(group, native, self._shapes, layout, lanes)
            if isinstance(native, NativeMoe)
            else GpuSteps(native, self._shapes, layout, lanes, num_experts, placement)
        )
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
        device: torch.device | str | None = None,
        **layouts: Any,
    ) -> Plan:
        """The bytes that an AllToAll of these arguments would take on `rank` of `world`. Allocates and connects
        nothing. Arguments that cost no memory on the wire (`layout`, `max_rows`, `scale_layout`, ...) are taken and
        have no effect."""
        unknown = sorted(layouts.keys() - _FREE_OF_BYTES)
        if unknown:
            raise InvalidArgument(f"plan has no argument {', '.join(unknown)}")
        config, keep, _ = moe_config(
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
        found = plan_of(config, cuda_device(device, look=False))
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
        mirror_counts: bool = False,
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
        mirror_counts counts and the number of rows are shown to the host when they are known: got.counts_host
        max_rows      bound of this call's outputs; see AllToAll
        out           where x goes, or everything: a tensor, or what an earlier dispatch gave

        InvalidArgument, UnsupportedError, CapacityError (more rows than fit: none is dropped or written outside),
        Timeout, PeerLost, MismatchError (ranks call different objects), LaneFault.
        """
        with self._span("dispatch", lane):
            unpacking = Unpacking(layout, host_counts, mirror_counts, max_rows, out)
            self._steps.dispatch_send(
                DispatchCall(x, topk_ids, topk_weights, scales, routing, num_tokens, lane, unpacking, whole=True)
            )
            return self._steps.dispatch_recv(lane, AS_TOLD)

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
        where = routing_of(got).lane if lane is None else lane
        with self._span("combine", where):
            self._steps.combine_send(
                CombineCall(expert_out, got, topk_weights, weights_applied, row_weights, where, whole=True)
            )
            return self._steps.combine_recv(where, out)

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
        mirror_counts: bool = False,
        max_rows: int | None = None,
        lane: int = 0,
        out: torch.Tensor | Dispatched | None = None,
    ) -> None:
        """The first half of `dispatch`: packs and posts. x may be reused when it returns. Waits only for a slot that
        peers still read. At most `plan_.chunk_tokens` tokens; a longer batch has no halves. Collective in its lane."""
        with self._span("dispatch_send", lane):
            unpacking = Unpacking(layout, host_counts, mirror_counts, max_rows, out)
            self._steps.dispatch_send(
                DispatchCall(x, topk_ids, topk_weights, scales, routing, num_tokens, lane, unpacking, whole=False)
            )

    def dispatch_recv(
        self,
        *,
        lane: int = 0,
        layout: Layout | None = None,
        host_counts: bool | None = None,
        mirror_counts: bool | None = None,
        max_rows: int | None = None,
        out: torch.Tensor | Dispatched | None = None,
    ) -> Dispatched:
        """The second half: blocks until the rows of all ranks are here, and unpacks them. What isn't given is as
        `dispatch_send` was told. Collective in its lane."""
        with self._span("dispatch_recv", lane):
            return self._steps.dispatch_recv(lane, Unpacking(layout, host_counts, mirror_counts, max_rows, out))

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
        where = routing_of(got).lane if lane is None else lane
        with self._span("combine_send", where):
            self._steps.combine_send(
                CombineCall(expert_out, got, topk_weights, weights_applied, row_weights, where, whole=False)
            )

    def combine_recv(
        self, got: Dispatched | Routing | None = None, *, out: torch.Tensor | None = None, lane: int | None = None
    ) -> Any:
        """The second half: blocks until the sums of all ranks are here; returns what `combine` does. Collective in its
        lane, which is `lane`, else that of `got`, else 0."""
        where = lane if lane is not None else 0 if got is None else routing_of(got).lane
        with self._span("combine_recv", where):
            return self._steps.combine_recv(where, out)

    # -- state --

    def check(self, lane: int | None = None) -> None:
        """Raises LaneFault, with its first cause, if the lane (None: any) is faulted. Not collective, doesn't block."""
        self._steps.check(lane)

    def reset(self, timeout: float | None = None) -> None:
        """Brings every lane of the group to a common, empty state; faults are gone, steps under way are abandoned.
        Collective over the ranks that are up, and for all AllToAlls of the group at once; blocks. Goes on without ranks
        that are masked, also one that is lost meanwhile where on_lost is "mask", and with those that were readmitted.
        Masked, Timeout, PeerLost."""
        for steps in list(self.group._gpu_steps):
            steps.settle()
        deadline = monotonic() + (self.group.settings.timeout_s if timeout is None else timeout)
        while True:
            self._members.learn()
            membership = self._members.state.epoch
            left = timeout_ns(max(0.0, deadline - monotonic()))
            try:
                if self._steps.reset(left) == Code.OK:
                    break
            except PeerLost:
                if self._members.state.epoch == membership:
                    raise  # nobody has masked it
            if monotonic() > deadline:
                raise Timeout("reset: the membership went on changing until the deadline", operation="reset")
        self.group.fault.zero_()
        self.paths = self._find_paths()

    def stats(self) -> Stats:
        """What it has done so far. Not collective, doesn't block. On a GPU it counts kernels that have ended, those of
        captured graphs too."""
        stats = sized("ept_moe_stats")
        self._native.guard.enter()
        try:
            if self._arena is not None:
                call(lib.ept_gpu_moe_stats_get, self._native.pointer, stats)
            else:
                lib.ept_moe_stats_get(self._native.pointer, stats)
        finally:
            self._native.guard.leave()
        pairs = {name: tuple(getattr(stats, name)) for name in ("generations", "messages", "bytes", "rows")}
        return Stats(**pairs, grants=stats.grants, acks=stats.acks, ack_waits=stats.ack_waits)

    def close(self) -> None:
        """Gives it back; the arena stays the group's. Not collective; closing twice is fine. `group.close` does it
        too."""
        self._finalizer()

    def __repr__(self) -> str:
        return f"<AllToAll of {self.num_experts} experts, top-{self.top_k}, hidden {self.hidden}, on {self.group!r}>"

    def __str__(self) -> str:
        rooms = ", ".join(f"{layout} {self._shapes.room(layout, None):,}" for layout in LAYOUTS)
        return f"{self!r}\n{self.plan_}\nrows that outputs have room for: {rooms}"

    # -- how it is done --

    def _find_paths(self) -> tuple[Path, ...]:
        return tuple(_path(self._arena, self.group.rank, rank) for rank in range(self.group.world_size))

    def _find_local_experts(self, placement: Sequence[int] | None) -> range | tuple[int, ...]:
        count = self.plan_.local_experts
        ids = ffi.new("int32_t[]", max(count, 1))
        (lib.ept_moe_local_experts if self._arena is None else lib.ept_gpu_moe_local_experts)(self._native.pointer, ids)
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
            ", ".join(f"{layout} {self._shapes.room(layout, None)}" for layout in LAYOUTS),
        )
        if self._arena is not None:
            counts = ", ".join(f"{self.paths.count(path)} {path}" for path in get_args(Path) if path in self.paths)
            logger.info("rank %d: ranks are reached so: %s", self.group.rank, counts)
