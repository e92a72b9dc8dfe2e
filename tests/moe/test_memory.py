# SPDX-License-Identifier: Apache-2.0
"""`plan` before, registered bytes after: equal. One arena for all objects. Nothing leaks."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import moe_model as model
import numpy as np
import pytest
import torch
from harness import LAYOUTS, Scenario, all_to_alls, make_batches, plan, run_all

import eptransport as ept

Make = Callable[..., list[Any]]
MIB = 1 << 20
ON_GPU = harness.DEVICE != "cpu"


def beside_lanes(world: int, lanes: int) -> int:
    """What a rank has registered for AllToAlls beside their lanes: on a GPU values that its proxy writes from, 8 bytes
    a command, of which there is room for 64 or more, 8 a lane and rank."""
    commands = 64
    while commands < 8 * lanes * world:
        commands *= 2
    return 8 * commands if ON_GPU else 0


def test_receive_buffers_of_the_target_shape() -> None:
    """64 ranks, 128 tokens, hidden 7168, 256 experts, top-8, fp8 there, bf16 back, two slots: under 400 MiB a lane."""
    config = model.Config(64, 256, 8, 7168, "bf16", "e4m3")
    made = plan(config, max_tokens=128, lanes=1)
    receive = 2 * (made.dispatch_recv + made.combine_recv)
    print(f"receive {receive / MIB:.1f} MiB, send {2 * (made.dispatch_send + made.combine_send) / MIB:.1f} MiB a lane")
    assert receive < 400 * MIB
    # The formula of the design, with rows of wire.h: nothing beside it but headers.
    row = model.dispatch_row_bytes(7168, 56 * 4, 8)
    back = model.combine_row_bytes(7168 * 2, 8, row_weights=True)
    assert made.dispatch_row == row
    assert 64 * 128 * row <= made.dispatch_recv <= 64 * 129 * row
    assert 128 * 8 * back <= made.combine_recv <= (128 * 8 + 64) * back


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("lanes", [1, 3])
def test_registered_bytes_equal_the_plan(make_groups: Make, world: int, lanes: int) -> None:
    config = model.Config(world, 7, 3, 528, "bf16", "e4m3")
    groups = make_groups(world, **harness.BY_ENGINE)  # lanes that a GPU maps are not registered anywhere
    before = [group.engine.info().registered_bytes + beside_lanes(world, lanes) for group in groups]
    moes = all_to_alls(groups, config, max_tokens=24, lanes=lanes)
    made = plan(config, max_tokens=24, lanes=lanes)
    page = os.sysconf("SC_PAGE_SIZE")
    assert made.arena_bytes == lanes * made.lane_bytes
    assert made.lane_bytes % page == 0
    parts = 2 * (made.dispatch_recv + made.dispatch_send + made.combine_recv + made.combine_send)
    assert parts <= made.lane_bytes < parts + page
    for rank, group in enumerate(groups):
        assert group.engine.info().registered_bytes - before[rank] == made.arena_bytes
        assert moes[rank].plan_.arena_bytes == made.arena_bytes
    run_all(Scenario(config, make_batches(config, [24] * world, 1), ["rows"] * world), moes, groups)
    for rank, group in enumerate(groups):
        assert group.engine.info().registered_bytes - before[rank] == made.arena_bytes


@pytest.mark.parametrize("world", [64, 256])
def test_many_ranks_in_one_process(make_groups: Make, world: int) -> None:
    """Small rows; every rank to some others; memory as the plan says."""
    config = model.Config(world, world, 2, 16)
    # Of hundreds of threads on two busy cores one is silent for seconds.
    groups = make_groups(world, dead_s=120.0, timeout_s=240.0)
    before = sum(group.engine.info().registered_bytes for group in groups)
    moes = all_to_alls(groups, config, max_tokens=2)
    made = plan(config, max_tokens=2, lanes=1)
    assert sum(group.engine.info().registered_bytes for group in groups) - before == world * made.arena_bytes
    tokens = [rank % 3 for rank in range(world)]
    run_all(Scenario(config, make_batches(config, tokens, 1), ["contiguous"] * world), moes, groups)


def test_objects_share_one_arena(make_groups: Make) -> None:
    """Objects of other shapes, dtypes and lanes, their calls interleaved: memory of the largest, results of each."""
    groups = make_groups(3)
    before = groups[0].engine.info().registered_bytes
    shapes = [
        (model.Config(3, 8, 3, 64), 16, 1),
        (model.Config(3, 5, 2, 528, "bf16", "e4m3"), 24, 2),
        (model.Config(3, 30, 7, 32, "f32"), 8, 1),
        (model.Config(3, 3, 1, 1024, "f16"), 3, 2),
    ]
    objects = [(c, all_to_alls(groups, c, max_tokens=t, lanes=lanes), t, lanes) for c, t, lanes in shapes]
    used = groups[0].engine.info().registered_bytes - before
    plans = [plan(c, max_tokens=t, lanes=lanes) for c, t, lanes in shapes]
    largest = {name: max(getattr(p, name) for p in plans) for name in
               ("dispatch_recv", "dispatch_send", "combine_recv", "combine_send")}  # fmt: skip
    page = os.sysconf("SC_PAGE_SIZE")
    assert used == 2 * model.align(2 * sum(largest.values()), page)
    assert used < sum(p.arena_bytes for p in plans)
    for step in range(8):
        config, moes, most, lanes = objects[(step * 3) % len(objects)]
        tokens = [(step + r) % (most + 1) for r in range(3)]
        scenario = Scenario(config, make_batches(config, tokens, step), [LAYOUTS[step % 4]] * 3)
        run_all(scenario, moes, groups, lane=step % lanes)
    assert groups[0].engine.info().registered_bytes - before == used


def test_routing_of_one_object_is_refused_by_another(make_groups: Make) -> None:
    groups = make_groups(1)
    small = all_to_alls(groups, model.Config(1, 4, 2, 32))[0]
    other = all_to_alls(groups, model.Config(1, 4, 3, 64))[0]
    with harness.on_device():
        got = small.dispatch(torch.ones(2, 32, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.int64))
        with pytest.raises(ept.InvalidArgument):
            other.combine(torch.zeros(*got.x.shape[:-1], 64, dtype=torch.bfloat16), got)
        with pytest.raises(ept.InvalidArgument):
            other.dispatch(torch.ones(2, 64, dtype=torch.bfloat16), routing=got.routing)


# ---- leaks -----------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def drive(moes: list[ept.AllToAll], prepared: list[Scenario], steps: int) -> None:
    """`steps` steps of mixed sizes, layouts and halves on a thread for each rank; results are checked now and then."""
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with harness.on_device():
                all_steps(rank)
        except BaseException as error:
            errors.append(error)

    def all_steps(rank: int) -> None:
        moe = moes[rank]
        for step in range(steps):
            scenario = prepared[step % len(prepared)]
            if step % 97 == 0:
                scenario.run(rank, moe)
                continue
            arguments = calls[rank][step % len(prepared)]
            if step % 3 == 0:
                moe.dispatch_send(**arguments)
                got = moe.dispatch_recv(lane=0)
            else:
                got = moe.dispatch(**arguments)
            if step % 11:  # a GPU rank's outputs have room for the worst case
                moe.combine(got.x if ON_GPU else outs[rank][step % len(prepared)], got)

    ranks = range(len(moes))
    calls = [[s.arguments(rank) for s in prepared] for rank in ranks]
    outs = [[s.expert_out(rank, s.unpacked(rank, 8 * s.config.world).shape) for s in prepared] for rank in ranks]
    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_ten_thousand_steps_do_not_leak(make_groups: Make) -> None:
    config = model.Config(2, 6, 2, 256)
    groups = make_groups(2)
    moes = all_to_alls(groups, config, max_tokens=32)
    sizes = np.random.default_rng(1).integers(0, 33, (24, 2))
    prepared = [
        Scenario(config, make_batches(config, [int(n) for n in size], step), [("rows", "contiguous")[step % 2]] * 2)
        for step, size in enumerate(sizes)
    ]
    drive(moes, prepared, 1000)
    memory, files = resident(), descriptors()
    drive(moes, prepared, 9000)
    assert descriptors() == files
    # A leak of one row (512 bytes) a step would be 4.6 MiB; the allocator's own wandering is below 3.
    assert resident() - memory < 3 * MIB


def test_groups_and_objects_are_given_back() -> None:
    config = model.Config(2, 4, 2, 64)

    def once() -> None:
        groups = harness.groups(2)
        moes = all_to_alls(groups, config)
        run_all(Scenario(config, make_batches(config, (3, 5), 1), ["contiguous"] * 2), moes, groups)
        harness.on_ranks(groups, lambda rank: moes[rank].close())
        harness.close(groups)

    for _ in range(20 if ON_GPU else 5):  # until torch has made all its 32 streams, of which each once takes four
        once()
    memory, files, threads = resident(), descriptors(), threading.active_count()
    for _ in range(30):
        once()
    assert descriptors() == files
    assert threading.active_count() <= threads
    assert resident() - memory < 8 * MIB
