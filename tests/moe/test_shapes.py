# SPDX-License-Identifier: Apache-2.0
"""No list of shapes: any top-k to 32, any hidden of a multiple of 16 bytes, any number of ranks, experts and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import moe_model as model
import numpy as np
import pytest
import torch
from harness import LAYOUTS, Scenario, all_to_alls, make_batches, run_all

import eptransport as ept

Make = Callable[..., list[Any]]


@pytest.mark.parametrize("top_k", [*range(1, 33)])
def test_every_top_k(make_groups: Make, top_k: int) -> None:
    config = model.Config(2, max(3, top_k), top_k, 16)
    groups = make_groups(2)
    moes = all_to_alls(groups, config, max_tokens=6)
    layouts = [LAYOUTS[top_k % 4], LAYOUTS[(top_k + 1) % 4]]
    run_all(Scenario(config, make_batches(config, (6, 2), top_k), layouts), moes, groups)


@pytest.mark.parametrize(
    ("dtype", "sent", "hidden"),
    [("bf16", "bf16", 8), ("bf16", "bf16", 24), ("f32", "f32", 4), ("f32", "f32", 12), ("f16", "f16", 1000),
     ("bf16", "e4m3", 16), ("bf16", "e4m3", 144), ("bf16", "e4m3", 1040), ("f32", "e4m3", 1152),
     ("bf16", "bf16", 7168)],
)  # fmt: skip
def test_any_hidden_of_16_bytes(make_groups: Make, dtype: str, sent: str, hidden: int) -> None:
    config = model.Config(2, 5, 3, hidden, dtype, sent)
    groups = make_groups(2)
    moes = all_to_alls(groups, config, max_tokens=6)
    run_all(Scenario(config, make_batches(config, (6, 2), hidden), ["contiguous", "rows"]), moes, groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_the_caches_hold(make_groups: Make, layout: str) -> None:
    """From 4 MiB of output on, rows are written past the caches."""
    config = model.Config(2, 4, 4, 7168)
    groups = make_groups(2)
    moes = all_to_alls(groups, config, max_tokens=160)
    batches = make_batches(config, (160, 150), 5)
    rows = sum(int((batch.ids >= 0).any(axis=1).sum()) for batch in batches)
    assert rows * 7168 * 2 >= 4 << 20
    run_all(Scenario(config, batches, [layout] * 2), moes, groups)


@pytest.mark.parametrize(("world", "experts"), [(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (5, 13), (7, 100), (8, 256)])
def test_any_number_of_ranks_and_experts(make_groups: Make, world: int, experts: int) -> None:
    """Also fewer experts than ranks: a rank that holds none is an ordinary one."""
    config = model.Config(world, experts, min(experts, 3), 32)
    groups = make_groups(world)
    moes = all_to_alls(groups, config, max_tokens=5)
    assert sum(len(moe.local_experts) for moe in moes) == experts
    tokens = [(3 * rank + 1) % 6 for rank in range(world)]
    for layout in LAYOUTS:
        run_all(Scenario(config, make_batches(config, tokens, 1), [layout] * world), moes, groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nobody_has_tokens(make_groups: Make, layout: str) -> None:
    config = model.Config(3, 4, 2, 32)
    groups = make_groups(3)
    moes = all_to_alls(groups, config)
    for halves in (False, True):
        run_all(Scenario(config, make_batches(config, (0, 0, 0), 1), [layout] * 3), moes, groups, halves=halves)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_without_any_expert(make_groups: Make, layout: str) -> None:
    """They go nowhere, and their sum is zero."""
    config = model.Config(2, 4, 2, 32)
    groups = make_groups(2)
    moes = all_to_alls(groups, config)
    scenario = Scenario(config, make_batches(config, (6, 5), 1, none=1.0), [layout] * 2)
    for y in run_all(scenario, moes, groups):
        assert (y == 0).all()
    batches = make_batches(config, (6, 5), 2, none=0.8)
    assert any((batch.ids < 0).all(axis=1).any() for batch in batches)
    run_all(Scenario(config, batches, [layout] * 2), moes, groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeated_ids(make_groups: Make, layout: str) -> None:
    """An id that stands there k times is weighed k times; the row still goes once."""
    config = model.Config(2, 4, 5, 32)
    groups = make_groups(2)
    moes = all_to_alls(groups, config)
    batches = make_batches(config, (6, 5), 1, repeat=0.7)
    batches[0].ids[0] = 3
    scenario = Scenario(config, batches, [layout] * 2)
    assert sum(1 for row in scenario.arrived[1].rows if (row.source, row.token) == (0, 0)) == 1
    run_all(scenario, moes, groups)


def test_repeated_ids_in_the_masked_layout(make_groups: Make) -> None:
    """An expert's room is for tokens whose ids differ, unless max_rows says more; a row too many is an error."""
    config = model.Config(2, 2, 4, 32)
    groups = make_groups(2)
    moes = all_to_alls(groups, config, max_tokens=3)
    batches = [harness.make_batch(config, 3, r, ids=np.zeros((3, 4), np.int64)) for r in range(2)]
    scenario = Scenario(config, batches, ["masked"] * 2)
    run_all(scenario, moes, groups, max_rows=24)
    run_all(scenario, moes, groups, host_counts=True)

    # A GPU says how many there are at least, when a peer's rows find no room.
    said = "received 24 rows" if harness.DEVICE == "cpu" else "received (12|24) rows or more; the outputs hold 6"

    def step(rank: int) -> None:
        if rank == 0:
            with pytest.raises(ept.CapacityError, match=said):
                moes[rank].dispatch(**scenario.arguments(rank))
        else:
            moes[rank].dispatch(**scenario.arguments(rank))

    harness.on_ranks(groups, step)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_to_one_expert(make_groups: Make, layout: str) -> None:
    """The worst skew that max_tokens allows, with the default outputs: nothing is dropped."""
    config = model.Config(3, 5, 1, 32)
    groups = make_groups(3)
    moes = all_to_alls(groups, config, max_tokens=20)
    for target in (0, 4):
        batches = [harness.make_batch(config, 20, (1, r), ids=np.full((20, 1), target)) for r in range(3)]
        run_all(Scenario(config, batches, [layout] * 3), moes, groups)


