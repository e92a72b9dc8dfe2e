# SPDX-License-Identifier: Apache-2.0
"""`doctor --peer` between two machines of which one's firewall drops what it sends, but for the doctors' own talk."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from libfabrics import Libfabric, cases
from wire import join

import eptransport as ept
from eptransport.self_test import WRITES, SelfTest, dialled, listened

PORT = 7777
"""In namespaces of their own nobody else has it."""
WHERE = f"10.77.0.1:{PORT}"
DEADLINE_S = 8.0
"""Of each stage: what is blocked costs all of it."""


def doctor(rank: int, world: int, folder: Path, muted: int, when: str, fields: dict[str, Any]) -> SelfTest:
    """What rank `muted` sends is dropped from the stage on whose notice begins with `when`."""
    joined = join(folder, rank)
    settings = ept.Settings(**{"backend": "tcp", **fields})

    def notice(stage: str) -> None:
        if stage.startswith("listening"):
            (folder / "listening").touch()
        if rank == muted and stage.startswith(when):
            joined.change(rank, mute=True, mute_but=PORT)

    if rank == 0:
        return listened(WHERE, settings, DEADLINE_S, notice)
    limit = time.monotonic() + 60
    while not (folder / "listening").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    return dialled(WHERE, settings, DEADLINE_S, notice)


def named(found: SelfTest, muted: int) -> None:
    assert isinstance(found, SelfTest), repr(found)
    assert found.connected
    assert not found.passed
    assert [each.passed for each in found.directions] == [muted != 0, muted != 1]
    assert found.directions[1 - muted].seen == WRITES
    assert found.directions[muted].seen < WRITES
    assert f"packets from rank {muted} to rank {1 - muted} are dropped" in found.mend


@pytest.mark.parametrize("muted", [0, 1])
def test_the_blocked_direction_is_named(wire: Callable[..., None], spawn: Callable[..., list[Any]], muted: int) -> None:
    wire()
    for found in spawn(2, doctor, muted, "connected", {}):
        named(found, muted)


# Over one release: what is blocked costs a deadline, and what is tried here is ours.
@pytest.mark.parametrize("case", cases("tcp")[-1:])
def test_over_libfabric_the_rule_is_named_too(
    wire: Callable[..., None], spawn: Callable[..., list[Any]], case: tuple[Libfabric, str]
) -> None:
    release, provider = case
    options = {f"libfabric.{name}": value for name, value in release.options(provider).items()}
    wire()
    for found in spawn(2, doctor, 1, "connected", {"backend": "libfabric", "options": options}):
        named(found, 1)
        assert "outbound rule of rank 1's group" in found.mend
        assert "inbound rule of rank 0's" in found.mend


def test_no_connection_is_no_direction(wire: Callable[..., None], spawn: Callable[..., list[Any]]) -> None:
    """TCP needs both directions to connect at all: that it doesn't is said, and none is blamed."""
    wire()
    for found in spawn(2, doctor, 0, "backend", {}):
        assert not found.connected
        assert not found.passed
        assert found.problem
        assert not found.directions
        assert "packets between the two are dropped" in found.mend
