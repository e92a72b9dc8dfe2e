# SPDX-License-Identifier: Apache-2.0
"""Ranks as real processes: each runs one function, answers with one value, and keeps its group until all have answered.

The processes are forked from a server that has imported torch and eptransport and done nothing else, so eight of them
start in a second. A survivor that closed its group at once would look to the others like a second rank that is gone; so
a rank holds it until `run` lets go.

With EPT_TEST_DEVICE=cuda those of test_masked.py compute on a GPU, which they share where there are fewer than ranks.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import harness
import torch

import eptransport as ept

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "eptransport", "harness", "launch"])


@dataclass(frozen=True)
class Failed:
    """A function that raised, in words."""

    words: str


class Died(Exception):
    pass


def open_group(rank: int, world: int, folder: str, *, rejoin: bool = False, **fields: Any) -> ept.Group:
    """A group over TCP on this machine; the ranks meet in a file."""
    store = torch.distributed.FileStore(str(Path(folder) / "store"), world)
    fields = {"backend": "tcp", "timeout_s": 20.0, "dead_s": 5.0, "threads": 1, **fields}
    return ept.Group(ept.Settings(**fields), store=store, rank=rank, world_size=world, rejoin=rejoin)


def _child(
    function: Callable[..., Any], rank: int, world: int, folder: str, args: tuple[Any, ...], device: str, pipe: Any
) -> None:
    torch.set_num_threads(1)
    harness.DEVICE = device  # the server that this was forked from may have begun without EPT_TEST_DEVICE
    held: list[Any] = []  # what must live until the parent lets go
    try:
        with harness.on_device():
            answer = function(rank, world, folder, held, *args)
    except BaseException:
        answer = Failed(traceback.format_exc())
    pipe.send(answer)
    pipe.recv()
    for thing in reversed(held):
        thing.close()


def run(
    world: int,
    function: Callable[..., Any],
    folder: Path,
    *args: Any,
    dies: frozenset[int] = frozenset(),
    again: Callable[..., Any] | None = None,
    limit_s: float,
) -> list[Any]:
    """function(rank, world, folder, held, *args) in `world` processes; the answers, None for each rank in `dies`. With
    `again` a rank in `dies` is started once more when it has died, with that function, and its answer is that one's.

    Raises if another rank dies or fails, or if an answer is not there after `limit_s`: then a rank hangs.
    """

    def start(rank: int, what: Callable[..., Any]) -> None:
        pipes[rank], there = CONTEXT.Pipe()
        args_of = (what, rank, world, str(folder), args, harness.DEVICE, there)
        processes[rank] = CONTEXT.Process(target=_child, args=args_of, daemon=True)
        processes[rank].start()
        there.close()

    pipes: dict[int, Connection] = {}
    processes: dict[int, Any] = {}
    for rank in range(world):
        start(rank, function)
    for rank in sorted(dies) if again else ():
        processes[rank].join(limit_s)
        start(rank, again)
    dies = dies if again is None else frozenset()
    answers: list[Any] = [None] * world
    waiting = {pipes[rank]: rank for rank in range(world) if rank not in dies}
    deadline = time.monotonic() + limit_s
    try:
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} gave no answer within {limit_s} s")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[index]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError as error:
                    processes[rank].join(5)
                    raise Died(f"rank {rank} ended with {processes[rank].exitcode}") from error
                if isinstance(answers[rank], Failed):
                    raise AssertionError(f"rank {rank}: {answers[rank].words}")
        for rank, pipe in pipes.items():
            if rank not in dies:
                pipe.send("go")
        for rank, process in processes.items():
            if rank in dies:
                continue
            process.join(20)
            if process.exitcode != 0:
                raise Died(f"rank {rank} closed its group and ended with {process.exitcode}")
        return answers
    finally:
        for process in processes.values():
            if process.is_alive():
                process.kill()
            process.join(5)
