"""5. Zero length transfers signal too."""

from __future__ import annotations

from typing import Any

from eptransport.conformance.registry import check
from eptransport.conformance.world import Subject, World
from eptransport.engine import Write


@check(5)
def nothing_but_the_signal(subject: Subject) -> None:
    """A transfer of no bytes raises its signal once and changes no byte, alone, in a scatter, paged, or among
    others."""
    with World(subject) as world:
        route = world.route(0, 1, 1 << 16)
        count, transfers = 0, list[Any]()

        def due(more: int) -> None:
            nonlocal count
            count += more
            world.until(lambda: route.signal.value >= count, f"the signal reached {count}")
            world.settle(transfers)
            route.counted(count, "when all is quiet")
            route.look("when all is quiet")

        transfers.append(route.peer.write(None, None, 0, signal=route.remote))
        due(1)
        transfers.append(route.peer.write(route.source_memory, route.region, 0, signal=route.remote))
        due(1)
        transfers.append(route.peer.write_paged(route.source_memory, route.region, 64, [], [], signal=route.remote))
        due(1)
        transfers.append(world.engines[0].scatter([Write(1, None, None, 0, signal=route.remote) for _ in range(5)]))
        due(5)
        for number in range(3000):
            length = world.random.choice((0, 0, 0, 1, 300))
            transfers.append(route.write(number * 20, length))
            world.step(world.random.choice((0, 0, 1)))
        due(3000)
