# SPDX-License-Identifier: Apache-2.0
"""The backend ucx beside the contract (tests/contract): dispatch and combine between processes, payloads in every way
that they can go, what `doctor` and refusals say. A process loads one UCX, so ranks are processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import launch
import pytest
from every_layout import steps
from test_killed import TIMEOUT_S, VICTIM, WORLD, expect, killed_in

from eptransport.backends import absent, registry
from eptransport.conformance import subject
from eptransport.conformance.world import World
from eptransport.errors import ConfigError

TRANSPORTS = {
    "tcp": {"ucx.transports": "tcp", "ucx.interface": "lo"},
    "shared memory": {"ucx.transports": "posix,sysv,cma"},
}
PLUGIN = registry(()).plugins.get("ucx")


def usable() -> str:
    """Empty, or why nothing here can run."""
    if PLUGIN is None:
        return "; ".join(absent("ucx"))
    found = PLUGIN.probe()
    return "" if found.usable else found.why_not


pytestmark = pytest.mark.skipif(bool(usable()), reason=f"no ucx here: {usable()}")


@pytest.mark.parametrize(("transports", "world", "sent"), [("tcp", 4, "e4m3"), ("shared memory", 2, "bf16")])
def test_dispatch_and_combine_between_processes(transports: str, world: int, sent: str, tmp_path: Path) -> None:
    # Low enough for payloads of both kinds.
    options = {**TRANSPORTS[transports], "ucx.rendezvous": "2048"}
    written = launch.run(world, steps, tmp_path, "ucx", options, sent, limit_s=200)
    assert all(len(each) == 1 and min(each) > 0 for each in written), written


@pytest.mark.parametrize("write", ["message", "rendezvous", "put"])
@pytest.mark.parametrize("transports", TRANSPORTS)
def test_every_length_in_every_way(transports: str, write: str) -> None:
    """Around every threshold: inside a message, by rendezvous, by an RDMA write (here one that UCX emulates)."""
    assert PLUGIN is not None
    options = {name.removeprefix("ucx."): value for name, value in TRANSPORTS[transports].items()}
    under = subject(PLUGIN, {**options, "rendezvous": "2048", "write": write})
    lengths = [0, 1, 7, 8, 2047, 2048, 2049, 65536, (1 << 20) + 3]
    with World(under) as world:
        route = world.route(0, 1, max(lengths))
        for turn, length in enumerate(lengths, 1):
            world.settle([route.write(0, length)])
            route.counted(turn, f"a write of {length} bytes")
            route.look(f"a write of {length} bytes")


def killed(rank: int, world: int, folder: str, held: list[Any], how: str, options: dict[str, str]) -> Any:
    return killed_in(rank, world, folder, held, "before_combine", how, TIMEOUT_S, backend="ucx", options=options)


@pytest.mark.parametrize(
    ("transports", "how"), [("tcp", "SIGKILL"), ("shared memory", "SIGKILL"), ("shared memory", "SIGSTOP")]
)
def test_a_rank_that_dies_or_stops(transports: str, how: str, tmp_path: Path) -> None:
    """Over shared memory no connection breaks: UCX looks whether the process is there, we whether it answers."""
    answers = launch.run(
        WORLD, killed, tmp_path, how, TRANSPORTS[transports], dies=frozenset({VICTIM}), limit_s=TIMEOUT_S + 40
    )
    expect(answers, TIMEOUT_S + 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"library": "/nowhere/libucp.so.0"}, "/nowhere/libucp.so.0"),
        ({"transports": "carrier_pigeon"}, "carrier_pigeon"),
        ({"interface": "eth_nowhere", "transports": "tcp"}, "eth_nowhere"),
    ],
)
def test_what_cannot_be_is_refused_with_its_name(options: dict[str, str], words: str) -> None:
    assert PLUGIN is not None
    found = PLUGIN.probe(options)
    assert not found.usable
    assert words in found.summary
    assert found.mend


def test_a_wrong_way_to_write_is_a_wrong_setting() -> None:
    assert PLUGIN is not None
    with pytest.raises(ConfigError, match="rendezvous, put or message"):
        PLUGIN.probe({"write": "fence"})


def test_what_each_way_waives() -> None:
    assert PLUGIN is not None
    waived = {write: PLUGIN.probe({"write": write}).waived for write in ("message", "rendezvous", "put")}
    assert waived == {"message": (), "rendezvous": (12,), "put": (9, 10, 11, 12)}


def test_auto_asks_ucx_only_where_a_setting_names_it() -> None:
    from eptransport import Settings
    from eptransport.backends import candidates

    def ucx(**fields: Any) -> str:
        rows = candidates(Settings(**fields), one_process=False)
        return next(row.why_not or "" for row in rows if row.name == "ucx")

    assert "asked for" in ucx()
    assert ucx(options={"ucx.write": "message"}) == ""
    assert "waives clause 12" in ucx(options={"ucx.transports": "tcp"})
