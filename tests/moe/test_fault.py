# SPDX-License-Identifier: Apache-2.0
"""A lane that met an expired deadline, a lost peer or a full buffer: what it says, what works on, how it is mended."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import harness
import moe_model as model
import numpy as np
import pytest
import torch
from harness import Scenario, all_to_alls, make_batches, on_ranks, on_some, run_all

import eptransport as ept

Make = Callable[..., list[Any]]
CONFIG = model.Config(3, 6, 2, 32)


def ordinary(seed: int = 1) -> Scenario:
    return Scenario(CONFIG, make_batches(CONFIG, (3, 5, 4), seed), ["contiguous"] * 3)


def test_a_deadline_names_who_and_what_and_reset_mends(make_groups: Make) -> None:
    """Rank 2 stays away from one dispatch. The others' deadline passes; another lane never notices; reset mends."""
    groups = make_groups(3, timeout_s=1.0)
    moes = all_to_alls(groups, CONFIG, lanes=2)
    scenario = ordinary()
    run_all(scenario, moes, groups)

    def late(rank: int) -> None:
        if rank == 2:
            return
        begun = time.monotonic()
        with pytest.raises(ept.Timeout) as caught:
            moes[rank].dispatch(**scenario.arguments(rank))
        assert 0.9 < time.monotonic() - begun < 6
        assert caught.value.peer == 2 or "rank 2" in str(caught.value)
        assert "dispatch" in str(caught.value)

    on_ranks(groups, late)
    for rank in (0, 1):
        assert int(groups[rank].fault) != 0
        with pytest.raises(ept.EptError):
            moes[rank].check()
        begun = time.monotonic()
        with pytest.raises(ept.LaneFault, match="rank 2"):  # the first cause
            on_some(groups, [rank], lambda rank: moes[rank].dispatch(**scenario.arguments(rank)))
        assert time.monotonic() - begun < 0.5
    run_all(scenario, moes, groups, lane=1)
    on_ranks(groups, lambda rank: moes[rank].reset())
    for rank in range(3):
        moes[rank].check()
        assert int(groups[rank].fault) == 0
    for step in range(4):
        run_all(ordinary(step), moes, groups, lane=step % 2)


@pytest.mark.parametrize("phase", ["dispatch_recv", "combine_send", "combine_recv"])
def test_a_deadline_in_every_phase(make_groups: Make, phase: str) -> None:
    groups = make_groups(3, timeout_s=1.0)
    moes = all_to_alls(groups, CONFIG)
    scenario = ordinary()

    def step(rank: int) -> str | None:
        moe = moes[rank]
        try:
            if rank == 1 and phase == "dispatch_recv":
                return None
            moe.dispatch_send(**scenario.arguments(rank))
            got = moe.dispatch_recv(lane=0)
            sent = scenario.combine_arguments(rank, got)
            if rank == 1:
                return None
            moe.combine_send(**sent)
            moe.combine_recv(got)
        except ept.Timeout as error:
            return str(error)
        return ""

    said = on_ranks(groups, step)
    assert said[1] is None
    assert "rank 1" in (said[0] or "")
    assert "rank 1" in (said[2] or "")
    on_ranks(groups, lambda rank: moes[rank].reset())
    for again in range(3):
        run_all(ordinary(again), moes, groups)


def test_reset_with_half_a_step_in_flight(make_groups: Make) -> None:
    """Ranks are in different places when they reset: sent, received, not begun. Nothing stale shows afterwards."""
    groups = make_groups(3, adversary=5)
    moes = all_to_alls(groups, CONFIG, lanes=2)
    for attempt in range(6):
        scenario = ordinary(attempt)

        def partly(rank: int, scenario: Scenario = scenario, attempt: int = attempt) -> None:
            place = (rank + attempt) % 3
            if place >= 1:
                moes[rank].dispatch_send(**scenario.arguments(rank))
            if place >= 2 and attempt % 3 == 0:
                moes[rank].dispatch_send(**scenario.arguments(rank, lane=1))
            moes[rank].reset()

        on_ranks(groups, partly)
        for step in range(3):
            run_all(ordinary(100 + step), moes, groups, lane=step % 2)


def test_a_rank_that_is_slow_but_alive_is_waited_for(make_groups: Make) -> None:
    """Longer than dead_s and warn_s, well within the deadline."""
    groups = make_groups(3, timeout_s=60.0, dead_s=1.5, warn_s=0.5)
    moes = all_to_alls(groups, CONFIG)
    scenario = ordinary()

    def step(rank: int) -> None:
        if rank == 1:
            time.sleep(2.0)
        got = moes[rank].dispatch(**scenario.arguments(rank))
        scenario.check(rank, got)
        if rank == 2:
            time.sleep(2.0)
        scenario.check_y(rank, moes[rank].combine(**scenario.combine_arguments(rank, got)))

    on_ranks(groups, step)


