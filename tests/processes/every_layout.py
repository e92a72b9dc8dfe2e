# SPDX-License-Identifier: Apache-2.0
"""What ranks that are processes do over one backend, for the tests of several: every layout, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import harness
import launch
import moe_model as model

import eptransport as ept

TOKENS = 24


def steps(
    rank: int, world: int, folder: str, held: list[Any], backend: str, options: dict[str, str], sent: str
) -> list[int]:
    """Each layout once on every rank, and all four at a time, by whole calls and by halves. Writes of this rank by
    rail."""
    settings = {"backend": backend, "options": options, "timeout_s": 120.0, "dead_s": 60.0}
    # Cut over the rails, as far as messages of this size can be.
    group = launch.open_group(rank, world, folder, stripe_bytes=4096, **settings)
    held.append(group)
    assert group.engine.plugin.name == backend
    config = model.Config(world, 2 * world + 1, 3, 272, "bf16", sent)
    moe = ept.AllToAll(
        group,
        num_experts=config.num_experts,
        top_k=config.top_k,
        hidden=config.hidden,
        max_tokens=TOKENS,
        lanes=2,
        dtype=harness.TORCH[config.dtype],
        dispatch_dtype=harness.TORCH[config.sent],
    )
    alike = [[layout] * world for layout in harness.LAYOUTS]
    mixed = [[harness.LAYOUTS[(r + turn) % 4] for r in range(world)] for turn in range(4)]
    for step, (layouts, halves) in enumerate(itertools.product(alike + mixed, (False, True))):
        tokens = [(7 * r + 5 * step) % (TOKENS + 1) for r in range(world)]
        scenario = harness.Scenario(config, harness.make_batches(config, tokens, step), layouts)
        scenario.run(rank, moe, lane=step % 2, halves=halves)
    moe.check()
    return [rail.counters.tx_operations for rail in group.engine.rails()]
