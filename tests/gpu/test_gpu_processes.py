# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes, one a GPU where there are so many: then NVLink or PCIe carries what CUDA IPC maps. A GPU takes
several of them in turn where no MPS runs: a wait lasts some time slices."""

from __future__ import annotations

from pathlib import Path

import gpu_rank
import pytest
import torch
from children import process_context, run_child


def reached(answers: list[tuple[tuple[str, ...], int]], nodes: tuple[str, ...]) -> None:
    """Each rank reached the others as it should, and bytes went through the engine where one was on another node."""
    for rank, (paths, written) in enumerate(answers):
        expected = ["mapped" if node == nodes[rank] else "engine" for node in nodes]
        expected[rank] = "own"
        assert list(paths) == expected
        assert (written > 0) == ("engine" in expected), written


@pytest.mark.parametrize(("n", "intra"), [(2, None), (4, None), (2, "off"), (4, "off")])
def test_processes(tmp_path: Path, n: int, intra: str | None) -> None:
    answers = started(n, tmp_path, (4, intra))
    reached(answers, tuple(str(rank) for rank in range(n)) if intra else ("one",) * n)


@pytest.mark.parametrize("nodes", ["aabb", "abab"])
def test_two_nodes(tmp_path: Path, nodes: str) -> None:
    """Both ways in one step: by CUDA IPC inside a node, over tcp between them."""
    reached(started(4, tmp_path, (8, None, tuple(nodes))), tuple(nodes))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_torchrun_with_one_process_a_gpu(tmp_path: Path, n: int) -> None:
    if torch.cuda.device_count() < n:
        pytest.skip(f"{torch.cuda.device_count()} GPUs here")
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id="gpus",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    answers = elastic_launch(config, gpu_rank.by_torchrun)(8)
    reached([answers[rank] for rank in range(n)], ("one",) * n)


def started(n: int, folder: Path, arguments: tuple[object, ...]) -> list[tuple[tuple[str, ...], int]]:
    context = process_context()
    pipes, children = [], []
    for rank in range(n):
        ours, theirs = context.Pipe(duplex=False)
        given = (theirs, gpu_rank.steps, rank, n, folder, arguments)
        child = context.Process(target=run_child, args=given, daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    answers = [pipe.recv() if pipe.poll(100) else "no answer" for pipe in pipes]
    for child in children:
        child.join(10)
        if child.is_alive():
            child.terminate()
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
        assert answer != "no answer", answers
    return answers
