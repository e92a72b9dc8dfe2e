# SPDX-License-Identifier: Apache-2.0
"""What a rank that is a process of its own does on its GPU: steps as test_gpu_moe.py's, with memory shared by CUDA IPC
among the ranks of a node, over tcp between nodes or where `intra` is off. Every process draws all ranks' inputs from
the same seed, and checks its own part against the reference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import moe_model as model
import torch
from gpu_harness import DEVICE, Scenario
from harness import LAYOUTS, TORCH, make_batches
from torch.distributed import FileStore

import eptransport as ept


def steps(
    rank: int, n: int, folder: Path, count: int, intra: str | None, nodes: str | None = None, share: Any = "auto"
) -> tuple[tuple[str, ...], int]:
    settings = ept.Settings(
        backend="tcp", timeout_s=60.0, threads=1, intra=intra, node=nodes and nodes[rank], gpu_share=share
    )
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


def written(group: ept.Group) -> int:
    return sum(rail.tx_bytes for rail in group.metrics().rails)
