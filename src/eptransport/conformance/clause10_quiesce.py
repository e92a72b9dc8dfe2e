"""10. Quiesced is a promise with a scope: afterwards no thread of a backend and no NIC touches the memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from eptransport.conformance.registry import check, require
from eptransport.conformance.world import Subject, World, raises
from eptransport.errors import AccessDenied, EptError, StuckError, Timeout


def _while_stepping(world: World, rank: int, body: Callable[[], Any]) -> Any:
    """Runs `body`, a wait of one rank, on a thread, while the others are moved on here."""
    result: list[Any] = []

    def call() -> None:
        try:
            result.append((body(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=call)
    thread.start()
    deadline = time.monotonic() + world.subject.ample_s
    while thread.is_alive():
        for engine in world.engines:
            if engine.rank != rank and engine.rank not in world.absent:
                engine.progress()
        require(time.monotonic() < deadline, f"the call of rank {rank} did not end in {world.subject.ample_s:g} s")
        time.sleep(0)
    value, error = result[0]
    if error is not None:
        raise error
    return value


@check(10)
def local_when_what_was_posted_is_complete(subject: Subject) -> None:
    """After a local quiesce every transfer of this rank that reads from the memory has ended, and it may be reused."""
    with World(subject) as world:
        route, other = world.route(0, 1, 1 << 20), world.route(0, 1, 1 << 16)
        for memory in (route.source_memory, None):
            transfers = [route.write(number << 12, 1 << 12) for number in range(256)]
            rest = [other.write(number << 8, 1 << 8) for number in range(256)]
            _while_stepping(world, 0, partial(world.engines[0].quiesce, memory, "local", subject.ample_s))
            due = transfers if memory is not None else [*transfers, *rest]
            open_still = sum(not transfer.done for transfer in due)
            require(not open_still, f"{open_still} of {len(due)} transfers had not ended after a local quiesce")
            route.source[:] ^= 0xFF
            world.settle([*transfers, *rest])
            route.look("after the source was overwritten behind a local quiesce")
            route.source[:] ^= 0xFF


@check(10)
def remote_then_nothing_touches_it(subject: Subject) -> None:
    """Two peers write into a memory at full speed; after a remote quiesce not one byte of it changes any more, though
    they go on. Their writes fail; those into other memory of the same rank arrive."""
    with World(subject, ranks=3) as world:
        routes = [world.route(source, 0, 1 << 16, label=f"from {source}") for source in (1, 2)]
        shared = routes[0]
        # The second source writes into the first one's block too.
        blob = shared.memory.export(2, 256, shared.size)
        region = world.engines[2].peer(0).import_region(blob)
        other = world.route(2, 0, 1 << 12, label="other memory")
        posted: list[Any] = []
        stop = threading.Event()
        problems: list[str] = []

        def flood(rank: int) -> None:
            peer, route = world.engines[rank].peer(0), routes[rank - 1]
            target = shared.region if rank == 1 else region
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    transfer = peer.write(
                        route.source_memory,
                        target,
                        1 << 12,
                        source_offset=(number % 16) << 12,
                        destination_offset=(number % 7) << 12,
                        signal=route.remote,
                        timeout=0,
                    )
                    posted.append(transfer)
                except (Timeout, AccessDenied):
                    pass
                except EptError as error:
                    problems.append(f"rank {rank}: {error!r}")
                    return
                world.engines[rank].progress()

        writers = [threading.Thread(target=flood, args=(rank,)) for rank in (1, 2)]
        for writer in writers:
            writer.start()
        time.sleep(0.05)
        world.engines[0].quiesce(shared.memory, "remote", subject.ample_s)
        before = shared.block.copy()
        for _ in range(50):
            time.sleep(0.002)
            world.engines[0].progress()
            require(bool((shared.block == before).all()), "a byte changed after a remote quiesce")
        stop.set()
        for writer in writers:
            writer.join()
        require(not problems, "; ".join(problems))
        require(len(posted) > 20, "the writers posted next to nothing")
        world.settle(posted)
        require(bool((shared.block == before).all()), "a byte changed after a remote quiesce, when all was quiet")
        error = raises(AccessDenied, lambda: _now(world, shared), "a write after a remote quiesce")
        require(error.peer == 0, f"the refusal names peer {error.peer}")
        world.settle([other.write(0, 1 << 12)])
        other.counted(1, "into other memory")
        other.look("into other memory")


def _now(world: World, route: Any) -> None:
    transfer = route.write(0, 64)
    world.settle([transfer])
    transfer.wait(timeout=0)


@check(10)
def a_peer_that_does_not_answer(subject: Subject) -> None:
    """A peer that takes no part can't be shown quiet: the quiesce says so within its deadline. When the peer takes part
    again, a later one succeeds."""
    with World(subject) as world:
        route = world.route(1, 0, 1 << 12)
        world.settle([route.write(0, 100)])
        world.absent.add(1)
        begin = time.monotonic()
        raises(
            (Timeout, StuckError),  # type: ignore[arg-type]
            lambda: world.engines[0].quiesce(route.memory, "remote", 0.2),
            "a quiesce that nobody answers",
        )
        require(time.monotonic() - begin < 2.5, "it took far longer than its deadline")
        world.absent.clear()
        _while_stepping(world, 0, lambda: world.engines[0].quiesce(route.memory, "remote", subject.ample_s))
        raises(AccessDenied, lambda: _now(world, route), "a write after the quiesce")
        route.look("after the quiesce")


@check(10)
def closing_memory_and_engines_is_quiet(subject: Subject) -> None:
    """After `Memory.close`, and after `Engine.close`, writes that are still coming change nothing."""
    with World(subject, ranks=3) as world:
        closed, left = world.route(1, 0, 1 << 16, label="closed"), world.route(1, 2, 1 << 16, label="left")
        transfers = [route.write(number << 10, 1 << 10) for number in range(64) for route in (closed, left)]
        world.step(3)
        closed.memory.close()
        before = closed.block.copy()
        world.absent.add(2)
        world.engines[2].close(0.2)
        after = left.block.copy()
        world.until(lambda: all(transfer.done for transfer in transfers), "all transfers have ended")
        world.settle()
        require(bool((closed.block == before).all()), "a byte of closed memory changed")
        require(bool((left.block == after).all()), "a byte changed at a rank that had closed its engine")
