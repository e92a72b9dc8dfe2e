# SPDX-License-Identifier: Apache-2.0
"""The log of who takes part: however ranks mask and readmit at once, all read the same changes in the same order.

A machine of hypothesis has several views of one store. While one of them makes a change, others make theirs between any
two of its calls of the store, and others again between theirs: that is every order in which real ranks could meet.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import eptransport as ept
from eptransport._bootstrap import LocalStore
from eptransport._membership import Change, MembershipLog

WORLD = 5
VIEWS = 4


class Crowded:
    """A store in which others do something before a call gets through."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.meanwhile: list[Callable[[], None]] = []
        self.written: list[str] = []

    def _let_others(self) -> None:
        if self.meanwhile:
            self.meanwhile.pop()()

    def check(self, keys: list[str]) -> bool:
        self._let_others()
        return bool(self.store.check(keys))

    def get(self, key: str) -> bytes:
        self._let_others()
        return bytes(self.store.get(key))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._let_others()
        assert expected == "", "an entry that stands is never to change"
        before = self.store.check([key])
        stands = bytes(self.store.compare_set(key, expected, desired))
        if not before:
            self.written.append(desired)
        return stands


def mask(view: MembershipLog, rank: int, by: int) -> None:
    view.propose(lambda state: Change("mask", rank, by, f"{by} says so") if rank in state.active else None)  # type: ignore[arg-type]
    assert rank not in view.state.active
    assert view.state.why(rank) is not None


def readmit(view: MembershipLog, rank: int, by: int) -> None:
    def wanted(state: ept.Membership) -> Change | None:
        if rank in state.active:
            return None
        return Change("readmit", rank, by, life=state.epoch + 1, step=10 * by)

    view.propose(wanted)
    assert rank in view.state.active
    assert view.state.why(rank) is None


DEEDS = {"mask": mask, "readmit": readmit}
DEED = st.tuples(st.sampled_from(sorted(DEEDS)), st.integers(0, VIEWS - 1), st.integers(0, WORLD - 1))


class Ranks(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = Crowded(LocalStore())
        self.views = [MembershipLog(self.store, "job", WORLD) for _ in range(VIEWS)]

    @rule(deed=DEED, others=st.lists(DEED, max_size=6))
    def change(self, deed: tuple[str, int, int], others: list[tuple[str, int, int]]) -> None:
        busy = {deed[1]}

        def do(kind: str, view: int, rank: int) -> None:
            DEEDS[kind](self.views[view], rank, by=view)

        def another(kind: str, view: int, rank: int) -> None:
            if view in busy:  # one view is one rank, and does one thing at a time
                return
            busy.add(view)
            do(kind, view, rank)
            busy.remove(view)

        self.store.meanwhile = [lambda other=other: another(*other) for other in others]  # type: ignore[misc]
        do(*deed)
        self.store.meanwhile = []

    @rule(view=st.integers(0, VIEWS - 1))
    def read(self, view: int) -> None:
        before = self.views[view].state.epoch
        changes = self.views[view].read()
        assert [change.epoch for change in changes] == list(range(before + 1, self.views[view].state.epoch + 1))

    @invariant()
    def the_log_is_what_was_written_and_all_read_it_alike(self) -> None:
        entries = [json.loads(word) for word in self.store.written]
        masked: set[int] = set()
        steps = [0]
        for entry in entries:  # the model: each change was one when it was made
            assert (entry["rank"] in masked) == (entry["kind"] == "readmit")
            masked ^= {entry["rank"]}
            steps.append(entry["step"])
        fresh = MembershipLog(self.store.store, "job", WORLD)
        assert [change.rank for change in fresh.read()] == [entry["rank"] for entry in entries]
        assert fresh.state.epoch == len(entries)
        assert set(fresh.state.active) == set(range(WORLD)) - masked
        assert {each.rank for each in fresh.state.masked} == masked
        assert fresh.state.step == max(steps)
        for view in self.views:
            other = MembershipLog(_Until(self.store.store, view.state.epoch), "job", WORLD)
            other.read()
            assert other.state == view.state, "one epoch is one membership"


class _Until:
    """A store that shows only the first entries."""

    def __init__(self, store: Any, epoch: int) -> None:
        self.store, self.epoch = store, epoch

    def check(self, keys: list[str]) -> bool:
        return int(keys[0].rsplit("/", 1)[1]) <= self.epoch and bool(self.store.check(keys))

    def get(self, key: str) -> bytes:
        return bytes(self.store.get(key))


TestRanks = Ranks.TestCase
TestRanks.settings = settings(max_examples=30, stateful_step_count=20, derandomize=True, deadline=None)


def test_torch_stores_are_such_a_store(tmp_path: Path) -> None:
    stores = [
        dist.HashStore(),
        dist.FileStore(str(tmp_path / "store"), 1),
        dist.PrefixStore("within", dist.HashStore()),
        dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False),
    ]
    for store in stores:
        ours, theirs = MembershipLog(store, "job", WORLD), MembershipLog(store, "job", WORLD)
        mask(ours, 3, by=0)
        mask(theirs, 3, by=1)
        assert theirs.state == ours.state, type(store).__name__
        assert theirs.state.masked[0].by == 0, "the first one's reason stands"
        readmit(theirs, 3, by=1)
        assert [change.kind for change in ours.read()] == ["readmit"]


def test_a_store_without_compare_set_says_so() -> None:
    class Old:
        def check(self, keys: list[str]) -> bool:
            return False

    with pytest.raises(ept.UnsupportedError, match="compare_set"):
        mask(MembershipLog(Old(), "job", WORLD), 1, by=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "word",
    [
        "",
        "[]",
        '{"kind": "mask"}',
        json.dumps({**Change("mask", 1, 0).__dict__, "rank": WORLD}),
        json.dumps({**Change("mask", 1, 0).__dict__, "kind": "evict"}),
        json.dumps({**Change("readmit", 1, 0).__dict__, "address": "xyz"}),
        json.dumps({**Change("readmit", 1, 0).__dict__, "step": -1}),
    ],
)
def test_an_entry_that_makes_no_sense_is_an_error_and_changes_nothing(word: str) -> None:
    store = LocalStore()
    store.set("job/membership/1", word)
    log = MembershipLog(store, "job", WORLD)
    with pytest.raises(ept.TransportError, match="change 1 of the membership"):
        log.read()
    assert log.state.epoch == 0
