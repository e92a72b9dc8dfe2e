# SPDX-License-Identifier: Apache-2.0
"""Ranks as threads on one GPU, each with a stream of its own, and Scenario (tests/moe/harness.py) for CUDA tensors:
what a rank gets is checked against the same reference, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import harness
import moe_model as model
import torch

import eptransport as ept

T = TypeVar("T")

DEVICE = "cuda"  # the current one: a rank that is a process may have chosen another


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


class World:
    """n groups over loopback, and a stream for each rank."""

    def __init__(self, n: int, **settings: Any) -> None:
        self.groups = harness.groups(n, **{"timeout_s": 20.0, **settings})
        self.streams = [torch.cuda.Stream(DEVICE) for _ in range(n)]
        # What torch loads at a first use would wait for kernels that wait for the rank that loads it.
        torch.zeros(8, device=DEVICE).fill_(1).cpu()
        torch.cuda.synchronize()

    def on_ranks(self, run: Callable[[int], T]) -> list[T]:
        def on_stream(rank: int) -> T:
            with torch.cuda.stream(self.streams[rank]):
                answer = run(rank)
                self.streams[rank].synchronize()
                return answer

        return harness.on_ranks(self.groups, on_stream)

    def all_to_alls(self, config: model.Config, devices: Sequence[str] = (), **arguments: Any) -> list[ept.AllToAll]:
        return harness.all_to_alls(self.groups, config, devices or [DEVICE] * len(self.groups), **arguments)

    def close(self) -> None:
        torch.cuda.synchronize()
        harness.close(self.groups)


class Scenario(harness.Scenario):
    """One dispatch and its combine; `run` as harness.Scenario.run has it."""

    def arguments(self, rank: int, **more: Any) -> dict[str, Any]:
        return {k: moved(v, DEVICE) for k, v in super().arguments(rank, **more).items()}

    def combine_arguments(self, rank: int, got: ept.Dispatched, **more: Any) -> dict[str, Any]:
        return {k: moved(v, DEVICE) for k, v in super().combine_arguments(rank, got, **more).items()}

    def check(self, rank: int, got: ept.Dispatched) -> None:
        torch.cuda.current_stream().synchronize()
        fields = {f.name: moved(getattr(got, f.name), "cpu") for f in dataclasses.fields(got)}
        super().check(rank, dataclasses.replace(got, **fields))

    def check_y(self, rank: int, y: torch.Tensor) -> None:
        torch.cuda.current_stream().synchronize()
        super().check_y(rank, y.cpu())


def run_all(scenario: Scenario, moes: Sequence[ept.AllToAll], world: World, **more: Any) -> list[torch.Tensor]:
    def run(rank: int) -> torch.Tensor:
        y = scenario.run(rank, moes[rank], **more)
        moes[rank].check()
        return y

    return world.on_ranks(run)
