"""Several ranks in one process, and something to look at: engines over the backend under test, stepped by hand.

With progress "inline" nothing moves but by `World.step`, so a schedule is the same on every run and a check can look
between any two steps. With "thread" the ranks move by themselves and the checks only look.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from eptransport._closing import Closing
from eptransport.backends import Plugin, registry
from eptransport.conformance.registry import Skip, Violation, require
from eptransport.engine import Engine, Memory, PeerStatus, Region, RemoteSignal, Signal, Transfer
from eptransport.errors import Timeout
from eptransport.settings import Settings

GUARD = 256
"""Bytes on both sides of every exported region; nobody may write them."""
PATIENCE_S = 30.0
"""Of a check, for what must happen; of a subject that is known to be broken it may be shorter."""
QUIET_ROUNDS = 600
"""Steps of every rank in which nothing happened, after which nothing will: an adversary holds a step for 254 at
most."""
QUIET_S = 0.05
"""The same where ranks or the network move by themselves."""
PAUSE_S = 0.0002
"""Between two looks at a world that moves by itself, or where nothing has moved for QUIET_ROUNDS: what comes now comes
from outside this thread, which leaves it the core."""

Bytes = np.ndarray[Any, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """What is being tested: a backend with settings of its own."""

    plugin: Plugin
    options: Mapping[str, str] = field(default_factory=dict)
    label: str = ""
    seed: int = 1
    hostile: bool = False
    """It shows reordering, delays and partial bytes as much as it can."""
    across_processes: bool = True
    thorough: bool = False
    """Also what takes many seconds and is the same on every backend."""
    patience_s: float = PATIENCE_S
    """How long its ranks, once they are connected, may take to what must happen."""

    @property
    def ample_s(self) -> float:
        """The same for what a broken backend does too, and for processes to start: PATIENCE_S, or more on a machine
        that is said to be slow (`--patience`)."""
        return max(PATIENCE_S, self.patience_s)

    @property
    def slowness(self) -> float:
        """By what a machine that is said to be slow stretches times in which a rank must show life; 1 or more."""
        return self.ample_s / PATIENCE_S

    def having(self, **options: object) -> Subject:
        """The same with other settings of the backend; Skip where it has no such setting."""
        known = {setting.name for setting in self.plugin.settings}
        for name in options:
            if name not in known:
                raise Skip(f"backend {self.plugin.name} has no setting {name}")
        return replace(self, options={**self.options, **{name: str(value) for name, value in options.items()}})

    def settings(self, **overrides: Any) -> Settings:
        plugin = self.plugin
        options = {f"{plugin.name}.{key}": value for key, value in self.options.items()}
        backend = plugin.name if plugin.source == "built in" else plugin.path
        return Settings(backend=backend, options=options, **overrides)


Spec = tuple[str, str, dict[str, str], int, float]
"""A subject on its way to another process, where its plugin has to be opened anew."""


def spec_of(subject: Subject) -> Spec:
    return subject.plugin.name, subject.plugin.path, dict(subject.options), subject.seed, subject.patience_s


def subject_of(spec: Spec) -> Subject:
    name, path, options, seed, patience_s = spec
    return replace(subject(registry((path,)).plugins[name], options, seed), patience_s=patience_s)


def subject(plugin: Plugin, options: Mapping[str, str] | None = None, seed: int = 1) -> Subject:
    """A subject with what is known of the backend filled in."""
    chosen = dict(options or {})
    hostile = int(chosen.get("adversary", "0")) > 0 or bool(chosen.get("strict"))
    shown = {name: value.rpartition("/")[2] for name, value in chosen.items()}
    label = plugin.name + "".join(f"-{name}{value}" for name, value in shown.items())
    return Subject(plugin, chosen, label, seed, hostile, across_processes=plugin.name != "loopback")


_jobs = itertools.count()


class World(Closing):
    """`ranks` engines that are connected to each other. A context manager."""

    def __init__(self, subject: Subject, ranks: int = 2, *, progress: str = "inline", **settings: Any) -> None:
        self.subject = subject
        self.random = random.Random(subject.seed)
        self.inline = progress == "inline"
        settings.setdefault("timeout_s", subject.ample_s)
        self._job = f"conformance-{next(_jobs)}-{time.time_ns()}"
        self._ranks, self._settings = ranks, subject.settings(progress=progress, **settings)
        self.engines: list[Engine] = []
        self.lives = [0] * ranks
        """The epoch of each rank."""
        self.absent: set[int] = set()
        """Ranks that `step` leaves alone: their application does nothing and their engine does not poll."""
        try:
            for rank in range(ranks):
                self.engines.append(self.another(rank))
            addresses = [engine.address() for engine in self.engines]
            for engine in self.engines:
                engine.connect(addresses)
            self.until(self._connected, "every rank is connected to every other", subject.ample_s)
        except BaseException:
            self.close()
            raise

    def another(self, rank: int, epoch: int = 0) -> Engine:
        """An engine that is `rank` in its life `epoch`, connected to nobody."""
        self.lives[rank] = epoch
        return Engine(
            self.subject.plugin,
            rank=rank,
            world_size=self._ranks,
            job=self._job,
            secret=b"the secret of a conformance run.",
            settings=self._settings,
            epoch=epoch,
        )

    def _connected(self) -> bool:
        ranks = range(len(self.engines))
        return all(
            engine.peer(rank).info.status == PeerStatus.UP
            for engine in self.engines
            for rank in ranks
            if rank != engine.rank
        )

    def step(self, rounds: int = 1) -> int:
        """Moves every rank on, `rounds` times; the number of events that brought."""
        moved = 0
        for _ in range(rounds):
            for engine in self.engines:
                if engine.rank not in self.absent:
                    moved += engine.progress()
        return moved

    def until(self, condition: Callable[[], bool], what: str, patience_s: float | None = None) -> None:
        """Moves the world on until the condition holds. Violation if it never does."""
        patience_s = patience_s or self.subject.patience_s
        deadline = time.monotonic() + patience_s
        quiet = 0
        while not condition():
            moved = self.step() if self.inline else 0
            quiet = 0 if moved else quiet + 1
            if not self.inline or quiet > QUIET_ROUNDS:
                time.sleep(PAUSE_S)
            if not moved and time.monotonic() > deadline:
                raise Violation(f"it never happened in {patience_s:g} s that {what}")

    def post(self, one: Callable[[], T]) -> T:
        """What `one` (a post with timeout=0) gives; moves the world on while there is no room."""
        patience_s = self.subject.patience_s
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return one()
            except Timeout:
                if time.monotonic() > deadline:
                    raise Violation(f"there was no room for a transfer in {patience_s:g} s") from None
            if self.inline:
                self.step()

    def settle(self, transfers: Iterable[Transfer] = ()) -> None:
        """Until all is quiet: these transfers have ended, and nothing has moved for as long as anything is ever
        held."""
        waiting = list(transfers)
        number = len(waiting)

        def ended() -> bool:
            while waiting and waiting[-1].done:
                waiting.pop()
            return not waiting

        self.until(ended, f"{number} transfers have ended")
        rounds = QUIET_ROUNDS if self.subject.hostile else 50
        length = QUIET_S if self.subject.across_processes or not self.inline else 0
        quiet, since = 0, time.monotonic()
        while quiet < rounds or time.monotonic() - since < length:
            if self.inline and self.step():
                quiet, since = 0, time.monotonic()
            quiet += 1
            if not self.inline or quiet > rounds:
                time.sleep(PAUSE_S)

    def route(self, source: int, target: int, size: int, *, label: str = "", home: Any = None) -> Route:
        return Route(self, source, target, size, label=label, home=home)

    def bytes(self, count: int) -> Bytes:
        """Bytes that differ from one another and from all others drawn before."""
        drawn: Bytes = np.frombuffer(self.random.randbytes(count), dtype=np.uint8).copy()
        return drawn

    def close(self) -> None:
        """All at once: a farewell may have to be read by a peer that closes too."""
        threads = [threading.Thread(target=engine.close, args=(2.0,)) for engine in self.engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Route:
    """Memory at `source`, a region of `size` bytes at `target` with guards around it, and a signal there.

    The whole block is registered, guards included, and only its middle exported: so a write past the region would not
    be stopped by the registration's own bounds."""

    def __init__(self, world: World, source: int, target: int, size: int, *, label: str = "", home: Any = None) -> None:
        self.world, self.size = world, size
        self.sender, self.receiver = world.engines[source], world.engines[target]
        self.peer = self.sender.peer(target)
        self.source = world.bytes(size)
        self.block = world.bytes(size + 2 * GUARD)
        self.target = self.block[GUARD : GUARD + size]
        self.expected = self.block.copy()
        self.source_memory: Memory = self.sender.register(self.source)
        self.memory: Memory = self.receiver.register(self.block)
        self.blob = self.memory.export(source, GUARD, size)
        self.region: Region = self.peer.import_region(self.blob)
        self.label = label or f"route from {source} to {target}"
        self.signal: Signal = self.receiver.signal(source, self.label, home)
        self.remote: RemoteSignal = self.peer.import_signal(self.signal.export())

    def write(self, offset: int, length: int, *, signal: bool = True, timeout: float | None = None) -> Transfer:
        """From `offset` of the source to `offset` of the region, and says so to `expected`. Moves the world on while
        there is no room, unless a timeout is given."""

        def one() -> Transfer:
            return self.peer.write(
                self.source_memory if length else None,
                self.region if length else None,
                length,
                source_offset=offset,
                destination_offset=offset,
                signal=self.remote if signal else None,
                timeout=timeout or 0,
            )

        transfer = self.world.post(one) if timeout is None else one()
        self.expect(offset, length)
        return transfer

    def write_pages(self, page_bytes: int, pages: list[int], *, signal: RemoteSignal | None = None) -> Transfer:
        """The same pages of the source and of the region; `signal` instead of the route's own."""
        transfer = self.world.post(
            lambda: self.peer.write_paged(
                self.source_memory, self.region, page_bytes, pages, pages, signal=signal or self.remote, timeout=0
            )
        )
        for page in pages:
            self.expect(page_bytes * page, page_bytes)
        return transfer

    def expect(self, offset: int, length: int) -> None:
        self.expected[GUARD + offset : GUARD + offset + length] = self.source[offset : offset + length]

    def there(self, offset: int, length: int) -> bool:
        """All of these bytes can be read at the target."""
        return bool((self.target[offset : offset + length] == self.source[offset : offset + length]).all())

    def look(self, when: str) -> None:
        """The whole block, guards included, is as expected."""
        wrong = np.flatnonzero(self.block != self.expected)
        if len(wrong):
            first = int(wrong[0])
            where = "in a guard" if not GUARD <= first < GUARD + self.size else f"at offset {first - GUARD}"
            raise Violation(
                f"{when}: {len(wrong)} bytes of the block at rank {self.receiver.rank} differ from what was written, "
                f"the first {where}: {self.block[first]} instead of {self.expected[first]}"
            )

    def reached(self, count: int) -> Callable[[], bool]:
        """To be waited for: the signal has come to `count`."""
        return lambda: self.signal.value >= count

    def counted(self, count: int, when: str) -> None:
        require(self.signal.value == count, f"{when}: the signal is {self.signal.value}, not {count}")


def slots(world: World, size: int, count: int, most: int) -> list[tuple[int, int]]:
    """`count` ranges (offset, length) of [0, size) that don't touch, of mixed lengths up to `most`, shuffled."""
    room = size // count
    ranges = []
    for index in range(count):
        length = min(
            world.random.choice((1, 3, 8, 100, 1000, room, room // 2, world.random.randint(1, room))), room, most
        )
        ranges.append((index * room + world.random.randint(0, room - length), length))
    world.random.shuffle(ranges)
    return ranges


@contextmanager
def warnings(lines: list[str]) -> Iterator[None]:
    """Collects what the logger `eptransport` warns of, as text. Nobody else gets it: whoever keeps a record keeps the
    error in it, its traceback, and through the frames even a transfer that is waiting to be dropped."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("eptransport")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


def raises(kind: type[BaseException], body: Callable[[], object], what: str) -> Any:
    """The error that `body` must raise."""
    try:
        body()
    except kind as error:
        return error
    except Exception as error:
        raise Violation(f"{what} raised {type(error).__name__} ({error}), not {kind.__name__}") from error
    raise Violation(f"{what} raised nothing; {kind.__name__} was due")
