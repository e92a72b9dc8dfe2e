"""9. Errors are values: a code, a sentence, the peer, the operation. None is swallowed; a failed transfer is reported
exactly once; nothing aborts the process."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

from eptransport.conformance.registry import check, require
from eptransport.conformance.world import Subject, World, raises, warnings
from eptransport.engine import PeerStatus
from eptransport.errors import AccessDenied, Code, EptError, PeerLost, TransportError


def _outcome(transfer: Any) -> EptError | None:
    """How a transfer that has ended ended; the same each time it is asked."""
    found: list[EptError | None] = []
    for _ in range(2):
        try:
            transfer.wait(timeout=0)
            found.append(None)
        except EptError as error:
            found.append(error)
    require(found[0] is found[1], f"a transfer ended in two ways: {found}")
    return found[0]


@check(9)
def a_refused_write_says_what_and_where(subject: Subject) -> None:
    """A write that the target refuses fails, with code, sentence, peer and operation; the peer stays, others go on."""
    with World(subject) as world:
        refused, other = world.route(0, 1, 1 << 12, label="refused"), world.route(0, 1, 1 << 12, label="other")
        refused.memory.revoke(0)
        for number in range(1, 40):
            transfer = refused.write(0, world.random.choice((1, 1 << 12)))
            good = other.write(number, 1)
            world.settle([transfer, good])
            error = _outcome(transfer)
            require(isinstance(error, AccessDenied), f"a write that was refused ended with {error!r}")
            assert error is not None
            require(error.code == Code.ACCESS and error.peer == 1, f"code {error.code}, peer {error.peer}")
            require(bool(error.operation) and "rank 1" in str(error), f"{error.operation}: {error}")
            require(_outcome(good) is None, "a write to another region failed with it")
        refused.counted(0, "after refused writes")
        other.counted(39, "beside refused writes")
        require(world.engines[0].peer(1).info.status == PeerStatus.UP, "the peer was lost over a refused write")


@check(9)
def a_refused_write_does_not_hold_up_the_rest(subject: Subject) -> None:
    """Thousands of refused writes of one and many pieces, on a signal that good ones use too: no credit is lost with
    them, the signal counts the good ones alone."""
    with World(subject, credits=128) as world:
        route, refused = world.route(0, 1, 1 << 14), world.route(0, 1, 1 << 14)
        refused.memory.revoke(0)
        before = refused.block.copy()
        good: list[Any] = []
        bad: list[Any] = []
        for _ in range(400):
            for target, transfers in ((refused, bad), (route, good)):
                pages = [2 * page for page in world.random.sample(range(1000), world.random.choice((1, 1, 3, 20)))]
                transfers.append(target.write_pages(8, pages, signal=route.remote))
            world.step(world.random.choice((0, 1, 2)))
        world.settle([*good, *bad])
        failed = [transfer for transfer in good if _outcome(transfer) is not None]
        require(not failed, f"{len(failed)} good writes failed beside refused ones")
        kinds = {type(_outcome(transfer)) for transfer in bad}
        require(kinds == {AccessDenied}, f"refused writes ended with {kinds}")
        route.counted(len(good), "beside refused writes")
        route.look("beside refused writes")
        refused.expected[:] = before
        refused.look("where writes were refused")


@check(9, only_hostile=True)
def each_failure_once(subject: Subject) -> None:
    """Operations fail at random, half landed: each transfer ends once, well or with the network's error; the signal
    counts those that ended well, and no other byte of the target changes."""
    subject = subject.having(fail_permille=100)
    with World(subject, credits=128) as world:
        route = world.route(0, 1, 1 << 20)
        transfers = []
        size = 256
        for number in range(2000):
            offset, length = number * 512, world.random.randint(0, size)
            transfer = world.post(
                partial(
                    route.peer.write,
                    route.source_memory,
                    route.region,
                    length,
                    source_offset=offset,
                    destination_offset=offset,
                    signal=route.remote,
                    timeout=0,
                )
            )
            transfers.append((transfer, offset, length))
            world.step(world.random.choice((0, 0, 1, 2)))
        world.settle([transfer for transfer, _, _ in transfers])
        outcomes = [(_outcome(transfer), offset, length) for transfer, offset, length in transfers]
        wells = [each for each in outcomes if each[0] is None]
        errors = [each[0] for each in outcomes if each[0] is not None]
        for error in errors:
            require(isinstance(error, (TransportError, PeerLost)), f"a failure was told as {error!r}")
            require(error.peer == 1 and len(str(error)) > 20, f"a failure without peer or sentence: {error!r}")
        require(bool(errors), "nothing failed: this schedule fails nothing")
        lost = world.engines[0].peer(1).info.status != PeerStatus.UP
        if not lost:
            route.counted(len(wells), f"{len(errors)} of {len(transfers)} transfers failed")
        else:
            require(route.signal.value <= len(transfers), "more was counted than was posted")
        for _, offset, length in wells:
            require(lost or route.there(offset, length), f"a transfer that ended well is not there at {offset}")
        for _, offset, length in outcomes:
            at = slice(256 + offset + length, 256 + offset + 512)
            require(
                bool((route.block[at] == route.expected[at]).all()), f"bytes behind the transfer at {offset} changed"
            )


@check(9)
def nobody_waited_and_it_is_told(subject: Subject) -> None:
    """A transfer that nobody waits for and that fails is told once in the log."""
    with World(subject) as world:
        route = world.route(0, 1, 64)
        route.memory.revoke(0)
        lines: list[str] = []
        with warnings(lines):
            for _ in range(3):
                route.write(0, 64)
            gc.collect()
            world.settle()
        told = [line for line in lines if "nobody waited" in line]
        require(len(told) == 3, f"three writes failed unwaited, {len(told)} were told: {told}")


@check(9, only_hostile=True)
def a_peer_that_disappears_fails_what_involves_it(subject: Subject) -> None:
    """One of three ranks disappears: waits and transfers that involve it end with PeerLost naming it, each once; the
    other two go on."""
    subject = subject.having(lose_rank=2, lose_after=200)
    with World(subject, ranks=3) as world:
        to_lost = world.route(0, 2, 1 << 12, label="to the lost")
        from_lost = world.route(2, 0, 1 << 12, label="from the lost")
        others = world.route(0, 1, 1 << 12, label="the others")
        ours: list[Any] = []
        theirs: list[Any] = []
        for number in range(2000):
            if world.engines[0].peer(2).info.status != PeerStatus.UP:
                break
            for route, transfers in ((to_lost, ours), (from_lost, theirs)):
                try:
                    transfers.append(route.write(number % 4096, 1, timeout=1.0))
                except PeerLost:
                    continue
            world.step()
        world.until(lambda: world.engines[0].peer(2).info.status == PeerStatus.LOST, "the lost rank is noticed")
        good = [others.write(number % 4096, 1) for number in range(500)]
        world.settle([*ours, *good])
        ends = {type(_outcome(transfer)) for transfer in ours}
        require(ends <= {type(None), PeerLost, TransportError}, f"transfers to a lost rank ended with {ends}")
        for error in filter(None, map(_outcome, ours)):
            require(error.peer == 2, f"a transfer to rank 2 names peer {error.peer}: {error}")
        error = raises(PeerLost, lambda: from_lost.signal.wait(1 << 20, timeout=5.0), "a wait for a lost rank")
        require(error.peer == 2 and "rank 2" in str(error), f"a wait for rank 2 says peer {error.peer}: {error}")
        error = raises(PeerLost, lambda: to_lost.write(0, 1), "a write to a lost rank")
        require(error.peer == 2, f"a write to rank 2 says peer {error.peer}")
        others.counted(500, "between the ranks that are left")
        others.look("between the ranks that are left")
