# SPDX-License-Identifier: Apache-2.0
"""A group on a GPU that sleeps: its memory is given back, and graphs that were captured before give, replayed after it,
the bits that they gave. Calls and replays in between harm nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gpu_rank
import moe_model as model
import pytest
import torch
from gpu_harness import Scenario, World, run_all
from gpu_rank import Captured, free_bytes
from harness import LAYOUTS, make_batches

import eptransport as ept

Make = Callable[..., World]

# Receive halves of 32 MiB a lane and rank: what a GPU's allocator keeps for itself is small beside it.
LARGE = model.Config(2, 8, 2, 4096)
TOKENS = 512


def asleep(world: World, *, resume: bool = False) -> None:
    world.on_ranks(lambda rank: world.groups[rank].resume() if resume else world.groups[rank].suspend())


@pytest.mark.parametrize(
    ("share", "intra", "gpu"),
    [("ipc", None, 0), ("descriptors", None, 0), ("auto", "off", 0), ("auto", "off", 1)],
    ids=["cuMemAlloc", "virtual", "pinned", "on the GPU"],
)
def test_graphs_are_replayed_after_it(make_world: Make, share: Any, intra: str | None, gpu: int) -> None:
    world = make_world(2, gpu_share=share, intra=intra, options={"loopback.gpu": gpu})
    moes = world.all_to_alls(LARGE, max_tokens=TOKENS)
    scenario = Scenario(LARGE, make_batches(LARGE, (TOKENS, 300), 1), ["rows", "contiguous"])
    run_all(scenario, moes, world)
    graphs = []
    for rank, stream in enumerate(world.streams):
        with torch.cuda.stream(stream):
            graphs.append(Captured(moes[rank], LARGE, TOKENS, seed=rank))
    wanted = world.on_ranks(lambda rank: graphs[rank].replay())
    plan = moes[0].plan_
    # What peers write into; over the engine, on the GPU, all four halves of the lane beside it.
    receives = 2 * (plan.dispatch_recv + plan.combine_recv)
    lanes = 2 * (receives + (plan.arena_bytes if gpu else 0))
    for _ in range(2):
        registered = [group.engine.info().registered_bytes for group in world.groups]
        torch.cuda.synchronize()
        before = free_bytes()
        asleep(world)
        given = free_bytes() - before
        print(f"{given / 2**20:.0f} MiB of {lanes / 2**20:.0f} are given back")
        assert given > 0.9 * lanes
        for group, bytes_ in zip(world.groups, registered, strict=True):
            assert bytes_ - group.engine.info().registered_bytes >= (plan.arena_bytes if intra else 0)
            assert group.metrics().suspended

        def calls(rank: int) -> None:
            for call in (
                lambda: moes[rank].dispatch(**scenario.arguments(rank)),
                lambda: moes[rank].check(),
                lambda: moes[rank].reset(),
            ):
                with pytest.raises(ept.Suspended, match=f"rank {rank}'s group is suspended"):
                    call()
            blank = graphs[rank].replay()  # a slip: nobody can tell a graph
            assert not blank.any()
            assert int(graphs[rank].rows) == 0

        world.on_ranks(calls)
        assert int(world.groups[0].fault) == 0
        sleeping = free_bytes()
        asleep(world, resume=True)
        assert sleeping - free_bytes() > 0.9 * lanes
        assert [group.engine.info().registered_bytes for group in world.groups] == registered
        for rank, y in enumerate(world.on_ranks(lambda rank: graphs[rank].replay())):
            assert torch.equal(y, wanted[rank])
        run_all(scenario, moes, world)
        for seed in range(4):
            run_all(Scenario(LARGE, make_batches(LARGE, (9, TOKENS), seed), [LAYOUTS[seed]] * 2), moes, world)


def test_what_was_sent_and_never_received(make_world: Make) -> None:
    """It is dropped, as by the next dispatch; a rank that doesn't come is waited for no longer than was asked."""
    config = model.Config(2, 6, 2, 64)
    world = make_world(2)
    moes = world.all_to_alls(config, max_tokens=8)
    scenario = Scenario(config, make_batches(config, (5, 6), 1), ["rows", "masked"])
    run_all(scenario, moes, world)

    def late(rank: int) -> None:
        began = time.monotonic()
        if rank == 0:
            with pytest.raises(ept.Timeout, match="to suspend the group"):
                world.groups[0].suspend(timeout=0.5)
            assert time.monotonic() - began < 20  # that of a step

    world.on_ranks(late)

    def run(rank: int) -> None:
        moes[rank].dispatch_send(**scenario.arguments(rank))
        world.groups[rank].suspend()
        world.groups[rank].resume()

    # A call that the other one didn't make counts as one here alone: both begin anew.
    world.on_ranks(lambda rank: moes[rank].reset())
    world.on_ranks(run)
    run_all(scenario, moes, world)


def test_steps_on_cpus_and_gpus(make_world: Make) -> None:
    config = model.Config(3, 6, 2, 64)
    world = make_world(3)
    devices = ["cuda", "cpu", "cuda"]
    moes = world.all_to_alls(config, devices, max_tokens=8)
    wanted = None
    for _ in range(3):
        y = world.on_ranks(lambda rank: gpu_rank.step(moes[rank], config, rank, devices[rank]))
        assert wanted is None or all(torch.equal(a, b) for a, b in zip(y, wanted, strict=True))
        wanted = y
        asleep(world)
        asleep(world, resume=True)


@pytest.mark.parametrize("share", ["ipc", "descriptors"])
def test_processes(spawn: Callable[..., list[Any]], share: str) -> None:
    """Memory that other processes had mapped is given back, and they map what comes."""
    for answer in spawn(2, gpu_rank.sleeps, share, LARGE, TOKENS):
        if isinstance(answer, Exception):
            raise answer
        assert answer == "mapped"
