"""13. Any number of peers, regions and signals, up to limits that settings name; past one, an error names it."""

from __future__ import annotations

from functools import partial

from eptransport.conformance.registry import Skip, check, require
from eptransport.conformance.world import Subject, World, raises
from eptransport.errors import LimitError


@check(13)
def many_regions_and_signals(subject: Subject) -> None:
    """Thousands of both at once, each reached by its own description, given back and taken again. One turn where keys
    can't be taken back: there regions are given back with their memory."""
    revocable = 12 not in subject.plugin.probe(subject.options).waived
    with World(subject) as world:
        before = world.engines[1].info()
        block = world.route(0, 1, 3000 * 16)
        for turn in range(2):
            regions = [
                block.peer.import_region(block.memory.export(0, 256 + 16 * number, 16)) for number in range(3000)
            ]
            signals = [world.engines[1].signal(0, f"signal {number}") for number in range(3000)]
            remotes = [block.peer.import_signal(signal.export()) for signal in signals]
            order = world.random.sample(range(3000), 3000)
            transfers = []
            for number in order:
                transfers.append(
                    world.post(
                        partial(
                            block.peer.write,
                            block.source_memory,
                            regions[number],
                            16,
                            source_offset=16 * number,
                            signal=remotes[number],
                            timeout=0,
                        )
                    )
                )
                block.expect(16 * number, 16)
                world.step(int(number % 8 == 0))
            world.settle(transfers)
            counts = {signal.value for signal in signals}
            require(counts == {1}, f"turn {turn}: the signals are {sorted(counts)}, 1 each is due")
            block.look(f"turn {turn}")
            for handle in (*regions, *remotes, *signals):
                handle.close()
            if not revocable:
                return
            block.memory.revoke(0)
            block.region = block.peer.import_region(block.memory.export(0, 256, block.size))
        after = world.engines[1].info()
        require(after.signals == before.signals + 1, f"{after.signals} signals are left of {before.signals + 1}")
        require(after.regions == before.regions + 1, f"{after.regions} regions are left of {before.regions + 1}")


@check(13)
def many_peers(subject: Subject) -> None:
    """Twelve ranks, each a peer of all others: every pair has its own region and signal, nothing gets mixed up."""
    ranks = 12
    with World(subject, ranks=ranks) as world:
        routes = [world.route(a, b, 256) for a in range(ranks) for b in range(ranks) if a != b]
        transfers = []
        for route in world.random.sample(routes, len(routes)):
            transfers += [route.write(part, 16) for part in range(0, 256, 16)]
        world.settle(transfers)
        for route in routes:
            route.look(route.label)
            route.counted(16, route.label)


@check(13)
def past_the_limit_of_signals(subject: Subject) -> None:
    """An immediate names 262,143 chans: the signal that is one too many is refused with the limit in the sentence, and
    those before it work."""
    if not subject.thorough:
        raise Skip("takes 262,143 signals, and is the engine's limit, not the backend's")
    with World(subject) as world:
        signals, error = [], None
        try:
            for _ in range(1 << 18):
                signal = world.engines[1].signal(0, "")
                signals.append(signal)
                blob = signal.export()
        except LimitError as raised:
            error = raised
        require(error is not None, f"{len(signals)} signals were exported and nothing refused one")
        require("262143" in str(error) or "max_signals" in str(error), f"the limit is not named: {error}")
        remote = world.engines[0].peer(1).import_signal(blob)
        exported = signals[-2] if signals[-1].value == 0 and len(signals) > 1 else signals[-1]
        transfer = world.engines[0].peer(1).write(None, None, 0, signal=remote)
        world.settle([transfer])
        require(
            sum(signal.value for signal in (signals[-1], exported)) == 1, "the last signal that was given does not work"
        )
        for signal in signals:
            signal.close()


@check(13)
def past_the_limit_of_regions(subject: Subject) -> None:
    """The backend's own limit of exports, set low, is named when it is met; giving one back makes room for one."""
    subject = subject.having(max_regions=20)
    with World(subject) as world:
        memories = [world.engines[1].register(world.bytes(64)) for _ in range(50)]
        exported = []
        error = None
        for memory in memories:
            try:
                memory.export(0)
                exported.append(memory)
            except LimitError as raised:
                error = raised
                break
        require(error is not None, f"{len(exported)} exports with max_regions=20, and nothing refused one")
        require("20" in str(error) or "max_regions" in str(error), f"the limit is not named: {error}")
        if 12 in subject.plugin.probe(subject.options).waived:
            exported[0].close()  # keys can't be taken back, but go with their memory
            del exported[0]
        else:
            exported[0].revoke(0)
        exported[0].export(0)
        raises(LimitError, lambda: exported[0].export(0), "one export more than the limit")
