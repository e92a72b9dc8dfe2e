"""12. Memory is safe: a write outside a region, with a wrong or revoked key, or without the right to write, changes
nothing at the target and fails at the initiator; everyone else goes on."""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

import numpy as np

from eptransport.conformance.registry import check, require
from eptransport.conformance.world import GUARD, Route, Subject, World, raises
from eptransport.engine import Region
from eptransport.errors import AccessDenied, EptError, InvalidArgument


def _attempt(world: World, route: Route, region: Region, offset: int, length: int) -> EptError | None:
    """The error of a write into `region`, from wherever it comes; None where it was let through."""
    try:
        transfer = route.peer.write(
            route.source_memory, region, length, destination_offset=offset, signal=route.remote, timeout=5.0
        )
        world.settle([transfer])
        transfer.wait(timeout=0)
    except EptError as error:
        return error
    return None


def _refused(world: World, route: Route, region: Region, offset: int, length: int, what: str) -> EptError:
    error = _attempt(world, route, region, offset, length)
    require(error is not None, f"{what} was let through")
    assert error is not None
    require(isinstance(error, AccessDenied), f"{what} failed with {error!r}, not AccessDenied")
    route.look(f"after {what}")
    return error


def _goes_on(world: World, route: Route) -> None:
    count = route.signal.value
    world.settle([route.write(0, route.size)])
    route.counted(count + 1, "a write by the right key afterwards")
    route.look("a write by the right key afterwards")


@check(12)
def outside_of_the_region(subject: Subject) -> None:
    """Past the end, before the start, across it, and with numbers that wrap around: refused, though the registration is
    larger than the region."""
    with World(subject) as world:
        route = world.route(0, 1, 4096)
        for offset, length in (
            (4096, 1),
            (4095, 2),
            (0, 4097),
            (1, 4096),
            (1 << 40, 1),
            (2**64 - 1, 1),
            (2**64 - 8, 16),
        ):
            error = _attempt(world, route, route.region, offset, min(length, 4096))
            if (offset, length) == (0, 4097):
                continue  # cut to the source's length above: a write that fits
            require(isinstance(error, (AccessDenied, InvalidArgument)), f"[{offset}, +{length}) ended with {error!r}")
        route.expect(0, 4096)
        route.look("after writes outside")
        require(route.signal.value == 1, f"the signal is {route.signal.value} after one good write")
        _goes_on(world, route)


@check(12)
def outside_of_the_region_by_a_forged_description(subject: Subject) -> None:
    """A writer whose own engine believes that the region is longer is stopped at the target."""
    with World(subject) as world:
        route = world.route(0, 1, 4096)
        blob = bytearray(route.blob)
        wanted = (4096).to_bytes(8, "little")
        at = blob.find(wanted)
        require(at >= 0, "the blob doesn't hold its length: this check must be told where it is")
        while at >= 0:
            blob[at : at + 8] = (4096 + 2 * GUARD).to_bytes(8, "little")
            at = blob.find(wanted)
        forged = route.peer.import_region(bytes(blob))
        require(forged.length > 4096, "the forged region is as long as the true one")
        _refused(world, route, forged, 4096, 64, "a write past the end by a forged length")
        _refused(world, route, forged, 4000, 200, "a write across the end by a forged length")
        route.counted(0, "after forged writes")
        _goes_on(world, route)


@check(12)
def with_a_wrong_key(subject: Subject) -> None:
    """Each byte of a region's description flipped, one at a time, and whole descriptions of noise: refused, or a
    region that still ends where it should. Guessing never writes."""
    with World(subject) as world:
        route = world.route(0, 1, 512)
        denied = 0
        for at in range(len(route.blob)):
            forged = bytearray(route.blob)
            forged[at] ^= 1 << world.random.randrange(8)
            try:
                region = route.peer.import_region(bytes(forged))
            except EptError:
                continue
            error = _attempt(world, route, region, 0, 512)
            if error is None:
                route.expect(0, 512)  # a bit that means nothing to the key
                continue
            denied += isinstance(error, AccessDenied)
            route.look(f"after a write with byte {at} of the key flipped")
        require(denied >= 8, f"{denied} flipped bytes were denied: no long key is checked")
        for _ in range(200):
            noise = secrets.token_bytes(world.random.choice((0, 1, 16, len(route.blob), 4096)))
            raises(EptError, partial(route.peer.import_region, noise), f"importing {len(noise)} bytes of noise")
            raises(EptError, partial(route.peer.import_signal, noise), f"importing {len(noise)} bytes of noise")
        count = route.signal.value
        route.write(0, 512)
        world.settle()
        require(route.signal.value == count + 1, "a good write afterwards was not counted once")


