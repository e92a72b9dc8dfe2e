"""The steps of an AllToAll on CUDA tensors: checks, outputs, and launches on torch's current stream."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from eptransport._call import call, ffi, lib, sized, whole
from eptransport._calls import CombineCall, DispatchCall, Unpacking
from eptransport._convert import code_of, fill
from eptransport._gpu_lane import GpuRouting, Lane, Sent, Summed
from eptransport._inputs import check_combine, check_dispatch
from eptransport._members import BY_MEMBERSHIP
from eptransport._outputs import check_out, make_outputs
from eptransport._shapes import LAYOUTS
from eptransport._sums import make_sums
from eptransport.dispatched import Dispatched, Layout, Routing, routing_of
from eptransport.errors import (
    Code,
    ConfigError,
    EptError,
    InvalidArgument,
    UnsupportedError,
)
from eptransport.host_counts import Counts, HostCounts

if TYPE_CHECKING:
    import torch

    from eptransport._gpu_arena import NativeGpuMoe
    from eptransport._membership import Membership
    from eptransport._shapes import Shapes

__all__ = ["GpuSteps"]

FP8_BLOCK = 128
"""Elements under one scale of our own quantisation: wire.h's EPT_FP8_BLOCK."""
DISPATCH, COMBINE = 0, 1
"""wire.h's phases."""


