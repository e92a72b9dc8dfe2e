# SPDX-License-Identifier: Apache-2.0
"""Masks on GPU ranks, beside what tests/moe/test_mask.py asserts there (tests/gpu/run same): captured graphs go on
without a rank that is masked between two replays, and with it when it is back."""

from __future__ import annotations

from collections.abc import Callable

import moe_model as model
import numpy as np
import pytest
import torch
from gpu_harness import Scenario, World, run_all
from harness import make_batches, on_some
from test_gpu_moe import Replayed

import eptransport as ept

Make = Callable[..., World]


@pytest.mark.parametrize("intra", [None, "off"])
def test_a_rank_is_masked_and_readmitted_between_replays(make_world: Make, intra: str | None) -> None:
    rng = np.random.default_rng(3)
    config = model.Config(4, 8, 2, 64)
    world = make_world(4, intra=intra)
    moes = world.all_to_alls(config, max_tokens=16)
    run_all(Scenario(config, make_batches(config, (4, 4, 4, 4), 0), ["rows"] * 4), moes, world)
    graphs = [[Replayed(world, r, moes[r], config, tokens, 0) for tokens in (16, 5)] for r in range(4)]

    def replay(ranks: list[int], steps: int) -> None:
        for _ in range(steps):
            picked = {r: graphs[r][int(rng.integers(0, 2))] for r in ranks}
            batches = {r: make_batches(config, [g.tokens], int(rng.integers(1 << 30)))[0] for r, g in picked.items()}
            for r, graph in picked.items():
                graph.load(batches[r], config)
            for graph in picked.values():
                with torch.cuda.stream(graph.stream):
                    graph.graph.replay()
            for r, graph in picked.items():
                graph.stream.synchronize()
                kept = model.Batch(batches[r].x, batches[r].ids.copy(), batches[r].weights)
                kept.ids[~np.isin(kept.ids // 2, ranks)] = -1  # two experts a rank
                assert torch.equal(graph.y.cpu(), graph.expected(kept, config)), r
                moes[r].check()

    for victim in (2, 0):
        left = [r for r in range(4) if r != victim]
        replay([0, 1, 2, 3], 4)

        def mask(rank: int, victim: int = victim) -> None:
            with torch.cuda.stream(world.streams[rank]):
                world.groups[rank].mask(victim)

        on_some(world.groups, left, mask)
        assert world.groups[left[0]].active_mask.tolist() == [int(r != victim) for r in range(4)]
        replay(left, 6)

        def back(rank: int, victim: int = victim, left: list[int] = left) -> None:
            with torch.cuda.stream(world.streams[rank]):
                if rank == victim:
                    with pytest.raises(ept.Masked):
                        moes[rank].dispatch(graphs[rank][0].x, graphs[rank][0].ids, layout="rows")
                    world.groups[rank].rejoin()
                else:
                    world.groups[rank].readmit(victim)
                moes[rank].reset()

        on_some(world.groups, [0, 1, 2, 3], back)
        replay([0, 1, 2, 3], 4)
        run_all(Scenario(config, make_batches(config, (4, 9, 0, 2), victim), ["masked"] * 4), moes, world)