@check(12)
def with_the_key_of_another_rank(subject: Subject) -> None:
    """A region that was exported to rank 1 is no use to rank 2; where keys are each peer's own (KEY), not even when it
    lies about whom it is for."""
    lies = (False, True) if subject.plugin.probe(subject.options).protection == "key" else (False,)
    with World(subject, ranks=3) as world:
        theirs, own = world.route(1, 0, 4096, label="of 1"), world.route(2, 0, 4096, label="of 2")
        stolen: list[Region] = []
        for patched in lies:
            blob = bytearray(theirs.blob)
            if patched:  # the envelope says who may read it: make it say 2
                mine = bytearray(own.memory.export(2, GUARD, 4096))
                for at in range(min(8, len(blob))):
                    blob[at] = mine[at]
            try:
                stolen.append(own.peer.import_region(bytes(blob)))
            except EptError:
                require(not patched, "a blob with another reader's envelope can't even be imported: check this check")
        for region in stolen:
            error = _attempt(world, own, region, 0, 4096)
            require(isinstance(error, AccessDenied), f"rank 2 wrote by the key of rank 1: {error!r}")
        theirs.look("after rank 2 tried the key of rank 1")
        own.counted(0, "after rank 2 tried the key of rank 1")
        _goes_on(world, theirs)
        _goes_on(world, own)


@check(12)
def with_a_revoked_key(subject: Subject) -> None:
    """From the return of a revoke on nothing changes, what is half received included; other peers' keys, and a new one
    for the same peer, hold."""
    with World(subject, ranks=3) as world:
        route = world.route(0, 2, 1 << 16, label="revoked")
        kept = world.engines[1].peer(2).import_region(route.memory.export(1, GUARD, route.size))
        for turn in range(10):
            region = route.peer.import_region(route.memory.export(0, GUARD, route.size))
            transfers = [
                route.peer.write(
                    route.source_memory,
                    region,
                    1 << 13,
                    source_offset=part << 13,
                    destination_offset=part << 13,
                    signal=route.remote,
                )
                for part in range(8)
            ]
            world.step(world.random.randint(0, 12))
            route.memory.revoke(0)
            route.expected[:] = route.block
            world.step(20)
            route.look(f"turn {turn}: after a revoke, with writes under way")
            world.settle(transfers)
            route.look(f"turn {turn}: after a revoke, when all is quiet")
            _refused(world, route, region, 0, 64, "a write after a revoke")
            source = world.bytes(64)
            with world.engines[1].register(source) as memory:
                transfer = world.engines[1].peer(2).write(memory, kept, 64, destination_offset=turn * 64)
                world.settle([transfer])
            route.expected[GUARD + turn * 64 : GUARD + turn * 64 + 64] = source
            route.look(f"turn {turn}: a write of another peer")
        route.region = route.peer.import_region(route.memory.export(0, GUARD, route.size))
        _goes_on(world, route)


@check(12)
def without_the_right_to_write(subject: Subject) -> None:
    """Read-only memory may be a source and is never exported; a closed one is neither."""
    with World(subject) as world:
        route = world.route(0, 1, 4096)
        constant = world.bytes(4096).tobytes()
        memory = world.engines[1].register(constant)
        raises(AccessDenied, lambda: memory.export(0), "exporting read-only memory")
        memory.close()
        source = np.frombuffer(constant, dtype=np.uint8)
        source_memory = world.engines[0].register(constant)
        transfer = route.peer.write(source_memory, route.region, 4096, signal=route.remote)
        route.expected[GUARD:-GUARD] = source
        world.settle([transfer])
        route.look("a write from read-only memory")
        gone = world.engines[1].register(world.bytes(64))
        blob = gone.export(0)
        region = route.peer.import_region(blob)
        gone.close()
        _refused(world, route, region, 0, 64, "a write into closed memory")
        raises(InvalidArgument, lambda: gone.export(0), "exporting closed memory")
        _goes_on(world, route)


@check(12)
def with_another_secret(subject: Subject) -> None:
    """A process that doesn't hold the job's secret gets no connection, and the others are none the worse."""
    from eptransport.engine import Engine, PeerStatus
    from eptransport.errors import AuthError, PeerLost, Timeout

    settings = subject.settings(progress="inline", timeout_s=3.0)
    kinds: list[Any] = []
    engines = [
        Engine(subject.plugin, rank=rank, world_size=2, job="secretive", secret=secret * 32, settings=settings)
        for rank, secret in enumerate((b"a", b"b"))
    ]
    with engines[0], engines[1]:
        addresses = [engine.address() for engine in engines]
        for engine in engines:
            try:
                engine.connect(addresses)
            except EptError as error:
                kinds.append(type(error))
        for _ in range(3000):
            for engine in engines:
                try:
                    engine.progress()
                except EptError as error:
                    kinds.append(type(error))
        for rank, engine in enumerate(engines):
            status = engine.peer(1 - rank).info.status
            require(status != PeerStatus.UP, f"rank {rank} is connected to a rank with another secret")
            told = raises(EptError, partial(engine.wait_connected, 0.5), "a wait for a stranger")
            require(isinstance(told, (AuthError, PeerLost, Timeout)), f"rank {rank} was told {told!r}")
            kinds.append(type(told))
    require(AuthError in kinds, f"nobody was told that the secrets differ: {kinds}")
