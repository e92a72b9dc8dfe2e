# SPDX-License-Identifier: Apache-2.0
"""MoE steps over networks that misbehave: real TCP stacks in namespaces, the wire of wire.py between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wire import Joined, Link, Netem, join, netem_why_not, why_not

import eptransport as ept
from eptransport.backends import absent, registry


def ucx_why_not() -> str:
    """Empty, or why no rank can use ucx."""
    plugin = registry(()).plugins.get("ucx")
    if plugin is None:
        return "; ".join(absent("ucx"))
    found = plugin.probe()
    return found.why_not if not found.usable else why_not(sysfs=True) or ""


NO_UCX = ucx_why_not()
# What carries the steps over the wire. UCX has its own connections and its own word for one that is gone.
CARRIERS = [
    pytest.param({"backend": "tcp"}, id="tcp"),
    pytest.param(
        {"backend": "ucx", "options": {"ucx.transports": "tcp"}},
        id="ucx",
        marks=pytest.mark.skipif(bool(NO_UCX), reason=f"no ucx here: {NO_UCX}"),
    ),
]
TOKENS, TOP_K, HIDDEN, EXPERTS = 12, 3, 256, 8


def make(rank: int, world: int, folder: Path, **fields: Any) -> tuple[Joined, ept.Group]:
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    joined = join(folder, rank, sysfs=fields.get("backend") == "ucx")
    settings = ept.Settings(**{"backend": "tcp", "timeout_s": 60.0, "dead_s": 30.0, "threads": 1, **fields})
    store = FileStore(str(folder / "store"), world)
    return joined, ept.Group(settings, store=store, rank=rank, world_size=world)


class Steps:
    """Steps whose sums are known bit for bit: small whole numbers, expert e multiplies by e + 1."""

    def __init__(self, group: ept.Group) -> None:
        import torch

        self.rank, self.world = group.rank, group.world_size
        self.moe = ept.AllToAll(
            group,
            num_experts=EXPERTS,
            top_k=TOP_K,
            hidden=HIDDEN,
            max_tokens=TOKENS,
            dtype=torch.float32,
            layout="rows",
        )
        self.done = 0

    def one(self) -> None:
        import torch

        draw = torch.Generator().manual_seed(1000 * self.done + self.rank)
        x = torch.randint(-8, 9, (TOKENS, HIDDEN), generator=draw).float()
        ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:TOP_K] for _ in range(TOKENS)])
        weights = torch.randint(1, 5, (TOKENS, TOP_K), generator=draw).float()
        got = self.moe.dispatch(x, ids, weights, host_counts=True)
        first = self.moe.local_experts[0]
        factors = torch.where(got.topk_ids >= 0, (got.topk_ids + first + 1) * got.topk_weights, 0).sum(1)
        y = self.moe.combine(got.x * factors[:, None], got)
        # The share of a masked rank's experts is left out.
        share = (ids + 1) * weights if got.lost is None else torch.where(got.lost, 0, (ids + 1) * weights)
        wanted = x * share.sum(1)[:, None]
        assert torch.equal(y, wanted), f"step {self.done} of rank {self.rank}"
        self.done += 1


def steady(rank: int, world: int, folder: Path, steps: int, netem: tuple[str, ...] = ()) -> int:
    joined, group = make(rank, world, folder)
    if netem:
        Netem.set(*netem)
    with group:
        work = Steps(group)
        for _ in range(steps):
            work.one()
        if rank == 0:
            joined.counts(0)
    return work.done


@pytest.mark.parametrize(
    ("name", "link", "steps"),
    [
        ("1 ms", Link(delay_s=0.001), 10),
        ("20 ms", Link(delay_s=0.02), 4),
        ("loss of 1 %", Link(delay_s=0.0005, loss=0.01), 12),
        ("reordering", Link(delay_s=0.002, reorder=0.1), 12),
    ],
)
def test_every_link_is_bad(
    wire: Callable[..., None], spawn: Callable[..., list[Any]], name: str, link: Link, steps: int
) -> None:
    wire({0: link, 1: link})
    assert spawn(2, steady, steps) == [steps, steps]


def test_one_link_of_four_is_slow(wire: Callable[..., None], spawn: Callable[..., list[Any]]) -> None:
    wire({2: Link(delay_s=0.01, bytes_per_s=2_000_000)})
    assert spawn(4, steady, 5) == [5] * 4


def changing(rank: int, world: int, folder: Path) -> int:
    joined, group = make(rank, world, folder)
    with group:
        work = Steps(group)
        for size in (1500, 600, 1400):
            joined.mtu(size)
            for _ in range(4):
                work.one()
    return work.done


def test_the_mtu_changes(wire: Callable[..., None], spawn: Callable[..., list[Any]]) -> None:
    wire()
    assert spawn(2, changing) == [12, 12]


def all_here(rank: int, world: int, folder: Path, what: str) -> None:
    """Every rank has come this far: not over the network, which may be down."""
    (folder / f"{what}{rank}").touch()
    deadline = time.monotonic() + 60
    while not all((folder / f"{what}{other}").exists() for other in range(world)):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def interrupted(rank: int, world: int, folder: Path, carrier: dict[str, Any], pause_s: float) -> tuple[int, float]:
    """The link of rank 1 goes down amid steps and comes back after a while. Steps; the longest one, s."""
    joined, group = make(rank, world, folder, **carrier)
    longest = 0.0
    with group:
        work = Steps(group)
        for step in range(12):
            if step == 4:
                all_here(rank, world, folder, "before")
                if rank == 0:
                    joined.change(1, down=True)
                    threading.Timer(pause_s, joined.change, (1,), {"down": False}).start()
                all_here(rank, world, folder, "down")
            begin = time.monotonic()
            work.one()
            longest = max(longest, time.monotonic() - begin)
    return work.done, longest


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_link_is_down_for_three_seconds(
    wire: Callable[..., None], spawn: Callable[..., list[Any]], carrier: dict[str, Any]
) -> None:
    wire()
    for done, longest in spawn(2, interrupted, carrier, 3.0):
        assert done == 12
        assert longest >= 1  # it was down, and the step went on from there


def cut_off(rank: int, world: int, folder: Path, carrier: dict[str, Any]) -> tuple[str, str, float, int]:
    """The link of the last rank goes down for good. How the step under way ends, and after how long."""
    joined, group = make(rank, world, folder, dead_s=5.0, **carrier)
    work = Steps(group)
    for _ in range(3):
        work.one()
    all_here(rank, world, folder, "before")
    if rank == 0:
        joined.change(world - 1, down=True)
    all_here(rank, world, folder, "down")
    begin = time.monotonic()
    with pytest.raises(ept.EptError) as ended:
        work.one()
    after_s = time.monotonic() - begin
    group.close(0)
    return type(ended.value).__name__, str(ended.value), after_s, work.done


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_link_is_down_for_ever(
    wire: Callable[..., None], spawn: Callable[..., list[Any]], carrier: dict[str, Any]
) -> None:
    wire()
    for rank, (kind, text, after_s, done) in enumerate(spawn(2, cut_off, carrier)):
        assert kind == "PeerLost", text
        assert f"rank {1 - rank}" in text
        assert after_s < 55  # by dead_s (5 s), not by the deadline (60 s)
        assert done == 3


def masking(rank: int, world: int, folder: Path, carrier: dict[str, Any]) -> tuple[str, int, list[int]]:
    """As `cut_off`; then the ranks that are left mask the one that is gone and go on."""
    joined, group = make(rank, world, folder, dead_s=5.0, **carrier)
    work = Steps(group)
    for _ in range(2):
        work.one()
    all_here(rank, world, folder, "before")
    if rank == 0:
        joined.change(world - 1, down=True)
    all_here(rank, world, folder, "down")
    with pytest.raises(ept.EptError) as ended:
        work.one()
    if rank < world - 1:
        group.mask(world - 1, why=str(ended.value)[:200])
        work.moe.reset()
        for _ in range(3):
            work.one()
    active = group.active_mask.tolist()
    group.close(0)
    return type(ended.value).__name__, work.done, active


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_rank_behind_a_dead_link_is_masked(
    wire: Callable[..., None], spawn: Callable[..., list[Any]], carrier: dict[str, Any]
) -> None:
    wire()
    *left, gone = spawn(3, masking, carrier)
    assert left == [("PeerLost", 5, [1, 1, 0])] * 2
    assert gone[0] in ("PeerLost", "Masked")  # as it learns first
    assert gone[1] == 2


def test_the_kernels_own_netem(wire: Callable[..., None], spawn: Callable[..., list[Any]]) -> None:
    missing = netem_why_not()
    if missing is not None:
        pytest.skip(missing)
    wire()
    assert spawn(2, steady, 6, ("delay", "2ms", "loss", "1%")) == [6, 6]
