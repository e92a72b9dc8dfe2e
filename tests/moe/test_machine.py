# SPDX-License-Identifier: Apache-2.0
"""Programs that hypothesis makes up, on several ranks, lanes and objects, under a schedule that it seeds, side by side
with the reference.

A machine is one group: 1 to 4 ranks over loopback, two AllToAll objects of other shapes in one arena. A rule is one
program on one lane, or one on each of several lanes at once: 0 to 3 dispatches and 0 to 2 combines, in any order that
names only dispatches that were received. Every rank runs the same program on threads of its own; nothing but the
library brings them together. Programs are abandoned in every way that a caller can: a dispatch that nobody receives, or
only some do, a combine likewise, a dispatch without combine, an exception between. Dispatches are kept; later programs
combine them, and dispatch by their routing.

`make test` runs a bounded number, HYPOTHESIS_PROFILE=long an hour.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import harness
import moe_model as model
import numpy as np
import pytest
from harness import LAYOUTS, Scenario
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import eptransport as ept

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
ON_GPU = harness.DEVICE != "cpu"
EXAMPLES, STEPS = (1500, 24) if LONG else (25 if ON_GPU else 100, 8)  # an hour, a minute, on two cores; or on a GPU
CHUNK, LONGEST = 12, 40  # tokens that fit at once where calls are streamed, and of the longest one
KEPT = 4  # dispatches of a lane that stay around for combines of later programs


@dataclass(frozen=True)
class Dispatch:
    which: int  # of the objects
    tokens: tuple[int, ...]  # by rank
    layouts: tuple[str, ...]
    seed: int
    weights: bool = True
    none: float = 0.1
    halves: bool = False
    host_counts: bool = False
    again: int | None = None  # by the routing of that kept dispatch (modulo their number)
    deaf: frozenset[int] = frozenset()  # ranks that never receive it


@dataclass(frozen=True)
class Combine:
    of: int  # of the kept dispatches, modulo their number
    salt: int
    halves: bool = False
    late: bool = False
    applied: bool = False
    row_weights: bool = False
    deaf: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Raise:
    """The caller's own exception: the program ends here on every rank."""


Program = tuple[Any, ...]


class OfTheCaller(Exception):
    pass


@dataclass
class Kept:
    which: int
    scenario: Scenario
    got: list[ept.Dispatched | None]  # by rank


# ---- what hypothesis may draw ----------------------------------------------------------------------------------------


def configs(world: int) -> st.SearchStrategy[model.Config]:
    def build(experts: int, top_k: int, hidden: int, kind: tuple[str, str, str], scales: str, alignment: int) -> Any:
        return model.Config(world, experts, top_k, hidden, *kind, alignment=alignment, scale_format=scales)

    return st.builds(
        build,
        experts=st.integers(1, 12),
        top_k=st.sampled_from([1, 2, 3, 4, 6, 32]),
        hidden=st.sampled_from([16, 32, 144]),
        kind=st.sampled_from(
            [("bf16", "bf16", "bf16"), ("bf16", "e4m3", "bf16"), ("f32", "f32", "f32"), ("f16", "f16", "f32")]
        ),
        scales=st.sampled_from(["fp32", "ue8m0"]),
        alignment=st.sampled_from([1, 4]),
    )


def ranks(world: int) -> st.SearchStrategy[frozenset[int]]:
    some = st.frozensets(st.integers(0, world - 1), max_size=world)
    return st.one_of(st.just(frozenset()), st.just(frozenset(range(world))), some)


@st.composite
def programs(draw: st.DrawFn, world: int, most: int) -> Program:
    dispatches = draw(st.integers(0, 3))
    combines = draw(st.integers(0, 2))
    steps: list[Any] = []
    for _ in range(dispatches):
        halves = draw(st.booleans())
        steps.append(
            Dispatch(
                which=draw(st.integers(0, 1)),
                tokens=tuple(draw(st.lists(st.integers(0, most), min_size=world, max_size=world))),
                layouts=tuple(draw(st.lists(st.sampled_from(LAYOUTS), min_size=world, max_size=world))),
                seed=draw(st.integers(0, 2**16)),
                weights=draw(st.booleans()),
                none=draw(st.sampled_from([0.0, 0.1, 0.6, 1.0])),
                halves=halves,
                host_counts=draw(st.booleans()),
                again=draw(st.one_of(st.none(), st.integers(0, KEPT))),
                deaf=draw(ranks(world)) if halves else frozenset(),
            )
        )
    for _ in range(combines):
        halves = draw(st.booleans())
        steps.insert(
            draw(st.integers(0, len(steps))),
            Combine(
                of=draw(st.integers(0, KEPT)),
                salt=draw(st.integers(-2, 2)),
                halves=halves,
                late=draw(st.booleans()),
                applied=draw(st.booleans()),
                row_weights=draw(st.booleans()),
                deaf=draw(ranks(world)) if halves else frozenset(),
            ),
        )
    if draw(st.integers(0, 9)) == 0:
        steps.insert(draw(st.integers(0, len(steps))), Raise())
    return tuple(steps)


