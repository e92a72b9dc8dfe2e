# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes that meet over TCP: each runs one function and hands back what it returned."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def run(world: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """`job(group, store, *args)` on every rank; the first exception of a rank is raised here, the others are ended."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world, folder, job, args), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import eptransport as ept

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    store = torch.distributed.FileStore(os.path.join(folder, "store"), world)
    settings = ept.Settings(backend="tcp", threads=1, timeout_s=120.0)
    group = ept.Group(settings, store=store, rank=rank, world_size=world)
    try:
        torch.save(job(group, store, *args), os.path.join(folder, f"{rank}.pt"))
    finally:
        group.close()
