# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine on a GPU, ranks as threads with a stream each, bit for bit against the CPU tests' reference."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import moe_model as model
import numpy as np
import pytest
import torch
from gpu_harness import DEVICE, Scenario, World, run_all
from harness import LAYOUTS, make_batches

import eptransport as ept
from eptransport._call import ffi, lib

Make = Callable[..., World]

REPLAYS = int(os.environ.get("EPT_GPU_REPLAYS", "60"))
"""Read before a fixture clears EPT_*."""


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(make_world: Make, n: int, layout: str) -> None:
    config = model.Config(n, 16, 4, 256)
    world = make_world(n)
    moes = world.all_to_alls(config, max_tokens=40)
    tokens = [(11 * rank + 7) % 41 for rank in range(n)]
    for seed, halves in enumerate((False, True)):
        run_all(Scenario(config, make_batches(config, tokens, seed), [layout] * n), moes, world, halves=halves)


@pytest.mark.parametrize(
    ("dtype", "sent", "scales", "hidden"),
    [("bf16", "bf16", "fp32", 7168), ("f16", "f16", "fp32", 1000), ("f32", "f32", "fp32", 12),
     ("bf16", "e4m3", "fp32", 7168), ("bf16", "e4m3", "fp32", 144), ("f32", "e4m3", "fp32", 1152),
     ("bf16", "e4m3", "ue8m0", 1040)],
)  # fmt: skip
@pytest.mark.parametrize("scale_layout", ["row", "column"])
def test_formats(make_world: Make, dtype: str, sent: str, scales: str, hidden: int, scale_layout: str) -> None:
    config = model.Config(4, 9, 4, hidden, dtype, sent, scale_format=scales)
    world = make_world(4)
    moes = world.all_to_alls(config, max_tokens=24, scale_layout=scale_layout)
    for seed in range(2):
        batches = make_batches(config, (24, 0, 5, 17), seed)
        run_all(Scenario(config, batches, list(LAYOUTS)), moes, world)


@pytest.mark.parametrize("host_counts", [False, True])
def test_random_steps_in_two_lanes(make_world: Make, host_counts: bool) -> None:
    rng = np.random.default_rng(5)
    config = model.Config(4, 13, 3, 64, alignment=8)
    world = make_world(4)
    moes = world.all_to_alls(config, max_tokens=70, lanes=2)
    for step in range(40):
        tokens = [int(rng.integers(0, 71)) * int(rng.integers(0, 4) > 0) for _ in range(4)]
        layouts = [str(rng.choice(LAYOUTS)) for _ in range(4)]
        batches = make_batches(config, tokens, step, none=0.3, skew=float(rng.integers(0, 3)))
        scenario = Scenario(config, batches, layouts)
        run_all(scenario, moes, world, lane=int(rng.integers(0, 2)), halves=step % 2 == 0, host_counts=host_counts)


def test_many_tokens(make_world: Make) -> None:
    config = model.Config(4, 32, 8, 512)
    world = make_world(4)
    moes = world.all_to_alls(config, max_tokens=1024)
    run_all(Scenario(config, make_batches(config, (1024, 1000, 513, 0), 1), list(LAYOUTS)), moes, world)


def test_a_rank_that_never_comes(make_world: Make) -> None:
    """The others' kernels end at their deadline with blank outputs, say for whom they waited, and a reset mends it."""
    config = model.Config(3, 6, 2, 64)
    world = make_world(3, timeout_s=2.0)
    moes = world.all_to_alls(config, max_tokens=8)
    scenario = Scenario(config, make_batches(config, (5, 6, 7), 1), ["rows", "masked", "contiguous"])
    assert int(world.groups[0].fault) == 0

    def run(rank: int) -> None:
        if rank == 1:
            return
        got = moes[rank].dispatch(**scenario.arguments(rank))
        y = moes[rank].combine(torch.ones(*got.x.shape, device=DEVICE, dtype=torch.bfloat16), got)
        torch.cuda.current_stream().synchronize()
        with pytest.raises(ept.LaneFault, match="for rank 1, whose signal stands at 0 of 1"):
            moes[rank].check()
        assert not y.any()
        assert not got.x.any()
        assert int(got.counts.sum()) == 0
        assert int(world.groups[rank].fault) == int(ept.Code.TIMEOUT)

    world.on_ranks(run)
    world.on_ranks(lambda rank: moes[rank].reset())
    assert int(world.groups[0].fault) == 0
    run_all(scenario, moes, world)


