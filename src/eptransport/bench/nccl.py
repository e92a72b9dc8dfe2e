"""NCCL's all_to_all_single with the rows of a dispatch and of a combine: what a library of collectives takes to move
the same bytes, with the number of rows known on every rank before. Packing, unpacking and sums are not in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eptransport.bench.ranks import Rank
from eptransport.bench.shapes import Shape

if TYPE_CHECKING:
    import torch

__all__ = ["MOVES", "Nccl"]

MOVES = ("NCCL, rows out", "NCCL, rows back")


class Nccl:
    """`sent[s][r]`: rows of rank s that go to rank r. Needs a GPU a rank."""

    def __init__(self, shape: Shape, rank: Rank, device: torch.device, sent: Sequence[Sequence[int]]) -> None:
        import torch
        from torch import distributed
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        distributed.init_process_group(
            "nccl", store=PrefixStore("nccl", rank.store()), rank=rank.rank, world_size=rank.world, device_id=device
        )
        self._there = list(sent[rank.rank])
        self._here = [row[rank.rank] for row in sent]

        def rows(count: int, bytes_each: int) -> torch.Tensor:
            return torch.zeros(count, bytes_each, dtype=torch.uint8, device=device)

        self._out = rows(sum(self._there), shape.dispatch_row), rows(sum(self._here), shape.dispatch_row)
        self._back = rows(sum(self._here), shape.combine_row), rows(sum(self._there), shape.combine_row)
        for move in self.moves():  # its connections are made by the first
            move()
        torch.cuda.synchronize(device)

    def moves(self) -> tuple[Callable[[], Any], ...]:
        from torch import distributed

        return (
            lambda: distributed.all_to_all_single(self._out[1], self._out[0], self._here, self._there),
            lambda: distributed.all_to_all_single(self._back[1], self._back[0], self._there, self._here),
        )

    def close(self) -> None:
        from torch import distributed

        distributed.destroy_process_group()
