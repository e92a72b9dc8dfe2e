"""7. Posting never blocks and never allocates without bound; a receiver can't be overrun."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from eptransport.conformance.registry import Violation, check, require
from eptransport.conformance.world import Route, Subject, World
from eptransport.errors import Timeout

MANY = 200_000
"""Far more than any queue may hold."""
MOST_BYTES = 96 << 20
PROMPT_S = 1.0
SLOW_IN_A_ROW = 3
"""So many calls that each took longer than PROMPT_S have blocked. One alone may have been kept from its core: beside
four busy loops of a higher priority on two cores one of tcp's took 1.7 s, though nothing there waits. What blocks does
so every time, for the target takes no part."""


def _post_until_refused(post: Callable[[int], Any]) -> list[Any]:
    """Posts until the answer is "later", which Python tells as Timeout; every call must come back promptly."""
    taken = []
    slow = 0
    for number in range(MANY):
        begin = time.monotonic()
        full = False
        try:
            taken.append(post(number))
        except Timeout:
            full = True
        took = time.monotonic() - begin
        slow = slow + 1 if took > PROMPT_S else 0
        require(slow < SLOW_IN_A_ROW, f"post {number} took {took:.3f} s, like those before it: it blocked")
        if full and slow == 0:
            return taken
    raise Violation(f"{MANY} posts to a rank that takes no part were all taken: nothing bounds the queue")


@check(7)
def a_full_queue_is_an_answer(subject: Subject) -> None:
    """The target never polls: the poster is told "later" past a bound, promptly each time and again when it asks again;
    when the target polls, exactly what was taken arrives, and posting goes on."""
    with World(subject) as world:
        route = world.route(0, 1, 1 << 12)
        world.absent.add(1)
        taken = _post_until_refused(lambda number: route.write(number % 4096, 1, timeout=0))
        for _ in range(100):
            world.step()
            taken += _post_until_refused(lambda number: route.write(number % 4096, 1, timeout=0))
        world.absent.clear()
        world.settle(taken)
        route.counted(len(taken), "when all that was taken has landed")
        more = [route.write(number, 1, timeout=subject.ample_s) for number in range(10)]
        world.settle(more)
        route.counted(len(taken) + 10, "after posting on")
        route.look("at the end")


def _again(post: Callable[[Route], Any], route: Route) -> Callable[[int], Any]:
    return lambda _: post(route)


@check(7)
def memory_stays_bounded(subject: Subject) -> None:
    """What a poster may run ahead by is bounded in bytes too: big writes, and lists of thousands of pages."""
    pages = np.arange(0, 1 << 14, 2, dtype=np.int32)
    kinds: dict[str, Callable[[Route], Any]] = {
        "writes of 64 KiB": lambda route: route.write(0, 1 << 16, timeout=0),
        "writes of 8,192 pages": lambda route: route.peer.write_paged(
            route.source_memory, route.region, 4, pages, pages, signal=route.remote, timeout=0
        ),
    }
    for name, post in kinds.items():
        with World(subject) as world:
            route = world.route(0, 1, 1 << 16)
            world.absent.add(1)
            before = _resident()
            taken = _post_until_refused(_again(post, route))
            grown = _resident() - before
            require(grown < MOST_BYTES, f"{len(taken)} {name} to a rank that takes no part took {grown >> 20} MiB")
            require(len(taken) > 2, f"only {len(taken)} {name} were taken: room to run ahead is the point of a queue")
            for page in pages if "pages" in name else ():
                route.expect(4 * int(page), 4)
            world.absent.clear()
            world.settle(taken)
            route.counted(len(taken), f"when all {name} have landed")
            route.look(f"when all {name} have landed")


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@check(7)
def messages_are_bounded_too(subject: Subject) -> None:
    """A receiver that never receives stops its sender's messages past a bound, and nothing else: writes, paged ones
    too, go on. When it receives, exactly what was sent is there, each once."""
    with World(subject) as world:
        route = world.route(0, 1, 1 << 12)
        sent: list[int] = []

        def send(_: int) -> None:
            world.engines[0].peer(1).send(len(sent).to_bytes(4, "little"), tag=5, timeout=0)
            sent.append(len(sent))

        for _ in range(20):
            _post_until_refused(send)
            world.step(50)
        transfers = [route.write(number % 4096, 1) for number in range(3000)]
        pages = list(range(0, 4096 // 8, 2))
        # By the route, which moves the receiver on where there is no room: a network is free to take its time.
        transfers += [route.write_pages(8, pages) for _ in range(20)]
        world.settle(transfers)
        route.counted(3020, "with a full mailbox")
        found: list[int] = []

        def all_came() -> bool:
            # Both ranks move on: a message may be held back at its sender.
            try:
                found.append(int.from_bytes(world.engines[1].recv(tag=5, timeout=0)[1], "little"))
            except Timeout:
                return False
            return len(found) == len(sent)

        world.until(all_came, "every message is received")
        require(sorted(found) == sent, f"{len(sent)} messages were sent; {len(set(found))} different ones came")
        world.settle()
        try:
            extra = world.engines[1].recv(tag=5, timeout=0)
        except Timeout:
            return
        raise Violation(f"{len(sent)} messages were sent and one more came: {extra}")


@check(7)
def a_fast_sender_does_not_overrun_a_slow_receiver(subject: Subject) -> None:
    """The target polls once for hundreds of posts: back-pressure holds the sender, and nothing is lost or doubled."""
    with World(subject) as world:
        route = world.route(0, 1, 1 << 14)
        taken: list[Any] = []
        while len(taken) < 20_000:
            for _ in range(500):
                try:
                    taken.append(route.write(len(taken) % (1 << 14), 1, timeout=0))
                except Timeout:
                    break
            world.engines[0].progress()
            world.step()
        world.settle(taken)
        route.counted(len(taken), "when all is quiet")
        route.look("when all is quiet")