def test_outputs_too_small(make_world: Make) -> None:
    config = model.Config(2, 4, 2, 64)
    world = make_world(2, timeout_s=2.0)
    moes = world.all_to_alls(config, max_tokens=8)
    ids = np.full((8, 2), 3)
    batches = make_batches(config, (8, 8), 1, ids=ids)

    def run(rank: int) -> None:
        moes[rank].dispatch(**Scenario(config, batches, ["rows"] * 2).arguments(rank, max_rows=15))
        torch.cuda.current_stream().synchronize()
        if rank == 1:
            with pytest.raises(ept.LaneFault, match="received 16 rows or more; the outputs hold 15"):
                moes[rank].check()

    world.on_ranks(run)


class Replayed:
    """One rank's step in a captured graph: inputs and outputs at fixed addresses."""

    def __init__(
        self, world: World, rank: int, moe: ept.AllToAll, config: model.Config, tokens: int, lane: int
    ) -> None:
        self.stream = world.streams[rank]
        self.lane, self.tokens = lane, tokens
        self.x = torch.zeros(tokens, config.hidden, dtype=torch.bfloat16, device=DEVICE)
        self.ids = torch.full((tokens, config.top_k), -1, dtype=torch.int64, device=DEVICE)
        self.weights = torch.zeros(tokens, config.top_k, device=DEVICE)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            got = moe.dispatch(self.x, self.ids, self.weights, layout="rows", lane=lane, mirror_counts=True)
            # An expert that doubles: rows come back weighed by nobody, as the layout rows has it.
            self.y = moe.combine(got.x + got.x, got)
        self.got = got

    def load(self, batch: model.Batch, config: model.Config) -> None:
        from harness import arguments

        given = arguments(config, batch)
        with torch.cuda.stream(self.stream):
            self.x.copy_(given["x"])
            self.ids.copy_(given["topk_ids"])
            self.weights.copy_(given["topk_weights"])

    def expected(self, batch: model.Batch, config: model.Config) -> torch.Tensor:
        """Every rank that has a part doubles the token: one sum a rank, in fp32, rounded once."""
        per = -(-config.num_experts // config.world)
        x = self.x.float().cpu()
        homes = np.where(batch.ids >= 0, batch.ids // per, -1)
        ranks = torch.tensor([len({int(h) for h in row if h >= 0}) for row in homes])
        return (2 * x * ranks[:, None]).to(torch.bfloat16)


@pytest.mark.parametrize(("intra", "gpu"), [(None, 0), ("off", 0), ("off", 1)], ids=["mapped", "pinned", "on the GPU"])
def test_graphs_replayed_in_other_orders(make_world: Make, intra: str | None, gpu: int) -> None:
    """Eight graphs of different sizes in two lanes, replayed in any order with new inputs, ranks on different ones,
    eager steps between; one has no tokens. EPT_GPU_REPLAYS=10000 is the long run of tests/gpu/run."""
    rng = np.random.default_rng(9)
    config = model.Config(4, 8, 2, 64)
    world = make_world(4, intra=intra, options={"loopback.gpu": gpu})
    moes = world.all_to_alls(config, max_tokens=16, lanes=2)
    assert ("on the GPU" in moes[0].lane_memory) == bool(gpu)
    sizes = [(16, 0), (3, 0), (7, 0), (1, 0), (9, 1), (0, 1), (12, 1), (5, 1)]
    run_all(Scenario(config, make_batches(config, (4, 4, 4, 4), 0), ["rows"] * 4), moes, world)
    graphs = [[Replayed(world, r, moes[r], config, *size) for size in sizes] for r in range(4)]
    for step in range(REPLAYS):
        lane = int(rng.integers(0, 2))
        picked = [[g for g in graphs[r] if g.lane == lane][int(rng.integers(0, 4))] for r in range(4)]
        batches = make_batches(config, [g.tokens for g in picked], step + 1, none=0.3)
        for graph, batch in zip(picked, batches, strict=True):
            graph.load(batch, config)
        before = [graph.got.counts_host.epoch for graph in picked]
        for graph in picked:
            with torch.cuda.stream(graph.stream):
                graph.graph.replay()
        # While kernels still run, the host is told this replay's counts.
        told = [g.got.counts_host.wait(after=epoch) for g, epoch in zip(picked, before, strict=True)]
        for graph, batch, seen, epoch in zip(picked, batches, told, before, strict=True):
            graph.stream.synchronize()
            assert seen.epoch == epoch + 1
            assert torch.equal(seen.counts, graph.got.counts.cpu())
            assert seen.num_rows == int(graph.got.num_rows)
            assert torch.equal(graph.y.cpu(), graph.expected(batch, config))
        if step % (5 if REPLAYS < 1000 else 100) == 0:
            run_all(Scenario(config, make_batches(config, (4, 9, 0, 2), step), list(LAYOUTS)), moes, world, lane=lane)
    for moe in moes:
        moe.check()


def test_what_is_refused(make_world: Make) -> None:
    config = model.Config(2, 4, 2, 64)
    world = make_world(2)
    moes = world.all_to_alls(config, max_tokens=8)
    scenario = Scenario(config, make_batches(config, (3, 3), 1), ["rows", "masked"])
    given = scenario.arguments(0)
    with pytest.raises(ept.ConfigError, match="default stream"):
        moes[0].dispatch(**given)
    with torch.cuda.stream(world.streams[0]), pytest.raises(ept.InvalidArgument, match="x is on cpu"):
        moes[0].dispatch(**{**given, "x": given["x"].cpu()})


def test_dispatch_again_by_the_routing(make_world: Make) -> None:
    config = model.Config(2, 6, 3, 64)
    world = make_world(2)
    moes = world.all_to_alls(config, max_tokens=8)
    scenario = Scenario(config, make_batches(config, (5, 8), 1), ["rows", "masked"])

    def run(rank: int) -> Any:
        got = moes[rank].dispatch(**scenario.arguments(rank))
        given = scenario.arguments(rank)
        again = moes[rank].dispatch(given["x"], routing=got.routing, layout=scenario.layouts[rank])
        scenario.check(rank, again)
        return moes[rank].combine(**scenario.combine_arguments(rank, again))

    for rank, y in enumerate(world.on_ranks(run)):
        scenario.check_y(rank, y)


@pytest.mark.parametrize(("layout", "late"), [("by_rank", 1), ("rows", 3), ("masked", 3)])
def test_others_are_done_while_one_is_held_back(make_world: Make, layout: str, late: int) -> None:
    """A rank sends 5 ms after all others have launched theirs: by the GPU's own clock, each other rank has unpacked all
    rows of those that came before it has seen the late one's signal."""
    config = model.Config(4, 16, 4, 1024)
    world = make_world(4)
    moes = world.all_to_alls(config, max_tokens=64)
    scenario = Scenario(config, make_batches(config, (64, 50, 64, 33), 1), [layout] * 4)
    run_all(scenario, moes, world)  # what is slow the first time
    times = [Times(moe) for moe in moes]
    launched = threading.Barrier(4)

    def run(rank: int) -> torch.Tensor:
        given = scenario.arguments(rank)
        if rank == late:
            launched.wait(60)
            sleep: Any = torch.cuda
            sleep._sleep(int(5e-3 * 2e9))  # cycles: at most 2 GHz, so 5 ms or more
        got = moes[rank].dispatch(**given)
        if rank != late:
            launched.wait(60)
        scenario.check(rank, got)
        return moes[rank].combine(**scenario.combine_arguments(rank, got))

    for rank, y in enumerate(world.on_ranks(run)):
        scenario.check_y(rank, y)
    for rank in range(4):
        seen, done = times[rank].sources(0)
        for source in range(4):
            if source == late or rank == late:
                continue
            assert 0 < seen[source] <= done[source] < seen[late], (rank, source, seen, done)
            assert seen[late] - done[source] > 3_000_000, "the late rank was not late"
    for one in times:
        one.close()


class Times:
    """Device timestamps of a rank's kernels (gpu.h, ept_gpu_lanes_times), in ns; one lane."""

    def __init__(self, moe: ept.AllToAll) -> None:
        native: Any = moe._native
        self.pointer = native.arena.pointer
        self.world = native.group.world_size
        self.blocks = int(lib.ept_gpu_lanes_blocks(self.pointer))
        words = int(lib.ept_gpu_lanes_times(self.pointer, ffi.NULL))
        self.memory = torch.zeros(words, dtype=torch.int64, device=DEVICE)
        torch.cuda.synchronize()
        lib.ept_gpu_lanes_times(self.pointer, ffi.cast("uint64_t *", self.memory.data_ptr()))

    def sources(self, phase: int) -> tuple[list[int], list[int]]:
        """Of each source: when its signal was seen, and when the last of its rows was done."""
        begin = 4 * self.blocks * 8 + phase * self.world * 2
        pairs = self.memory.cpu()[begin : begin + 2 * self.world].view(self.world, 2)
        return pairs[:, 0].tolist(), pairs[:, 1].tolist()

    def close(self) -> None:
        lib.ept_gpu_lanes_times(self.pointer, ffi.NULL)
