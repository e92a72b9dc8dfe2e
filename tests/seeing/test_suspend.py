# SPDX-License-Identifier: Apache-2.0
"""A group that sleeps holds no buffers, and wakes as it fell asleep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eptransport as ept

LIMIT_S = 90


def batch(rank: int, seed: int, hidden: int = 256) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(32, hidden, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(32)])
    return x, ids, torch.rand(32, 3, generator=generator)


def step(moe: ept.AllToAll, seed: int) -> list[torch.Tensor]:
    x, ids, weights = batch(moe.group.rank, seed, moe.hidden)
    got = moe.dispatch(x, ids, weights)
    assert got.counts is not None
    return [got.counts.clone(), moe.combine(got.x, got)]


def make(group: ept.Group, hidden: int = 256) -> ept.AllToAll:
    return ept.AllToAll(group, num_experts=8, top_k=3, hidden=hidden, max_tokens=32, threads=1)


def mapped_kb() -> int:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


@pytest.mark.parametrize("backend", ["loopback", "tcp"])
def test_nothing_stays_registered_and_the_bits_are_the_same(
    ranks: Callable[..., list[ept.Group]], backend: str
) -> None:
    groups = ranks(3, backend)

    def run(group: ept.Group) -> None:
        small, large = make(group), make(group, 512)
        expected = [step(moe, seed) for seed in range(3) for moe in (small, large)]
        full = group.engine.info()
        assert full.registered_bytes > 0
        x, ids, weights = batch(group.rank, 9)
        kept = small.dispatch(x, ids, weights)
        first = small.combine(kept.x, kept)
        for _ in range(2):
            group.suspend()
            asleep = group.engine.info()
            assert (asleep.registered_bytes, asleep.regions) == (0, 0)
            assert group.metrics().suspended
            group.suspend()  # nothing more to give back
            group.resume()
            group.resume()
            awake = group.engine.info()
            assert (awake.registered_bytes, awake.regions) == (full.registered_bytes, full.regions)
            assert not group.metrics().suspended
            # A routing from before still serves a combine, and so does its own dispatch again.
            assert torch.equal(small.combine(kept.x, kept), first)
            again = [step(moe, seed) for seed in range(3) for moe in (small, large)]
            for got, wanted in zip(again, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        third = make(group, 768)  # the arena grows as ever
        step(third, 0)

    ept.loopback_run(groups, run)


def test_calls_in_between_raise_and_harm_nothing(ranks: Callable[..., list[ept.Group]]) -> None:
    groups = ranks(2)

    def run(group: ept.Group) -> None:
        moe = make(group)
        wanted = step(moe, 1)
        x, ids, weights = batch(group.rank, 1)
        got = moe.dispatch(x, ids, weights)
        group.suspend()
        calls: list[Callable[[], Any]] = [
            lambda: moe.dispatch(x, ids, weights),
            lambda: moe.dispatch_send(x, ids, weights),
            lambda: moe.combine(got.x, got),
            lambda: moe.check(),
            lambda: moe.reset(),
            lambda: make(group),
        ]
        for call in calls:
            with pytest.raises(ept.Suspended, match=f"rank {group.rank}'s group is suspended") as caught:
                call()
            assert caught.value.code == ept.Code.SUSPENDED
        assert int(group.fault) == 0
        group.resume()
        assert all(torch.equal(a, b) for a, b in zip(step(moe, 1), wanted, strict=True))

    ept.loopback_run(groups, run)


def test_the_memory_is_really_given_back(ranks: Callable[..., list[ept.Group]]) -> None:
    groups = ranks(2)

    def run(group: ept.Group) -> tuple[int, ept.AllToAll]:
        moe = ept.AllToAll(group, num_experts=8, top_k=3, hidden=4096, max_tokens=1024, lanes=1, threads=1)
        generator = torch.Generator().manual_seed(group.rank)
        x = torch.randn(1024, 4096, generator=generator).bfloat16()
        ids = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(1024)])
        for _ in range(2):
            got = moe.dispatch(x, ids, torch.ones(1024, 3), layout="rows")
            moe.combine(got.x, got)
        return group.engine.info().registered_bytes, moe

    arenas = [registered for registered, _ in ept.loopback_run(groups, run)]
    before = mapped_kb()
    ept.loopback_run(groups, lambda group: group.suspend())
    # Half of it: pages that no step has touched were never there.
    assert before - mapped_kb() > sum(arenas) / 1024 / 2


def test_every_rank_must_come(ranks: Callable[..., list[ept.Group]]) -> None:
    groups = ranks(2)
    ept.loopback_run(groups, make)
    with pytest.raises(ept.Timeout, match="to suspend the group") as caught:
        groups[1].suspend(timeout=0.3)
    assert "set-up: to suspend the group" in caught.value.why_stuck
    assert groups[1].engine.info().registered_bytes > 0


def test_a_faulted_lane_must_be_reset_first(ranks: Callable[..., list[ept.Group]]) -> None:
    groups = ranks(2, timeout_s=4.0)
    moes = ept.loopback_run(groups, make)
    with pytest.raises(ept.Timeout):
        step(moes[0], 0)

    def run(group: ept.Group) -> None:
        with pytest.raises(ept.LaneFault, match="reset first"):
            group.suspend()
        moes[group.rank].reset()
        group.suspend()
        group.resume()
        step(moes[group.rank], 0)

    ept.loopback_run(groups, run)


def test_a_group_without_an_all_to_all_sleeps_too(ranks: Callable[..., list[ept.Group]]) -> None:
    def run(group: ept.Group) -> None:
        memory = group.engine.register(torch.zeros(1000, dtype=torch.uint8))
        group.suspend()
        assert group.engine.info().registered_bytes == 1000  # the caller's, which stays
        with pytest.raises(ept.Suspended):
            make(group)
        group.resume()
        memory.close()
        step(make(group), 0)

    ept.loopback_run(ranks(2), run)


def test_it_can_be_closed_asleep(ranks: Callable[..., list[ept.Group]]) -> None:
    groups = ranks(2)

    def run(group: ept.Group) -> None:
        step(make(group), 0)
        group.suspend()

    ept.loopback_run(groups, run)
    for group in groups:
        group.close()
