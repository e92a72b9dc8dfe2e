# SPDX-License-Identifier: Apache-2.0
"""Steps go on without a rank that is masked, and with it again when it is readmitted: bit for bit what the reference
says, and every token knows which of its experts it has lost.

Ranks are threads over loopback. When a mask comes is decided by what has happened (a half of a step that has returned,
another rank's call that was seen to wait), never by time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import harness
import moe_model as model
import pytest
import torch
from harness import Scenario, all_to_alls, make_batches, on_ranks, on_some, run_all

import eptransport as ept
from eptransport.engine import PeerStatus

Make = Callable[..., list[Any]]
CONFIG = model.Config(4, 8, 3, 32)
CONFIG_OF_THREE = model.Config(3, 8, 3, 32)
LAYOUTS = ["contiguous", "rows", "masked", "by_rank"]


def scenario(seed: int, *masked: int) -> Scenario:
    return Scenario(CONFIG, make_batches(CONFIG, (3, 5, 4, 6), seed), LAYOUTS, masked=frozenset(masked))


def without(*masked: int) -> list[int]:
    return [rank for rank in range(CONFIG.world) if rank not in masked]


def go_on(moes: list[Any], groups: list[Any], *masked: int, seed: int = 50, steps: int = 3) -> None:
    """A few right steps of those that are left."""
    for step in range(steps):
        now = scenario(seed + step, *masked)
        on_some(groups, without(*masked), lambda rank, now=now, step=step: now.run(rank, moes[rank], halves=step == 1))


def until_reset(moe: Any, step: Callable[[], Any]) -> list[ept.EptError]:
    """What a serving loop does: steps, and on a fault a reset and the step again. The errors it met."""
    met: list[ept.EptError] = []
    while True:
        try:
            step()
        except (ept.PeerLost, ept.LaneFault) as error:
            met.append(error)
            if isinstance(error, ept.Masked) or len(met) > 10:
                raise
            moe.reset()
        else:
            return met


def test_an_idle_rank_is_masked_and_all_others_agree_to_go_on(make_groups: Make) -> None:
    """All survivors mask it at the same place, so no step is lost and no reset is needed."""
    groups = make_groups(4)
    moes = all_to_alls(groups, CONFIG)
    run_all(scenario(1), moes, groups)
    on_some(groups, without(2), lambda rank: groups[rank].mask(2, why=f"{rank} thinks so"))
    for rank in without(2):
        assert groups[rank].membership.epoch == 1, "three asked for one change"
        assert groups[rank].membership == groups[0].membership
        assert groups[rank].membership.active == (0, 1, 3)
        (masked,) = groups[rank].membership.masked
        assert masked.why == f"{masked.by} thinks so"
        assert groups[rank].active_mask.tolist() == [1, 1, 0, 1]
    go_on(moes, groups, 2)
    with pytest.raises(ept.Masked, match=r"rank 2 was masked by rank \d \(membership 1\): \d thinks so"):
        moes[2].dispatch(**scenario(1).arguments(2))
    with pytest.raises(ept.Masked):
        groups[2].mask(0)
    assert groups[2].membership.why(2) is not None


def test_one_survivor_masks_and_the_others_learn_of_it(make_groups: Make) -> None:
    """One asks; the others find out while they wait or at their next step, and all come together in a reset."""
    groups = make_groups(4, timeout_s=60.0)
    moes = all_to_alls(groups, CONFIG)
    run_all(scenario(1), moes, groups)

    def survivor(rank: int) -> None:
        if rank == 0:
            groups[0].mask(3, why="it is odd")
        for step in range(3):
            now = scenario(step, 3)
            until_reset(moes[rank], lambda now=now: now.run(rank, moes[rank]))  # type: ignore[misc]
        assert groups[rank].membership.epoch == 1

    on_some(groups, without(3), survivor)


@pytest.mark.parametrize("phase", ["dispatch_send", "dispatch_recv", "combine_send", "combine_recv"])
def test_a_rank_that_stops_in_a_phase_is_masked_in_it(make_groups: Make, phase: str) -> None:
    """Rank 1 does the phase's call no more. The others wait for it, wherever they come to; one of them, whose wait was
    seen, is told to mask it by another thread. All waits end, and after a reset steps are right without it."""
    groups = make_groups(4)
    moes = all_to_alls(groups, CONFIG)
    run_all(scenario(1), moes, groups)
    phases = ["dispatch_send", "dispatch_recv", "combine_send", "combine_recv"]
    gone = threading.Event()

    def halves(rank: int, seed: int, upto: str | None) -> None:
        got: Any = None
        now = scenario(seed)
        for name in phases:
            if name == upto:
                return
            if name == "dispatch_send":
                moes[rank].dispatch_send(**now.arguments(rank))
            elif name == "dispatch_recv":
                got = moes[rank].dispatch_recv()
                now = scenario(seed, *got.lost_ranks)  # one that learned in time took the mask
                now.check(rank, got)
                if got.lost_ranks:
                    noticed.add(rank)
            elif name == "combine_send":
                moes[rank].combine_send(**now.combine_arguments(rank, got))
            else:
                now.check_y(rank, moes[rank].combine_recv(got))

    noticed: set[int] = set()  # whose step began when the mask was there, so that it met no error
    met: dict[int, list[ept.EptError]] = {}

    def survivor(rank: int) -> None:
        met[rank] = []
        for step in range(3):  # what the victim has sent may carry a step to its end
            try:
                halves(rank, 7 + step, None)
            except (ept.PeerLost, ept.LaneFault) as error:
                met[rank].append(error)
                break
        moes[rank].reset()
        for step in range(3):
            now = scenario(20 + step, 1)
            now.run(rank, moes[rank], halves=step > 0)

    def victim() -> None:
        halves(1, 7, phase)
        gone.set()

    def masker() -> None:
        assert gone.wait(60)
        groups[0].mask(1, why="it stopped")

    calls = [*(lambda rank=rank: survivor(rank) for rank in without(1)), victim, masker]
    harness.together(groups, calls)
    for rank in without(1):
        # Of a rank that did all but receive nothing is missing, so the mask may have come between two steps for all.
        assert met[rank] or rank in noticed or phase == "combine_recv", f"rank {rank} went on as if nothing had been"
        assert groups[rank].membership.why(1) == "it stopped"


def test_the_mask_of_a_step_is_taken_once(make_groups: Make) -> None:
    """Between the halves of a dispatch whose rows are all here a rank is masked: the step has its rows still, and so
    have its counts; the step's combine says that it is lost, and the next step is without it."""
    groups = make_groups(4)
    moes = all_to_alls(groups, CONFIG)
    now = scenario(3)
    on_ranks(groups, lambda rank: moes[rank].dispatch_send(**now.arguments(rank)))
    for group in groups:
        group.engine.quiesce()  # what was posted has landed
    on_some(groups, without(2), lambda rank: groups[rank].mask(2))

    def survivor(rank: int) -> None:
        got = moes[rank].dispatch_recv()
        now.check(rank, got)  # rank 2's rows, counts and nothing lost
        with pytest.raises(ept.PeerLost, match="rank 2 was masked since the dispatch"):
            moes[rank].combine(**now.combine_arguments(rank, got))
        moes[rank].reset()
        # The routing is of another membership; a dispatch by it takes the mask anew.
        again = scenario(3, 2)
        got = moes[rank].dispatch(again.arguments(rank)["x"], routing=got.routing, layout=LAYOUTS[rank])
        again.check(rank, got)
        again.check_y(rank, moes[rank].combine(**again.combine_arguments(rank, got)))

    on_some(groups, without(2), survivor)


