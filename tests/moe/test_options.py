# SPDX-License-Identifier: Apache-2.0
"""What a call may ask for beside the plain step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import harness
import moe_model as model
import numpy as np
import pytest
import torch
from harness import LAYOUTS, Scenario, all_to_alls, make_batches, on_ranks, run_all, same_bits

import eptransport as ept

Make = Callable[..., list[Any]]
CONFIG = model.Config(3, 8, 3, 64)


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
@pytest.mark.parametrize("early", [False, True])
def test_late_weights(make_groups: Make, layout: str, early: bool) -> None:
    """Weights that come with combine win over those that came with dispatch."""
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG)
    batches = make_batches(CONFIG, (6, 2, 9), 1, weights=early)
    late = [np.random.default_rng((5, r)).random(b.ids.shape).astype(np.float32) for r, b in enumerate(batches)]
    for halves in (False, True):
        run_all(Scenario(CONFIG, batches, [layout] * 3, late=late), moes, groups, halves=halves)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_weights_at_all_are_ones(make_groups: Make, layout: str) -> None:
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG)
    run_all(Scenario(CONFIG, make_batches(CONFIG, (6, 2, 9), 1, weights=False), [layout] * 3), moes, groups)


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_weights_applied(make_groups: Make, layout: str) -> None:
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG)
    scenario = Scenario(CONFIG, make_batches(CONFIG, (6, 2, 9), 1), [layout] * 3, weights_applied=True)
    run_all(scenario, moes, groups)


@pytest.mark.parametrize("layout", ["rows", "by_rank"])
def test_row_weights_are_summed_beside(make_groups: Make, layout: str) -> None:
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG)
    scenario = Scenario(CONFIG, make_batches(CONFIG, (6, 0, 9), 1), [layout] * 3, row_weights=True)
    for halves in (False, True):
        run_all(scenario, moes, groups, halves=halves)


def test_several_combines_of_one_dispatch_in_any_order(make_groups: Make) -> None:
    """Two dispatches, then combines of the second, the first, the first again: routing outlives the slot."""
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG)
    first = Scenario(CONFIG, make_batches(CONFIG, (6, 2, 9), 1), ["contiguous"] * 3)
    second = Scenario(CONFIG, make_batches(CONFIG, (0, 7, 3), 2), ["rows", "masked", "by_rank"])

    def step(rank: int) -> None:
        a = moes[rank].dispatch(**first.arguments(rank))
        b = moes[rank].dispatch(**second.arguments(rank))
        for scenario, got in ((second, b), (first, a), (first, a)):
            scenario.check(rank, got)
            scenario.check_y(rank, moes[rank].combine(**scenario.combine_arguments(rank, got)))

    for _ in range(3):
        on_ranks(groups, step)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routing_is_kept_and_used_again(make_groups: Make, layout: str) -> None:
    """Other rows by the routing of an earlier call, after that call's slot was long overwritten."""
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG)
    first = Scenario(CONFIG, make_batches(CONFIG, (6, 2, 9), 1), ["rows"] * 3)
    other = Scenario(CONFIG, make_batches(CONFIG, (1, 12, 5), 2), ["contiguous"] * 3)
    again = Scenario(CONFIG, make_batches(CONFIG, (6, 2, 9), 3), [layout] * 3)
    for rank in range(3):
        again.batches[rank].ids = first.batches[rank].ids
        again.batches[rank].weights = first.batches[rank].weights
    again.__post_init__()
    assert not np.array_equal(again.batches[0].x, first.batches[0].x)

    def step(rank: int) -> None:
        kept = moes[rank].dispatch(**first.arguments(rank)).routing
        for _ in range(3):
            other.run(rank, moes[rank])
        x = harness.tensor(again.batches[rank].x, CONFIG.dtype)
        got = moes[rank].dispatch(x, routing=kept, layout=layout)
        again.check(rank, got)
        again.check_y(rank, moes[rank].combine(**again.combine_arguments(rank, got)))

    on_ranks(groups, step)


