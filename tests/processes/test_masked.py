# SPDX-License-Identifier: Apache-2.0
"""Ranks that die are masked and the others go on, bit for bit as the reference says without them; one that is started
again, or was masked by mistake, is taken back. Real processes over TCP, each with the loop of a server: step, and on a
fault reset and step again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import launch
import moe_model as model
import pytest

import eptransport as ept

CONFIG = model.Config(4, 8, 3, 64)
LAYOUTS = ["contiguous", "rows", "masked", "contiguous"]
LIMIT_S = 100.0
PHASES = ["before_dispatch_send", "between_dispatch_halves", "before_combine", "between_combine_halves"]


def scenario(*masked: int) -> harness.Scenario:
    """The same tokens every time, since ranks that come from a fault may repeat a step that others have finished."""
    return harness.Scenario(CONFIG, harness.make_batches(CONFIG, (4, 2, 5, 3), 1), LAYOUTS, masked=frozenset(masked))


def open_all(rank: int, world: int, folder: str, held: list[Any], **more: Any) -> tuple[ept.Group, ept.AllToAll]:
    group = launch.open_group(rank, world, folder, timeout_s=60.0, dead_s=60.0, **more)
    held.append(group)
    moe = ept.AllToAll(
        group,
        num_experts=8,
        top_k=3,
        hidden=64,
        max_tokens=16,
        lanes=1,
        dtype=harness.TORCH[CONFIG.dtype],
        device=harness.DEVICE,
    )
    return group, harness.checked(moe)


def nothing(*_: str) -> None:
    pass


def step(rank: int, moe: ept.AllToAll, here: Callable[[str], None] = nothing) -> tuple[int, ...]:
    """One step, checked against the reference without the ranks that it says are lost; those."""
    here("before_dispatch_send")
    moe.dispatch_send(**scenario().arguments(rank))
    here("between_dispatch_halves")
    got = moe.dispatch_recv()
    now = scenario(*got.lost_ranks)
    now.check(rank, got)
    here("before_combine")
    moe.combine_send(**now.combine_arguments(rank, got))
    here("between_combine_halves")
    now.check_y(rank, moe.combine_recv(got))
    return got.lost_ranks


def serve(
    rank: int, moe: ept.AllToAll, lost: tuple[int, ...], steps: int, before_reset: Callable[[], None] = nothing
) -> None:
    """Until so many steps are through with just those ranks lost."""
    done = 0
    while done < steps:
        try:
            done += step(rank, moe) == lost
        except (ept.PeerLost, ept.LaneFault) as error:
            if isinstance(error, ept.Masked):
                raise
            before_reset()
            moe.reset()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def killed(rank: int, world: int, folder: str, held: list[Any], phases: dict[int, str]) -> ept.Membership:
    """Whoever finds a rank lost masks it: all that are left do, at once."""
    group, moe = open_all(rank, world, folder, held, on_lost="mask")
    for _ in range(2):
        step(rank, moe)
    if rank in phases:
        with contextlib.suppress(ept.PeerLost):  # the other victim may be dead already
            step(rank, moe, lambda name: die() if name == phases[rank] else None)
        die()
    serve(rank, moe, tuple(sorted(phases)), 3)
    return group.membership


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_is_killed_in_a_phase_and_the_others_go_on(tmp_path: Path, phase: str) -> None:
    answers = launch.run(4, killed, tmp_path, {1: phase}, dies=frozenset({1}), limit_s=LIMIT_S)
    assert answers[0] == answers[2] == answers[3]
    assert answers[0].epoch == 1, "three masked it, which is one change"
    assert answers[0].active == (0, 2, 3)
    assert answers[0].why(1).startswith("lost: ")


def test_two_ranks_are_killed_in_different_phases(tmp_path: Path) -> None:
    phases = {2: PHASES[3], 3: PHASES[1]}
    answers = launch.run(4, killed, tmp_path, phases, dies=frozenset(phases), limit_s=LIMIT_S)
    assert answers[0] == answers[1]
    assert answers[0].active == (0, 1)
    assert answers[0].epoch == 2


def killed_before_its_reset(rank: int, world: int, folder: str, held: list[Any]) -> ept.Membership:
    """Rank 3 dies in a step, and rank 2 where the others call reset, which goes on without it."""
    group, moe = open_all(rank, world, folder, held, on_lost="mask")
    step(rank, moe)
    if rank == 3:
        step(rank, moe, lambda name: die() if name == PHASES[1] else None)
    serve(rank, moe, (2, 3), 2, before_reset=die if rank == 2 else nothing)
    return group.membership


def test_a_rank_that_is_killed_amid_a_reset_is_masked_in_it(tmp_path: Path) -> None:
    answers = launch.run(4, killed_before_its_reset, tmp_path, dies=frozenset({2, 3}), limit_s=LIMIT_S)
    assert answers[0] == answers[1]
    assert answers[0].active == (0, 1)


def killed_and_taken_back(rank: int, world: int, folder: str, held: list[Any]) -> ept.Membership:
    group, moe = open_all(rank, world, folder, held, on_lost="mask")
    for _ in range(2):
        step(rank, moe)
    if rank == 0:
        step(rank, moe, lambda name: die() if name == "before_combine" else None)
    if rank == 3:
        serve(rank, moe, (0,), 2)
        group.readmit(0)
        moe.reset()
    serve(rank, moe, (), 3)
    return group.membership


def started_again(rank: int, world: int, folder: str, held: list[Any]) -> ept.Membership:
    group, moe = open_all(rank, world, folder, held, rejoin=True)
    with pytest.raises(ept.LaneFault, match="reset"):
        step(rank, moe)
    moe.reset()
    serve(rank, moe, (), 3)
    return group.membership


def test_a_process_that_is_started_again_takes_part_again(tmp_path: Path) -> None:
    answers = launch.run(4, killed_and_taken_back, tmp_path, dies=frozenset({0}), again=started_again, limit_s=LIMIT_S)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0].active == (0, 1, 2, 3)
    assert answers[0].epoch == 2
    assert answers[0].step > 0


def state_of(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]


def stopped(rank: int, world: int, folder: str, held: list[Any]) -> ept.Membership:
    """Rank 1 stands still in the middle of a step, is masked for it, and then goes on as if nothing had been."""
    group, moe = open_all(rank, world, folder, held)
    for _ in range(2):
        step(rank, moe)
    note = Path(folder) / "stopped"
    if rank == 1:
        (Path(folder) / "note").write_text(str(os.getpid()))
        (Path(folder) / "note").rename(note)
        with pytest.raises(ept.Masked, match="it stands still"):
            step(rank, moe, lambda name: os.kill(os.getpid(), signal.SIGSTOP) if name == PHASES[1] else None)
        group.rejoin()
        moe.reset()
    if rank == 0:
        while not note.exists() or state_of(int(note.read_text())) != "T":
            time.sleep(0.01)
        group.mask(1, why="it stands still")
        serve(rank, moe, (1,), 2)
        os.kill(int(note.read_text()), signal.SIGCONT)
        group.readmit(1)
        moe.reset()
    serve(rank, moe, (), 3)
    return group.membership


def test_a_process_that_stood_still_is_masked_and_comes_back(tmp_path: Path) -> None:
    answers = launch.run(4, stopped, tmp_path, limit_s=LIMIT_S)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0].active == (0, 1, 2, 3)
    assert answers[0].epoch == 2