# ---- the machine -----------------------------------------------------------------------------------------------------


class MoeMachine(RuleBasedStateMachine):
    groups: list[ept.Group]

    def __init__(self) -> None:
        super().__init__()
        self.groups = []

    @initialize(data=st.data(), world=st.integers(1, 4), seed=st.integers(0, 2**32), lanes=st.integers(1, 3))
    def set_up(self, data: st.DataObject, world: int, seed: int, lanes: int) -> None:
        self.world, self.lanes = world, lanes
        self.most = data.draw(st.sampled_from([4, 9]))
        self.configs = [data.draw(configs(world)) for _ in range(2)]
        streamed = data.draw(st.booleans())
        self.groups = harness.groups(
            world,
            adversary=seed,
            timeout_s=15.0,
            threads=data.draw(st.integers(1, 2)),
            progress=data.draw(st.sampled_from(["auto", "thread"])),
        )
        self.objects = []
        for config in self.configs:
            more: dict[str, Any] = {"max_tokens": self.most, "lanes": lanes}
            if streamed:
                more["max_tokens"] = LONGEST
                more["buffer_bytes"] = harness.plan(config, max_tokens=CHUNK, lanes=1).lane_bytes
            self.objects.append(harness.all_to_alls(self.groups, config, **more))
        # A streamed object has halves up to its chunk; longer calls are whole.
        self.chunk = [int(moes[0].plan_.chunk_tokens) for moes in self.objects]
        self.longest = LONGEST if streamed else self.most
        self.kept: list[list[Kept]] = [[] for _ in range(lanes)]
        self.late_left: list[int | None] = [None] * lanes
        self.routing_of: dict[int, Kept | None] = {}

    @rule(data=st.data(), lane=st.integers(0, 2))
    def one_program(self, data: st.DataObject, lane: int) -> None:
        self.run({lane % self.lanes: data.draw(programs(self.world, self.longest))})

    @precondition(lambda self: self.groups and self.lanes > 1)
    @rule(data=st.data())
    def a_program_on_each_lane_at_once(self, data: st.DataObject) -> None:
        # One streamed call at a time a group, so these are short.
        self.run({lane: data.draw(programs(self.world, min(self.most, *self.chunk))) for lane in range(self.lanes)})

    @precondition(lambda self: self.groups)
    @rule()
    def reset(self) -> None:
        harness.on_ranks(self.groups, lambda rank: self.objects[0][rank].reset())
        self.late_left = [None] * self.lanes

    def run(self, drawn: dict[int, Program]) -> None:
        prepared = {lane: self.prepare(lane, program) for lane, program in drawn.items()}

        def on_thread(rank: int, lane: int) -> None:
            try:
                for step in prepared[lane]:
                    self.execute(rank, lane, *step)
            except OfTheCaller:
                pass

        harness.together(
            self.groups,
            [lambda rank=rank, lane=lane: on_thread(rank, lane) for lane in prepared for rank in range(self.world)],  # type: ignore[misc]
        )
        for moes in self.objects:
            for moe in moes:
                moe.check()
        for lane in prepared:
            # Only what every rank received can be combined later.
            self.kept[lane] = [kept for kept in self.kept[lane] if None not in kept.got][-KEPT:]

    def prepare(self, lane: int, program: Program) -> list[tuple[Any, Kept | None, Scenario | None]]:
        """Each step with the reference's answer; what can't be said about this lane now is left out."""
        steps: list[tuple[Any, Kept | None, Scenario | None]] = []
        usable = list(self.kept[lane])
        for step in program:
            if isinstance(step, Raise):
                steps.append((step, None, None))
                break
            if isinstance(step, Dispatch):
                before = usable[step.again % len(usable)] if step.again is not None and usable else None
                which = before.which if before else step.which
                step = replace(step, which=which, again=step.again if before else None)
                config = self.configs[which]
                batches = harness.make_batches(
                    config, step.tokens, step.seed, weights=step.weights, none=step.none, repeat=0.2
                )
                if before:
                    old = before.scenario.batches
                    batches = harness.make_batches(config, [b.tokens for b in old], step.seed)
                    batches = [model.Batch(b.x, o.ids, o.weights) for b, o in zip(batches, old, strict=True)]
                if max(b.tokens for b in batches) > self.chunk[which]:
                    step = replace(step, halves=False, deaf=frozenset())
                scenario = Scenario(config, batches, list(step.layouts))
                kept = Kept(which, scenario, [None] * self.world)
                self.late_left[lane] = 1 if step.deaf else None
                self.kept[lane].append(kept)
                if not step.deaf:
                    usable.append(kept)
                steps.append((step, kept, before.scenario if before else None))
                self.routing_of[id(kept)] = before
            elif usable:
                kept = usable[step.of % len(usable)]
                scenario = kept.scenario
                summed_here = all(layout in ("rows", "by_rank") for layout in scenario.layouts)
                weighed_here = all(layout in ("contiguous", "masked") for layout in scenario.layouts)
                # Late weights travel as a dispatch: while one is to be received, a second late combine is refused, and
                # on a GPU the first.
                late = None
                if step.late and self.late_left[lane] not in ((0, 1) if ON_GPU else (0,)):
                    if self.late_left[lane] is not None:
                        self.late_left[lane] = 0
                    late = [
                        np.random.default_rng((step.salt + 9, r)).random(b.ids.shape).astype(np.float32)
                        for r, b in enumerate(scenario.batches)
                    ]
                if max(b.tokens for b in scenario.batches) > self.chunk[kept.which]:
                    step = replace(step, halves=False, deaf=frozenset())
                expected = replace(
                    scenario,
                    salt=step.salt,
                    late=late,
                    weights_applied=step.applied and weighed_here and late is None,
                    row_weights=step.row_weights and summed_here,
                )
                steps.append((step, kept, expected))
        return steps

    def execute(self, rank: int, lane: int, step: Any, kept: Kept | None, scenario: Scenario | None) -> None:
        if isinstance(step, Raise):
            raise OfTheCaller
        assert kept is not None
        moe = self.objects[kept.which][rank]
        if isinstance(step, Dispatch):
            arguments = kept.scenario.arguments(rank, lane=lane, host_counts=step.host_counts)
            # Repeated ids: an expert may get more rows than there are tokens.
            arguments["max_rows"] = 100_000
            before = self.routing_of[id(kept)]
            if before is not None:
                arguments.pop("topk_ids")
                arguments.pop("topk_weights")
                arguments["routing"] = before.got[rank].routing
            if step.halves:
                moe.dispatch_send(**arguments)
                if rank in step.deaf:
                    return
                got = moe.dispatch_recv(lane=lane)
            else:
                got = moe.dispatch(**arguments)
            kept.scenario.check(rank, got)
            kept.got[rank] = got
            return
        assert scenario is not None
        got = kept.got[rank]
        assert got is not None
        arguments = scenario.combine_arguments(rank, got)
        if step.halves:
            moe.combine_send(**arguments)
            if rank in step.deaf:
                return
            result = moe.combine_recv(got)
        else:
            result = moe.combine(**arguments)
        y, weights = result if isinstance(result, tuple) else (result, None)
        scenario.check_y(rank, y)
        if scenario.row_weights:
            assert weights is not None
            harness.same_bits(weights, scenario.expected_row_weights[rank], "f32", f"rank {rank}: row weights")

    def teardown(self) -> None:
        if not self.groups:
            return
        harness.close(self.groups)


MoeMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    # A failure on a GPU is mostly a wait for a rank that failed, 15 s of it: too long to be made smaller.
    phases=[Phase.explicit, Phase.generate] if ON_GPU else list(Phase),
)
TestMoeMachine = pytest.mark.timeout(0 if LONG else 600)(MoeMachine.TestCase)
