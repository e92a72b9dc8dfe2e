"""8. Every wait has a deadline, and an expired one says who waits for whom, for what, what was seen, since when."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from eptransport.conformance.registry import check, require
from eptransport.conformance.world import Subject, World, raises, warnings
from eptransport.engine import Engine
from eptransport.errors import Code, StuckError, Timeout

SHORT_S = 0.2
MOMENT_S = 0.05
LATE_S = 2.0
"""How much later than its deadline an answer may come on a busy machine."""


def _expires(body: Callable[[], object], what: str, length: float = SHORT_S) -> Timeout:
    begin = time.monotonic()
    error = raises(Timeout, body, what)
    took = time.monotonic() - begin
    require(length * 0.95 <= took <= length + LATE_S, f"{what} with a deadline of {length} s ended after {took:.3f} s")
    require(error.code == Code.TIMEOUT, f"{what}: the code is {error.code}")
    require(isinstance(error, TimeoutError), f"{what}: no TimeoutError of Python's")
    assert isinstance(error, Timeout)
    return error


def _names(error: Timeout, *words: str) -> None:
    for word in words:
        require(word in str(error), f"the sentence doesn't say {word!r}: {error}")


@check(8)
def a_wait_for_a_signal(subject: Subject) -> None:
    """The error has the count expected, the count seen, the peer, the label and how long the peer has been silent."""
    with World(subject) as world:
        route = world.route(0, 1, 64, label="dispatch of lane 7")
        world.settle([route.write(number, 1) for number in range(3)])
        time.sleep(0.05)
        error = _expires(lambda: route.signal.wait(5, timeout=SHORT_S), "a wait for a signal")
        require(
            (error.expected, error.seen) == (5, 3), f"expected {error.expected}, seen {error.seen}; 5 and 3 are right"
        )
        require(error.peer == 0, f"the peer is {error.peer}, not 0")
        require(error.operation == "signal_wait", f"the operation is {error.operation!r}")
        silent = error.silent_s
        require(silent is not None and 0.05 <= silent < 60, f"the peer is said to be silent for {silent} s")
        _names(error, "rank 1", "rank 0", "dispatch of lane 7", "5", "3")


@check(8)
def a_wait_for_a_transfer(subject: Subject) -> None:
    """A transfer that can't go out, since the peer takes no part, times out naming the peer; later it still
    completes."""
    with World(subject) as world:
        route = world.route(0, 1, 1 << 10)
        world.absent.add(1)
        taken: list[Any] = []
        try:
            while len(taken) < 100_000:
                taken.append(route.write(0, 1 << 10, timeout=0))
        except Timeout:
            pass
        error = _expires(lambda: taken[-1].wait(timeout=SHORT_S), "a wait for a transfer")
        require(error.peer == 1, f"the peer is {error.peer}, not 1")
        _names(error, "rank 0", "rank 1")
        world.absent.clear()
        world.settle(taken)
        taken[-1].wait(timeout=0)
        route.counted(len(taken), "after the wait that expired")


@check(8)
def room_for_a_transfer(subject: Subject) -> None:
    """Waiting for room ends at its deadline too, and nothing was taken."""
    with World(subject) as world:
        route = world.route(0, 1, 1 << 12)
        world.absent.add(1)
        taken: list[Any] = []
        refused = 0
        # A network may say "later" and have room a moment after, and on a busy machine a moment may be one look at it:
        # full is what stays so.
        while refused < 5 and len(taken) < 100_000:
            try:
                taken.append(route.write(0, 1, timeout=MOMENT_S))
                refused = 0
            except Timeout:
                refused += 1
        _expires(lambda: route.write(0, 1, timeout=SHORT_S), "a write without room")
        world.absent.clear()
        world.settle(taken)
        route.counted(len(taken), "after the write that was not taken")


@check(8)
def a_wait_for_a_message(subject: Subject) -> None:
    """A receive says from whom it waits, and a send to a full mailbox to whom."""
    with World(subject) as world:
        error = _expires(lambda: world.engines[0].recv(tag=3, peer=1, timeout=SHORT_S), "a receive")
        require(error.peer == 1, f"the peer is {error.peer}, not 1")
        _names(error, "rank 0", "rank 1")
        _expires(lambda: world.engines[0].recv(tag=3, timeout=SHORT_S), "a receive from anyone")
        world.absent.add(1)
        try:
            for _ in range(100_000):
                world.engines[0].peer(1).send(b"x", tag=3, timeout=0)
        except Timeout:
            pass
        error = _expires(lambda: world.engines[0].peer(1).send(b"x", tag=3, timeout=SHORT_S), "a send")
        require(error.peer == 1, f"the peer is {error.peer}, not 1")


@check(8)
def a_wait_for_quiet(subject: Subject) -> None:
    """Quiescing with a peer that takes no part ends at its deadline, or says what is stuck; it names the peer."""
    with World(subject) as world:
        route = world.route(1, 0, 1 << 12)
        world.absent.add(1)
        begin = time.monotonic()
        error = raises(
            (Timeout, StuckError),  # type: ignore[arg-type]
            lambda: world.engines[0].quiesce(route.memory, "remote", timeout=SHORT_S),
            "a quiesce that nobody answers",
        )
        require(time.monotonic() - begin < SHORT_S + LATE_S, "a quiesce that nobody answers ended late")
        _names(error, "rank 1" if "rank 1" in str(error) else "1")
        require(error.peer in (1, None), f"the peer is {error.peer}, not 1")


@check(8)
def a_wait_for_a_connection(subject: Subject) -> None:
    """A rank that never comes is named when the wait for connections ends."""
    settings = subject.settings(progress="inline", timeout_s=30.0)
    engines = [
        Engine(subject.plugin, rank=rank, world_size=2, job="lonely", secret=b"s" * 32, settings=settings)
        for rank in (0, 1)
    ]
    with engines[0], engines[1]:
        engines[0].connect([engine.address() for engine in engines])  # rank 1 does not connect, and never polls
        error = _expires(lambda: engines[0].wait_connected(SHORT_S), "a wait for connections")
        _names(error, "1")


@check(8)
def the_deadline_of_the_settings(subject: Subject) -> None:
    """A wait without a deadline of its own has that of the settings; a slow wait is told once in the log before."""
    with World(subject, timeout_s=1.0, warn_s=0.2) as world:
        route = world.route(0, 1, 64, label="slow lane")
        lines: list[str] = []
        with warnings(lines):
            _expires(lambda: route.signal.wait(1), "a wait without a deadline", 1.0)
            world.engines[1].drain_log()
        slow = [line for line in lines if "slow lane" in line]
        require(len(slow) == 1, f"a slow wait is told {len(slow)} times in the log, not once: {lines}")
