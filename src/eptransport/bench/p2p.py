"""`eptransport bench p2p`: a write with a signal, beside what the machine does without us.

Ranks go in pairs (0 with 1, 2 with 3), all pairs at once, one core a rank as long as there are so many. Each round
runs the floor and then us, and each measure is the median of its rounds.

    latency     one way, half a round trip, one write in flight      floor: a spinning ping-pong over a bare TCP socket
    bandwidth   at most RING writes in flight                        floor: a blocking TCP stream of as many bytes
    rate        loopback: two engines of one process on one core     floor: copies with an atomic count

On loopback ranks are threads, and the floors are shared memory and copies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eptransport.bench import native
from eptransport.bench.figures import Spread, percentile, slowest, spread
from eptransport.bench.ranks import Mesh, Rank, run_job
from eptransport.errors import InvalidArgument

if TYPE_CHECKING:
    from eptransport import Group

__all__ = ["Measure", "P2pJob", "P2pResult", "run"]

RING = 4
"""Buffers in flight: enough to hide the answer, few enough to stay in a cache of some MiB."""
PROBE_TURNS = 1_000
PROBE_PERCENT = 10
"""Which of the turns is told: one that no other process got into."""
RATE_BATCH = 64


@dataclass(frozen=True)
class P2pJob:
    ranks: int = 2
    backend: str = "tcp"
    latency_bytes: tuple[int, ...] = (8, 7168)
    bandwidth_bytes: tuple[int, ...] = (1 << 20,)
    rate_bytes: int = 64
    iterations: int = 5_000
    """Turns of a ping-pong, a round."""
    stream_bytes: int = 256 << 20
    """Of a bandwidth run, a round."""
    rate_writes: int = 2_000_000
    rounds: int = 5
    options: dict[str, Any] = field(default_factory=dict)
    """Settings, beside those of the environment."""

    @property
    def threads(self) -> bool:
        return self.backend == "loopback"

    @property
    def units(self) -> int:
        """Of the progress bar."""
        return self.rounds * (len(self.latency_bytes) + len(self.bandwidth_bytes))

    def run(self, rank: Rank) -> _RankResult:
        return _measure(self, rank)


@dataclass(frozen=True)
class Measure:
    """One line of the table. Times in us, bandwidths in GB/s, rates in million a second; the slowest pair's."""

    kind: str
    bytes: int
    unit: str
    ours: Spread
    floor: Spread
    floor_name: str
    ratio: float
    """Ours to the floor: of times at least about 1, of the others at most about 1. The median of the rounds' ratios."""
    messages: float
    """Sent by rank 0 for one turn or write, as the rails counted."""
    wire_bytes: float
    cores: float
    """CPU time of all ranks to wall time, our side."""


@dataclass(frozen=True)
class P2pResult:
    job: P2pJob
    backend: str
    regime_ns: tuple[float, ...]
    """One way between two cores through shared memory: before, and after each round."""
    measures: tuple[Measure, ...]


def run(job: P2pJob, progress: Callable[[int], None] | None = None) -> P2pResult:
    """Starts the ranks, measures, and ends them. Not collective: they are its own."""
    if job.ranks < 2 or job.ranks % 2:
        raise InvalidArgument(f"ranks go in pairs: {job.ranks} is odd or less than 2")
    if min(job.iterations, job.rounds, *job.latency_bytes, *job.bandwidth_bytes) < 1:
        raise InvalidArgument("iterations, rounds and sizes must be at least 1")
    results = run_job(job, job.ranks, threads=job.threads, progress=progress)
    initiators = [result for result in results if result.side == 0]
    measures = []
    for index, first in enumerate(initiators[0].runs):
        measures.append(_combine(first, [result.runs[index] for result in initiators], results, index))
    if job.threads:
        measures.append(_rate(job))
    return P2pResult(job, results[0].backend, tuple(results[0].regime_ns), tuple(measures))


