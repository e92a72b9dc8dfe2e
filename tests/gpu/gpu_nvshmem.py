# SPDX-License-Identifier: Apache-2.0
"""What a rank that is a process of its own does over NVSHMEM: steps as gpu_rank.py's, graphs, masks, refusals. A
process is one PE for good, so each of these is the first thing that its process does with NVSHMEM."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import gpu_rank
import moe_model as model
import pytest
import torch
from gpu_harness import DEVICE, Scenario
from harness import LAYOUTS, TORCH, make_batches
from torch.distributed import FileStore

import eptransport as ept


def group_of(rank: int, n: int, folder: Path, **more: Any) -> ept.Group:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    options = {"nvshmem.heap_mib": "256", **more.pop("options", {})}
    fields = {"timeout_s": 60.0, "threads": 1, "gpu_path": "gpu", **more}
    settings = ept.Settings(backend="nvshmem", options=options, **fields)
    return ept.Group(settings, store=FileStore(str(folder / "store"), n), rank=rank, world_size=n)


def all_to_all(group: ept.Group, config: model.Config, **more: Any) -> ept.AllToAll:
    torch.zeros(1, device=DEVICE)
    return ept.AllToAll(
        group,
        num_experts=config.num_experts,
        top_k=config.top_k,
        hidden=config.hidden,
        dtype=TORCH[config.dtype],
        dispatch_dtype=TORCH[config.sent],
        **{"max_tokens": 24, "device": DEVICE, **more},
    )


def puts(moe: ept.AllToAll) -> int:
    native: Any = moe._native
    return int(native.arena.puts())


def steps(
    rank: int, n: int, folder: Path, count: int, intra: str | None, nodes: str | None = None
) -> tuple[tuple[str, ...], int, int, int]:
    """How each rank is reached; puts of this rank's kernels; messages that it sent to other ranks; bytes that the
    engine wrote."""
    with group_of(rank, n, folder, intra=intra, node=nodes and nodes[rank]) as group:
        config = model.Config(n, 9, 4, 272, "bf16", "e4m3")
        moe = all_to_all(group, config)
        before = gpu_rank.written(group)
        for step in range(count):
            layouts = [LAYOUTS[(r + step) % 4] for r in range(n)]
            batches = make_batches(config, [(7 * (r + step)) % 25 for r in range(n)], step)
            Scenario(config, batches, layouts).run(rank, moe, halves=step % 2 == 1)
            moe.check()
        torch.cuda.synchronize()
        came = puts(moe), sum(moe.stats().messages), gpu_rank.written(group) - before
        moe.reset()
        assert puts(moe) == 0
        batches = make_batches(config, [5] * n, 99)
        Scenario(config, batches, [LAYOUTS[0]] * n).run(rank, moe)
        moe.close()
        return (moe.paths, *came)


def replays(rank: int, n: int, folder: Path, count: int) -> tuple[int, int]:
    """A captured step, replayed with other tokens and another routing each time: experts that change nothing, and
    weights and values whose sums are exact. Puts of the replays, and messages."""
    with group_of(rank, n, folder, intra="off") as group, torch.cuda.stream(torch.cuda.Stream()):
        config = model.Config(n, 4 * n, 4, 512)
        moe = all_to_all(group, config)
        x = torch.zeros(24, 512, dtype=torch.bfloat16, device=DEVICE)
        ids = torch.zeros(24, 4, dtype=torch.int64, device=DEVICE)
        weights = torch.full((24, 4), 0.25, device=DEVICE)
        got = moe.dispatch(x, ids, weights, layout="rows")
        moe.combine(got.x, got)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            got = moe.dispatch(x, ids, weights, layout="rows")
            scale = (got.topk_weights * (got.topk_ids >= 0)).sum(dim=1, keepdim=True)
            y = moe.combine((got.x.float() * scale).bfloat16(), got)
        before, sent = puts(moe), sum(moe.stats().messages)
        random = torch.Generator().manual_seed(100 + rank)
        for _ in range(count):
            new = torch.randint(-15, 16, (24, 512), generator=random).bfloat16()
            x.copy_(new)
            ids.copy_(torch.stack([torch.randperm(4 * n, generator=random)[:4] for _ in range(24)]))
            graph.replay()
            assert torch.equal(y.cpu(), new)
        moe.check()
        counted = puts(moe) - before, sum(moe.stats().messages) - sent
        del graph
        moe.close()
        return counted


def masks(rank: int, n: int, folder: Path) -> int:
    """The last rank is masked and goes on living; the others take their steps without it. Rows that came."""
    with group_of(rank, n, folder, intra="off") as group:
        config = model.Config(n, 2 * n, 2, 256)
        moe = all_to_all(group, config)
        batches = make_batches(config, [8] * n, 1)
        Scenario(config, batches, [LAYOUTS[0]] * n).run(rank, moe)
        torch.cuda.synchronize()
        store = FileStore(str(folder / "second"), n)
        if rank == n - 1:
            store.set("idle", b"1")
            store.wait(["over"])
            return 0
        store.wait(["idle"])
        if rank == 0:
            group.mask(n - 1, "a test")
        x = torch.ones(8, 256, dtype=torch.bfloat16, device=DEVICE)
        ids = torch.arange(2 * n, device=DEVICE).repeat(8)[: 8 * 2].view(8, 2)
        moe.reset()
        rows = 0
        for _ in range(3):
            got = moe.dispatch(x, ids, torch.full((8, 2), 0.5, device=DEVICE), layout="rows")
            y = moe.combine(got.x, got)
            moe.check()
            rows += int(got.num_rows)
            assert torch.isfinite(y.float()).all()
        store.add("done", 1)
        while store.add("done", 0) < n - 1:
            pass
        store.set("over", b"1")
        return rows


def loses_the_last(rank: int, n: int, folder: str, held: list[Any]) -> tuple[str, str, float]:
    """The last rank's process is killed after two steps, amid the third of the others: what they raise, and after how
    many seconds. Then they take steps without it."""
    group = group_of(rank, n, Path(folder), intra="off", timeout_s=20.0, dead_s=5.0)
    config = model.Config(n, 2 * n, 2, 256)
    moe = all_to_all(group, config)
    held += [group, moe]

    def steps(lost: frozenset[int]) -> None:
        for seed in range(2):
            Scenario(config, make_batches(config, [8] * n, seed), [LAYOUTS[seed]] * n, masked=lost).run(rank, moe)
            moe.check()

    steps(frozenset())
    torch.cuda.synchronize()
    if rank == n - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    x = torch.ones(8, 256, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.arange(16, device=DEVICE).view(8, 2) % (2 * n)

    def third() -> None:
        got = moe.dispatch(x, ids, torch.full((8, 2), 0.5, device=DEVICE), layout="rows")
        moe.combine(got.x, got)
        torch.cuda.synchronize()
        moe.check()

    begun = time.monotonic()
    with pytest.raises(ept.EptError) as raised:
        third()
    took = time.monotonic() - begun
    group.mask(n - 1, why="it was killed")
    moe.reset()
    steps(frozenset({n - 1}))
    return type(raised.value).__name__, raised.value.message, took


def chooses(rank: int, n: int, folder: Path, path: str) -> tuple[str, tuple[str, ...], int, int]:
    """Steps of an AllToAll by EPT_GPU_PATH: what was measured, how ranks are reached, puts, bytes of the engine."""
    with group_of(rank, n, folder, intra="off", gpu_path=path) as group:
        config = model.Config(n, 4 * n, 4, 7168, "bf16", "e4m3")
        moe = all_to_all(group, config, max_tokens=128)
        before = gpu_rank.written(group), puts(moe)
        for step in range(4):
            batches = make_batches(config, [(37 * (r + step)) % 129 for r in range(n)], step)
            Scenario(config, batches, [LAYOUTS[(r + step) % 4] for r in range(n)]).run(rank, moe, halves=step % 2 == 1)
            moe.check()
        moe.reset()
        Scenario(config, make_batches(config, [5] * n, 99), [LAYOUTS[1]] * n).run(rank, moe)
        torch.cuda.synchronize()
        counted = puts(moe) - before[1], gpu_rank.written(group) - before[0]
        moe.close()
        return moe.path_choice, moe.paths, *counted


def refusals(rank: int, n: int, folder: Path) -> tuple[str, str, str]:
    """A second group while the first is open, lanes that are larger than the heap, and calls that may be streamed."""
    with group_of(rank, n, folder, intra="off") as group:
        config = model.Config(n, 2 * n, 2, 7168)
        try:
            all_to_all(group, config, max_tokens=8192)
        except ept.EptError as error:
            large = error.message
        torch.zeros(1)
        (folder / "again").mkdir(exist_ok=True)
        try:
            group_of(rank, n, folder / "again").close()
        except ept.EptError as error:
            second = error.message
        try:
            all_to_all(group, config, max_tokens=4096, buffer_bytes=64 << 20)
        except ept.UnsupportedError as error:
            streamed = error.message
        moe = all_to_all(group, config)
        Scenario(config, make_batches(config, [3] * n, 1), [LAYOUTS[0]] * n).run(rank, moe)
        moe.close()
    with group_of(rank, n, folder / "again") as group:  # the same PEs, later
        moe = all_to_all(group, config)
        Scenario(config, make_batches(config, [3] * n, 2), [LAYOUTS[0]] * n).run(rank, moe)
        moe.close()
    return large, second, streamed
