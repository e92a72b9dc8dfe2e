# SPDX-License-Identifier: Apache-2.0
"""Ten thousand steps of mixed sizes, and engines that come and go: no memory, descriptor, thread or handle is left."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import pytest

from eptransport.backends import registry
from eptransport.conformance.world import GUARD, World, subject
from eptransport.engine import Write
from eptransport.errors import AccessDenied

STEPS, WARM_UP = 10_000, 2_000
GROWTH_BYTES = 6 << 20
"""A leak of 600 bytes a step is over it; what an allocator keeps varies by some MiB."""


def resident() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Steps:
    """Every kind of call, all handles given back in the step that took them."""

    def __init__(self, world: World) -> None:
        self.world, self.random = world, world.random
        self.routes = [world.route(source, 1 - source, 1 << 18, label=f"from {source}") for source in (0, 1)]
        self.counts = [0, 0]
        self.pending: list[Any] = []

    def one(self) -> None:
        number = self.random.randrange(2)
        route = self.routes[number]
        length = self.random.choice((0, 1, 64, 1000, 7168, 1 << 16, self.random.randint(1, 1 << 18)))
        kind = self.random.randrange(6)
        if kind < 2:
            self.pending.append(route.write(0, length))
            self.counts[number] += 1
        elif kind == 2:
            pages = self.random.choice((1, 3, 15, 200))
            self.pending.append(route.write_pages(64, [2 * page for page in range(pages)]))
            self.counts[number] += 1
        elif kind == 3:
            write = Write(route.peer, route.source_memory, route.region, length, signal=route.remote)
            self.pending.append(self.world.post(lambda: route.sender.scatter([write, write], timeout=0)))
            self.counts[number] += 2
        elif kind == 4:
            data = self.random.randbytes(self.random.choice((0, 8, 2000)))
            self.world.post(lambda: route.peer.send(data, tag=1, timeout=0))
            self.world.post(lambda: route.receiver.recv(tag=1, timeout=0 if self.world.inline else 10))
        else:
            self.handles(route)
        if len(self.pending) > 20:
            self.finish()

    def handles(self, route: Any) -> None:
        """New memory, region and signal, used, refused, and given back."""
        block, source = self.world.bytes(512 + 2 * GUARD), self.world.bytes(512)
        memory, local = route.receiver.register(block), route.sender.register(source)
        region = route.peer.import_region(memory.export(route.sender.rank, GUARD, 512))
        signal = route.receiver.signal(route.sender.rank, "short-lived")
        remote = route.peer.import_signal(signal.export())

        def write() -> Any:
            return route.peer.write(local, region, 512, signal=remote, timeout=0)

        first = self.world.post(write)
        self.world.until(lambda: signal.value == 1 and first.done, "the write is there")
        memory.revoke(route.sender.rank)
        second = self.world.post(write)
        self.world.until(lambda: second.done, "the refused write has ended")
        with pytest.raises(AccessDenied):
            second.wait(timeout=0)
        for handle in (remote, signal, region, local, memory):
            handle.close()

    def finish(self) -> None:
        self.world.until(
            lambda: (
                [route.signal.value for route in self.routes] == self.counts
                and all(transfer.done for transfer in self.pending)
            ),
            f"the signals reach {self.counts}",
        )
        self.pending.clear()


SUBJECTS = [("loopback", {}), ("loopback", {"adversary": "3", "delay": "4"}), ("tcp", {})]


@pytest.mark.parametrize(("name", "options"), SUBJECTS, ids=["loopback", "loopback-adversary", "tcp"])
def test_ten_thousand_steps_leave_nothing(name: str, options: dict[str, str]) -> None:
    found = registry(()).plugins[name]
    with World(subject(found, options), credits=256) as world:
        steps = Steps(world)
        for _ in range(WARM_UP):
            steps.one()
        steps.finish()
        world.settle()
        before = (resident(), descriptors(), threading.active_count(), [_held(engine) for engine in world.engines])
        for _ in range(STEPS):
            steps.one()
        steps.finish()
        world.settle()
        after = (resident(), descriptors(), threading.active_count(), [_held(engine) for engine in world.engines])
    grown = after[0] - before[0]
    assert grown < GROWTH_BYTES, f"{STEPS} steps took {grown} bytes, {grown / STEPS:.0f} a step"
    assert after[1:] == before[1:]


def _held(engine: Any) -> tuple[int, int, int, int]:
    """What an engine holds; chans of destroyed signals go on counting, so they aren't here."""
    info = engine.info()
    return info.registered_bytes, info.regions, info.signals, len(engine._native.keep)


@pytest.mark.parametrize(("name", "options"), SUBJECTS, ids=["loopback", "loopback-adversary", "tcp"])
def test_engines_that_come_and_go_leave_nothing(name: str, options: dict[str, str]) -> None:
    found = registry(()).plugins[name]

    def life(progress: str) -> None:
        with World(subject(found, options), progress=progress) as world:
            route = world.route(0, 1, 4096)
            transfer = route.write(0, 4096)
            world.until(lambda: transfer.done and route.signal.value == 1, "the write is there")

    for _ in range(10):
        life("inline")
        life("auto")
    before = (resident(), descriptors(), threading.active_count())
    for _ in range(60):
        life("inline")
        life("auto")
    after = (resident(), descriptors(), threading.active_count())
    grown = after[0] - before[0]
    assert grown < GROWTH_BYTES, f"120 pairs of engines took {grown} bytes, {grown // 120} a pair"
    assert after[1:] == before[1:], "descriptors or threads are left"