class GpuSteps:
    """The calls of AllToAll, for one of a GPU. None waits; kernels report to `check`."""

    def __init__(
        self,
        native: NativeGpuMoe,
        shapes: Shapes,
        layout: Layout,
        lanes: int,
        num_experts: int,
        placement: Sequence[int] | None,
    ) -> None:
        self._native = native
        self._shapes = shapes
        self._layout: Layout = layout
        self._lanes = [native.arena.lane(number) for number in range(lanes)]
        self._tickets = [0] * lanes
        """Dispatches of each lane so far whose counts the host is shown."""
        self._members = native.group._members
        self._homes = list(placement) if placement is not None else _blocks(num_experts, shapes.world)
        """The rank of each expert."""
        self._lost: tuple[int, torch.Tensor | None] = (0, None)
        """A membership, and [experts] where they are at ranks that are masked in it."""
        native.group._gpu_steps.add(self)

    # -- halves --

    def dispatch_send(self, given: DispatchCall) -> None:
        import torch

        shapes, lane = self._shapes, given.lane
        state = self._lane(lane)
        self._members.learn_if_told()
        asked = check_dispatch(shapes, self._layout, given)
        x, topk_ids, topk_weights, routing = given.x, given.topk_ids, given.topk_weights, given.routing
        tokens, count, chosen = asked.tokens, asked.count, asked.layout
        weighed = topk_weights is not None
        if routing is not None:
            kept = self._own(routing)
            if kept.num_tokens != count:
                raise InvalidArgument(f"x has {count} tokens; the routing has {kept.num_tokens}")
            topk_ids, weights = self._kept(kept)
            if topk_weights is None and kept.weighed:
                topk_weights, weighed = weights, True
        assert topk_ids is not None
        size = self._number(lib.ept_gpu_routing_bytes, count)
        stream = self._stream(state)
        memory = torch.empty(max(size, 16), dtype=torch.uint8, device=shapes.device)
        made = GpuRouting(shapes, memory, chosen, lane, tokens, count)
        made.weighed = weighed
        self._take_members(lane, made, stream)
        arguments = sized("ept_dispatch_args")
        arguments.lane, arguments.whole = lane, given.whole
        fill(arguments.x, x[:count])
        fill(arguments.topk_ids, topk_ids[:count])
        fill(arguments.topk_weights, None if topk_weights is None else topk_weights[:count])
        fill(arguments.scales, None if given.scales is None else given.scales[:count])
        if state.sent is not None:  # dispatched, and never received
            state.sent.by._drain(self, lane, DISPATCH, stream)
            state.sent = None
        self._call(lib.ept_gpu_moe_dispatch_send, arguments, _address(made), stream)
        keep = (x, topk_ids, topk_weights, given.scales)
        state.sent = Sent(self, made, chosen, given.unpacking, self._scales(x, given.scales), keep)

    def dispatch_recv(self, lane: int, given: Unpacking) -> Dispatched:
        import torch

        state = self._lane(lane)
        sent = state.sent
        if sent is None or sent.by is not self:
            raise InvalidArgument(f"dispatch_recv on lane {lane}, where no dispatch_send is to be received")
        wanted = given.over(sent.unpacking)
        chosen = sent.layout
        if given.layout is not None:
            chosen = check_out(self._shapes, given.layout, self._layout, wanted.out)
        exact = bool(wanted.host_counts)
        stream = self._stream(state)
        arrival = self._arrival(lane, sent, stream, exact)
        outputs = make_outputs(self._shapes, chosen, arrival, exact, wanted.max_rows, wanted.out)
        num_rows = torch.empty((), dtype=torch.int32, device=self._shapes.device)
        routing = sent.routing
        routing.layout = chosen
        ticket = 0
        if wanted.mirror_counts:
            self._tickets[lane] += 1
            ticket = self._tickets[lane]
        routing.leading = int(outputs.x.shape[1 if chosen in ("by_rank", "masked") else 0])
        self._call(
            lib.ept_gpu_moe_dispatch_recv,
            lane,
            outputs.native(chosen),
            _address(routing),
            routing.num_tokens,
            ffi.cast("int32_t *", num_rows.data_ptr()),
            ticket,
            stream,
        )
        state.sent = None
        rows: Any = num_rows
        if exact:
            rows = arrival.contiguous_rows if chosen == "contiguous" else arrival.rows
        masked = routing.lost_ranks(self._shapes.world)
        lost = routing.lost(self._shapes.top_k) if masked else None
        mirror = self._mirror(lane, ticket) if ticket else None
        return Dispatched(
            **outputs.__dict__, routing=routing, num_rows=rows, lost=lost, lost_ranks=masked, counts_host=mirror
        )

    def combine_send(self, given: CombineCall) -> None:
        lane, expert_out, topk_weights = given.lane, given.expert_out, given.topk_weights
        state = self._lane(lane)
        routing = self._own(routing_of(given.got))
        check_combine(self._shapes, routing, given)
        if topk_weights is not None and state.sent is not None:
            raise InvalidArgument(
                f"combine with topk_weights on lane {lane}, which has a dispatch still to be received: both are "
                "messages of one phase; receive it before"
            )
        two = routing.layout in ("by_rank", "masked")
        rows = int(expert_out.shape[1 if two else 0])
        if rows != routing.leading if two else rows < routing.leading:
            raise InvalidArgument(
                f"expert_out has shape {tuple(expert_out.shape)}; the dispatch unpacked {routing.leading} rows"
            )
        arguments = sized("ept_combine_args")
        arguments.lane, arguments.layout = lane, LAYOUTS[routing.layout]
        arguments.weights_applied, arguments.whole = given.weights_applied, given.whole
        fill(arguments.expert_out, expert_out)
        fill(arguments.row_weights, given.row_weights)
        stream = self._stream(state)
        if self._members.state.epoch != routing.membership:
            self._call(lib.ept_gpu_moe_refuse_old, lane, routing.membership, stream)
        if state.summed is not None:
            state.summed.by._drain(self, lane, COMBINE, stream)
            state.summed = None
        late = None if topk_weights is None else self._send_weights(lane, routing, topk_weights, stream)
        pointer = ffi.NULL if late is None else ffi.cast("float *", late.data_ptr())
        self._call(lib.ept_gpu_moe_combine_send, arguments, _address(routing), routing.num_tokens, pointer, stream)
        state.summed = Summed(self, routing, given.row_weights is not None, (expert_out, given.row_weights, late))

    def _send_weights(self, lane: int, routing: GpuRouting, weights: torch.Tensor, stream: Any) -> torch.Tensor:
        """The weights of the rows that are here, by which this combine goes."""
        import torch

        size = self._number(lib.ept_gpu_late_bytes)
        late = torch.empty(size // 4, dtype=torch.float32, device=self._shapes.device)
        native = ffi.new("ept_tensor *")
        fill(native, weights[: routing.num_tokens])
        pointer = ffi.cast("float *", late.data_ptr())
        self._call(lib.ept_gpu_moe_late_weights, lane, native, _address(routing), pointer, stream)
        return late

    def combine_recv(self, lane: int, out: torch.Tensor | None) -> Any:
        state = self._lane(lane)
        if state.summed is None or state.summed.by is not self:
            raise InvalidArgument(f"combine_recv on lane {lane}, where no combine_send is to be received")
        routing = state.summed.routing
        sums = make_sums(self._shapes, routing.tokens, routing.num_tokens, state.summed.row_weights, out)
        self._call(lib.ept_gpu_moe_combine_recv, lane, *sums.native(), _address(routing), self._stream(state))
        state.summed = None
        return sums.answer()

    # -- state --

    def check(self, lane: int | None) -> None:
        for number in range(len(self._lanes)) if lane is None else (lane,):
            self._lane(number)
            self._call(lib.ept_gpu_moe_check, number)
        self.take_members()

    def take_members(self) -> None:
        """Where a membership has come since the last step of a lane, and this is its stream, launches what brings it
        there: for captured graphs, which do no more than they did. Others learn at their next dispatch_send."""
        import torch

        current = torch.cuda.current_stream(self._shapes.device)
        if torch.cuda.is_current_stream_capturing():
            return
        for number, state in enumerate(self._lanes):
            if state.captured or state.stream == current:
                stream = ffi.cast("void *", current.cuda_stream)
                try:
                    self._call(lib.ept_gpu_moe_members, number, 0, ffi.NULL, stream)
                except EptError:  # said by the step, or the reset, that comes next
                    return
        self._find_lost(self._members.state)

    def wait_for_kernels(self) -> None:
        """Of this rank, which end at their deadlines at the latest."""
        import torch

        torch.cuda.current_stream(self._shapes.device).synchronize()  # of graphs that are replayed on it
        for lane in self._lanes:
            if lane.stream is not None:
                lane.stream.synchronize()

    def settle(self) -> None:
        """Before a reset."""
        self.wait_for_kernels()
        for lane in self._lanes:
            lane.sent = lane.summed = None

    def drop_unreceived(self) -> None:
        """Before a suspend: kernels read what no call will receive when the others' messages come, and nobody waits for
        that here."""
        if self._native.guard.is_shut:
            return
        for number, lane in enumerate(self._lanes):
            if lane.stream is None:
                continue
            stream = ffi.cast("void *", lane.stream.cuda_stream)
            if lane.sent is not None:
                lane.sent.by._drain(self, number, DISPATCH, stream)
            if lane.summed is not None:
                lane.summed.by._drain(self, number, COMBINE, stream)
            lane.sent = lane.summed = None

    def reset(self, timeout: int) -> int:
        """Collective; ns. LATER: the membership moves."""
        self._native.guard.enter()
        try:
            return call(lib.ept_gpu_lanes_reset, self._native.arena.pointer, timeout)
        except BY_MEMBERSHIP as error:
            self._members.after(error, self._native.group.settings.on_lost)
            raise
        finally:
            self._native.guard.leave()

    # -- how it is done --

    def _drain(self, other: GpuSteps, lane: int, phase: int, stream: Any) -> None:
        """What this one has sent and `other` finds in the lane. Who sent it knows how; messages of one that is closed
        are whole, since a call that is streamed receives them itself."""
        steps = other if self._native.guard.is_shut else self
        steps._call(lib.ept_gpu_moe_drain, lane, phase, stream)

    def _take_members(self, lane: int, routing: GpuRouting, stream: Any) -> None:
        """The mask of a step is taken here and nowhere else."""
        import torch

        captures = torch.cuda.is_current_stream_capturing()
        epoch = ffi.new("uint32_t *")
        self._call(lib.ept_gpu_moe_members, lane, captures, epoch, stream)
        routing.membership = int(epoch[0])
        if not routing.membership:
            return
        state = self._members.state
        if not captures:
            self._find_lost(state)
        routing._lost_ranks = tuple(each.rank for each in state.masked)
        routing._lost_experts = self._lost[1]
        routing._ids = lambda: self._kept(routing)[0]

    def _find_lost(self, state: Membership) -> None:
        import torch

        if self._lost[0] == state.epoch:
            return
        masked = {each.rank for each in state.masked}
        lost = [home in masked for home in self._homes]
        self._lost = (state.epoch, torch.tensor(lost, device=self._shapes.device) if masked else None)

    def _arrival(self, lane: int, sent: Sent, stream: Any, exact: bool) -> SimpleNamespace:
        import torch

        rows = [0, 0, 0, 0]
        if exact:
            if torch.cuda.is_current_stream_capturing():
                raise UnsupportedError("host_counts=True waits for the GPU, which a captured graph can't")
            counts = torch.empty(4, dtype=torch.int64, device=self._shapes.device)
            self._call(lib.ept_gpu_moe_dispatch_wait, lane, ffi.cast("uint64_t *", counts.data_ptr()), stream)
            rows = counts.tolist()
            self.check(lane)
        return SimpleNamespace(
            rows=rows[0],
            max_rank_rows=rows[1],
            contiguous_rows=rows[2],
            max_expert_rows=rows[3],
            payload_format=code_of("dispatch_dtype", self._shapes.types.dispatch),
            scale_bytes=sent.scales[0],
            scale_format=sent.scales[1],
            has_weights=sent.routing.weighed,
        )

    def _mirror(self, lane: int, ticket: int) -> HostCounts:
        """Of the dispatch that was just launched, or captured."""
        import torch

        native, experts = self._native, self._shapes.local_experts

        def look() -> tuple[int, Counts] | None:
            seen = sized("ept_gpu_counts")
            counts = torch.empty(experts, dtype=torch.int32, device="cpu")  # whatever torch makes by default
            native.guard.enter()
            try:
                there = ffi.cast("int32_t *", counts.data_ptr())
                if call(lib.ept_gpu_moe_counts, native.pointer, lane, seen, there) == Code.LATER:
                    return None
            finally:
                native.guard.leave()
            return seen.ticket, Counts(seen.epoch, counts, seen.rows, seen.fault != 0)

        own = None if torch.cuda.is_current_stream_capturing() else ticket
        return HostCounts(look, own, native.group.settings.timeout_s)

    def _scales(self, x: torch.Tensor, scales: torch.Tensor | None) -> tuple[int, int]:
        types = self._shapes.types
        if scales is not None:
            return int(scales.shape[1]) * scales.element_size(), code_of("scales", scales.dtype)
        if x.dtype == types.dtype and types.dispatch != types.dtype:
            blocks = -(-self._shapes.hidden // FP8_BLOCK)
            return (blocks, lib.EPT_DTYPE_E8M0) if self._native.ue8m0 else (blocks * 4, lib.EPT_DTYPE_F32)
        return 0, lib.EPT_DTYPE_NONE

    def _kept(self, routing: GpuRouting) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and weights that a routing has."""
        import torch

        count, top_k = routing.num_tokens, self._shapes.top_k

        def kept(at: int, dtype: torch.dtype) -> torch.Tensor:
            return routing._memory[at : at + 4 * count * top_k].view(dtype).view(count, top_k)

        ids_at = self._number(lib.ept_gpu_routing_ids, count)
        weights_at = self._number(lib.ept_gpu_routing_weights, count)
        return kept(ids_at, torch.int32), kept(weights_at, torch.float32)

    def _lane(self, lane: int) -> Lane:
        number = whole("lane", lane)
        if not 0 <= number < len(self._lanes):
            raise InvalidArgument(f"lane={number}: this AllToAll has lanes 0 to {len(self._lanes) - 1}")
        return self._lanes[number]

    def _own(self, routing: Routing) -> GpuRouting:
        """Kernels go by it as it stands: it must be this AllToAll's."""
        if not isinstance(routing, GpuRouting):
            raise InvalidArgument("the routing is of a dispatch on the CPU; this AllToAll is on a GPU")
        if routing.of is not self._shapes:
            raise InvalidArgument("the routing is of a dispatch of another AllToAll: what dispatched combines")
        return routing

    def _stream(self, state: Lane) -> Any:
        import torch

        stream = torch.cuda.current_stream(self._shapes.device)
        if stream.cuda_stream == 0 and self._native.arena.shares_process:
            raise ConfigError(
                "ranks of this group are threads of one process, and this one is on the default stream, which they "
                "share: their kernels would wait behind one another for ever. Call inside torch.cuda.stream(...), with "
                "a stream for each rank"
            )
        if torch.cuda.is_current_stream_capturing():
            state.captured = True
        else:
            state.stream = stream
        return ffi.cast("void *", stream.cuda_stream)

    def _number(self, function: Any, *arguments: Any) -> int:
        """What a native function that can't fail answers."""
        self._native.guard.enter()
        try:
            return int(function(self._native.pointer, *arguments))
        finally:
            self._native.guard.leave()

    def _call(self, function: Any, *arguments: Any) -> None:
        self._native.guard.enter()
        try:
            call(function, self._native.pointer, *arguments)
        except BY_MEMBERSHIP as error:
            self._members.after(error, self._native.group.settings.on_lost)
            raise
        finally:
            self._native.guard.leave()


def _address(routing: GpuRouting) -> Any:
    return ffi.cast("void *", routing._memory.data_ptr())


def _blocks(num_experts: int, world: int) -> list[int]:
    """In rank order, the first ranks hold one more."""
    each, more = divmod(num_experts, world)
    return [rank for rank in range(world) for _ in range(each + (rank < more))]