@pytest.mark.parametrize(
    "placement",
    [(2, 0, 1, 2, 0, 1, 2, 0), (0, 0, 0, 0, 2, 2, 2, 2), (1, 1, 1, 1, 1, 1, 1, 1)],
    ids=["round", "hole", "one"],
)
def test_placement(make_groups: Make, placement: tuple[int, ...]) -> None:
    """Experts anywhere; also a rank that holds none."""
    config = model.Config(3, 8, 3, 64, placement=placement)
    groups = make_groups(3)
    moes = all_to_alls(groups, config)
    assert [list(moe.local_experts) for moe in moes] == [config.local_experts(r) for r in range(3)]
    for layout in LAYOUTS:
        run_all(Scenario(config, make_batches(config, (6, 2, 9), 1), [layout] * 3), moes, groups)


def test_blocks_in_rank_order_without_placement(make_groups: Make) -> None:
    config = model.Config(3, 8, 3, 64)
    moes = all_to_alls(make_groups(3), config)
    assert [list(moe.local_experts) for moe in moes] == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize("alignment", [1, 2, 7, 64])
def test_alignment(make_groups: Make, alignment: int) -> None:
    config = model.Config(2, 5, 2, 32, alignment=alignment)
    groups = make_groups(2)
    moes = all_to_alls(groups, config)
    scenario = Scenario(config, make_batches(config, (9, 6), 1), ["contiguous"] * 2)

    def step(rank: int) -> None:
        got = moes[rank].dispatch(**scenario.arguments(rank))
        scenario.check(rank, got)
        assert all(start % alignment == 0 for start in got.offsets.tolist())
        scenario.check_y(rank, moes[rank].combine(**scenario.combine_arguments(rank, got)))

    on_ranks(groups, step)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_host_counts_gives_exact_sizes(make_groups: Make, layout: str) -> None:
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG)
    scenario = Scenario(CONFIG, make_batches(CONFIG, (6, 0, 9), 1), [layout] * 3)

    def step(rank: int) -> None:
        got = moes[rank].dispatch(**scenario.arguments(rank, host_counts=True))
        scenario.check(rank, got)
        assert tuple(got.x.shape[:-1]) == scenario.unpacked(rank, scenario.tight_capacity(rank)).shape
        scenario.check_y(rank, moes[rank].combine(**scenario.combine_arguments(rank, got)))

    on_ranks(groups, step)


def test_num_tokens_takes_a_part_of_the_batch(make_groups: Make) -> None:
    """A padded batch: only the first num_tokens rows are sent, and y has rows for them."""
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG)
    tokens = (6, 0, 9)
    scenario = Scenario(CONFIG, make_batches(CONFIG, tokens, 1), ["contiguous"] * 3)

    def step(rank: int) -> None:
        batch = scenario.batches[rank]
        x = torch.full((12, 64), torch.nan, dtype=torch.bfloat16)
        x[: tokens[rank]] = harness.tensor(batch.x, "bf16")
        ids = torch.zeros(12, 3, dtype=torch.int32)
        ids[: tokens[rank]] = torch.from_numpy(batch.ids)
        weights = torch.full((12, 3), torch.nan)
        weights[: tokens[rank]] = torch.from_numpy(batch.weights)
        got = moes[rank].dispatch(x, ids, weights, num_tokens=tokens[rank], layout="contiguous")
        scenario.check(rank, got)
        y = moes[rank].combine(scenario.expert_out(rank, got.x.shape[:-1]), got)
        scenario.check_y(rank, y[: tokens[rank]])

    on_ranks(groups, step)


