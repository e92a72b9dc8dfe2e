# SPDX-License-Identifier: Apache-2.0
"""A rank is killed with SIGKILL in each phase: every other rank raises an error that names it, in time, and none hangs.
One that is only slow is waited for."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import launch
import moe_model as model
import pytest

import eptransport as ept

WORLD = 3
VICTIM = 1
TIMEOUT_S = 20.0
DEAD_S = 5.0
CONFIG = model.Config(WORLD, 6, 2, 64)
PHASES = ["before_dispatch_send", "between_dispatch_halves", "before_combine", "between_combine_halves"]


@dataclass(frozen=True)
class Said:
    kind: str
    peer: int | None
    words: str
    after_s: float


def scenario(tokens: int = 4, seed: int = 1) -> harness.Scenario:
    return harness.Scenario(CONFIG, harness.make_batches(CONFIG, [tokens] * WORLD, seed), ["contiguous"] * WORLD)


def all_to_all(group: ept.Group, **more: Any) -> ept.AllToAll:
    more.setdefault("max_tokens", 16)
    return ept.AllToAll(
        group, num_experts=CONFIG.num_experts, top_k=CONFIG.top_k, hidden=CONFIG.hidden, lanes=1,
        dtype=harness.TORCH[CONFIG.dtype], **more
    )  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stop() -> None:
    """Neither dead nor alive: sockets stay open, nothing answers. The test's end kills it."""
    os.kill(os.getpid(), signal.SIGSTOP)


def killed_in(
    rank: int, world: int, folder: str, held: list[Any], phase: str, how: str, timeout_s: float, **network: Any
) -> Said | None:
    group = launch.open_group(rank, world, folder, timeout_s=timeout_s, dead_s=DEAD_S, **network)
    held.append(group)
    moe = all_to_all(group)
    step = scenario()
    for _ in range(3):
        step.run(rank, moe)

    def here(name: str) -> None:
        if rank == VICTIM and phase == name:
            (die if how == "SIGKILL" else stop)()

    begun = time.monotonic()
    try:
        while True:  # a survivor may well finish the phase: what it needs of the victim can have come before
            here("before_dispatch_send")
            moe.dispatch_send(**step.arguments(rank))
            here("between_dispatch_halves")
            got = moe.dispatch_recv(lane=0)
            here("before_combine")
            moe.combine_send(**step.combine_arguments(rank, got))
            here("between_combine_halves")
            step.check_y(rank, moe.combine_recv(got))
    except ept.EptError as error:
        return Said(type(error).__name__, error.peer, str(error), time.monotonic() - begun)


def expect(answers: list[Said | None], within_s: float) -> None:
    for rank, said in enumerate(answers):
        if rank == VICTIM:
            continue
        assert said is not None
        assert said.kind in ("PeerLost", "Timeout"), f"rank {rank}: {said}"
        assert said.peer == VICTIM or f"rank {VICTIM}" in said.words, f"rank {rank} names another: {said}"
        assert said.after_s < within_s, f"rank {rank}: {said}"


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in(tmp_path: Path, phase: str) -> None:
    answers = launch.run(
        WORLD, killed_in, tmp_path, phase, "SIGKILL", TIMEOUT_S, dies=frozenset({VICTIM}), limit_s=TIMEOUT_S + 40
    )
    expect(answers, TIMEOUT_S)


def test_stopped_and_silent(tmp_path: Path) -> None:
    """A machine that froze: no reset comes from its kernel. The others find out by their deadline at the latest."""
    timeout_s = 8.0
    answers = launch.run(
        WORLD, killed_in, tmp_path, "before_combine", "SIGSTOP", timeout_s, dies=frozenset({VICTIM}), limit_s=60
    )
    expect(answers, timeout_s + 2)


def killed_while_streaming(rank: int, world: int, folder: str, held: list[Any]) -> Said:
    group = launch.open_group(rank, world, folder, timeout_s=TIMEOUT_S, dead_s=DEAD_S)
    held.append(group)
    budget = int(harness.plan(CONFIG, max_tokens=16, lanes=1).lane_bytes)
    moe = all_to_all(group, max_tokens=4000, buffer_bytes=budget)
    scenario().run(rank, moe)
    long = harness.arguments(CONFIG, harness.make_batch(CONFIG, 4000, rank))
    begun = time.monotonic()
    moe.dispatch(**long)  # 250 chunks and more to each peer
    took = time.monotonic() - begun
    begun = time.monotonic()
    if rank == VICTIM:
        threading.Timer(took / 2, die).start()
    try:
        while True:
            moe.dispatch(**long)
    except ept.EptError as error:
        return Said(type(error).__name__, error.peer, str(error), time.monotonic() - begun)


def test_killed_while_streaming(tmp_path: Path) -> None:
    answers = launch.run(WORLD, killed_while_streaming, tmp_path, dies=frozenset({VICTIM}), limit_s=TIMEOUT_S + 40)
    # Who had all of the victim's chunks waits for a survivor that had not: until the deadline, which names both.
    expect(answers, TIMEOUT_S + 10)


def slow(rank: int, world: int, folder: str, held: list[Any]) -> float:
    """Far longer than dead_s between two calls, while the others wait for it."""
    group = launch.open_group(rank, world, folder, timeout_s=30.0, dead_s=2.0, warn_s=1.0)
    held.append(group)
    moe = all_to_all(group)
    step = scenario()
    step.run(rank, moe)
    begun = time.monotonic()
    if rank == VICTIM:
        time.sleep(3.0)
    got = moe.dispatch(**step.arguments(rank))
    if rank == VICTIM:
        time.sleep(3.0)
    step.check_y(rank, moe.combine(**step.combine_arguments(rank, got)))
    return time.monotonic() - begun


def test_slow_but_alive(tmp_path: Path) -> None:
    waited = launch.run(WORLD, slow, tmp_path, limit_s=60)
    assert all(seconds > 5.9 for seconds in waited)


def in_python(rank: int, world: int, folder: str, held: list[Any]) -> str:
    """A rank that leaves in order is no failure, and whoever still calls it is told that it left."""
    group = launch.open_group(rank, world, folder, timeout_s=10.0, dead_s=2.0)
    moe = all_to_all(group)
    scenario().run(rank, moe)
    if rank == VICTIM:
        group.close()
        return "left"
    held.append(group)
    time.sleep(0.5)
    with pytest.raises((ept.PeerLost, ept.Timeout)) as caught:
        scenario().run(rank, moe)
    assert caught.value.peer == VICTIM or f"rank {VICTIM}" in str(caught.value), str(caught.value)
    return type(caught.value).__name__


def test_a_rank_that_left(tmp_path: Path) -> None:
    answers = launch.run(WORLD, in_python, tmp_path, limit_s=60)
    assert answers[VICTIM] == "left"
    assert {answers[0], answers[2]} <= {"PeerLost", "Timeout"}
