# SPDX-License-Identifier: Apache-2.0
"""What a rank that is a process of its own does on the GPU: steps as test_gpu_moe.py's, their memory shared by CUDA
IPC, or over tcp where `intra` is off. Every process draws all ranks' inputs from the same seed, and checks its own part
against the reference."""

from __future__ import annotations

from pathlib import Path

import moe_model as model
import torch
from gpu_harness import DEVICE, Scenario
from harness import LAYOUTS, TORCH, make_batches
from torch.distributed import FileStore

import eptransport as ept


def steps(rank: int, n: int, folder: Path, count: int, intra: str | None) -> list[str]:
    config = model.Config(n, 9, 4, 272, "bf16", "e4m3")
    settings = ept.Settings(backend="tcp", timeout_s=60.0, threads=1, intra=intra)
    done: list[str] = []
    torch.zeros(1, device=DEVICE)
    with ept.Group(settings, store=FileStore(str(folder / "store"), n), rank=rank, world_size=n) as group:
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
        for step in range(count):
            layouts = [LAYOUTS[(r + step) % 4] for r in range(n)]
            batches = make_batches(config, [(7 * (r + step)) % 25 for r in range(n)], step)
            Scenario(config, batches, layouts).run(rank, moe, halves=step % 2 == 1)
            moe.check()
            done.append(layouts[rank])
        moe.reset()
        moe.close()
    return done
