"""6. Local completion says that the source may be reused, and nothing about the target."""

from __future__ import annotations

from functools import partial

import numpy as np

from eptransport.conformance.registry import check, require
from eptransport.conformance.world import Subject, World


@check(6)
def the_source_may_be_written_over_at_once(subject: Subject) -> None:
    """The moment a transfer is complete its source is overwritten; what lands is what was there before."""
    with World(subject) as world:
        route = world.route(0, 1, 60 << 14)
        pending = []
        for number in range(60):
            offset, length = number << 14, world.random.choice((1, 100, 4096, 1 << 14))
            pending.append((route.write(offset, length), offset, length))
            world.step(world.random.choice((0, 1, 4)))
            pending = [each for each in pending if not _spoiled(route.source, *each)]

        def all_spoiled() -> bool:
            pending[:] = [each for each in pending if not _spoiled(route.source, *each)]
            return not pending

        world.until(all_spoiled, "every write is locally complete")
        world.until(lambda: route.signal.value >= 60, "every write raised the signal")
        world.settle()
        route.look("after every source was overwritten at its completion")


def _spoiled(source: np.ndarray, transfer: object, offset: int, length: int) -> bool:
    if not transfer.done:  # type: ignore[attr-defined]
        return False
    source[offset : offset + length] ^= 0xFF
    return True


@check(6)
def the_source_memory_may_be_given_back_at_once(subject: Subject) -> None:
    """The registration of a source may be closed and its memory reused as soon as its write is complete."""
    with World(subject) as world:
        route = world.route(0, 1, 1 << 12)
        for number in range(1, 30):
            source = world.bytes(1 << 12)
            memory = world.engines[0].register(source)
            transfer = route.peer.write(memory, route.region, 1 << 12, signal=route.remote)
            world.until(partial(getattr, transfer, "done"), "the write is locally complete")
            memory.close()
            wanted = source.copy()
            source[:] = 0
            del source
            world.until(route.reached(number), "the write raised the signal")
            require(
                bool((route.target == wanted).all()), f"write {number} brought bytes that came after its completion"
            )
