"""2. Unordered: nothing is promised about order, so nothing may lean on it. A hostile backend must show disorder, or
the checks of everything above it would prove nothing."""

from __future__ import annotations

from eptransport.conformance.registry import Violation, check, require
from eptransport.conformance.world import Subject, World, slots


@check(2)
def any_order_ends_in_the_same_memory(subject: Subject) -> None:
    """Hundreds of transfers under way at once, on several signals and both ways: all of them are there when all is
    quiet."""
    with World(subject) as world:
        routes = [
            world.route(source, 1 - source, 1 << 20, label=f"lane {lane}") for lane in (0, 1) for source in (0, 1)
        ]
        transfers = []
        plan = [
            (route, offset, length) for route in routes for offset, length in slots(world, route.size, 100, 1 << 20)
        ]
        world.random.shuffle(plan)
        for number, (route, offset, length) in enumerate(plan):
            transfers.append(route.write(offset, length))
            if number >= len(plan) // 2:  # those before are all under way when the first of them is looked at
                world.step(world.random.choice((0, 0, 0, 1, 2)))
        world.settle(transfers)
        for route in routes:
            route.look("when all is quiet")
            route.counted(100, "when all is quiet")


@check(2, only_hostile=True)
def partial_bytes_are_seen_while_the_signal_is_down(subject: Subject) -> None:
    """Between two steps a transfer is half there, its signal still down, and the half is not always the first one."""
    with World(subject) as world:
        route = world.route(0, 1, 40 << 14)
        partial, backwards = 0, 0
        for count in range(40):
            offset, length = count << 14, 1 << 14
            route.write(offset, length)
            while route.signal.value <= count:
                landed = route.target[offset : offset + length] == route.source[offset : offset + length]
                if 0.05 < landed.mean() < 0.95:
                    partial += 1
                    backwards += landed[-64:].all() and not landed[:64].all()
                world.step()
            require(route.there(offset, length), f"transfer {count}: the signal is up and not all bytes are")
        require(partial > 20, f"a transfer was seen half there {partial} times only: this schedule is not hostile")
        require(backwards > 0, "the end of a transfer was never seen before its beginning")


@check(2, only_hostile=True)
def later_transfers_pass_earlier_ones(subject: Subject) -> None:
    """Of the transfers under way a later one is there first, on the same signal and across signals; the bytes of step
    e + 1 land before those of step e; two lanes interleave."""
    with World(subject) as world:
        lanes = [world.route(0, 1, 64 << 12, label=f"lane {lane}") for lane in (0, 1)]
        steps = [(lane, step << 12, 1 << 12) for step in range(64) for lane in lanes]
        transfers = [lane.write(offset, length) for lane, offset, length in steps]
        overtaken, touched_early, switches, last = 0, 0, 0, None
        counts = [0, 0]
        for _ in range(100_000):
            world.step()
            for number, lane in enumerate(lanes):
                if lane.signal.value > counts[number]:
                    switches += last not in (None, number)
                    counts[number], last = lane.signal.value, number
                there = [lane.there(step << 12, 1 << 12) for step in range(64)]
                require(sum(there) >= counts[number], f"{lane.label}: {counts[number]} raised, {sum(there)} are there")
                first = there.index(False) if False in there else 64
                overtaken += any(there[first:])
                after = slice((first + 1) << 12, (first + 2) << 12)
                touched_early += bool(first < 62 and (lane.target[after] == lane.source[after]).mean() > 0.3)
            if counts == [64, 64]:
                break
        else:
            raise Violation(f"the signals stayed at {counts}, 64 each were due")
        world.settle(transfers)
        for lane in lanes:
            lane.look("when all is quiet")
            lane.counted(64, "when all is quiet")
        require(overtaken > 0, "no transfer was ever seen whole before an earlier one of its signal")
        require(touched_early > 0, "no bytes of a later transfer were ever seen before an earlier one was whole")
        require(switches > 5, f"the two lanes came one after the other ({switches} changes)")
