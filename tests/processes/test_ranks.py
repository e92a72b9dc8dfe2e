# SPDX-License-Identifier: Apache-2.0
"""Eight ranks as eight processes over TCP, against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import launch
import moe_model as model

import eptransport as ept


def steps(rank: int, world: int, folder: str, held: list[Any], config: model.Config, count: int, budget: int) -> int:
    group = launch.open_group(rank, world, folder, timeout_s=60.0)
    held.append(group)
    moe = ept.AllToAll(
        group,
        num_experts=config.num_experts,
        top_k=config.top_k,
        hidden=config.hidden,
        max_tokens=40,
        lanes=2,
        dtype=harness.TORCH[config.dtype],
        dispatch_dtype=harness.TORCH[config.sent],
        buffer_bytes=budget or None,
    )
    for step in range(count):
        tokens = [(7 * r + 5 * step) % 41 for r in range(world)]
        layouts = [harness.LAYOUTS[(r + step) % 4] for r in range(world)]
        scenario = harness.Scenario(config, harness.make_batches(config, tokens, step), layouts)
        scenario.run(rank, moe, lane=step % 2, halves=step % 3 == 0 and not budget)
    moe.check()
    return count


def test_eight_processes(tmp_path: Path) -> None:
    config = model.Config(8, 20, 4, 272, "bf16", "e4m3")
    assert launch.run(8, steps, tmp_path, config, 6, 0, limit_s=120) == [6] * 8


def test_streamed_between_processes(tmp_path: Path) -> None:
    config = model.Config(3, 8, 3, 272)
    budget = int(harness.plan(config, max_tokens=8, lanes=1).lane_bytes)
    assert launch.run(3, steps, tmp_path, config, 8, budget, limit_s=120) == [8] * 3
