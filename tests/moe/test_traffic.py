# SPDX-License-Identifier: Apache-2.0
"""Bytes and writes that the plugin saw equal what the routing says, exactly: a token goes to a rank once, a peer gets
one write a phase, and nothing else is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import moe_model as model
import numpy as np
import pytest
from harness import Scenario, all_to_alls, make_batches, on_ranks, run_all

import eptransport as ept

Make = Callable[..., list[Any]]


def counted(group: ept.Group) -> model.Traffic:
    rails = [rail.counters for rail in group.engine.rails()]
    return model.Traffic(sum(c.tx_operations for c in rails), sum(c.tx_bytes for c in rails))


def settled(groups: list[ept.Group]) -> list[model.Traffic]:
    """All that was posted is out; grants of credit (zero bytes, one operation for 64) are too rare to show here."""
    on_ranks(groups, lambda rank: groups[rank].engine.quiesce(scope="local"))
    return [counted(group) for group in groups]


def scale_bytes(config: model.Config) -> int:
    blocks = -(-config.hidden // model.BLOCK)
    return 0 if config.sent != "e4m3" else blocks * (4 if config.scale_format == "fp32" else 1)


def predicted(scenario: Scenario, source: int) -> model.Traffic:
    config = scenario.config
    payload = config.hidden * np.dtype(model.RAW[config.sent]).itemsize
    return model.dispatch_traffic(
        config, scenario.arrived, source, payload, scale_bytes(config)
    ) + model.combine_traffic(config, scenario.arrived, source, scenario.row_weights)


@pytest.mark.parametrize("backend", ["loopback", "tcp"])
@pytest.mark.parametrize("dtype", ["bf16", "e4m3"])
def test_bytes_and_messages_are_as_predicted(make_groups: Make, backend: str, dtype: str) -> None:
    config = model.Config(4, 16, 6, 272, "bf16", dtype)
    groups = make_groups(4, backend=backend, credits=1024, **harness.BY_ENGINE)
    moes = all_to_alls(groups, config)
    before = settled(groups)
    total = [model.Traffic()] * 4
    for step, tokens in enumerate([(9, 4, 0, 31), (0, 0, 0, 0), (1, 32, 32, 2)]):
        scenario = Scenario(config, make_batches(config, tokens, step, skew=1.0), ["contiguous"] * 4)
        run_all(scenario, moes, groups, halves=step == 1)
        total = [total[r] + predicted(scenario, r) for r in range(4)]
    after = settled(groups)
    for rank in range(4):
        seen = model.Traffic(after[rank].messages - before[rank].messages, after[rank].bytes - before[rank].bytes)
        assert seen == total[rank], f"rank {rank} on {backend}"
        assert total[rank].messages == 3 * 2 * 3  # steps, phases, peers


def test_the_dedup_saves_what_it_should() -> None:
    """The prediction would be another without it, so the test above can fail."""
    config = model.Config(4, 16, 6, 272)
    scenario = Scenario(config, make_batches(config, (9, 4, 0, 31), 0), ["contiguous"] * 4)
    pairs = sum(sum(arrived.counts) for arrived in scenario.arrived)
    rows = sum(len(arrived.rows) for arrived in scenario.arrived)
    assert rows < 0.8 * pairs


def test_late_weights_and_row_weights_cost_what_they_weigh(make_groups: Make) -> None:
    config = model.Config(3, 8, 3, 64)
    groups = make_groups(3, **harness.BY_ENGINE)
    moes = all_to_alls(groups, config)
    batches = make_batches(config, (6, 2, 9), 1)
    late = [np.random.default_rng((5, r)).random(b.ids.shape).astype(np.float32) for r, b in enumerate(batches)]
    plain = Scenario(config, batches, ["contiguous"] * 3)
    weighed_late = Scenario(config, batches, ["contiguous"] * 3, late=late)
    carrying = Scenario(config, batches, ["rows"] * 3, row_weights=True)
    seen: list[list[model.Traffic]] = []
    for scenario in (plain, weighed_late, carrying):
        before = settled(groups)
        run_all(scenario, moes, groups)
        after = settled(groups)
        seen.append(
            [model.Traffic(a.messages - b.messages, a.bytes - b.bytes) for a, b in zip(after, before, strict=True)]
        )
    for rank in range(3):
        assert seen[0][rank] == predicted(plain, rank)
        rows = sum(model.row_count(plain.arrived, rank, t) for t in range(3) if t != rank)
        weights = model.align(4 * 3, 16)
        messages = seen[1][rank].messages - seen[0][rank].messages
        assert messages == 2  # one more write a peer
        headers = sum(model.dispatch_header_bytes(len(config.local_experts(t))) for t in range(3) if t != rank)
        assert seen[1][rank].bytes - seen[0][rank].bytes in (rows * weights + 2 * 128, rows * weights + headers)
        assert seen[2][rank] == predicted(carrying, rank)


def test_a_shared_rank_costs_nothing_on_the_wire(make_groups: Make) -> None:
    """What stays on its rank doesn't touch the network."""
    config = model.Config(2, 4, 2, 64)
    groups = make_groups(2, **harness.BY_ENGINE)
    moes = all_to_alls(groups, config)
    batches = [harness.make_batch(config, 9, r, ids=np.full((9, 2), 2 * r)) for r in range(2)]
    scenario = Scenario(config, batches, ["contiguous"] * 2)
    before = settled(groups)
    run_all(scenario, moes, groups)
    after = settled(groups)
    header = model.dispatch_header_bytes(2) + model.HEADER_BYTES
    for a, b in zip(after, before, strict=True):
        assert (a.messages - b.messages, a.bytes - b.bytes) == (2, header)


def test_stats_agree_with_the_plugin(make_groups: Make) -> None:
    config = model.Config(3, 8, 3, 64)
    groups = make_groups(3, **harness.BY_ENGINE)
    moes = all_to_alls(groups, config)
    before = settled(groups)
    for step in range(5):
        run_all(Scenario(config, make_batches(config, (6, 2, 9), step), ["masked"] * 3), moes, groups)
    after = settled(groups)
    for rank in range(3):
        stats = moes[rank].stats()
        assert sum(stats.messages) == after[rank].messages - before[rank].messages
        assert sum(stats.bytes) == after[rank].bytes - before[rank].bytes
        assert list(stats.generations) == [5, 5]
        assert stats.ack_waits == 0  # plain pairs never wait for a slot
        assert stats.acks == 0
