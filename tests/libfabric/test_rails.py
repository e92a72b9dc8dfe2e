# SPDX-License-Identifier: Apache-2.0
"""One transfer over several rails, and what is left of it when one of them fails. Both ranks are in one process, moved
by hand; each case is a process of its own."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from libfabrics import Libfabric, cases

from eptransport.backends import registry
from eptransport.conformance import Subject, subject
from eptransport.conformance.world import GUARD, Route, World, raises, warnings
from eptransport.engine import PeerStatus, Transfer
from eptransport.errors import EptError, PeerLost

Spawn = Callable[..., list[Any]]

STRIPE = 64 << 10
"""A longer write is cut over the rails."""
BIG = 16 << 20
"""Bytes a rail that no socket takes in at once: so a rail can be stopped in the middle of them."""


def under(options: dict[str, str], rails: int, **more: str) -> Subject:
    plugin = registry(()).plugins["libfabric"]
    return replace(subject(plugin, {**options, "rails": str(rails), **more}), patience_s=60.0)


def several(_rank: int, _n: int, _folder: Path, options: dict[str, str], rails: int) -> list[list[tuple[int, int]]]:
    """Twenty transfers, of odd lengths that are cut and short ones that are not. Bytes and writes of each rank."""
    with World(under(options, rails), stripe_bytes=STRIPE) as world:
        room = 2 * STRIPE * rails
        routes = [world.route(0, 1, 20 * room), world.route(1, 0, 20 * room)]
        for route in routes:
            lengths = [STRIPE + 1, room, room - 4095, 0, 1, STRIPE] + [world.random.randrange(room) for _ in range(14)]
            world.random.shuffle(lengths)
            for number, length in enumerate(lengths, 1):
                # One at a time: the signal of each rises once, and not before its last byte.
                at = (number - 1) * room
                transfer = route.write(at, length)
                while route.signal.value < number:
                    assert route.signal.value == number - 1
                    world.until(lambda: route.signal.value >= number, f"transfer {number} is counted")  # noqa: B023
                assert route.there(at, length), f"{length} bytes were counted before they were there"
                world.until(lambda: transfer.done, f"transfer {number} ends")  # noqa: B023
            world.settle()
            route.counted(20, "after twenty transfers")
            route.look("after twenty transfers")
        return [[(rail.counters.tx_bytes, rail.counters.tx_operations) for rail in e.rails()] for e in world.engines]


@pytest.mark.parametrize("rails", [2, 4, 8])
@pytest.mark.parametrize("case", cases("tcp", "shm"))
def test_every_rail_carries_its_part(case: tuple[Libfabric, str], spawn: Spawn, rails: int) -> None:
    release, provider = case
    (seen,) = spawn(1, several, release.options(provider), rails)
    assert not isinstance(seen, Exception), seen
    for carried in seen:
        assert len(carried) == rails
        total = sum(size for size, _ in carried)
        for number, (size, writes) in enumerate(carried):
            assert writes >= 3, f"rail {number} of {carried}"  # the longest lengths are cut over all
            assert size >= total / rails / 4, f"rail {number} carried next to nothing: {carried}"


# ---- a rail that fails amid a transfer ------------------------------------------------------------------------------


def port_of(address: bytes, rail: int, rails: int) -> int:
    """Where a rail listens: the address of a rank ends with its rails', each a length and a sockaddr."""
    length = next(n for n in (16, 28) if address[-n - 2 : -n] == struct.pack("<H", n))
    at = len(address) - (rails - rail) * (length + 2) + 2
    (port,) = struct.unpack_from(">H", address, at + 2)
    return int(port)


