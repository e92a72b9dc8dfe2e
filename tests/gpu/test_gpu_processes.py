# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes on one GPU, which takes them in turn where no MPS runs: a wait lasts some time slices."""

from __future__ import annotations

from pathlib import Path

import gpu_rank
import pytest
from children import process_context, run_child


@pytest.mark.parametrize(("n", "intra"), [(2, None), (4, None), (2, "off"), (4, "off")])
def test_processes(tmp_path: Path, n: int, intra: str | None) -> None:
    context = process_context()
    pipes, children = [], []
    for rank in range(n):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, gpu_rank.steps, rank, n, tmp_path, (4, intra))
        child = context.Process(target=run_child, args=arguments, daemon=True)
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
    assert [len(answer) for answer in answers] == [4] * n
