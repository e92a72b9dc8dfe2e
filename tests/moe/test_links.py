# SPDX-License-Identifier: Apache-2.0
"""Connections between ranks break all the time, and no step notices: every bit is as on a network that holds."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import harness
import moe_model as model
import pytest
from harness import Scenario, all_to_alls, make_batches, run_all
from relay import Detour, Relay

import eptransport as ept
from eptransport.info import RailCounters

WORLD = 3
RECONNECTS = 12


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay(seed=3, every_s=0.25)
    yield made
    made.close()


def counters(groups: list[ept.Group]) -> list[RailCounters]:
    return [rail.counters for group in groups for rail in group.engine.rails()]


def test_steps_stay_right_while_connections_break(relay: Relay) -> None:
    config = model.Config(WORLD, 12, 4, 1024)
    store = Detour(relay)
    # Far more than any wait of this test: what is waited for is only ever another connection.
    settings = harness.settings(backend="tcp", timeout_s=90.0, dead_s=60.0, **harness.BY_ENGINE)
    make = functools.partial(ept.Group, settings, store=store, world_size=WORLD)
    groups = harness.together([], [functools.partial(make, rank=rank) for rank in range(WORLD)])
    try:
        moes = all_to_alls(groups, config)
        relay.breaking.set()
        steps = itertools.count()
        while sum(each.reconnects for each in counters(groups)) < RECONNECTS:
            step = next(steps)
            tokens = [(step * 7 + 11 * rank) % 32 for rank in range(WORLD)]
            scenario = Scenario(config, make_batches(config, tokens, step), ["contiguous"] * WORLD)
            run_all(scenario, moes, groups, halves=step % 2 == 0)
        relay.breaking.clear()
        assert sum(each.errors for each in counters(groups)) == 0
        for moe in moes:
            moe.check()
    finally:
        relay.breaking.clear()
        harness.close(groups)
