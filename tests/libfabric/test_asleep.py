# SPDX-License-Identifier: Apache-2.0
"""A target whose proxy thread sleeps on what `arm` gave: a write wakes it, and none is slept through.

Nothing else would wake it: there is no heartbeat within the time that a test waits, and the test's own thread only
looks. So an event that is slept through once is never seen, and the test fails; how fast it is seen is not asked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from libfabrics import Libfabric, cases

from eptransport.backends import registry
from eptransport.conformance import subject
from eptransport.conformance.world import World

Spawn = Callable[..., list[Any]]

ROUNDS = 100
ROOM = 256 << 10
NEVER_S = 3600.0
"""Till a rank is taken for dead, so a third of it between two signs of life."""


def switches() -> int:
    """How often a thread of this process has gone to sleep so far."""
    total = 0
    for thread in os.listdir("/proc/self/task"):
        for line in Path(f"/proc/self/task/{thread}/status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total


def woken(_rank: int, _n: int, _folder: Path, options: dict[str, str], rails: int, seed: int) -> int:
    """Both ranks write to each other after pauses of any length, seldom while the other is awake. How often a thread
    went to sleep while nothing happened."""
    plugin = registry(()).plugins["libfabric"]
    under = replace(subject(plugin, {**options, "rails": str(rails)}, seed), patience_s=60.0)
    fields = {"spin_us": 0.0, "dead_s": NEVER_S, "stripe_bytes": 64 << 10}
    with World(under, progress="thread", **fields) as world:
        routes = [world.route(0, 1, ROOM), world.route(1, 0, ROOM)]
        written = [0, 0]
        for number in range(ROUNDS):
            time.sleep(world.random.choice((0, 0, 0.0001, 0.0005, 0.002, 0.01, 0.02)))
            transfers = []
            for way in world.random.sample((0, 1), world.random.choice((1, 1, 2))):
                for _ in range(world.random.choice((1, 1, 1, 3))):
                    length = world.random.choice((0, 1, 4096, 100_000, world.random.randrange(ROOM)))
                    transfers.append(routes[way].write(world.random.randrange(ROOM - length + 1), length))
                    written[way] += 1
            for way, route in enumerate(routes):
                world.until(route.reached(written[way]), f"round {number}: write {written[way]} of way {way} is seen")
            world.until(lambda: all(each.done for each in transfers), f"round {number}: its writes end")  # noqa: B023
        world.settle()
        for way, route in enumerate(routes):
            route.counted(written[way], "after all rounds")
            route.look("after all rounds")
        before = switches()
        time.sleep(0.5)
        return switches() - before


@pytest.mark.parametrize("rails", [1, 2])
@pytest.mark.parametrize("case", cases("tcp"))
def test_a_write_wakes_a_target_that_sleeps(case: tuple[Libfabric, str], spawn: Spawn, rails: int) -> None:
    release, provider = case
    (quiet,) = spawn(1, woken, release.options(provider), rails, 1 + rails)
    assert not isinstance(quiet, Exception), quiet
    # Looking every 50 us, which is what an engine does that has nothing to sleep on, would be thousands.
    assert quiet < 50, "the proxies did not sleep"