@dataclass
class _Side:
    rounds: list[Sequence[float]] = field(default_factory=list)
    cpu: float = 0.0
    wall: float = 0.0


@dataclass
class _Run:
    kind: str
    bytes: int
    floor_name: str
    ours: _Side = field(default_factory=_Side)
    floor: _Side = field(default_factory=_Side)
    messages: float = 0.0
    wire_bytes: float = 0.0


@dataclass
class _RankResult:
    side: int
    backend: str
    regime_ns: list[float]
    runs: list[_Run]


def _measure(job: P2pJob, rank: Rank) -> _RankResult:
    from eptransport import Settings

    mesh = None if job.threads else Mesh(rank)
    with rank.group(Settings(backend=job.backend, **job.options)) as group:
        rank.pin()  # after the group is made, which chooses how to wait by the cores it may use
        pair = _Pair(job, rank, group, mesh)
        runs = [_Run("latency", size, pair.latency_floor) for size in job.latency_bytes]
        runs += [_Run("bandwidth", size, pair.bandwidth_floor) for size in job.bandwidth_bytes]
        regime = [pair.probe()]
        done = 0
        for _ in range(job.rounds):
            for each in runs:
                pair.turn(each)
                done += 1
                rank.progress(done)
            regime.append(pair.probe())
        pair.pair.close()
        rank.barrier()
    return _RankResult(pair.side, group.backend, regime, runs)


