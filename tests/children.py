# SPDX-License-Identifier: Apache-2.0
"""What a test's child process runs. A module of its own: `conftest` names another file in each folder."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
from collections.abc import Callable
from pathlib import Path
from typing import Any


def process_context() -> multiprocessing.context.ForkServerContext:
    """Forks from a server that has imported torch and done nothing else: a process starts in milliseconds. The server
    starts with the first process, whoever asks for it: so all must ask here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "eptransport.group"])
    return context


def run_child(pipe: Any, function: Callable[..., Any], rank: int, n: int, folder: Path, args: tuple[Any, ...]) -> None:
    """Sends what the function returns or raises."""
    try:
        answer = function(rank, n, folder, *args)
    except Exception as error:
        answer = error
    pipe.send(answer)


def torchrun(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(*args) returned in n processes that torchrun's launcher started on this machine, in rank order."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id="test",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    answers = elastic_launch(config, function)(*args)
    return [answers[rank] for rank in range(n)]
