# SPDX-License-Identifier: Apache-2.0
"""The same bits on every run, under every schedule, with any number of threads, and whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import moe_model as model
import numpy as np
import pytest
import torch
from harness import LAYOUTS, Scenario, all_to_alls, make_batches, run_all

Make = Callable[..., list[Any]]
CONFIG = model.Config(3, 9, 4, 208, "bf16", "e4m3")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_to_run(make_groups: Make, layout: str) -> None:
    batches = make_batches(CONFIG, (9, 30, 14), 1)
    scenario = Scenario(CONFIG, batches, [layout] * 3)
    first: list[torch.Tensor] | None = None
    for seed, threads in ((None, 1), (1, 1), (2, 2), (3, 5)):
        groups = make_groups(3, adversary=seed, threads=threads)
        moes = all_to_alls(groups, CONFIG)
        for _ in range(2):
            got = run_all(scenario, moes, groups)
            first = first or got
            assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(first, got, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_does_not_see_its_batch(make_groups: Make, layout: str) -> None:
    """One token alone, then in the midst of others, at another place, with other tokens on the other ranks."""
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG)
    probe = harness.make_batch(CONFIG, 1, 77, none=0, repeat=0)
    seen = []
    for before, others in ((0, 0), (3, 5), (20, 11)):
        batches = make_batches(CONFIG, (before + 4, others, others + 2), before)
        batches[0].x[before] = probe.x[0]
        batches[0].ids[before] = probe.ids[0]
        batches[0].weights[before] = probe.weights[0]
        got = run_all(Scenario(CONFIG, batches, [layout] * 3), moes, groups)
        seen.append(got[0][before].view(torch.int16).clone())
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_ranks_are_added_in_rank_order_and_places_in_order(make_groups: Make) -> None:
    """Numbers whose sum depends on the order: the reference has the one we promise, and another order shows."""
    config = model.Config(3, 6, 6, 64, "f32", combine_dtype="f32")
    groups = make_groups(3)
    moes = all_to_alls(groups, config)
    batches = make_batches(config, (8, 8, 8), 4, none=0, repeat=0)
    for batch in batches:
        batch.weights = (
            np.random.default_rng(3).choice([1e8, -1e8, 1.0, 3e-3, -7.0], batch.ids.shape).astype(np.float32)
        )
    right = Scenario(config, batches, ["contiguous"] * 3)
    run_all(right, moes, groups)

    backwards = [model.Arrived(a.rank, a.local, a.rows) for a in right.arrived]
    tight = [right.unpacked(r, 0) for r in range(3)]
    outs = [right.out_bits(r, tight[r]) for r in range(3)]
    mirrored = model.Config(3, 6, 6, 64, "f32", placement=(2, 2, 1, 1, 0, 0))
    y, _ = model.combine(mirrored, batches, backwards[::-1], tight[::-1], outs[::-1])
    assert any((y[r] != right.expected[r]).any() for r in range(3)), "these inputs can't tell one order from another"


def test_fused_multiply_add_shows(make_groups: Make) -> None:
    """The inputs of these tests do tell a fused multiply-add from a product and a sum."""
    config = model.Config(2, 4, 4, 64, "f32", combine_dtype="f32")
    scenario = Scenario(config, make_batches(config, (8, 8), 4), ["contiguous"] * 2)
    fused = model.fma
    try:
        model.fma = lambda a, b, c: np.float32(a) * b + c  # type: ignore[assignment]
        apart = Scenario(config, scenario.batches, ["contiguous"] * 2)
    finally:
        model.fma = fused
    assert (apart.expected[0] != scenario.expected[0]).any()
    groups = make_groups(2)
    run_all(scenario, all_to_alls(groups, config), groups)