@pytest.mark.parametrize("layout", ["rows", "contiguous", "masked", "by_rank"])
def test_more_rows_than_fit_raise_and_drop_nothing(make_groups: Make, layout: str) -> None:
    """out= one row too short: CAPACITY with both numbers, nothing behind the tensor is touched, reset mends."""
    config = model.Config(2, 2, 1, 32)
    groups = make_groups(2)
    moes = all_to_alls(groups, config)
    batches = [harness.make_batch(config, 6, r, ids=np.zeros((6, 1), np.int64)) for r in range(2)]
    fits = {"rows": (12,), "contiguous": (12,), "masked": (1, 12), "by_rank": (2, 6)}[layout]
    short = (*fits[:-1], fits[-1] - 1)

    def step(rank: int) -> None:
        arguments = {**harness.arguments(config, batches[rank]), "layout": layout}
        if rank == 1:
            moes[rank].dispatch(**arguments)
            return
        whole = torch.full((int(np.prod(short)) + 8, 32), 7.0, dtype=torch.bfloat16)
        out = whole[: int(np.prod(short))].view(*short, 32)
        with pytest.raises(ept.CapacityError) as caught:
            moes[rank].dispatch(**arguments, out=out)
        assert str(fits[-1]) in str(caught.value)
        assert str(short[-1]) in str(caught.value)
        assert (whole[int(np.prod(short)) :] == 7.0).all()
        with pytest.raises(ept.EptError):
            moes[rank].check()

    on_ranks(groups, step)
    on_ranks(groups, lambda rank: moes[rank].reset())
    run_all(Scenario(config, batches, [layout] * 2), moes, groups)


def test_max_rows_bounds_the_outputs(make_groups: Make) -> None:
    config = model.Config(2, 2, 1, 32)
    groups = make_groups(2)
    moes = all_to_alls(groups, config, max_rows=10)
    few = [harness.make_batch(config, 5, r, ids=np.zeros((5, 1), np.int64)) for r in range(2)]
    many = [harness.make_batch(config, 6, r, ids=np.zeros((6, 1), np.int64)) for r in range(2)]
    for layout in ("rows", "contiguous"):
        run_all(Scenario(config, few, [layout] * 2), moes, groups)

    def step(rank: int) -> None:
        if rank == 0:
            with pytest.raises(ept.CapacityError, match="12"):
                moes[rank].dispatch(**harness.arguments(config, many[rank]), layout="rows")
        else:
            moes[rank].dispatch(**harness.arguments(config, many[rank]), layout="rows")

    on_ranks(groups, step)
    on_ranks(groups, lambda rank: moes[rank].reset())
    run_all(Scenario(config, few, ["rows"] * 2), moes, groups)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_rank_that_disappears_is_named(make_groups: Make, lost: int) -> None:
    """Loopback's adversary takes it away; whoever waits for it hears within dead_s or so, not at the deadline."""
    options = {"loopback.lose_rank": lost, "loopback.lose_after": 400}
    groups = make_groups(3, timeout_s=30.0, dead_s=3.0, adversary=3, options=options, **harness.BY_ENGINE)
    moes = all_to_alls(groups, CONFIG)
    said: dict[int, ept.EptError] = {}

    def until_it_ends(rank: int) -> None:
        scenario = ordinary()
        for _ in range(2000):
            try:
                scenario.run(rank, moes[rank])
            except ept.EptError as error:
                said[rank] = error
                return

    begun = time.monotonic()
    on_ranks(groups, until_it_ends)
    assert time.monotonic() - begun < 55, "the deadline is 60 s"
    for rank in {0, 1, 2} - {lost}:
        assert rank in said, f"rank {rank} never noticed"
        assert isinstance(said[rank], (ept.PeerLost, ept.Timeout)), repr(said[rank])
        assert said[rank].peer == lost or f"rank {lost}" in str(said[rank]), str(said[rank])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_failed_operations_give_errors_never_wrong_bits(make_groups: Make, seed: int) -> None:
    """Operations fail half landed, two in a hundred. Every step is either right on a rank or an error there."""
    groups = make_groups(3, timeout_s=2.0, adversary=seed, options={"loopback.fail_permille": 20}, **harness.BY_ENGINE)
    try:
        moes = all_to_alls(groups, CONFIG)
    except ept.EptError:
        return  # the set-up met one: that is an answer too
    ended: list[ept.EptError] = []

    def until_it_ends(rank: int) -> None:
        for step in range(200):
            try:
                ordinary(step % 7).run(rank, moes[rank])
            except ept.EptError as error:
                ended.append(error)
                return

    on_ranks(groups, until_it_ends)
    assert ended, "200 steps without a single failure: the adversary was not there"