def test_two_survivors_mask_two_ranks_at_once(make_groups: Make) -> None:
    groups = make_groups(4)
    moes = all_to_alls(groups, CONFIG, lanes=2)
    run_all(scenario(1), moes, groups, lane=1)
    start = threading.Barrier(2)

    def survivor(rank: int) -> None:
        start.wait(60)
        groups[rank].mask(2 if rank == 0 else 3, why=f"by {rank}")
        for step in range(4):
            now = scenario(step, 2, 3)
            until_reset(moes[rank], lambda now=now, step=step: now.run(rank, moes[rank], lane=step % 2))  # type: ignore[misc]

    on_some(groups, [0, 1], survivor)
    assert groups[0].membership == groups[1].membership
    assert groups[0].membership.epoch == 2
    assert {each.rank: each.by for each in groups[0].membership.masked} == {2: 0, 3: 1}


def test_all_but_one_are_masked(make_groups: Make) -> None:
    groups = make_groups(4)
    moes = all_to_alls(groups, CONFIG)
    for rank in (1, 2, 3):
        groups[0].mask(rank)
    go_on(moes, groups, 1, 2, 3)


def test_a_masked_rank_that_writes_on_changes_nothing(make_groups: Make) -> None:
    """It was masked by mistake, doesn't know it, and goes on with its steps. The others' results have nothing of it."""
    groups = make_groups(4)
    moes = all_to_alls(groups, CONFIG)
    run_all(scenario(1), moes, groups)
    on_some(groups, without(0), lambda rank: groups[rank].mask(0))
    for step in range(3):
        now = scenario(step, 0)

        def survivor(rank: int, now: Scenario = now) -> None:
            now.run(rank, moes[rank])

        def stray(rank: int = 0) -> None:
            with pytest.raises(ept.Masked):
                moes[0].dispatch(**scenario(9).arguments(0))

        harness.together(groups, [stray, *(lambda rank=rank: survivor(rank) for rank in without(0))])  # type: ignore[misc]


