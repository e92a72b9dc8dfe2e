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
