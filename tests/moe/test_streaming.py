# SPDX-License-Identifier: Apache-2.0
"""A batch that is longer than its region goes in chunks, within the budget, and nobody can tell from the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import moe_model as model
import numpy as np
import pytest
from harness import LAYOUTS, Scenario, all_to_alls, make_batches, on_ranks, run_all

import eptransport as ept

Make = Callable[..., list[Any]]
CONFIG = model.Config(3, 8, 3, 64)
TOKENS = (200, 3, 131)


def budget(config: model.Config, chunk_tokens: int) -> int:
    """Bytes of a lane that hold about so many tokens at once."""
    return int(harness.plan(config, max_tokens=chunk_tokens, lanes=1).lane_bytes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_tokens", [16, 64])
def test_streamed_equals_the_reference(make_groups: Make, layout: str, chunk_tokens: int) -> None:
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG, max_tokens=200, buffer_bytes=budget(CONFIG, chunk_tokens))
    assert moes[0].plan_.chunk_tokens < 200
    for step in range(2):
        run_all(Scenario(CONFIG, make_batches(CONFIG, TOKENS, step), [layout] * 3), moes, groups)


def test_streamed_equals_unstreamed_bit_for_bit(make_groups: Make) -> None:
    config = model.Config(3, 8, 3, 272, "bf16", "e4m3")
    scenario = Scenario(config, make_batches(config, TOKENS, 1), ["contiguous", "rows", "masked"])
    results = []
    for buffer_bytes in (None, budget(config, 16)):
        groups = make_groups(3)
        moes = all_to_alls(groups, config, max_tokens=200, buffer_bytes=buffer_bytes)
        results.append([harness.bits(y) for y in run_all(scenario, moes, groups)])
    for whole, streamed in zip(*results, strict=True):
        np.testing.assert_array_equal(whole, streamed)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_streamed_under_the_adversary(make_groups: Make, seed: int) -> None:
    groups = make_groups(3, adversary=seed)
    moes = all_to_alls(groups, CONFIG, max_tokens=200, buffer_bytes=budget(CONFIG, 16))
    late = [np.random.default_rng((5, r)).random((n, 3)).astype(np.float32) for r, n in enumerate(TOKENS)]
    batches = make_batches(CONFIG, TOKENS, seed)
    run_all(Scenario(CONFIG, batches, ["contiguous", "masked", "contiguous"]), moes, groups)
    run_all(Scenario(CONFIG, batches, ["contiguous"] * 3, late=late), moes, groups)
    run_all(Scenario(CONFIG, batches, ["rows"] * 3, row_weights=True), moes, groups)


def test_long_and_short_calls_alternate(make_groups: Make) -> None:
    """Which ranks have many tokens changes from call to call; a short call keeps its halves."""
    groups = make_groups(3)
    moes = all_to_alls(groups, CONFIG, max_tokens=200, buffer_bytes=budget(CONFIG, 16))
    for step, tokens in enumerate([(200, 200, 200), (1, 2, 3), (0, 0, 200), (8, 0, 8), (90, 91, 92)]):
        scenario = Scenario(CONFIG, make_batches(CONFIG, tokens, step), ["contiguous"] * 3)
        run_all(scenario, moes, groups, halves=max(tokens) <= 8)


def test_halves_of_a_long_batch_are_refused(make_groups: Make) -> None:
    """On the rank that asks for it, at once, before anything is sent; the group goes on."""
    groups = make_groups(2)
    config = model.Config(2, 4, 2, 64)
    moes = all_to_alls(groups, config, max_tokens=200, buffer_bytes=budget(config, 16))
    long = Scenario(config, make_batches(config, (150, 150), 1), ["contiguous"] * 2)

    def refused(rank: int) -> None:
        with pytest.raises(ept.EptError, match="150"):
            moes[rank].dispatch_send(**long.arguments(rank))

    on_ranks(groups, refused)
    run_all(long, moes, groups)


def test_a_budget_too_small_for_one_token_is_refused(make_groups: Make) -> None:
    groups = make_groups(2)
    with pytest.raises(ept.EptError, match="buffer_bytes"):
        all_to_alls(groups, model.Config(2, 4, 2, 64), buffer_bytes=4096)


def test_buffers_stay_within_the_budget(make_groups: Make) -> None:
    groups = make_groups(2)
    config = model.Config(2, 4, 2, 512)
    limit = 256 << 10
    moes = all_to_alls(groups, config, max_tokens=4096, buffer_bytes=limit, lanes=2)
    assert moes[0].plan_.lane_bytes <= limit
    assert moes[0].plan_.arena_bytes <= 2 * limit
    scenario = Scenario(config, make_batches(config, (150, 220), 1), ["contiguous"] * 2)
    run_all(scenario, moes, groups)
