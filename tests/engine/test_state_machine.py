# SPDX-License-Identifier: Apache-2.0
"""Engines under the adversary and the plain model, side by side, step by step.

Hypothesis draws the schedule's seed and what the applications do; nothing moves but by the steps that it draws. After
every step the model is asked whether what can be seen is allowed, and when all is quiet whether everything is there.
What differs is shrunk to a few steps and printed with its seed.

`HYPOTHESIS_PROFILE=long` runs for an hour; without it the run is bounded for `make test`.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from engine_model import Bytes, Fate, Memory, Model, Region, Signal, Transfer
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eptransport import engine as ept
from eptransport.backends import registry
from eptransport.conformance.world import GUARD, World, subject
from eptransport.errors import AccessDenied, InvalidArgument, Timeout, TransportError

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
SOURCE_BYTES = 1 << 15
MOST_MEMORIES, MOST_REGIONS, MOST_SIGNALS = 6, 12, 12
PATIENCE_S = 20.0

# Drawn as fractions, so that a shorter example keeps its meaning when a memory shrinks.
part = st.integers(0, 1000)
ranks = st.integers(0, 2)


def at(fraction: int, most: int) -> int:
    return fraction * most // 1000


@dataclass(eq=False)
class Block:
    """Memory that peers may write, with guards around it."""

    model: Memory
    handle: ept.Memory
    block: Bytes
    closed: bool = False


@dataclass(eq=False)
class Target:
    model: Region
    handle: ept.Region
    block: Block


@dataclass(eq=False)
class Counter:
    model: Signal
    handle: ept.Signal
    remote: ept.RemoteSignal


@dataclass(eq=False)
class Posted:
    """A transfer of the library's: one or more of the model's."""

    handle: ept.Transfer
    rank: int
    transfers: list[Transfer]
    told: bool = False

    @property
    def reads_until_done(self) -> bool:
        """Each of its operations has bytes to read. One of no bytes, or the descriptor of 14 pieces and more, may be
        the last that ends, when nothing reads from the source any more."""
        return all(0 < len(transfer.writes) < 14 for transfer in self.transfers)


class Engines(RuleBasedStateMachine):
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.blocks: list[Block] = []
        self.targets: list[Target] = []
        self.counters: list[Counter] = []
        self.posted: list[Posted] = []
        self.started = False

    # ---- the beginning

    @initialize(
        seed=st.integers(1, 2**31),
        size=st.integers(2, 3),
        credits=st.sampled_from((None, 128, 200)),
        delay=st.sampled_from((16, 0, 4, 60)),
        chunks=st.sampled_from((8, 1, 3, 64)),
        early=st.sampled_from((300, 0, 1000)),
        later=st.sampled_from((100, 0, 500)),
        fails=st.sampled_from((0, 0, 0, 50)),
        stripe=st.sampled_from((None, 4096)),
    )
    def begin(
        self,
        seed: int,
        size: int,
        credits: int | None,
        delay: int,
        chunks: int,
        early: int,
        later: int,
        fails: int,
        stripe: int | None,
    ) -> None:
        options = {
            "adversary": seed,
            "delay": delay,
            "chunks": chunks,
            "early_permille": early,
            "later_permille": later,
            "fail_permille": fails,
            "max_message": 4096,
        }
        under = subject(registry(()).plugins["loopback"], {name: str(value) for name, value in options.items()}, seed)
        self.world = World(under, size, timeout_s=PATIENCE_S, credits=credits, stripe_bytes=stripe)
        self.started = True
        self.random = random.Random(seed)
        self.model.flaky = fails > 0
        self.sources = [self.world.bytes(SOURCE_BYTES) for _ in range(size)]
        self.source_memories = [
            engine.register(source) for engine, source in zip(self.world.engines, self.sources, strict=True)
        ]
        for rank in range(size):  # so that the first writes need no luck
            self.add_memory(rank, 300)
            self.add_region(len(self.blocks) - 1, 0, 0, 1000)
            self.add_signal(rank, 0)

    # ---- set-up

    def _rank(self, number: int) -> int:
        return number % len(self.world.engines)

    def _other(self, rank: int, number: int) -> int:
        """Some rank that isn't `rank`."""
        others = [other for other in range(len(self.world.engines)) if other != rank]
        return others[number % len(others)]

    @precondition(lambda self: len(self.blocks) < MOST_MEMORIES)
    @rule(rank=ranks, size=part)
    def add_memory(self, rank: int, size: int) -> None:
        rank = self._rank(rank)
        block = self.world.bytes(1 + at(size, 1 << 14) + 2 * GUARD)
        name = f"memory {len(self.blocks)} of rank {rank}"
        model = self.model.memory(name, rank, lambda: block)
        self.blocks.append(Block(model, self.world.engines[rank].register(block), block))

    @precondition(lambda self: len(self.targets) < MOST_REGIONS)
    @rule(block=st.integers(0, MOST_MEMORIES), writer=ranks, offset=part, length=part)
    def add_region(self, block: int, writer: int, offset: int, length: int) -> None:
        chosen = self.blocks[block % len(self.blocks)]
        if chosen.closed:
            return
        rank = chosen.model.rank
        writer = self._other(rank, writer)
        room = len(chosen.block) - 2 * GUARD
        start = at(offset, room - 1)
        count = 1 + at(length, room - start - 1)
        blob = chosen.handle.export(writer, GUARD + start, count)
        handle = self.world.engines[writer].peer(rank).import_region(blob)
        self.targets.append(Target(self.model.region(chosen.model, writer, GUARD + start, count), handle, chosen))

    @precondition(lambda self: len(self.counters) < MOST_SIGNALS)
    @rule(rank=ranks, source=ranks)
    def add_signal(self, rank: int, source: int) -> None:
        rank = self._rank(rank)
        source = self._other(rank, source)
        name = f"signal {len(self.counters)} of rank {rank}"
        handle = self.world.engines[rank].signal(source, name)
        remote = self.world.engines[source].peer(rank).import_signal(handle.export())
        self.counters.append(Counter(self.model.signal(name, rank, source), handle, remote))

    # ---- transfers

    def _target(self, number: int) -> Target:
        return self.targets[number % len(self.targets)]

    def _signal(self, number: int | None, rank: int, source: int) -> Counter | None:
        fitting = [each for each in self.counters if (each.model.rank, each.model.source) == (rank, source)]
        return None if number is None or not fitting else fitting[number % len(fitting)]

    def _post(self, rank: int, post: Callable[[], ept.Transfer], record: Callable[[], list[Transfer]]) -> None:
        for _ in range(50):
            try:
                handle = post()
            except Timeout:
                self.world.step()
                continue
            except AccessDenied:
                # The engine may know already that the region was taken back.
                assert any(transfer.fate is Fate.REFUSED for transfer in record()), "a good region was refused"
                for counter in self.counters:
                    counter.model.transfers = [
                        each for each in counter.model.transfers if each.fate is not Fate.REFUSED
                    ]
                return
            self.posted.append(Posted(handle, rank, record()))
            return

    @precondition(lambda self: self.targets)
    @rule(
        into=st.integers(0, MOST_REGIONS),
        origin=part,
        offset=part,
        length=part,
        signal=st.none() | st.integers(0, MOST_SIGNALS),
    )
    def write(self, into: int, origin: int, offset: int, length: int, signal: int | None) -> None:
        chosen = self._target(into)
        region = chosen.model
        rank, peer = region.writer, region.memory.rank
        start = at(offset, region.length)
        count = at(length, region.length - start)
        source = at(origin, SOURCE_BYTES - count)
        counter = self._signal(signal, peer, rank)

        def post() -> ept.Transfer:
            return (
                self.world.engines[rank]
                .peer(peer)
                .write(
                    self.source_memories[rank],
                    chosen.handle,
                    count,
                    source_offset=source,
                    destination_offset=start,
                    signal=counter and counter.remote,
                    timeout=0,
                )
            )

        def record() -> list[Transfer]:
            data = self.sources[rank][source : source + count].copy()
            return [self.model.post(region, counter and counter.model, [(start, data)])]

        self._post(rank, post, record)

    @precondition(lambda self: self.targets)
    @rule(
        into=st.integers(0, MOST_REGIONS),
        page=st.sampled_from((1, 8, 64, 500)),
        pages=st.sampled_from((1, 0, 2, 3, 13, 14, 15, 16, 17, 100, 1000, 3000)),
        dense=st.booleans(),
        draw=st.integers(0, 2**31),
        signal=st.none() | st.integers(0, MOST_SIGNALS),
    )
    def write_paged(self, into: int, page: int, pages: int, dense: bool, draw: int, signal: int | None) -> None:
        chosen = self._target(into)
        region = chosen.model
        rank, peer = region.writer, region.memory.rank
        room = region.length // page
        pages = min(pages, room)
        drawn = random.Random(draw)
        first = drawn.randint(0, room - pages) if room else 0
        places = list(range(first, first + pages)) if dense else drawn.sample(range(room), pages)
        begin = drawn.randint(0, SOURCE_BYTES // page - pages)
        origins = list(range(begin, begin + pages)) if dense else drawn.choices(range(SOURCE_BYTES // page), k=pages)
        counter = self._signal(signal, peer, rank)

        def post() -> ept.Transfer:
            return (
                self.world.engines[rank]
                .peer(peer)
                .write_paged(
                    self.source_memories[rank],
                    chosen.handle,
                    page,
                    origins,
                    places,
                    signal=counter and counter.remote,
                    timeout=0,
                )
            )

        def record() -> list[Transfer]:
            source = self.sources[rank]
            pieces = [
                (page * place, source[page * origin : page * origin + page].copy())
                for origin, place in zip(origins, places, strict=True)
            ]
            return [self.model.post(region, counter and counter.model, pieces)]

        self._post(rank, post, record)

    @precondition(lambda self: self.targets)
    @rule(
        rank=ranks,
        parts=st.lists(
            st.tuples(st.integers(0, MOST_REGIONS), part, part, st.none() | st.integers(0, MOST_SIGNALS)),
            min_size=1,
            max_size=6,
        ),
    )
    def scatter(self, rank: int, parts: list[tuple[int, int, int, int | None]]) -> None:
        rank = self._rank(rank)
        mine = [each for each in self.targets if each.model.writer == rank]
        if not mine:
            return
        writes, records = [], []
        for number, offset, length, signal in parts:
            chosen = mine[number % len(mine)]
            region = chosen.model
            start = at(offset, region.length)
            count = at(length, region.length - start)
            counter = self._signal(signal, region.memory.rank, rank)
            data = self.sources[rank][start : start + count].copy()
            writes.append(
                ept.Write(
                    region.memory.rank,
                    self.source_memories[rank],
                    chosen.handle,
                    count,
                    start,
                    start,
                    counter and counter.remote,
                )
            )
            records.append((region, counter and counter.model, [(start, data)]))
        refused = [each for each in records if each[0].revoked and len(each[2][0][1])]
        if refused:  # all or none is taken: an engine that knows of the revoke takes none, so what is due is open
            writes, records = writes[:1], records[:1]
        self._post(
            rank,
            lambda: self.world.engines[rank].scatter(writes, timeout=0),
            lambda: [self.model.post(*each) for each in records],
        )

    @rule(rank=ranks, to=ranks, tag=st.integers(0, 2), length=st.sampled_from((0, 1, 30, 4000)))
    def send(self, rank: int, to: int, tag: int, length: int) -> None:
        rank = self._rank(rank)
        to = self._other(rank, to)
        data = self.random.randbytes(length)
        try:
            self.world.engines[rank].peer(to).send(data, tag, timeout=0)
        except Timeout:
            return
        self.model.send(to, tag, rank, data)

    @rule(rank=ranks, tag=st.integers(0, 2))
    def receive(self, rank: int, tag: int) -> None:
        self._receive(self._rank(rank), tag)

    def _receive(self, rank: int, tag: int) -> bool:
        try:
            sender, data = self.world.engines[rank].recv(tag, timeout=0)
        except Timeout:
            return False
        inbox = self.model.inboxes.get((rank, tag))
        assert inbox is not None, f"rank {rank} got a message of tag {tag} that nobody sent"
        inbox.take(sender, data)
        return True

    # ---- time

    @rule(rounds=st.sampled_from((1, 2, 5, 20)))
    def run_all(self, rounds: int) -> None:
        self.world.step(rounds)

    @rule(rank=ranks, rounds=st.sampled_from((1, 3, 30)))
    def run_one(self, rank: int, rounds: int) -> None:
        for _ in range(rounds):
            self.world.engines[self._rank(rank)].progress()

    @rule(rank=ranks)
    def reuse_source(self, rank: int) -> None:
        """Local completion says that a source may be reused."""
        rank = self._rank(rank)
        if all(each.handle.done for each in self.posted if each.rank == rank):
            self.sources[rank][:] = self.world.bytes(SOURCE_BYTES)

    @rule()
    def settle(self) -> None:
        self.world.settle(each.handle for each in self.posted)
        for _ in range(3):  # a full mailbox held messages back
            while any(self._receive(rank, tag) for rank in range(len(self.world.engines)) for tag in range(3)):
                pass
            self.world.settle()
        for inbox in self.model.inboxes.values():
            inbox.empty()
        self._tell()
        self.posted.clear()
        self.model.look(self._value, quiet=True)

    def _tell(self) -> None:
        """Tells the model how transfers ended, as their poster was told."""
        for each in self.posted:
            if each.told or not each.handle.done:
                continue
            each.told = True
            failed = False
            try:
                each.handle.wait(timeout=0)
            except AccessDenied:
                failed = True
                assert any(transfer.fate in (Fate.REFUSED, Fate.CUT) for transfer in each.transfers), "refused"
            except TransportError:
                failed = True
                assert self.model.flaky, "a write failed on a network that fails none"
            if len(each.transfers) == 1:
                each.transfers[0].ended(failed)
            elif failed:  # some of a scatter; which, the poster isn't told
                for transfer in each.transfers:
                    if transfer.fate is Fate.DOUBTFUL:
                        transfer.fate = Fate.CUT
                        for write in transfer.writes:
                            write.failed = True
            else:
                for transfer in each.transfers:
                    transfer.ended(False)

    # ---- taking back

    @precondition(lambda self: self.blocks)
    @rule(block=st.integers(0, MOST_MEMORIES), rank=ranks)
    def revoke(self, block: int, rank: int) -> None:
        chosen = self.blocks[block % len(self.blocks)]
        if chosen.closed:
            return
        rank = self._other(chosen.model.rank, rank)
        self._tell()
        chosen.handle.revoke(rank)
        self._cut(chosen, rank)

    @precondition(lambda self: self.blocks)
    @rule(block=st.integers(0, MOST_MEMORIES))
    def quiesce_remote(self, block: int) -> None:
        chosen = self.blocks[block % len(self.blocks)]
        if chosen.closed:
            return
        engine = self.world.engines[chosen.model.rank]
        self._tell()
        self._with_others(engine.rank, lambda: engine.quiesce(chosen.handle, "remote", PATIENCE_S))
        self._cut(chosen, None)

    @rule(rank=ranks)
    def quiesce_local(self, rank: int) -> None:
        rank = self._rank(rank)
        self._with_others(rank, lambda: self.world.engines[rank].quiesce(None, "local", PATIENCE_S))
        assert all(each.handle.done for each in self.posted if each.rank == rank), "not all had ended"

    @precondition(lambda self: self.blocks)
    @rule(block=st.integers(0, MOST_MEMORIES))
    def close_memory(self, block: int) -> None:
        chosen = self.blocks[block % len(self.blocks)]
        if chosen.closed:
            return
        self._tell()
        chosen.handle.close()
        chosen.closed = True
        self._cut(chosen, None)

    @rule(rank=ranks)
    def close_source(self, rank: int) -> None:
        rank = self._rank(rank)
        under_way = any(not each.handle.done for each in self.posted if each.rank == rank)
        try:
            self.source_memories[rank].close()
        except InvalidArgument:
            assert under_way, "nothing reads from it and it could not be closed"
            return
        still_read = (each for each in self.posted if each.rank == rank and each.reads_until_done)
        assert not under_way or all(each.handle.done for each in still_read), "a transfer still reads from it"
        self.source_memories[rank] = self.world.engines[rank].register(self.sources[rank])

    @precondition(lambda self: len(self.targets) > 3)
    @rule(into=st.integers(0, MOST_REGIONS))
    def drop_region(self, into: int) -> None:
        chosen = self._target(into)
        # Asked before: to ask moves the engine on, and may itself end what kept the region.
        under_way = any(not each.handle.done for each in self.posted)
        try:
            chosen.handle.close()
        except InvalidArgument:
            assert under_way, "no transfer names the region, and it is kept"
            return
        self.targets.remove(chosen)

    def _cut(self, chosen: Block, rank: int | None) -> None:
        under_way = [transfer for each in self.posted if not each.told for transfer in each.transfers]
        self.model.revoke(chosen.model, rank, under_way)

    def _with_others(self, rank: int, wait: Callable[[], None]) -> None:
        """A wait of one rank, while the others are moved on."""
        errors: list[BaseException] = []

        def call() -> None:
            try:
                wait()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        deadline = time.monotonic() + 2 * PATIENCE_S
        while thread.is_alive() and time.monotonic() < deadline:
            for engine in self.world.engines:
                if engine.rank != rank:
                    engine.progress()
            time.sleep(0)
        thread.join(1)
        assert not thread.is_alive(), "a wait did not end at its deadline"
        if errors:
            raise errors[0]

    # ---- what may be seen

    def _value(self, signal: Signal) -> int:
        for counter in self.counters:
            if counter.model is signal:
                return counter.handle.value
        raise AssertionError(signal.name)

    @invariant()
    def look(self) -> None:
        if self.started:
            self.model.look(self._value, quiet=False)

    def teardown(self) -> None:
        if not self.started:
            return
        try:
            self.settle()
            unknown = sum(engine.info().unknown_chans for engine in self.world.engines)
            assert not unknown, f"{unknown} immediates came for signals that nobody holds"
        finally:
            self.world.close()


Engines.TestCase.settings = settings(
    max_examples=20_000 if LONG else 60,
    stateful_step_count=120 if LONG else 40,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
# Shrinking a failure takes minutes: a timeout that cuts it off would hide what it found.
TestEngines = pytest.mark.timeout(0 if LONG else 1200)(Engines.TestCase)