@pytest.mark.parametrize("y_dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("out_dtype", ["f32", "f16", "bf16"])
def test_other_dtypes_of_expert_out_and_y(make_groups: Make, out_dtype: str, y_dtype: str) -> None:
    groups = make_groups(2)
    config = model.Config(2, 4, 3, 48)
    moes = all_to_alls(groups, config)
    for layout in ("contiguous", "rows"):
        batches = make_batches(config, (5, 3), 1)
        run_all(Scenario(config, batches, [layout] * 2, out_dtype=out_dtype, y_dtype=y_dtype), moes, groups)


def test_combine_writes_into_out(make_groups: Make) -> None:
    groups = make_groups(2)
    config = model.Config(2, 4, 3, 48)
    moes = all_to_alls(groups, config)
    scenario = Scenario(config, make_batches(config, (5, 3), 1), ["contiguous"] * 2)

    def step(rank: int) -> None:
        got = moes[rank].dispatch(**scenario.arguments(rank))
        wide = torch.full((scenario.batches[rank].tokens + 2, 96), 7.0, dtype=torch.bfloat16)
        out = wide[1:-1, 16:64]  # rows apart: only what was asked for is written
        y = moes[rank].combine(scenario.expert_out(rank, got.x.shape[:-1]), got, out=out)
        assert y.data_ptr() == out.data_ptr()
        scenario.check_y(rank, out)
        wide[1:-1, 16:64] = 7.0
        assert (wide == 7.0).all()

    on_ranks(groups, step)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dispatch_writes_into_out(make_groups: Make, layout: str) -> None:
    groups = make_groups(2)
    config = model.Config(2, 4, 3, 48)
    moes = all_to_alls(groups, config)
    scenario = Scenario(config, make_batches(config, (5, 3), 1), [layout] * 2)
    shapes = {"rows": (40,), "by_rank": (2, 9), "contiguous": (60,), "masked": (2, 20)}

    def step(rank: int) -> None:
        out = torch.full((*shapes[layout], 48), 7.0, dtype=torch.bfloat16)
        got = moes[rank].dispatch(**scenario.arguments(rank, out=out))
        assert got.x.data_ptr() == out.data_ptr()
        scenario.check(rank, got)
        scenario.check_y(rank, moes[rank].combine(**scenario.combine_arguments(rank, got)))

    on_ranks(groups, step)


def test_outputs_are_never_views_of_a_region(make_groups: Make) -> None:
    """What a dispatch gave stays as it is while later calls overwrite every slot."""
    groups = make_groups(2)
    config = model.Config(2, 4, 3, 48)
    moes = all_to_alls(groups, config)
    first = Scenario(config, make_batches(config, (5, 3), 1), ["contiguous", "rows"])
    later = [Scenario(config, make_batches(config, (5, 3), s), ["contiguous", "rows"]) for s in range(2, 6)]

    def step(rank: int) -> None:
        got = moes[rank].dispatch(**first.arguments(rank))
        y = moes[rank].combine(**first.combine_arguments(rank, got))
        for scenario in later:
            scenario.run(rank, moes[rank])
        first.check(rank, got)
        first.check_y(rank, y)

    on_ranks(groups, step)


def test_lanes_are_apart(make_groups: Make) -> None:
    """Two micro-batches, each half of one between the halves of the other, and threads on both lanes at once."""
    groups = make_groups(2)
    config = model.Config(2, 4, 3, 48)
    moes = all_to_alls(groups, config, lanes=3)
    a = Scenario(config, make_batches(config, (5, 3), 1), ["contiguous"] * 2)
    b = Scenario(config, make_batches(config, (2, 9), 2), ["rows"] * 2)

    def overlapped(rank: int) -> None:
        moe = moes[rank]
        moe.dispatch_send(**a.arguments(rank, lane=0))
        moe.dispatch_send(**b.arguments(rank, lane=2))
        got_b = moe.dispatch_recv(lane=2)
        got_a = moe.dispatch_recv(lane=0)
        a.check(rank, got_a)
        b.check(rank, got_b)
        moe.combine_send(**a.combine_arguments(rank, got_a))
        moe.combine_send(**b.combine_arguments(rank, got_b))
        b.check_y(rank, moe.combine_recv(got_b))
        a.check_y(rank, moe.combine_recv(got_a))

    for _ in range(3):
        on_ranks(groups, overlapped)

    harness.together(
        groups,
        [
            lambda rank=rank, lane=lane: steps(moes[rank], rank, lane, (a, b))  # type: ignore[misc]
            for rank in range(2)
            for lane in range(3)
        ],
    )


def test_what_one_object_left_in_a_lane_is_cleared_by_another(make_groups: Make) -> None:
    """Two AllToAlls share the lanes of their group: a dispatch, and a combine, that were sent and never received."""
    groups = make_groups(2)
    config = model.Config(2, 4, 3, 48)
    one, other = all_to_alls(groups, config), all_to_alls(groups, replace(config, num_experts=6))
    a = Scenario(config, make_batches(config, (5, 3), 1), ["contiguous", "rows"])
    more = replace(config, num_experts=6)
    b = Scenario(more, make_batches(more, (2, 9), 2), ["rows", "masked"])

    def step(rank: int) -> None:
        for _ in range(2):
            one[rank].dispatch_send(**a.arguments(rank))
            b.run(rank, other[rank])
            with pytest.raises(ept.InvalidArgument, match="no dispatch"):
                one[rank].dispatch_recv()
            got = one[rank].dispatch(**a.arguments(rank))
            one[rank].combine_send(**a.combine_arguments(rank, got))
            b.run(rank, other[rank], halves=True)
            with pytest.raises(ept.InvalidArgument, match="no combine"):
                one[rank].combine_recv(got)

    on_ranks(groups, step)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_default_device_of_torch_changes_nothing(make_groups: Make, layout: str) -> None:
    """Servers set it: what a call makes is where the AllToAll is all the same."""
    groups = make_groups(2)
    moes = all_to_alls(groups, replace(CONFIG, world=2))
    scenario = Scenario(
        replace(CONFIG, world=2),
        make_batches(replace(CONFIG, world=2), (5, 3), 1),
        [layout] * 2,
        row_weights=layout in ("rows", "by_rank"),
    )

    def step(rank: int) -> None:
        given = scenario.arguments(rank)
        with torch.device("meta"):
            got = moes[rank].dispatch(**given)
        scenario.check(rank, got)
        given = scenario.combine_arguments(rank, got)
        with torch.device("meta"):
            result = moes[rank].combine(**given)
            assert groups[rank].fault.device.type == groups[rank].active_mask.device.type == harness.DEVICE
        scenario.check_y(rank, result[0] if isinstance(result, tuple) else result)

    on_ranks(groups, step)


def steps(moe: ept.AllToAll, rank: int, lane: int, scenarios: tuple[Scenario, Scenario]) -> None:
    for step in range(6):
        scenarios[(step + lane) % 2].run(rank, moe, lane=lane, halves=step % 3 == 0)


@pytest.mark.parametrize("halves", [False, True])
def test_halves_equal_the_whole(make_groups: Make, halves: bool) -> None:
    groups = make_groups(3, adversary=9)
    moes = all_to_alls(groups, CONFIG)
    for step in range(4):
        scenario = Scenario(CONFIG, make_batches(CONFIG, (6, 2, 9), step), ["contiguous", "rows", "masked"])
        run_all(scenario, moes, groups, halves=halves)


def test_row_weights_with_late_weights_of_a_second_combine(make_groups: Make) -> None:
    """Backward's order: combine, then a combine of the same routing that carries router gradients."""
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG)
    plain = Scenario(CONFIG, make_batches(CONFIG, (6, 2, 9), 1), ["rows"] * 3)
    carried = Scenario(CONFIG, plain.batches, ["rows"] * 3, row_weights=True, salt=1)

    def step(rank: int) -> None:
        got = moes[rank].dispatch(**plain.arguments(rank))
        plain.check_y(rank, moes[rank].combine(**plain.combine_arguments(rank, got)))
        y, weights = moes[rank].combine(**carried.combine_arguments(rank, got))
        carried.check_y(rank, y)
        same_bits(weights, carried.expected_row_weights[rank], "f32", f"rank {rank}: row weights")

    on_ranks(groups, step)
