"""The steps of an AllToAll on CPU tensors: checks, outputs, and native calls that block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eptransport._call import call, ffi, lib, new_error, sized, whole
from eptransport._calls import CombineCall, DispatchCall, Unpacking
from eptransport._convert import fill
from eptransport._inputs import check_combine, check_dispatch
from eptransport._lane import Lane, Sent, Summed
from eptransport._members import BY_MEMBERSHIP
from eptransport._outputs import check_out, make_outputs
from eptransport._shapes import LAYOUTS
from eptransport._sums import make_sums
from eptransport.dispatched import Dispatched, Layout, Routing, routing_of
from eptransport.errors import Code, InvalidArgument, Timeout

if TYPE_CHECKING:
    import torch

    from eptransport._moe_native import NativeMoe
    from eptransport._shapes import Shapes
    from eptransport.group import Group

__all__ = ["CpuSteps"]


class CpuSteps:
    """The calls of AllToAll, for one of the CPU."""

    def __init__(self, group: Group, native: NativeMoe, shapes: Shapes, layout: Layout, lanes: int) -> None:
        self._group = group
        self._members = group._members
        self._native = native
        self._shapes = shapes
        self._layout: Layout = layout
        self._lanes = [Lane() for _ in range(lanes)]

    # -- halves --

    def dispatch_send(self, given: DispatchCall) -> None:
        self._members.learn_if_told()
        lane = given.lane
        state = self._lane(lane)
        asked = check_dispatch(self._shapes, self._layout, given)
        count = asked.count
        arguments = sized("ept_dispatch_args")
        arguments.lane, arguments.whole = lane, given.whole
        fill(arguments.x, given.x[:count])
        fill(arguments.topk_ids, None if given.topk_ids is None else given.topk_ids[:count])
        fill(arguments.topk_weights, None if given.topk_weights is None else given.topk_weights[:count])
        fill(arguments.scales, None if given.scales is None else given.scales[:count])
        if given.routing is not None:
            arguments.routing = given.routing._native
        self._call(lib.ept_moe_dispatch_send, arguments, lane=lane)
        keep = (given.x, given.scales) if given.whole else None
        state.sent = Sent(asked.tokens, count, asked.layout, given.unpacking, keep)

    def dispatch_recv(self, lane: int, given: Unpacking) -> Dispatched:
        state = self._lane(lane)
        sent = state.sent
        if sent is None:
            raise InvalidArgument(f"dispatch_recv on lane {lane}, where no dispatch_send is to be received")
        wanted = given.over(sent.unpacking)
        chosen = sent.layout
        if given.layout is not None:
            chosen = check_out(self._shapes, given.layout, self._layout, wanted.out)
        arrival = sized("ept_arrival")
        self._call(lib.ept_moe_dispatch_wait, lane, arrival, lane=lane)
        exact = bool(wanted.host_counts)
        outputs = make_outputs(self._shapes, chosen, arrival, exact, wanted.max_rows, wanted.out)
        native = outputs.native(chosen)
        handle = ffi.new("ept_routing **")
        self._call(lib.ept_moe_dispatch_recv, lane, native, handle, lane=lane)
        state.sent = None
        routing = Routing(handle[0], chosen, lane, sent.tokens, sent.count)
        rows = arrival.contiguous_rows if chosen == "contiguous" else arrival.rows
        masked = routing.lost_ranks(self._shapes.world) if self._group.membership.epoch else ()
        lost = routing.lost(self._shapes.top_k) if masked else None
        mirror = None
        if wanted.mirror_counts:
            mirror = state.mirror(outputs.counts, rows, self._group.settings.timeout_s)
        return Dispatched(
            **outputs.__dict__, routing=routing, num_rows=rows, lost=lost, lost_ranks=masked, counts_host=mirror
        )

    def combine_send(self, given: CombineCall) -> None:
        lane = given.lane
        state = self._lane(lane)
        routing = routing_of(given.got)
        check_combine(self._shapes, routing, given)
        weights = given.topk_weights
        arguments = sized("ept_combine_args")
        arguments.lane, arguments.routing, arguments.layout = lane, routing._native, LAYOUTS[routing.layout]
        arguments.weights_applied, arguments.whole = given.weights_applied, given.whole
        fill(arguments.expert_out, given.expert_out)
        fill(arguments.topk_weights, None if weights is None else weights[: routing.num_tokens])
        fill(arguments.row_weights, given.row_weights)
        self._call(lib.ept_moe_combine_send, arguments, lane=lane)
        keep = (given.expert_out, given.row_weights) if given.whole else None
        state.summed = Summed(routing.tokens, routing.num_tokens, given.row_weights is not None, keep)

    def combine_recv(self, lane: int, out: torch.Tensor | None) -> Any:
        state = self._lane(lane)
        summed = state.summed
        if summed is None:
            raise InvalidArgument(f"combine_recv on lane {lane}, where no combine_send is to be received")
        sums = make_sums(self._shapes, summed.tokens, summed.count, summed.row_weights, out)
        self._call(lib.ept_moe_combine_recv, lane, *sums.native(), lane=lane)
        state.summed = None
        return sums.answer()

    # -- state --

    def check(self, lane: int | None) -> None:
        for number in range(len(self._lanes)) if lane is None else (lane,):
            self._lane(number)
            self._call(lib.ept_moe_check, number)

    def reset(self, timeout: int) -> int:
        """Collective; ns. LATER: the membership moves."""
        done = self._call(lib.ept_moe_reset, timeout)
        if done == Code.OK:
            for lane in self._lanes:
                lane.clear()
        return done

    # -- how it is done --

    def _lane(self, lane: int) -> Lane:
        number = whole("lane", lane)
        if not 0 <= number < len(self._lanes):
            raise InvalidArgument(f"lane={number}: this AllToAll has lanes 0 to {len(self._lanes) - 1}")
        return self._lanes[number]

    def _call(self, function: Callable[..., int], *args: Any, lane: int | None = None) -> int:
        native = self._native
        native.guard.enter()
        try:
            return call(function, native.pointer, *args)
        except BaseException as error:  # also KeyboardInterrupt: the lane is faulted all the same
            self._note_fault(lane)
            if isinstance(error, Timeout):
                self._group.engine._native.tell_why(error)
            if isinstance(error, BY_MEMBERSHIP):
                self._members.after(error, self._group.settings.on_lost)
            raise
        finally:
            native.guard.leave()

    def _note_fault(self, lane: int | None) -> None:
        """A failed call may have faulted its lane: `group.fault` says so from then on."""
        self._group.engine.drain_log()
        if lane is None:
            return
        error = new_error()
        code = lib.ept_moe_check(self._native.pointer, lane, error)
        if code < 0 and code != Code.SUSPENDED:
            self._group.fault.fill_(error.code or lib.EPT_E_FAULT)
            self._lanes[lane].clear()
