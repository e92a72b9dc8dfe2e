"""1. One-sided: a write moves bytes, and the target's application takes no part."""

from __future__ import annotations

import time

import numpy as np

from eptransport.conformance import processes
from eptransport.conformance.registry import Violation, check, require
from eptransport.conformance.world import GUARD, Route, Subject, World
from eptransport.engine import Engine

LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 511, 4095, 4096, 4097, 7168, 65535, 65536, 65537, 1 << 20)


@check(1)
def bytes_arrive_and_nothing_else_changes(subject: Subject) -> None:
    """Whatever the length and the offsets: these bytes at the target, and no other byte of it, guards included."""
    with World(subject) as world:
        route = world.route(0, 1, (3 << 20) + 77)
        for count, length in enumerate((*LENGTHS, (3 << 20) + 5), 1):
            offset = world.random.randint(0, route.size - length)
            transfer = route.write(offset, length)
            world.until(route.reached(count), f"the write of {length} bytes raised its signal")
            route.look(f"after a write of {length} bytes to offset {offset}")
            world.settle([transfer])
            route.look(f"long after a write of {length} bytes to offset {offset}")
        route.counted(len(LENGTHS) + 1, "at the end")


@check(1)
def offsets_of_source_and_destination_are_apart(subject: Subject) -> None:
    """The source's offset and the destination's are two things, and a region may start anywhere in its memory."""
    with World(subject) as world:
        route = world.route(0, 1, 1 << 16)
        for count in range(1, 40):
            length = world.random.randint(1, 1 << 12)
            origin = world.random.randint(0, route.size - length)
            offset = world.random.randint(0, route.size - length)
            route.peer.write(
                route.source_memory,
                route.region,
                length,
                source_offset=origin,
                destination_offset=offset,
                signal=route.remote,
            )
            route.expected[GUARD + offset : GUARD + offset + length] = route.source[origin : origin + length]
            world.until(route.reached(count), "the write raised its signal")
            route.look(f"after a write from {origin} to {offset} of {length} bytes")


@check(1)
def pages_go_where_their_lists_say(subject: Subject) -> None:
    """Lists of pages that are neighbours on both sides, on one side, or on none, with pages of a source that repeat,
    strides and offsets: each page lands where its list says."""
    with World(subject) as world:
        route = world.route(0, 1, 1 << 19)
        for count in range(1, 40):
            page = world.random.choice((1, 16, 24, 512))
            pages = world.random.randint(1, 40)
            strides = [page + world.random.choice((0, 0, 8)) for _ in "sd"]
            offsets = [world.random.choice((0, 0, 33)) for _ in "sd"]
            rooms = [(route.size - offset - page) // stride for offset, stride in zip(offsets, strides, strict=True)]
            sources, targets = (_runs(world, room, pages) for room in rooms)
            if world.random.random() < 0.3:
                sources = world.random.choices(sources, k=pages)
            route.peer.write_paged(
                route.source_memory,
                route.region,
                page,
                sources,
                targets,
                signal=route.remote,
                source_offset=offsets[0],
                destination_offset=offsets[1],
                source_stride=strides[0],
                destination_stride=strides[1],
            )
            for source, target in zip(sources, targets, strict=True):
                start, at = offsets[0] + source * strides[0], GUARD + offsets[1] + target * strides[1]
                route.expected[at : at + page] = route.source[start : start + page]
            world.until(route.reached(count), "the pages raised their signal")
            route.look(f"after {pages} pages of {page} bytes with strides {strides}")


def _runs(world: World, room: int, count: int) -> list[int]:
    """Different numbers below `room`, many of them neighbours."""
    starts = world.random.sample(range(0, room - 8, 8), count)
    runs = [start + step for start in starts for step in range(world.random.choice((1, 1, 2, 8)))]
    return runs[:count]


@check(1)
def the_target_only_looks_at_its_memory(subject: Subject) -> None:
    """With a proxy thread the target's application makes no call at all: it reads its memory, and there it is."""
    for progress in ("thread", "auto"):
        word = np.zeros(1, dtype=np.uint64)
        with World(subject, progress=progress) as world:
            route = world.route(0, 1, 1 << 18, home=word)
            for count in range(1, 21):
                length = world.random.randint(1, route.size)
                route.write(route.size - length, length)
                _see(route, word, count, f"progress {progress}")


def _see(route: Route, word: np.ndarray, count: int, when: str) -> None:
    deadline = time.monotonic() + route.world.subject.ample_s
    while word[0] < count:
        time.sleep(0.0001)
        if time.monotonic() > deadline:
            raise Violation(f"{when}: the target's count stayed at {word[0]}, {count} transfers were sent to it")
    route.look(when)


@check(1)
def between_processes(subject: Subject) -> None:
    """The same between processes: the target only looks at its memory while the source writes."""
    processes.run(subject, f"{__name__}:one_process")


STEPS, SIZE = 50, 1 << 18


def one_process(engine: Engine) -> None:
    """Rank 0 writes, rank 1 watches its memory. Step k is `SIZE` bytes of k, except for a gap that moves."""
    if engine.rank == 1:
        block, word = np.full(SIZE, 255, dtype=np.uint8), np.zeros(1, dtype=np.uint64)
        memory, signal = engine.register(block), engine.signal(0, "watched", home=word)
        engine.peer(0).send(memory.export(0), tag=1)
        engine.peer(0).send(signal.export(), tag=2)
        for step in range(1, STEPS + 1):
            deadline = time.monotonic() + engine.settings.timeout_s
            while word[0] < step:
                time.sleep(0.0001)
                require(time.monotonic() < deadline, f"step {step} never came, the count is {word[0]}")
            require(bool((block == step).all()), f"step {step}: the count is up and not all bytes are")
            engine.peer(0).send(b"", tag=3)
        require(word[0] == STEPS, f"the count ended at {word[0]}")
        return
    region = engine.peer(1).import_region(engine.recv(tag=1, peer=1)[1])
    remote = engine.peer(1).import_signal(engine.recv(tag=2, peer=1)[1])
    block = np.zeros(SIZE, dtype=np.uint8)
    memory = engine.register(block)
    for step in range(1, STEPS + 1):
        block[:] = step
        engine.peer(1).write(memory, region, SIZE, signal=remote).wait()
        engine.recv(tag=3, peer=1)
