"""11. A dead peer costs only what involves it; after a mask nothing of that life lands; another life of it works."""

from __future__ import annotations

import os
import signal
import subprocess
from functools import partial
from typing import Any

from eptransport.conformance import processes
from eptransport.conformance.registry import Violation, check, require
from eptransport.conformance.world import GUARD, Route, Subject, World, raises
from eptransport.engine import Engine, PeerStatus
from eptransport.errors import EptError, PeerLost, Timeout

DEAD_S = 2.0
"""Of a silent rank: long enough that a rank which is only starved of its core for a moment isn't taken for dead. More
where the machine is said to be slow."""
STOPPED = 4
"""As many times as long a process is stopped."""


def _outcome(transfer: Any) -> EptError | None:
    try:
        transfer.wait(0)
    except EptError as error:
        return error
    return None


def _is_gone(world: World, by: int, rank: int) -> bool:
    return world.engines[by].peer(rank).info.status != PeerStatus.UP


def _link(world: World, one: int, other: int) -> None:
    """Both open each other, in the lives that they are in."""
    for by, to in ((one, other), (other, one)):
        world.engines[by].peer(to).readmit(world.lives[to], world.engines[to].address())

    def up() -> bool:
        pairs = ((one, other), (other, one))
        return all(world.engines[by].peer(to).info.status == PeerStatus.UP for by, to in pairs)

    world.until(up, f"ranks {one} and {other} are connected again")


def _reopen(route: Route) -> None:
    """Its region and signal again, for the link that there is now."""
    source = route.sender.rank
    route.region = route.peer.import_region(route.memory.export(source, GUARD, route.size))
    route.remote = route.peer.import_signal(route.signal.export())


def _exchange(world: World, route: Route, what: str) -> None:
    """A hundred writes go over the route as ever."""
    before = route.signal.value
    world.settle([route.write(32 * number, 32) for number in range(100)])
    route.look(what)
    route.counted(before + 100, what)


def _masked(world: World, route: Route, writes: int) -> list[Any]:
    """The sender of the route is masked amid its writes; what is there now is what may be there."""
    transfers = [route.write(512 * number, 512) for number in range(writes)]
    world.step(world.random.randint(0, 3))
    route.receiver.peer(route.sender.rank).mask(7, "it is part of the check")
    route.expected[:] = route.block
    return transfers


@check(11)
def a_masked_rank_that_goes_on_writing_changes_nothing(subject: Subject) -> None:
    """From the return of a mask on no byte and no count of that rank changes; its transfers fail, both ways; all that
    doesn't involve it goes on."""
    with World(subject, ranks=3) as world:
        masked = world.route(1, 0, 1 << 16, label="masked")
        to_masked = world.route(0, 1, 1 << 16, label="to the masked")
        others = [world.route(2, 0, 1 << 16), world.route(0, 2, 1 << 16)]
        ours = [to_masked.write(512 * number, 512) for number in range(64)]
        theirs = _masked(world, masked, 64)
        count = masked.signal.value
        for number in range(64):
            try:
                theirs.append(masked.write(512 * number, 512))
            except PeerLost:
                break  # it knows
            world.step()
        held = masked.block.copy()
        world.until(partial(_is_gone, world, 1, 0), "a masked rank is told that its link ended")
        world.settle([*ours, *theirs])
        require(bool((masked.block == held).all()), "bytes of a masked rank landed after the mask")
        masked.counted(count, "after the mask")
        require(isinstance(_outcome(theirs[-1]), EptError), "a write of a masked rank was told as done")
        error = raises(PeerLost, lambda: to_masked.write(0, 1), "a write to a masked rank")
        require(error.peer == 1 and "epoch 7" in str(error), f"a write to a masked rank says: {error}")
        error = raises(PeerLost, lambda: masked.signal.wait(1 << 20, timeout=5.0), "a wait for a masked rank")
        require("it is part of the check" in str(error), f"a wait for a masked rank says: {error}")
        for route in others:
            _exchange(world, route, "between the ranks that are left")


@check(11)
def another_life_of_the_same_process_works(subject: Subject) -> None:
    """A rank that was masked amid its writes begins another life and is opened again at once: nothing of its former
    life lands then, what it gave out is stale, and all works that is made anew."""
    with World(subject, ranks=2) as world:
        route = world.route(1, 0, 1 << 16, label="back again")
        answer = world.route(0, 1, 1 << 16, label="to the one that is back")
        for life in range(1, 4):
            transfers = _masked(world, route, 64)
            count = route.signal.value
            stale = route.region
            world.engines[1].rejoin(life)
            world.lives[1] = life
            _link(world, 0, 1)
            world.settle(transfers)
            route.look(f"life {life}: when the former one is over")
            route.counted(count, f"life {life}: when the former one is over")
            raises(PeerLost, partial(route.peer.write, route.source_memory, stale, 1), "a write to a stale region")
            for each in (route, answer):
                _reopen(each)
                _exchange(world, each, f"life {life}")


@check(11)
def a_rank_that_is_started_again_works(subject: Subject) -> None:
    """An engine that ended costs only what involves it; another one that comes for it under a higher epoch is taken
    in."""
    with World(subject, ranks=3) as world:
        others = world.route(2, 0, 1 << 16)
        world.route(1, 0, 1 << 16)
        world.absent.add(1)
        world.engines[1].close(0)
        for rank in (0, 2):
            world.until(partial(_is_gone, world, rank, 1), "a rank that ended is missed")
        _exchange(world, others, "while a rank is missing")
        world.engines[1] = world.another(1, epoch=3)
        world.absent.clear()
        for rank in (0, 2):
            _link(world, rank, 1)
            require(world.engines[rank].peer(1).info.epoch == 3, "the rank is back under another epoch than its own")
        for route in (world.route(1, 0, 1 << 16), world.route(2, 1, 1 << 16), others):
            _exchange(world, route, "with the rank that was started again")


@check(11)
def a_process_that_stops_is_noticed(subject: Subject) -> None:
    """A process that is stopped, its links still up, is lost to the others within a bound, with a reason; the others
    keep each other, and it doesn't take them for silent when it goes on."""
    times = {"dead_s": DEAD_S * subject.slowness, "timeout_s": 2 * subject.ample_s}
    results = processes.run(subject, f"{__name__}:one_of_three", ranks=3, **times)
    for rank in (0, 2):
        kind, words, other = results[rank]
        what = f"rank {rank} waited for a process that was stopped and got {kind}: {words}"
        require(kind == "PeerLost" and "rank 1" in words, what)
        require(other == "UP", f"rank {rank} finds rank {2 - rank} {other} too")
    for word in results[1]:
        require("silent" not in word, f"the process that was stopped says of one that was not: {word}")


def one_of_three(engine: Engine) -> Any:
    if engine.rank == 1:
        wake = subprocess.Popen(["sh", "-c", f"sleep {STOPPED * engine.settings.dead_s}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        wake.wait()
        for rank in (0, 2):
            try:
                engine.signal(rank, "after the stop").wait(1, timeout=engine.settings.timeout_s)
            except PeerLost:
                continue
            except Timeout as error:
                raise Violation(f"a process that was stopped isn't told that it was given up: {error}") from error
        return [engine.peer(rank).info.why for rank in (0, 2)]
    waiting = engine.signal(1, "before the stop")
    try:
        waiting.wait(1)
    except EptError as error:
        return type(error).__name__, str(error), engine.peer(2 - engine.rank).info.status.name
    return "nothing", "", ""
