# SPDX-License-Identifier: Apache-2.0
"""GPU ranks that talk through the engine: among themselves, with CPU ranks, and with some mapped and some not in one
step; bit for bit against the CPU tests' reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gpu_harness
import harness
import moe_model as model
import numpy as np
import pytest
import torch
from gpu_harness import DEVICE, World
from harness import LAYOUTS, make_batches

import eptransport as ept

Make = Callable[..., World]
CPU = "cpu"


def run_all(
    config: model.Config, batches: Sequence[model.Batch], layouts: Sequence[str], moes: Any, world: World, **more: Any
) -> None:
    """One step of ranks on either device."""
    on_cpu = harness.Scenario(config, list(batches), list(layouts))
    on_gpu = gpu_harness.Scenario(config, list(batches), list(layouts))

    def run(rank: int) -> None:
        gpu = moes[rank]._arena is not None
        (on_gpu if gpu else on_cpu).run(rank, moes[rank], **more)
        moes[rank].check()

    world.on_ranks(run)


@pytest.mark.parametrize("adversary", [None, 3])
@pytest.mark.parametrize(
    "devices",
    [[DEVICE, DEVICE], [DEVICE, CPU], [CPU, DEVICE, DEVICE, CPU]],
    ids=["two GPU ranks", "a GPU and a CPU rank", "two of each"],
)
@pytest.mark.parametrize("intra", [None, "off"])
def test_over_the_engine(make_world: Make, devices: list[str], intra: str | None, adversary: int | None) -> None:
    n = len(devices)
    rng = np.random.default_rng(n)
    config = model.Config(n, 13, 3, 272, "bf16", "e4m3", alignment=8)
    world = make_world(n, intra=intra, adversary=adversary)
    moes = world.all_to_alls(config, devices, max_tokens=40, lanes=2)
    for step in range(12):
        tokens = [int(rng.integers(0, 41)) for _ in range(n)]
        layouts = [str(rng.choice(LAYOUTS)) for _ in range(n)]
        batches = make_batches(config, tokens, step, none=0.3)
        run_all(config, batches, layouts, moes, world, lane=step % 2, halves=step % 3 == 0)


@pytest.mark.parametrize("adversary", [None, 5])
@pytest.mark.parametrize("devices", [[DEVICE, DEVICE], [DEVICE, CPU, DEVICE]], ids=["on the GPU", "one on the CPU"])
@pytest.mark.parametrize(("gpu", "says"), [(1, "by address"), (2, "as a dmabuf")])
def test_lanes_on_the_gpu(make_world: Make, gpu: int, says: str, devices: list[str], adversary: int | None) -> None:
    """The backend reads and writes GPU memory, which no CPU could touch."""
    n = len(devices)
    config = model.Config(n, 13, 3, 272, "bf16", "e4m3", alignment=8)
    world = make_world(n, intra="off", gpu_memory="device", adversary=adversary, options={"loopback.gpu": gpu})
    moes = world.all_to_alls(config, devices, max_tokens=40)
    for rank, device in enumerate(devices):
        assert (says in moes[rank].lane_memory) == (device != CPU), moes[rank].lane_memory
    for step in range(6):
        layouts = [LAYOUTS[(rank + step) % 4] for rank in range(n)]
        tokens = [(11 * (rank + step)) % 41 for rank in range(n)]
        run_all(config, make_batches(config, tokens, step, none=0.3), layouts, moes, world, halves=step % 3 == 0)
        if step == 3:
            world.on_ranks(lambda rank: moes[rank].reset())


def test_lanes_that_no_backend_takes_on_the_gpu(make_world: Make) -> None:
    config = model.Config(2, 6, 2, 64)
    for wish, says in (("auto", "takes no GPU memory"), ("pinned", "EPT_GPU_MEMORY=pinned")):
        moes = make_world(2, intra="off", gpu_memory=wish).all_to_alls(config, max_tokens=8)
        assert says in moes[0].lane_memory
        assert moes[0].lane_memory.startswith("pinned")
    with pytest.raises(ept.UnsupportedError, match="EPT_GPU_MEMORY=device: the backend takes no GPU memory"):
        make_world(2, intra="off", gpu_memory="device").all_to_alls(config, max_tokens=8)


def test_many_tokens(make_world: Make) -> None:
    config = model.Config(2, 32, 8, 512)
    world = make_world(2, intra="off")
    moes = world.all_to_alls(config, max_tokens=1024)
    gpu_harness.run_all(
        gpu_harness.Scenario(config, make_batches(config, (1024, 900), 1), ["masked", "rows"]), moes, world
    )


@pytest.mark.parametrize("devices", [[DEVICE] * 3, [DEVICE, CPU, DEVICE]], ids=["on the GPU", "one on the CPU"])
def test_a_reset_after_a_rank_that_is_late(make_world: Make, devices: list[str]) -> None:
    config = model.Config(3, 6, 2, 64)
    world = make_world(3, timeout_s=2.0, intra="off")
    moes = world.all_to_alls(config, devices, max_tokens=8)
    batches = make_batches(config, (5, 6, 7), 1)
    run_all(config, batches, ["rows"] * 3, moes, world)
    scenario = gpu_harness.Scenario(config, batches, ["rows"] * 3)

    def run(rank: int) -> None:
        if rank != 0:
            return
        got = moes[rank].dispatch(**scenario.arguments(rank))
        torch.cuda.current_stream().synchronize()
        with pytest.raises(ept.LaneFault, match=r"rank 0 waited 2\.0 s for rank"):
            moes[rank].check()
        assert not got.x.any()

    world.on_ranks(run)
    world.on_ranks(lambda rank: moes[rank].reset())
    for step in range(4):
        run_all(config, make_batches(config, (5, 6, 7), step), ["rows", "masked", "by_rank"], moes, world)


FEW_CONNECTIONS = """
import eptransport as ept
groups = ept.loopback_groups(2, ept.Settings(backend="loopback", timeout_s=20.0, intra={intra!r}))
def make(group):
    try:
        ept.AllToAll(group, num_experts=4, top_k=2, hidden=64, max_tokens=8, device="cuda")
    except ept.ConfigError as error:
        return str(error)
    return "made"
print(ept.loopback_run(groups, make))
"""


@pytest.mark.parametrize("intra", [None, "off"])
def test_threads_with_few_connections_are_refused(intra: str | None) -> None:
    code = FEW_CONNECTIONS.format(intra=intra)
    for connections, says in (("", "is 8 here: set it to 32"), ("32", "made")):
        environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": connections}
        if not connections:
            del environment["CUDA_DEVICE_MAX_CONNECTIONS"]
        ran = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert ran.stdout.count(says) == 2, ran.stdout + ran.stderr
