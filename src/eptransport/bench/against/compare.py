"""The rounds: every side is asked every question once a round, in an order that moves on by one side a round.

The processes of the other sides sleep in a pipe meanwhile. A side that crashes, fails or doesn't answer in time is
ended, its reason is kept, and the others go on. Ratios are of figures of the same round, for the machine's speed moves
from round to round.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eptransport.bench import native
from eptransport.bench.against import FINDERS, bare, own
from eptransport.bench.against.side import LARGEST, MOST_BYTES, Absent, Find, Recipe, Side
from eptransport.bench.figures import Spread, percentile, spread
from eptransport.bench.processes import Processes, ProcessRank
from eptransport.errors import EptError, InternalError, InvalidArgument, PeerLost

__all__ = ["AgainstJob", "AgainstResult", "Figure", "SideFigures", "run"]

OPEN_S = 90.0
"""For a side to load its library and connect: torch alone takes seconds on a busy machine."""
ANSWER_S = 60.0
"""For one question: some 50 times what BUDGET_S lets it take."""
BUDGET_S = 0.8
"""For one question of one side: whoever is slower takes fewer turns, so that ten sides and five rounds end in some
minutes."""
PROBE_TURNS = 1_000
PROBE_PERCENT = 10
"""Which of the turns is told: one that no other process got into."""
LAST_WORDS = 200
SMALL_BYTES = 16 << 10
"""Larger ping-pongs have fewer turns, down to a tenth: they take longer, and spread less."""


@dataclass(frozen=True)
class AgainstJob:
    against: tuple[str, ...]
    backend: str = "tcp"
    latency_bytes: tuple[int, ...] = (8, 4 << 10, 64 << 10, 1 << 20)
    bandwidth_bytes: int = 1 << 20
    bandwidth_depth: int = 16
    stream_bytes: int = 256 << 20
    rate_bytes: int = 8
    rate_depth: int = 64
    rate_messages: int = 30_000
    post_bytes: int = 8
    iterations: int = 2_000
    """Turns of a ping-pong and posts, a round."""
    rounds: int = 5
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of our sides, beside those of the environment."""
    vary: tuple[str, tuple[str, ...]] | None = None
    """A setting by its name in the environment, and values of it: our native loop once more for each."""

    @property
    def depth(self) -> int:
        """Of the bandwidth run: what fits the buffers."""
        return min(self.bandwidth_depth, MOST_BYTES // self.bandwidth_bytes)

    @property
    def questions(self) -> list[Question]:
        turns = [
            max(1, self.iterations // 10, self.iterations * SMALL_BYTES // max(size, SMALL_BYTES))
            for size in self.latency_bytes
        ]
        return [
            *(Question("latency", size, count) for size, count in zip(self.latency_bytes, turns, strict=True)),
            Question(
                "bandwidth",
                self.bandwidth_bytes,
                max(self.depth, self.stream_bytes // self.bandwidth_bytes),
                self.depth,
            ),
            Question("rate", self.rate_bytes, self.rate_messages, self.rate_depth),
            Question("post", self.post_bytes, self.iterations),
        ]

    @property
    def units(self) -> int:
        """Of the progress bar."""
        return self.rounds * len(self.questions)


@dataclass(frozen=True)
class Question:
    kind: str
    bytes: int
    count: int
    depth: int = 1


@dataclass(frozen=True)
class Figure:
    """Latency and post in us, bandwidth in GB/s, rate in million a second, CPU (of both ranks) in seconds per GB."""

    kind: str
    bytes: int
    unit: str
    value: Spread
    ratio: float | None
    """Ours to it, the median of the rounds' ratios: of times and CPU below 1, of the others above 1, where ours is the
    better. Our native loops for what is driven by such, our Python API for what is driven from Python. None for
    ours."""


@dataclass(frozen=True)
class SideFigures:
    name: str
    how: str
    version: str
    python: bool
    figures: tuple[Figure, ...]
    failed: str | None
    """Why it has fewer rounds than the others."""


@dataclass(frozen=True)
class AgainstResult:
    job: AgainstJob
    backend: str
    regime_ns: tuple[float, ...]
    """One way between two cores through shared memory: before, and after each round."""
    sides: tuple[SideFigures, ...]
    """Ours first, then bare sockets, then the others in the order asked for."""
    skipped: dict[str, str]
    """Who could not be measured here, and why."""


def run(
    job: AgainstJob, progress: Callable[[int], None] | None = None, finders: Mapping[str, Find] | None = None
) -> AgainstResult:
    """Starts two processes a side, measures, and ends them. What our own sides raise is raised."""
    _check(job)
    finders = FINDERS if finders is None else finders
    skipped: dict[str, str] = {}
    sides: list[_Pair] = []
    with tempfile.TemporaryDirectory(prefix="eptransport-bench-") as folder:
        recipes = [*own.find(Path(folder), job.backend, job.options), *bare.find(Path(folder))]
        if job.vary is not None:
            recipes += own.variants(job.backend, job.options, *job.vary)
        ours = {recipe.name for recipe in recipes}
        for name in job.against:
            try:
                recipes += finders[name](Path(folder))
            except Absent as reason:
                skipped[name] = str(reason)
        try:
            for recipe in recipes:
                pair = _Pair(recipe, Path(folder) / f"{len(sides)}.stderr")
                sides.append(pair)
                if pair.failed is not None and recipe.name in ours:
                    raise pair.error()
                if pair.failed is not None:
                    skipped[recipe.name] = pair.failed
            regime = _rounds(job, [side for side in sides if side.failed is None], progress or (lambda done: None))
            for side in sides:
                if side.failed is not None and side.recipe.name in ours:
                    raise side.error()
        finally:
            for side in sides:
                side.close()
    measured = [side for side in sides if side.recipe.name not in skipped]
    return AgainstResult(job, job.backend, tuple(regime), _figures(job, measured), skipped)


def _check(job: AgainstJob) -> None:
    if job.backend == "loopback":
        raise InvalidArgument(
            "--against needs a process a rank, and loopback's ranks are threads; bench another backend"
        )
    sizes = (*job.latency_bytes, job.bandwidth_bytes, job.rate_bytes, job.post_bytes)
    if min(job.iterations, job.rounds, job.rate_messages, *sizes) < 1:
        raise InvalidArgument("iterations, rounds and sizes must be at least 1")
    # Ours and bare sockets alone: they have buffers for one such write and don't mind its size.
    largest = LARGEST if job.against else MOST_BYTES
    if max(sizes) > largest:
        raise InvalidArgument(f"{'--against' if job.against else 'this'} measures at most {largest} bytes a write")


class _Pair:
    """The two processes of a side, and what they have answered. One that failed is closed and asked no more."""

    def __init__(self, recipe: Recipe, said: Path) -> None:
        self.recipe = recipe
        self._said = said
        """What its processes print to stderr: some log much, and one that crashes may say why."""
        said.touch()
        self.version = recipe.version
        self.failed: str | None = None
        self.rounds: dict[Question, list[list[float]]] = {}
        self.cpu: dict[Question, list[float]] = {}
        """Seconds per GB, of both ranks."""
        self._error: EptError | None = None
        self._processes: Processes | None = None
        try:
            self._processes = Processes(functools.partial(_answer, recipe, str(said)), 2)
            self.version = self._processes.results(OPEN_S)[0]
        except EptError as error:
            self._fail(error, "could not be opened")

    def ask(self, question: Question) -> None:
        if self._processes is None or question.kind not in self.recipe.only:
            return
        try:
            self._processes.tell(question)
            answers = self._processes.results(ANSWER_S)
        except EptError as error:
            self._fail(error, f"in {question.kind} of {question.bytes} bytes")
            return
        values, _, count = answers[0]
        self.rounds.setdefault(question, []).append(_converted(question, count, values))
        if question.kind == "bandwidth":
            amount = question.bytes * count / 1e9
            self.cpu.setdefault(question, []).append(sum(cpu for _, cpu, _ in answers) / amount)

    def probe(self) -> float | None:
        if self._processes is None:
            return None
        self._processes.tell(Question("probe", 8, PROBE_TURNS))
        samples: list[float] = self._processes.results(ANSWER_S)[0][0]
        return samples[0]

    def error(self) -> EptError:
        return self._error or InternalError(f"{self.recipe.name} failed: {self.failed}", operation="bench")

    def _fail(self, error: EptError, when: str) -> None:
        lines = [line for line in error.message.splitlines() if line.strip()]
        # Of a traceback the last line says what it was.
        self.failed = f"{when}: {lines[-1].strip() if lines else type(error).__name__}"
        last_words = self._said.read_text(errors="replace").strip().splitlines()
        if isinstance(error, PeerLost) and last_words:
            self.failed += f"; its last words: {last_words[-1].strip()[:LAST_WORDS]}"
        self._error = error
        self.close()

    def close(self) -> None:
        if self._processes is not None:
            if self.failed is None:
                self._processes.tell(None)  # so that it closes in order; nobody waits for it long
            self._processes.close()
            self._processes = None


def _rounds(job: AgainstJob, sides: Sequence[_Pair], progress: Callable[[int], None]) -> list[float]:
    bare_pair = next(side for side in sides if side.recipe.name == bare.NAME)
    regime = [bare_pair.probe()]
    done = 0
    for turn in range(job.rounds):
        first = turn % len(sides)
        for question in job.questions:
            for side in (*sides[first:], *sides[:first]):
                side.ask(question)
            done += 1
            progress(done)
        regime.append(bare_pair.probe())
    return [ns for ns in regime if ns is not None]


# ---- in the two processes of a side ----------------------------------------------------------------------------------


def _answer(recipe: Recipe, said: str, rank: ProcessRank) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    os.environ.update(recipe.environment)
    side = recipe.open(rank)
    rank.pin()  # after the side is made: a library that counts the cores it may use finds them all
    rank.answer(", ".join(filter(None, (recipe.version, side.detail))))
    while (question := rank.told()) is not None:
        rank.answer(_measure(side, rank, question))
    side.close()


def _measure(side: Side, rank: ProcessRank, question: Question) -> tuple[list[float], float, int]:
    """This rank's values, its CPU seconds meanwhile, and how many turns or messages that was."""
    size, count = question.bytes, question.count
    if question.kind == "probe":
        samples = native.atomics_pingpong(rank.shared, rank.rank, count)
        return [percentile(samples, PROBE_PERCENT)], 0.0, count
    asked: dict[str, Callable[[int], Sequence[float] | None]] = {
        "latency": lambda count: side.latency(size, count),
        "bandwidth": lambda count: [side.stream(size, count, question.depth)],
        "rate": lambda count: [side.stream(size, count, question.depth)],
        "post": lambda count: side.posts(size, count),
    }
    timed = asked[question.kind]
    rank.barrier()
    warm = max(1, count // 10)
    start = time.monotonic()
    timed(warm)
    affordable = int(warm * BUDGET_S / (time.monotonic() - start + 1e-9))
    count = max(warm, min(count, *rank.gather(affordable)))
    rank.barrier()
    cpu = time.process_time()
    values = timed(count)
    cpu = time.process_time() - cpu
    return (list(values or []) if rank.rank == 0 else []), cpu, count


# ---- figures ---------------------------------------------------------------------------------------------------------


def _figures(job: AgainstJob, sides: Sequence[_Pair]) -> tuple[SideFigures, ...]:
    by_name = {side.recipe.name: _by_kind(job, side) for side in sides}
    found = []
    for side in sides:
        reference = by_name[own.PYTHON if side.recipe.python else own.NATIVE]
        mine = side.recipe.name in (own.PYTHON, own.NATIVE)
        figures = [
            Figure(kind, size, _UNITS[kind], value, None if mine else _ratio(reference.get((kind, size)), value))
            for (kind, size), value in by_name[side.recipe.name].items()
        ]
        found.append(
            SideFigures(
                side.recipe.name, side.recipe.how, side.version, side.recipe.python, tuple(figures), side.failed
            )
        )
    return tuple(found)


_UNITS = {"latency": "us", "bandwidth": "GB/s", "cpu": "s/GB", "rate": "M/s", "post": "us"}


def _by_kind(job: AgainstJob, side: _Pair) -> dict[tuple[str, int], Spread]:
    found: dict[tuple[str, int], Spread] = {}
    for question in job.questions:
        rounds = side.rounds.get(question)
        if not rounds or not rounds[0]:
            continue
        found[question.kind, question.bytes] = spread(rounds)
        if question.kind == "bandwidth":
            found["cpu", question.bytes] = spread([[value] for value in side.cpu[question]])
    return found


def _converted(question: Question, count: int, values: list[float]) -> list[float]:
    """Seconds of a stream into what is told of it."""
    if question.kind == "bandwidth":
        return [question.bytes * count / seconds / 1e9 for seconds in values]
    if question.kind == "rate":
        return [count / seconds / 1e6 for seconds in values]
    return values


def _ratio(ours: Spread | None, theirs: Spread) -> float | None:
    if ours is None:
        return None
    # A side that failed has fewer rounds: those it has are the first.
    pairs = zip(ours.rounds, theirs.rounds, strict=False)
    return statistics.median(a / b for a, b in pairs)