def test_full_batches_to_every_rank(make_groups: Make) -> None:
    """max_tokens on every rank and each token to every rank: the regions are exactly full."""
    config = model.Config(4, 4, 4, 32)
    groups = make_groups(4)
    moes = all_to_alls(groups, config, max_tokens=17)
    batches = [harness.make_batch(config, 17, (2, r), none=0, repeat=0) for r in range(4)]
    for step in range(4):
        run_all(Scenario(config, batches, [LAYOUTS[step]] * 4), moes, groups, halves=step % 2 == 0)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_id_types_and_strides(make_groups: Make, ids_dtype: torch.dtype) -> None:
    """Rows apart in memory, ids and weights that are columns of wider tensors."""
    config = model.Config(2, 6, 3, 32)
    groups = make_groups(2)
    moes = all_to_alls(groups, config)
    scenario = Scenario(config, make_batches(config, (9, 4), 1), ["contiguous"] * 2)

    def step(rank: int) -> None:
        plain = harness.arguments(config, scenario.batches[rank], ids_dtype)
        x = torch.full((scenario.batches[rank].tokens, 64), torch.nan, dtype=torch.bfloat16)[:, 8:40]
        x.copy_(plain["x"])
        ids = torch.full((scenario.batches[rank].tokens, 7), 99, dtype=ids_dtype)[:, 2:5]
        ids.copy_(plain["topk_ids"])
        weights = torch.full((scenario.batches[rank].tokens, 8), torch.nan)[:, 1:4]
        weights.copy_(plain["topk_weights"])
        got = moes[rank].dispatch(x, ids, weights)
        scenario.check(rank, got)
        out = scenario.expert_out(rank, got.x.shape[:-1])
        apart = torch.full((len(out), 64), torch.nan, dtype=torch.bfloat16)[:, 16:48]
        apart.copy_(out)
        scenario.check_y(rank, moes[rank].combine(apart, got))

    harness.on_ranks(groups, step)
