# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes whose kernels put into each other's memory through NVSHMEM, one a GPU or, under MPS, several on
one. EPT_INTRA=off forces that where they could map each other's memory; a counter beside each put says that they
happened."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_nvshmem
import launch
import pytest

from eptransport.backends import registry

Spawn = Callable[..., list[Any]]

pytestmark = pytest.mark.skipif(
    "CUDA_MPS_PIPE_DIRECTORY" not in os.environ, reason="PEs share the GPU: run under MPS (tests/gpu/run nvshmem)"
)


@pytest.fixture(autouse=True)
def usable() -> None:
    plugin = registry(()).plugins.get("nvshmem")
    if plugin is None:
        pytest.skip("this build has no plugin nvshmem")
    probe = plugin.probe()
    if not probe.usable:
        pytest.skip(probe.why_not)


def answers_of(answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


@pytest.mark.parametrize("n", [2, 4, 8])
def test_every_message_is_a_put(spawn: Spawn, n: int) -> None:
    for rank, (paths, puts, messages, written) in enumerate(answers_of(spawn(n, gpu_nvshmem.steps, 8, "off"))):
        assert list(paths) == ["own" if other == rank else "gpu" for other in range(n)]
        assert puts == messages > 0
        assert written == 0


def test_two_nodes(spawn: Spawn) -> None:
    """Both ways in one step: mapped inside a node, by puts between them."""
    nodes = "abab"
    for rank, (paths, puts, messages, written) in enumerate(answers_of(spawn(4, gpu_nvshmem.steps, 8, None, nodes))):
        expected = ["mapped" if node == nodes[rank] else "gpu" for node in nodes]
        expected[rank] = "own"
        assert list(paths) == expected
        assert 3 * puts == 2 * messages > 0  # two of three peers
        assert written == 0


@pytest.mark.parametrize("n", [2, 4])
def test_replayed_graphs(spawn: Spawn, n: int) -> None:
    count = 200
    for puts, messages in answers_of(spawn(n, gpu_nvshmem.replays, count)):
        assert puts == messages == 2 * count * (n - 1)


@pytest.mark.parametrize("n", [2, 4])
def test_both_ways_are_measured(spawn: Spawn, n: int) -> None:
    """What is measured says which way, all ranks choose alike, and the steps are right over either."""
    for path in ("auto", "gpu", "proxy"):
        answers = answers_of(spawn(n, gpu_nvshmem.chooses, path))
        choices = {choice for choice, *_ in answers}
        assert len(choices) == 1
        (choice,) = choices
        print(f"{n} ranks, EPT_GPU_PATH={path}: {choice}")
        by_puts = path == "gpu"
        if path == "auto":
            took = [float(us) for pair in re.findall(r"([0-9.]+) and ([0-9.]+) us", choice) for us in pair]
            assert len(took) == 6
            assert min(took) > 0
            by_puts = choice.startswith("put by kernels")
            difference = took[3] + took[5] - took[2] - took[4]
            assert abs(difference) < 0.5 or by_puts == (difference > 0)  # as far as what is shown can tell
        else:
            assert choice == ""
        for rank, (_, paths, puts, written) in enumerate(answers):
            assert list(paths) == ["own" if other == rank else "gpu" if by_puts else "engine" for other in range(n)]
            assert (puts > 0) == by_puts
            assert (written > 0) == (not by_puts)


def test_a_rank_is_masked(spawn: Spawn) -> None:
    rows = answers_of(spawn(3, gpu_nvshmem.masks))
    assert rows[2] == 0
    assert rows[0] > 0
    assert rows[1] > 0


def test_a_process_is_killed(tmp_path: Path) -> None:
    """Amid a step: the others get an error that says who is gone, by their deadline, and go on without it."""
    answers = launch.run(3, gpu_nvshmem.loses_the_last, tmp_path, dies=frozenset({2}), limit_s=90.0)
    for kind, message, took in answers[:2]:
        assert kind == "LaneFault"
        assert "waited for rank 2, which is gone (EPT_E_PEER_LOST)" in message
        assert took < 20.0


def test_refusals(spawn: Spawn) -> None:
    for large, second, streamed in answers_of(spawn(2, gpu_nvshmem.refusals)):
        assert "set EPT_NVSHMEM_HEAP_MIB to" in large
        assert "a PE of another group that is open" in second
        assert "kernels that post by themselves can't do yet" in streamed