class _Pair:
    """This rank and the one beside it."""

    def __init__(self, job: P2pJob, rank: Rank, group: Group, mesh: Mesh | None) -> None:
        self.job, self.rank, self.group = job, rank, group
        self.side = rank.rank % 2
        self.peer = rank.rank ^ 1
        self.fd = -1 if mesh is None else mesh.fds[self.peer]
        self.latency_floor = "shared memory" if mesh is None else "bare TCP ping-pong"
        self.bandwidth_floor = "copies" if mesh is None else "bare TCP stream"
        most = max(*job.latency_bytes, *(RING * size for size in job.bandwidth_bytes))
        self.buffer = native.Buffer(most)
        self.pair = native.Pair(_engine(group), self.peer, self.side, most)

    def probe(self) -> float:
        """The speed of the cores, by ranks 0 and 1 while the others wait."""
        self.rank.barrier()
        samples: Sequence[float] = (0.0,)
        if self.rank.rank < 2:
            samples = native.atomics_pingpong(self.rank.shared, self.side, PROBE_TURNS)
        self.rank.barrier()
        return percentile(samples, PROBE_PERCENT)

    def turn(self, run: _Run) -> None:
        """One round of one measure: the floor, then us."""
        count = self.job.iterations if run.kind == "latency" else max(RING, self.job.stream_bytes // run.bytes)
        warm = max(1, count // 10)
        floor, ours = (self._latency(run), self._our_latency(run)) if run.kind == "latency" else self._streams(run)
        sides = [(run.floor, floor), (run.ours, ours)]
        for side, timed in sides:
            self.rank.barrier()
            timed(warm)
            before = self._counters()
            self.rank.barrier()
            cpu, wall = self.rank.cpu_seconds(), time.monotonic()
            side.rounds.append(timed(count))
            side.cpu += self.rank.cpu_seconds() - cpu
            side.wall += time.monotonic() - wall
            if side is run.ours:
                after = self._counters()
                run.messages = (after[0] - before[0]) / count
                run.wire_bytes = (after[1] - before[1]) / count

    def _latency(self, run: _Run) -> Callable[[int], list[float]]:
        def timed(count: int) -> list[float]:
            if self.job.threads:
                samples = native.atomics_pingpong(self.rank.shared, self.side, count)
            else:
                samples = native.tcp_pingpong(self.fd, self.side, run.bytes, count)
            return [sample / 1e3 for sample in samples]

        return timed

    def _our_latency(self, run: _Run) -> Callable[[int], list[float]]:
        def timed(count: int) -> list[float]:
            return [sample / 1e3 for sample in self.pair.pingpong(run.bytes, count)]

        return timed

    def _streams(self, run: _Run) -> tuple[Callable[[int], list[float]], Callable[[int], list[float]]]:
        def floor(count: int) -> list[float]:
            if self.job.threads:
                seconds = native.copy_rate(run.bytes, count, RING) if self.side == 0 else 1.0
            else:
                seconds = native.tcp_stream(self.fd, self.side, self.buffer, run.bytes, count, RING)
            return [run.bytes * count / seconds / 1e9]

        def ours(count: int) -> list[float]:
            seconds = self.pair.stream(run.bytes, count, RING)
            return [run.bytes * count / seconds / 1e9]

        return floor, ours

    def _counters(self) -> tuple[int, int]:
        return sent(self.group)


def sent(group: Group) -> tuple[int, int]:
    """Messages and bytes that this rank has sent, over all rails."""
    counters = [counters for _, counters in group.engine.rails()]
    return sum(each.tx_operations for each in counters), sum(each.tx_bytes for each in counters)


def _engine(group: Group) -> int:
    """The address of the `ept_engine`, for the native loops."""
    from eptransport._call import ffi

    return int(ffi.cast("uintptr_t", group.engine.handle))


def _combine(first: _Run, initiators: list[_Run], results: list[_RankResult], index: int) -> Measure:
    latency = first.kind == "latency"

    def rounds(side: Callable[[_Run], _Side]) -> list[list[float]]:
        by_pair = [side(run).rounds for run in initiators]
        rounds = []
        for samples in zip(*by_pair, strict=True):
            rounds.append(slowest(samples) if latency else [min(values[0] for values in samples)])
        return rounds

    ours, floor = spread(rounds(lambda run: run.ours)), spread(rounds(lambda run: run.floor))
    runs = [result.runs[index] for result in results]
    return Measure(
        kind=first.kind,
        bytes=first.bytes,
        unit="us" if latency else "GB/s",
        ours=ours,
        floor=floor,
        floor_name=first.floor_name,
        ratio=statistics.median(a / b for a, b in zip(ours.rounds, floor.rounds, strict=True)),
        messages=first.messages,
        wire_bytes=first.wire_bytes,
        cores=sum(run.ours.cpu for run in runs) / max(run.ours.wall for run in runs),
    )


def _rate(job: P2pJob) -> Measure:
    """Small writes between two ranks that one thread drives: what a message costs without a network."""
    from eptransport import Settings, loopback_groups

    options = {**job.options, "progress": "inline"}
    groups = loopback_groups(2, Settings(backend="loopback", **options))
    try:
        sender, receiver = groups
        ours, floor = [], []
        cpu = wall = 0.0
        before = sent(sender)
        for _ in range(job.rounds):
            floor.append(job.rate_writes / native.copy_rate(job.rate_bytes, job.rate_writes, 64) / 1e6)
            start = time.process_time(), time.monotonic()
            seconds = native.engine_rate(
                _engine(sender), 0, _engine(receiver), 1, job.rate_bytes, job.rate_writes, RATE_BATCH
            )
            cpu += time.process_time() - start[0]
            wall += time.monotonic() - start[1]
            ours.append(job.rate_writes / seconds / 1e6)
        after = sent(sender)
    finally:
        for group in groups:
            group.close()
    writes = job.rounds * job.rate_writes
    return Measure(
        kind="rate",
        bytes=job.rate_bytes,
        unit="M/s",
        ours=spread([[value] for value in ours]),
        floor=spread([[value] for value in floor]),
        floor_name="copies",
        ratio=statistics.median(a / b for a, b in zip(ours, floor, strict=True)),
        messages=(after[0] - before[0]) / writes,
        wire_bytes=(after[1] - before[1]) / writes,
        cores=cpu / wall,
    )
