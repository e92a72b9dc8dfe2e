"""gloo, by torch.distributed's send and recv."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from eptransport.bench.against.side import MOST_BYTES, Absent, Recipe, Side
from eptransport.bench.processes import ProcessRank

__all__ = ["find"]


def find(folder: Path) -> list[Recipe]:
    del folder
    for package in ("torch", "numpy"):
        if importlib.util.find_spec(package) is None:
            raise Absent(f"it comes with torch, and there is no {package}: pip install 'eptransport[bench]'")
    return [
        Recipe(
            "gloo",
            "torch.distributed isend, recv; messages and not one-sided writes",
            f"torch {metadata.version('torch')}",
            _Gloo,
            python=True,
            only=("latency", "bandwidth", "rate"),
        )
    ]


class _Gloo(Side):
    def __init__(self, rank: ProcessRank) -> None:
        import torch
        from torch import distributed

        self._torch, self._distributed = torch, distributed
        self._side, self._peer = rank.rank, 1 - rank.rank
        distributed.init_process_group("gloo", store=rank.store(), rank=rank.rank, world_size=rank.world)
        self._buffer = torch.full((MOST_BYTES,), 90, dtype=torch.uint8)

    def latency(self, size: int, count: int) -> Sequence[float]:
        send, recv = self._distributed.send, self._distributed.recv
        out, back = self._buffer[:size], self._torch.empty(size, dtype=self._torch.uint8)
        samples = []
        for _ in range(count):
            start = time.perf_counter_ns()
            if self._side == 0:
                send(out, self._peer)
            recv(back, self._peer)
            if self._side == 1:
                send(out, self._peer)
            samples.append((time.perf_counter_ns() - start) / 2e3)
        return samples

    def stream(self, size: int, count: int, depth: int) -> float:
        start_one = self._distributed.isend if self._side == 0 else self._distributed.irecv
        buffers = self._buffer[: size * depth].view(depth, size)
        answer = self._torch.ones(1, dtype=self._torch.uint8)
        works: list[object] = [None] * depth
        start = time.perf_counter()
        for index in range(count):
            work = works[index % depth]
            if work is not None:
                work.wait()  # type: ignore[attr-defined]
            works[index % depth] = start_one(buffers[index % depth], self._peer)
        for work in works:
            if work is not None:
                work.wait()  # type: ignore[attr-defined]
        (self._distributed.recv if self._side == 0 else self._distributed.send)(answer, self._peer)
        return time.perf_counter() - start

    def close(self) -> None:
        self._distributed.destroy_process_group()
