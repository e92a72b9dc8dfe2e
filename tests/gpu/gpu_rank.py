# SPDX-License-Identifier: Apache-2.0
"""What a rank that is a process of its own does on its GPU: steps as test_gpu_moe.py's, with memory shared by CUDA IPC
among the ranks of a node, over tcp (or what `more` says) between nodes or where `intra` is off. Every process draws all
ranks' inputs from the same seed, and checks its own part against the reference."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import launch
import moe_model as model
import pytest
import torch
from gpu_harness import DEVICE, Scenario, moved
from harness import LAYOUTS, TORCH, arguments, make_batch, make_batches
from torch.distributed import FileStore

import eptransport as ept


def steps(
    rank: int,
    n: int,
    folder: Path,
    count: int,
    intra: str | None,
    nodes: str | None = None,
    share: Any = "auto",
    more: Any = {"backend": "tcp"},  # noqa: B006 (read)
) -> tuple[tuple[str, ...], int]:
    settings = ept.Settings(timeout_s=60.0, threads=1, intra=intra, node=nodes and nodes[rank], gpu_share=share, **more)
    torch.cuda.set_device(rank % torch.cuda.device_count())
    with ept.Group(settings, store=FileStore(str(folder / "store"), n), rank=rank, world_size=n) as group:
        return exchange(group, count)


def by_torchrun(count: int) -> tuple[tuple[str, ...], int]:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with ept.Group(ept.Settings(backend="tcp", timeout_s=60.0, threads=1)) as group:
        return exchange(group, count)


def exchange(group: ept.Group, count: int) -> tuple[tuple[str, ...], int]:
    """Steps in every layout. How each rank is reached, and how many bytes the engine wrote meanwhile."""
    n = group.world_size
    config = model.Config(n, 9, 4, 272, "bf16", "e4m3")
    torch.zeros(1, device=DEVICE)
    moe = ept.AllToAll(
        group,
        num_experts=config.num_experts,
        top_k=config.top_k,
        hidden=config.hidden,
        max_tokens=24,
        dtype=TORCH[config.dtype],
        dispatch_dtype=TORCH[config.sent],
        device=DEVICE,
    )
    before = written(group)
    for step in range(count):
        layouts = [LAYOUTS[(r + step) % 4] for r in range(n)]
        batches = make_batches(config, [(7 * (r + step)) % 25 for r in range(n)], step)
        Scenario(config, batches, layouts).run(group.rank, moe, halves=step % 2 == 1)
        moe.check()
    moe.reset()
    moe.close()
    return moe.paths, written(group) - before


class Captured:
    """A step in a captured graph, with inputs drawn from a seed and outputs at fixed addresses. Captured on the current
    stream; one at a time in a process, since torch waits for the whole GPU before it begins."""

    def __init__(self, moe: ept.AllToAll, config: model.Config, tokens: int, seed: int) -> None:
        given = _given(config, tokens, seed, DEVICE)
        self.stream = torch.cuda.current_stream()
        self.graph = torch.cuda.CUDAGraph()
        self.stream.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            got = moe.dispatch(**given, layout="rows")
            self.y = moe.combine(got.x + got.x, got)
        self.rows = got.num_rows
        self._keep = (given, got)

    def replay(self) -> torch.Tensor:
        with torch.cuda.stream(self.stream):
            self.y.fill_(7)
            self.graph.replay()
            y = self.y.clone()
        self.stream.synchronize()
        return y


def step(moe: ept.AllToAll, config: model.Config, rank: int, device: str = DEVICE) -> torch.Tensor:
    """The same one each time, on the device of the AllToAll."""
    got = moe.dispatch(**_given(config, 5 + rank, rank, device), layout="rows")
    y: torch.Tensor = moe.combine(got.x, got)
    return y.cpu()


def _given(config: model.Config, tokens: int, seed: int, device: str) -> dict[str, Any]:
    return {name: moved(value, device) for name, value in arguments(config, make_batch(config, tokens, seed)).items()}


def free_bytes() -> int:
    """Of the GPU, for all its processes."""
    free: int = torch.cuda.mem_get_info()[0]
    return free


def sleeps(rank: int, n: int, folder: Path, share: Any, config: model.Config, tokens: int) -> str:
    """How the other rank is reached, where all went well."""
    settings = ept.Settings(backend="tcp", timeout_s=60.0, threads=1, gpu_share=share)
    torch.cuda.set_device(rank % torch.cuda.device_count())
    store = FileStore(str(folder / "store"), n)
    with ept.Group(settings, store=store, rank=rank, world_size=n) as group:
        moe = ept.AllToAll(
            group,
            num_experts=config.num_experts,
            top_k=config.top_k,
            hidden=config.hidden,
            max_tokens=tokens,
            device=DEVICE,
        )
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            eager = step(moe, config, rank)
            graph = Captured(moe, config, tokens, seed=rank)
            wanted = graph.replay()
            plan = moe.plan_
            here = 1 + (torch.cuda.device_count() < n)  # ranks of this GPU
            lanes = here * plan.lanes * 2 * (plan.dispatch_recv + plan.combine_recv)
            for round_ in range(2):
                before = free_bytes()
                _meet(store, f"{round_} before", n)
                group.suspend()
                until = time.monotonic() + 60
                while free_bytes() - before < 0.9 * lanes:
                    assert time.monotonic() < until, f"{free_bytes() - before} bytes of {lanes} are given back"
                    time.sleep(0.01)
                _meet(store, f"{round_} asleep", n)
                assert not graph.replay().any()
                group.resume()
                assert torch.equal(graph.replay(), wanted)
                assert torch.equal(step(moe, config, rank), eager)
        moe.close()
        return moe.paths[1 - rank]


def _meet(store: FileStore, what: str, n: int) -> None:
    count = store.add(what, 1)
    until = time.monotonic() + 60
    while count < n:
        assert time.monotonic() < until, f"only {count} of {n} came to {what!r}"
        time.sleep(0.01)
        count = store.add(what, 0)


THREE = model.Config(3, 8, 3, 64)


def _open(rank: int, world: int, folder: str, held: list[Any], nodes: str, **more: Any) -> ept.AllToAll:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.zeros(1, device=DEVICE)
    group = launch.open_group(rank, world, folder, timeout_s=60.0, dead_s=60.0, node=nodes[rank], **more)
    held.append(group)
    return ept.AllToAll(group, num_experts=8, top_k=3, hidden=64, max_tokens=16, device=DEVICE)


def _checked(moe: ept.AllToAll, lost: tuple[int, ...], count: int) -> None:
    for seed in range(count):
        batches = make_batches(THREE, (4, 2, 5), seed)
        Scenario(THREE, batches, ["rows", "masked", "contiguous"], masked=frozenset(lost)).run(moe.group.rank, moe)
        moe.check()


def loses_rank_1(rank: int, world: int, folder: str, held: list[Any], nodes: str) -> tuple[str, ...]:
    moe = _open(rank, world, folder, held, nodes)
    _checked(moe, (), 2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    moe.group.mask(1, why="it was killed")
    _checked(moe, (1,), 2)
    if rank == 2:
        moe.group.readmit(1)
    moe.reset()
    _checked(moe, (), 3)
    return moe.paths


def started_again(rank: int, world: int, folder: str, held: list[Any], nodes: str) -> tuple[str, ...]:
    moe = _open(rank, world, folder, held, nodes, rejoin=True)
    with pytest.raises(ept.LaneFault, match="reset"):
        _checked(moe, (), 1)
    moe.reset()
    _checked(moe, (), 3)
    return moe.paths


def written(group: ept.Group) -> int:
    return sum(rail.tx_bytes for rail in group.metrics().rails)