def cut(ports: set[int]) -> int:
    """Shuts the connections of this process that have one of these ports at an end; how many."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with copy:
            try:
                if copy.family in (socket.AF_INET, socket.AF_INET6) and (
                    copy.getsockname()[1] in ports or copy.getpeername()[1] in ports
                ):
                    copy.shutdown(socket.SHUT_RDWR)
                    found += 1
            except OSError:
                continue  # it listens
    return found


def outcome(world: World, transfer: Transfer) -> EptError | None:
    """What became of it: None, or its error."""
    world.until(lambda: transfer.done, "the transfer ends")
    try:
        transfer.wait(0)
    except EptError as error:
        return error
    return None


def untouched(route: Route, before: Any) -> None:
    """Each byte is what it was or what was written, and the guards are what they were."""
    new = route.block.copy()
    new[GUARD:-GUARD] = route.source
    assert ((route.block == before) | (route.block == new)).all(), "a byte is neither old nor new"


def cut_amid(_rank: int, _n: int, _folder: Path, options: dict[str, str], rails: int) -> list[str]:
    """The connection of the last rail is shut while it is amid its part of a transfer."""
    lines: list[str] = []
    with warnings(lines), World(under(options, rails), stripe_bytes=STRIPE) as world:
        route = world.route(0, 1, rails * BIG)
        before = route.block.copy()
        part = slice((rails - 1) * BIG, rails * BIG)
        transfer = route.write(0, rails * BIG)
        world.until(
            lambda: bool((route.target[part][:4096] == route.source[part][:4096]).all()), "the last rail begins"
        )
        assert not (route.target[part] == route.source[part]).all(), "it was over before it could be cut"
        assert cut({port_of(engine.address(), rails - 1, rails) for engine in world.engines}) > 0
        error = outcome(world, transfer)
        assert isinstance(error, PeerLost), error
        assert error.peer == 1
        assert error.provider_errno
        assert "rank 1" in str(error)
        later = raises(PeerLost, lambda: route.peer.write(None, None, 0, signal=route.remote), "a write behind the end")
        assert "rank 1" in str(later)
        world.settle()
        route.counted(0, "after a rail was cut")
        untouched(route, before)
        assert not (route.target[part] == route.source[part]).all()
        assert route.peer.info.status == PeerStatus.LOST
        assert not world.engines[0].failures(), "the failure was told a second time"
    return lines


@pytest.mark.parametrize("case", cases("tcp"))
def test_a_cut_rail_is_a_typed_error_and_no_signal(case: tuple[Libfabric, str], spawn: Spawn) -> None:
    release, provider = case
    (lines,) = spawn(1, cut_amid, release.options(provider), 4)
    assert not isinstance(lines, Exception), lines
    assert any("rank 1 is lost" in line for line in lines)


SMALL = 5
"""Writes that bring the first rail of rank 0 ahead of all others."""
FAULTS = {
    f"error=rnr@{SMALL + 1}": False,
    f"error=unresponsive@{SMALL + 1}": True,
    f"error=bad_address@{SMALL + 1}": False,
    f"eq_error=@{SMALL + 1}": True,
}
"""A fault of the first rail amid a transfer, and whether all of that may have landed."""
TRIES = 20
"""For a fault to be read amid the transfer: a queue of events is looked at once in many polls, and on a busy machine
fewer than that end the transfer."""


def faulty(
    _rank: int, _n: int, _folder: Path, options: dict[str, str], rails: int, fault: str, landed: bool
) -> list[str]:
    """Under the strict shim: one operation of one rail goes wrong, and a third rank has to do with both ends."""
    lines: list[str] = []
    with warnings(lines), World(under(options, rails, strict=f"7:{fault}"), 3, stripe_bytes=STRIPE) as world:
        small, route = world.route(0, 2, SMALL), world.route(0, 1, rails * STRIPE * 2)
        before = route.block.copy()
        world.settle([small.write(at, 1) for at in range(SMALL)])
        error = outcome(world, route.write(0, route.size))
        if error is None and fault.startswith("eq_error"):
            # It names no operation, and was read when none was under way here: then nobody is lost, but for what the
            # engines still say to each other.
            over = lambda: route.signal.value == 1 or route.peer.info.status == PeerStatus.LOST  # noqa: E731
            world.until(over, "it lands, or the link ends")
            if route.signal.value == 1:
                return []
        else:
            assert isinstance(error, PeerLost), error
            assert (error.peer, bool(error.provider_errno)) == (1, True), error
        raises(PeerLost, lambda: route.peer.write(None, None, 0, signal=route.remote), "a write behind the end")
        world.settle()
        assert route.signal.value <= int(landed)
        if route.signal.value:
            assert route.there(0, route.size), "it was counted before all of it was there"
        untouched(route, before)
        # Those that it is none of: on all their rails, both ways.
        for one, other in ((0, 2), (2, 0), (1, 2), (2, 1)):
            bystander = world.route(one, other, rails * STRIPE * 2)
            world.settle([bystander.write(0, bystander.size)])
            bystander.counted(1, bystander.label)
            bystander.look(bystander.label)
        small.look("after a fault on another link")
        assert not any(engine.failures() for engine in world.engines)
    return lines


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", cases("tcp"))
def test_a_fault_on_one_rail_costs_one_link(case: tuple[Libfabric, str], spawn: Spawn, fault: str) -> None:
    release, provider = case
    for _ in range(TRIES):
        (lines,) = spawn(1, faulty, release.options(provider), 4, fault, FAULTS[fault])
        assert not isinstance(lines, Exception), lines
        if lines:
            break
    assert sum("is lost" in line for line in lines) == 1, lines


def half_there(_rank: int, _n: int, _folder: Path, options: dict[str, str]) -> str:
    """Closes the target, then the initiator, amid a transfer. What has ended a process once: a provider that flushed
    what was half received."""
    with warnings([]), World(under(options, 2), stripe_bytes=STRIPE) as world:
        route = world.route(0, 1, 2 * BIG)
        transfer = route.write(0, 2 * BIG)
        world.until(lambda: route.there(0, 4096), "the transfer begins")
        assert not transfer.done
        world.engines[1].close(0.1)
        world.engines[0].close(0.1)
    return "alive"


@pytest.mark.parametrize("case", cases("tcp"))
def test_closing_amid_a_transfer_ends_no_process(case: tuple[Libfabric, str], spawn: Spawn) -> None:
    release, provider = case
    assert spawn(1, half_there, release.options(provider)) == ["alive"]
