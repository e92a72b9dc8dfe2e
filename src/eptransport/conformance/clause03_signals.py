"""3. A signal counts transfers: by one, once, after every byte; not by shard, page or retry; never ahead of data."""

from __future__ import annotations

import threading
import time

import numpy as np

from eptransport.conformance.registry import check, require
from eptransport.conformance.world import GUARD, Subject, World, slots
from eptransport.engine import Write


@check(3)
def never_ahead_of_the_bytes_step_by_step(subject: Subject) -> None:
    """Between any two steps, at most as many are counted as can wholly be read. Counted first, read after."""
    with World(subject) as world:
        route = world.route(0, 1, 1 << 20)
        ranges = slots(world, route.size, 200, 1 << 20)
        transfers = []
        for number, (offset, length) in enumerate(ranges, 1):
            transfers.append(route.write(offset, length))
            for _ in range(world.random.choice((0, 1, 5))):
                world.step()
                count = route.signal.value
                there = sum(route.there(*each) for each in ranges[:number])
                require(count <= there, f"the signal is {count} and {there} transfers are there")
        world.settle(transfers)
        route.look("when all is quiet")
        route.counted(200, "when all is quiet")


@check(3)
def never_ahead_of_the_bytes_seen_by_another_thread(subject: Subject) -> None:
    """A thread that only reads memory, on another core, sees no count before its bytes: the order holds between
    cores."""
    steps, size = 120, 1 << 15
    words = np.zeros(2, dtype=np.uint64)
    with World(subject, progress="thread") as world:
        routes = [world.route(0, 1, size, home=words[lane : lane + 1], label=f"lane {lane}") for lane in (0, 1)]
        problems: list[str] = []
        done = [0, 0]

        def read() -> None:
            deadline = time.monotonic() + 60
            while done != [steps, steps] and not problems and time.monotonic() < deadline:
                for lane, route in enumerate(routes):
                    if words[lane] > done[lane]:
                        count = int(words[lane])
                        if not (route.target == count % 251).all():
                            problems.append(f"{route.label}: {count} counted, bytes {np.unique(route.target)}")
                        done[lane] = count
                time.sleep(0)  # lets go of the interpreter, for which the others would wait 5 ms each time
            if done != [steps, steps] and not problems:
                problems.append(f"the counts stayed at {done}, {steps} each were due")

        reader = threading.Thread(target=read)
        reader.start()
        for step in range(1, steps + 1):
            for lane, route in enumerate(routes):
                route.source[:] = step % 251
                route.peer.write(route.source_memory, route.region, size, signal=route.remote).wait()
                while done[lane] < step and not problems:  # one step a lane at a time: the next would write over it
                    time.sleep(0)
        reader.join(60)
        require(not problems, "; ".join(problems))


@check(3)
def once_for_a_transfer_of_any_number_of_pieces(subject: Subject) -> None:
    """One page or thousands, a stripe over the rails or a scatter: one transfer, one count, when the last byte is
    there."""
    with World(subject, stripe_bytes=1 << 16) as world:
        page = 64
        route = world.route(0, 1, 8192 * page)
        for count, pages in enumerate((1, 2, 3, 13, 14, 15, 16, 100, 4096), 1):
            # Every other page and shuffled, so that no two are neighbours on both sides and become one piece.
            sources = world.random.sample(range(0, 8192, 2), pages)
            targets = world.random.sample(range(1, 8192, 2), pages)
            world.random.shuffle(targets)
            transfer = route.peer.write_paged(
                route.source_memory, route.region, page, sources, targets, signal=route.remote
            )
            for source, target in zip(sources, targets, strict=True):
                at = GUARD + target * page
                route.expected[at : at + page] = route.source[source * page : (source + 1) * page]
            while route.signal.value < count:
                require(route.signal.value == count - 1, f"{pages} pages: the signal is {route.signal.value}")
                if not world.step() and transfer.done:
                    world.until(route.reached(count), f"{pages} pages raised the signal")
            route.look(f"the signal is up for {pages} pages")
            world.settle([transfer])
            route.counted(count, f"long after {pages} pages")
        transfer = route.write(0, route.size)  # far past stripe_bytes: cut over the rails where there are some
        world.until(lambda: route.signal.value > 9, "a striped write raised the signal")
        route.look("the signal is up for a striped write")
        world.settle([transfer])
        route.counted(10, "long after a striped write")


@check(3)
def each_write_of_a_scatter_raises_its_own_signal(subject: Subject) -> None:
    """A scatter to several peers is one local completion, and one count for each write of it, also twice on one
    signal."""
    with World(subject, ranks=3) as world:
        routes = [world.route(0, target, 1 << 14, label=f"{name} of {target}") for target in (1, 2) for name in "ab"]
        rounds = 50
        transfers = []
        for number in range(rounds):
            offset, length = number * 256, world.random.randint(1, 256)
            writes = [
                Write(route.peer, route.source_memory, route.region, length, offset, offset, route.remote)
                for route in (*routes, routes[0])
            ]
            transfers.append(world.engines[0].scatter(writes))
            for route in routes:
                route.expect(offset, length)
            world.step(world.random.choice((0, 1, 3)))
        world.settle(transfers)
        for route in routes:
            route.look("after the scatters")
            route.counted(2 * rounds if route is routes[0] else rounds, f"after the scatters, {route.label}")


@check(3)
def only_its_own_signal_and_none_without(subject: Subject) -> None:
    """A transfer raises the signal that it names, no other, and none where it names none."""
    with World(subject) as world:
        routes = [world.route(0, 1, 4096, label=f"signal {number}") for number in range(8)]
        due = [0] * len(routes)
        transfers = []
        for _ in range(400):
            number = world.random.randrange(len(routes))
            named = world.random.random() < 0.7
            transfers.append(routes[number].write(0, world.random.randint(1, 64), signal=named))
            due[number] += named
            world.step(world.random.choice((0, 0, 1)))
        world.settle(transfers)
        found = [route.signal.value for route in routes]
        require(found == due, f"the signals are {found}, {due} were due")


@check(3)
def exact_past_every_window(subject: Subject) -> None:
    """Thousands of transfers of one, some and many pieces on two signals, far more than any window or credit: exact."""
    with World(subject, credits=128) as world:
        routes = [world.route(0, 1, 1 << 16, label=f"lane {lane}") for lane in (0, 1)]
        due = [0, 0]
        for turn in range(30):
            transfers = []
            for _ in range(100):
                lane = world.random.randrange(2)
                route = routes[lane]
                pages = world.random.choice((1, 1, 1, 2, 5, 14, 15, 40))
                at = [2 * page for page in world.random.sample(range(500), pages)]
                transfers.append(route.write_pages(8, at))
                due[lane] += 1
                world.step(world.random.choice((0, 0, 1)))
            world.until(lambda: [r.signal.value for r in routes] >= due, f"turn {turn} is counted")
            world.settle(transfers)
            found = [route.signal.value for route in routes]
            require(found == due, f"turn {turn}: the signals are {found}, {due} were due")
        for route in routes:
            route.look("at the end")
