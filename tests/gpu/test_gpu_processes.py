# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes, one a GPU where there are so many: then NVLink or PCIe carries what CUDA IPC maps. A GPU takes
several of them in turn where no MPS runs: a wait lasts some time slices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_rank
import launch
import libfabrics
import pytest
import torch
from children import torchrun

Spawn = Callable[..., list[Any]]


def reached(answers: list[Any], nodes: str) -> None:
    """Each rank reached the others as it should, and bytes went through the engine where one was on another node."""
    for rank, answer in enumerate(answers):
        if isinstance(answer, Exception):
            raise answer
        paths, written = answer
        expected = ["mapped" if node == nodes[rank] else "engine" for node in nodes]
        expected[rank] = "own"
        assert list(paths) == expected
        assert (written > 0) == ("engine" in expected), written


@pytest.mark.parametrize("intra", [None, "off"])
@pytest.mark.parametrize("n", [2, 4])
def test_processes(spawn: Spawn, n: int, intra: str | None) -> None:
    reached(spawn(n, gpu_rank.steps, 4, intra), "abcd"[:n] if intra else "a" * n)


@pytest.mark.parametrize("n", [2, 4])
def test_memory_by_descriptors(spawn: Spawn, n: int) -> None:
    """Virtual memory, whose descriptors go over Unix sockets, instead of CUDA IPC."""
    reached(spawn(n, gpu_rank.steps, 4, None, None, "descriptors"), "a" * n)


@pytest.mark.parametrize("nodes", ["aabb", "abab"])
def test_two_nodes(spawn: Spawn, nodes: str) -> None:
    """Both ways in one step: by CUDA IPC inside a node, over tcp between them."""
    reached(spawn(4, gpu_rank.steps, 8, None, nodes), nodes)


@pytest.mark.parametrize("nodes", ["aabb", "abab"])
def test_two_nodes_over_shared_memory_by_libfabric(spawn: Spawn, nodes: str) -> None:
    release = libfabrics.releases()[0]
    if why := release.missing or release.providers["shm"]:
        pytest.skip(f"libfabric's shm of {release.name}: {why}")
    more = {"backend": "libfabric", "options": {f"libfabric.{k}": v for k, v in release.options("shm").items()}}
    reached(spawn(4, gpu_rank.steps, 8, None, nodes, "auto", more), nodes)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_torchrun_with_one_process_a_gpu(n: int) -> None:
    if torch.cuda.device_count() < n:
        pytest.skip(f"needs {n} GPUs, {torch.cuda.device_count()} are here")
    reached(torchrun(n, gpu_rank.by_torchrun, 8), "a" * n)


@pytest.mark.parametrize("nodes", ["aaa", "aab", "abc"], ids=["mapped", "both ways", "through the backend"])
def test_one_that_is_started_again(tmp_path: Path, nodes: str) -> None:
    """It makes its lanes as the others' are, and all go on with it: rank 1 is killed and comes back."""
    answers = launch.run(
        3, gpu_rank.loses_rank_1, tmp_path, nodes, dies=frozenset({1}), again=gpu_rank.started_again, limit_s=100.0
    )
    for rank, paths in enumerate(answers):
        expected = ["mapped" if node == nodes[rank] else "engine" for node in nodes]
        expected[rank] = "own"
        assert list(paths) == expected
