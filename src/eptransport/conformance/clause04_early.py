"""4. Early arrivals count: a signal that rises before anyone waits for it is not lost."""

from __future__ import annotations

import asyncio

from eptransport.conformance.registry import check, require
from eptransport.conformance.world import Subject, World


@check(4)
def raised_long_before_anyone_waits(subject: Subject) -> None:
    """Everything lands first, then someone waits: each wait up to the count returns at once, looking only once."""
    with World(subject) as world:
        route = world.route(0, 1, 64)
        world.settle([route.write(number, 1) for number in range(10)])
        for target in range(11):
            route.signal.wait(target, timeout=0)
        route.look("after the waits")


@check(4)
def raised_while_the_receiver_does_other_things(subject: Subject) -> None:
    """Signals rise in any order while their receiver waits for another one, reads messages, or makes more signals."""
    with World(subject, progress="auto") as world:
        routes = [world.route(0, 1, 1024, label=f"signal {number}") for number in range(6)]
        for step in range(1, 21):
            order = world.random.sample(routes, len(routes))
            for route in order:
                route.write(0, world.random.randint(0, 1024))
            world.engines[0].peer(1).send(b"go on", tag=step)
            world.engines[1].recv(tag=step, timeout=subject.ample_s)
            for route in world.random.sample(routes, len(routes)):
                route.signal.wait(step, timeout=subject.ample_s)
        for route in routes:
            route.counted(20, route.label)


@check(4)
def raised_before_a_coroutine_asks(subject: Subject) -> None:
    """A count that is there already ends `await signal.reached()`, and so does one that comes later."""
    with World(subject, progress="auto") as world:
        route = world.route(0, 1, 1024)
        first = [route.write(0, 16) for _ in range(3)]
        for transfer in first:
            transfer.wait()
        route.signal.wait(3, timeout=subject.ample_s)

        async def waits() -> None:
            await asyncio.wait_for(route.signal.reached(3), subject.ample_s)
            later = asyncio.ensure_future(route.signal.reached(5))
            await asyncio.sleep(0.01)
            require(not later.done(), "a wait for 5 ended at 3")
            await asyncio.gather(*(asyncio.wait_for(_ended(route.write(0, 16)), subject.ample_s) for _ in range(2)))
            await asyncio.wait_for(later, subject.ample_s)

        asyncio.run(waits())
        route.counted(5, "after the coroutines")


async def _ended(transfer: object) -> None:
    await transfer  # type: ignore[misc]