def test_a_streamed_call_is_cut_by_a_mask(make_groups: Make) -> None:
    """Rank 2 stays away from a long dispatch, so that its chunks are never granted and never come."""
    config = model.Config(3, 6, 2, 32)
    groups = make_groups(3)
    budget = int(harness.plan(config, max_tokens=16, lanes=1).lane_bytes)
    moes = all_to_alls(groups, config, max_tokens=200, buffer_bytes=budget)
    whole = Scenario(config, make_batches(config, (150, 200, 120), 1), ["rows"] * 3)
    run_all(whole, moes, groups)
    left = Scenario(config, make_batches(config, (150, 200, 120), 2), ["rows"] * 3, masked=frozenset({2}))
    waiting = threading.Event()

    def survivor(rank: int) -> None:
        waiting.set()
        with pytest.raises((ept.PeerLost, ept.LaneFault)):
            whole.run(rank, moes[rank])
        moes[rank].reset()
        for _ in range(2):
            left.run(rank, moes[rank])

    def masker() -> None:
        assert waiting.wait(60)
        while moes[0].stats().rows[0] == before:  # some chunks of the call under way have gone
            pass
        groups[1].mask(2)

    before = moes[0].stats().rows[0]
    harness.together(groups, [lambda: survivor(0), lambda: survivor(1), masker])


def test_a_mask_while_another_all_to_all_is_set_up(make_groups: Make) -> None:
    """Rank 3 doesn't come to the constructor. The others wait in it, or are on their way to it, when they are told; who
    waited makes it again, and all have theirs without rank 3."""
    groups = make_groups(4)
    moes = all_to_alls(groups, CONFIG)
    inside = threading.Barrier(4)
    larger = model.Config(4, 8, 3, 64)

    def survivor(rank: int) -> ept.AllToAll:
        inside.wait(60)
        for _ in range(2):
            try:
                return ept.AllToAll(
                    groups[rank], num_experts=8, top_k=3, hidden=64, max_tokens=32, lanes=2, device=harness.DEVICE
                )
            except ept.PeerLost as error:
                lost.append(error)
        raise AssertionError(lost)

    def masker() -> ept.AllToAll:
        inside.wait(60)
        groups[0].mask(3)
        return moes[0]

    lost: list[ept.PeerLost] = []
    calls: list[Callable[[], ept.AllToAll]] = [lambda rank=rank: survivor(rank) for rank in range(3)]  # type: ignore[misc]
    made = harness.together(groups, [*calls, masker])
    assert all(error.peer == 3 for error in lost), lost
    now = Scenario(larger, make_batches(larger, (3, 5, 4, 6), 2), LAYOUTS, masked=frozenset({3}))
    on_some(groups, [0, 1, 2], lambda rank: now.run(rank, made[rank], lane=1))
    go_on(moes, groups, 3)


@pytest.mark.parametrize("masked", [0, 2])
def test_masked_readmitted_and_whole_again(make_groups: Make, masked: int) -> None:
    """Twice: every step between is right without it, and after it is back every step is right with it."""
    groups = make_groups(4)
    moes = all_to_alls(groups, CONFIG, lanes=2)
    for turn in range(2):
        for step in range(3):
            run_all(scenario(step), moes, groups, lane=step % 2)
        on_some(groups, without(masked), lambda rank: groups[rank].mask(masked, why="by mistake"))
        go_on(moes, groups, masked, seed=30 + turn)

        def back(rank: int) -> None:
            if rank == masked:
                with pytest.raises(ept.Masked):
                    moes[rank].dispatch(**scenario(1).arguments(rank))
                groups[rank].rejoin()
            elif rank == (masked + 1) % 4:
                groups[rank].readmit(masked)
            else:
                until_reset(moes[rank], lambda: scenario(40).run(rank, moes[rank]))
                return
            moes[rank].reset()
            scenario(40).run(rank, moes[rank])

        on_ranks(groups, back)
        for rank in range(4):
            membership = groups[rank].membership
            assert membership == groups[0].membership
            assert membership.epoch == 2 * (turn + 1)
            assert membership.active == (0, 1, 2, 3)
            assert membership.step > 0, "from a step on that all know"
            assert groups[rank].active_mask.tolist() == [1, 1, 1, 1]


