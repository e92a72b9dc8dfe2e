# SPDX-License-Identifier: Apache-2.0
"""Tests that need an NVIDIA GPU: all are marked gpu, and skipped with a reason where there is none."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before CUDA starts: ranks are threads of this process, and their kernels wait for one another.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# torch's own kernels too: what is loaded at a first use may wait until the GPU is idle, while ours wait for a rank.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / folder) for folder in ("moe", "processes", "reference"))]

import gpu_harness  # noqa: E402
import torch  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"
    for item in items:
        if HERE not in Path(item.path).parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if why:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def make_world() -> Iterator[Callable[..., gpu_harness.World]]:
    """make_world(n, **settings): n ranks as threads on one GPU, closed when the test ends."""
    made: list[gpu_harness.World] = []

    def make(n: int, **settings: Any) -> gpu_harness.World:
        made.append(gpu_harness.World(n, **settings))
        return made[-1]

    yield make
    for world in reversed(made):
        world.close()