def test_rejoin_and_readmit_refuse_what_makes_no_sense(make_groups: Make) -> None:
    groups = make_groups(2)
    with pytest.raises(ept.InvalidArgument, match="isn't masked"):
        groups[0].rejoin()
    for rank in (0, 2, -1):
        with pytest.raises(ept.InvalidArgument, match="another rank"):
            groups[0].mask(rank)
    groups[0].readmit(1)  # it is there
    groups[0].mask(1)
    with pytest.raises(ept.Timeout, match="rank 1 has not come back"):
        groups[0].readmit(1, timeout=0.05)
    with pytest.raises(ept.Timeout, match="no other rank has called"):
        groups[1].rejoin(timeout=0.05)


def test_lost_is_by_token_and_place(make_groups: Make) -> None:
    """By hand, without the model: ids with -1, with an expert twice, with all experts gone, and padding."""
    groups = make_groups(2)
    config = model.Config(2, 4, 2, 32)
    moes = all_to_alls(groups, config)
    with harness.on_device():
        groups[0].mask(1)
        x = torch.ones(5, 32, dtype=torch.bfloat16)
        ids = torch.tensor([[0, 1], [0, 2], [3, 2], [-1, 3], [3, 3]])
        weights = torch.full((5, 2), 0.5)
        got = moes[0].dispatch(x, ids, weights, layout="rows", num_tokens=4, host_counts=True)
        assert got.lost.tolist() == [[False, False], [False, True], [True, True], [False, True], [False, False]]
        assert got.lost_ranks == (1,)
        assert got.counts.tolist() == [2, 1]
        y = moes[0].combine(got.x, got)
        assert y[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
        assert got.source.tolist() == [[0, 0], [0, 1]]


def test_with_on_lost_a_lane_fault_masks_whom_the_engine_has_lost(make_groups: Make) -> None:
    """Lanes on a GPU tell of every cause as LaneFault: of a rank that is only late, and of one that is gone."""
    groups = make_groups(3, on_lost="mask")
    fault = ept.LaneFault("lane 0 is faulted, reset it; the first cause was ...", peer=1)
    groups[0]._members.after(fault, "mask")
    assert groups[0].membership.epoch == 0
    groups[1].close()
    while groups[0].engine.peer(1).info.status is PeerStatus.UP:
        time.sleep(0.01)
    groups[0]._members.after(fault, "raise")
    assert groups[0].membership.epoch == 0
    groups[0]._members.after(fault, "mask")
    assert groups[0].membership.active == (0, 2)


@pytest.mark.parametrize("on_lost", ["mask", "raise"])
def test_a_reset_goes_on_without_whom_it_masks(
    make_groups: Make, monkeypatch: pytest.MonkeyPatch, on_lost: str
) -> None:
    """A rank that is lost amid the reset of a GPU's lanes ends the try. Whoever has masked it tries again."""
    groups = make_groups(3, on_lost=on_lost)
    moes = all_to_alls(groups, CONFIG_OF_THREE)
    tries: list[int] = []
    whole = moes[0]._steps.reset

    def lost_at_first(timeout: int) -> Any:
        tries.append(timeout)
        if len(tries) > 1:
            return whole(timeout)
        if on_lost == "mask":
            groups[0].mask(2)
        raise ept.PeerLost("rank 2 is lost", peer=2)

    monkeypatch.setattr(moes[0]._steps, "reset", lost_at_first)
    if on_lost == "raise":
        with pytest.raises(ept.PeerLost):
            moes[0].reset()
        return
    on_some(groups, (0, 1), lambda rank: moes[rank].reset())
    assert len(tries) >= 2
    assert groups[0].membership.active == groups[1].membership.active == (0, 1)
