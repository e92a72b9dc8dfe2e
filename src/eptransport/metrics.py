"""What engines count: read from the pages that they keep in shared memory (native/include/eptransport/metrics.h).

    group.metrics()                  # of this rank
    for page in pages(): ...         # of every rank of this user on this machine, from any process

Values of one reading were not taken at one instant: what happens meanwhile is in some of them and not in others.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from eptransport._call import ffi, lib, text
from eptransport.info import PeerStatus

__all__ = [
    "FOLDER",
    "PHASES",
    "Histogram",
    "Metrics",
    "PeerMetrics",
    "PhaseMetrics",
    "RailMetrics",
    "WaitFor",
    "bucket_bounds_ns",
    "pages",
    "read_page",
    "wait_matrix",
]

FOLDER = "/dev/shm"
PREFIX = "eptransport-"
PHASES = ("dispatch", "combine", "late weights", "transfer")
MAGIC = 0x315352544D545045
"""EPT_METRICS_MAGIC, which cffi's reader of headers passes over since it is no decimal number."""


@dataclass(frozen=True)
class Histogram:
    """Times. `buckets[b]` counts those above 2^(b-1) ns and up to 2^b ns; the first one also 0, the last one all that
    are longer."""

    count: int
    total_s: float
    max_s: float
    buckets: tuple[int, ...]

    def quantile(self, part: float) -> float:
        """A bound of that quantile in s, less than twice too large: the end of its bucket, or the maximum."""
        seen = 0
        for end, count in zip(bucket_bounds_ns(), self.buckets, strict=True):
            seen += count
            if count and seen >= part * self.count:
                return min(end / 1e9, self.max_s)
        return self.max_s


@dataclass(frozen=True)
class WaitFor:
    """One cell of the wait matrix: how long `rank` stood still for `peer` in `phase`."""

    rank: int
    peer: int
    phase: str
    count: int
    total_s: float
    max_s: float
    now_s: float
    """How long a wait goes on that has not ended; 0: there is none."""


@dataclass(frozen=True)
class PhaseMetrics:
    """One peer in one phase. `transfer` (the point-to-point interface) has waits alone."""

    phase: str
    tx_bytes: int
    tx_messages: int
    tx_rows: int
    rx_bytes: int
    rx_messages: int
    rx_rows: int
    tx_later: int
    """Times that a message found the queue to the peer full."""
    tx_grants: int
    tx_acks: int
    waiting_since_ns: int
    """CLOCK_MONOTONIC; 0: no call waits for this peer now."""
    waiting_expected: int
    waiting_seen: int
    waits: Histogram
    arrivals: Histogram
    """From the begin of a call here until the peer's first message was here."""


@dataclass(frozen=True)
class PeerMetrics:
    """One peer: all that went to it and came from it, and how it stands."""

    rank: int
    tx_bytes: int
    """Payload of writes."""
    tx_operations: int
    """Writes and signals, credits' grants included."""
    rx_bytes: int
    rx_operations: int
    tx_sends: int
    """Small messages."""
    rx_sends: int
    later: int
    """Times that the backend had no room."""
    retries: int
    """Posts of what it had had no room for."""
    held: int
    """Writes that were queued for want of credits or room."""
    refused: int
    """Calls that were told to come later, since that queue was full."""
    failed: int
    credits_spent: int
    credits_granted: int
    status: PeerStatus
    epoch: int
    credits: int
    queued: int
    in_flight: int
    last_sign_ns: int
    """CLOCK_MONOTONIC of its last sign of life."""
    completions: Histogram
    """From the post of an operation to its local completion."""
    phases: tuple[PhaseMetrics, ...]

    def phase(self, name: str) -> PhaseMetrics:
        return self.phases[PHASES.index(name)]


@dataclass(frozen=True)
class RailMetrics:
    """One rail, as its backend counts."""

    name: str
    bits_per_s: int
    tx_bytes: int
    tx_operations: int
    rx_bytes: int
    rx_operations: int
    tx_sends: int
    rx_sends: int
    later: int
    errors: int
    reconnects: int
    replayed: int


@dataclass(frozen=True)
class Metrics:
    """One engine: a rank of a group."""

    pid: int
    rank: int
    world: int
    epoch: int
    job: str
    backend: str
    opened_ns: int
    updated_ns: int
    """When gauges and rails were last copied in; all else is counted where it happens."""
    read_ns: int
    registered_bytes: int
    regions: int
    signals: int
    credits: int
    suspended: bool
    unknown_chans: int
    last_progress_ns: int
    expired_waits: int
    rails: tuple[RailMetrics, ...]
    peers: tuple[PeerMetrics, ...]
    """By rank, without this one."""

    @property
    def group(self) -> str:
        """The group's name, without what tells its generations apart."""
        return self.job.rsplit("/", 2)[0]

    @cached_property
    def by_rank(self) -> dict[int, PeerMetrics]:
        return {peer.rank: peer for peer in self.peers}

    def waits(self) -> list[WaitFor]:
        """This rank's row of the wait matrix: cells with a wait that ended or goes on."""
        return [
            WaitFor(
                self.rank,
                peer.rank,
                seen.phase,
                seen.waits.count,
                seen.waits.total_s,
                seen.waits.max_s,
                max(0, self.read_ns - seen.waiting_since_ns) / 1e9 if seen.waiting_since_ns else 0.0,
            )
            for peer in self.peers
            for seen in peer.phases
            if seen.waits.count or seen.waiting_since_ns
        ]


def bucket_bounds_ns() -> list[int]:
    """The upper bound of each bucket, itself in it; the last bucket has none."""
    return [1 << bucket for bucket in range(lib.EPT_METRICS_BUCKETS)]


def wait_matrix(metrics: list[Metrics]) -> list[WaitFor]:
    """Who waits for whom, over all ranks of `metrics`; the longest total first."""
    return sorted((cell for one in metrics for cell in one.waits()), key=lambda cell: -cell.total_s)


def pages(folder: str = FOLDER) -> list[Metrics]:
    """What every living engine of this user on this machine counts now, by job and rank. Pages that dead processes left
    are removed. Doesn't disturb those that are read."""
    found = []
    prefix = f"{PREFIX}{os.getuid()}-"
    try:
        names = sorted(name for name in os.listdir(folder) if name.startswith(prefix))
    except OSError:
        return []
    for name in names:
        metrics = _read_file(os.path.join(folder, name))
        if metrics is not None:
            found.append(metrics)
    return sorted(found, key=lambda one: (one.job, one.rank))


def _read_file(path: str) -> Metrics | None:
    """None: no page, one of another version or user, or its owner is dead; then it is removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid():
            return None
        if about.st_size < ffi.sizeof("ept_metrics_page"):
            return None
        if _lockable(descriptor):
            os.unlink(path)
            return None
        with mmap.mmap(descriptor, about.st_size, prot=mmap.PROT_READ) as mapped:
            view = ffi.from_buffer(mapped)
            try:
                return read_page(ffi.cast("ept_metrics_page *", view), about.st_size)
            finally:
                ffi.release(view)
    except (OSError, ValueError):  # it went away meanwhile
        return None
    finally:
        os.close(descriptor)


def _lockable(descriptor: int) -> bool:
    """Its owner holds a lock on it as long as it lives."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def read_page(page: Any, length: int | None = None) -> Metrics | None:
    """The values of a page in memory; None where it is none of this version. `length`: of the file, which must hold
    what the head says."""
    if page.magic != MAGIC or page.version != lib.EPT_METRICS_VERSION:
        return None
    rails_end = page.rail_offset + page.rails * page.rail_bytes
    peers_end = page.peer_offset + page.world * page.peer_bytes
    if length is not None and (
        max(rails_end, peers_end, page.bytes) > length
        or page.rail_bytes < ffi.sizeof("ept_metrics_rail")
        or page.peer_bytes < ffi.sizeof("ept_metrics_peer")
    ):
        return None
    base = ffi.cast("char *", page)
    return Metrics(
        pid=page.pid,
        rank=page.rank,
        world=page.world,
        epoch=page.epoch,
        job=text(page.job),
        backend=text(page.backend),
        opened_ns=page.opened_ns,
        updated_ns=page.updated_ns,
        read_ns=time.monotonic_ns(),
        registered_bytes=page.registered_bytes,
        regions=page.regions,
        signals=page.signals,
        credits=page.credits,
        suspended=bool(page.suspended),
        unknown_chans=page.unknown_chans,
        last_progress_ns=page.last_progress_ns,
        expired_waits=page.stuck_reports,
        rails=tuple(
            _rail(ffi.cast("ept_metrics_rail *", base + page.rail_offset + index * page.rail_bytes))
            for index in range(page.rails)
        ),
        peers=tuple(
            _peer(rank, ffi.cast("ept_metrics_peer *", base + page.peer_offset + rank * page.peer_bytes))
            for rank in range(page.world)
            if rank != page.rank
        ),
    )


def _rail(rail: Any) -> RailMetrics:
    return RailMetrics(text(rail.name), **{name: getattr(rail, name) for name in _names(RailMetrics, "name")})


def _peer(rank: int, peer: Any) -> PeerMetrics:
    return PeerMetrics(
        rank=rank,
        status=PeerStatus(peer.status) if peer.status in PeerStatus._value2member_map_ else PeerStatus.LOST,
        completions=_histogram(peer.completions),
        phases=tuple(_phase(PHASES[index], peer.phases[index]) for index in range(lib.EPT_METRICS_PHASES)),
        **{name: getattr(peer, name) for name in _names(PeerMetrics, "rank", "status", "completions", "phases")},
    )


def _phase(name: str, phase: Any) -> PhaseMetrics:
    return PhaseMetrics(
        phase=name,
        waits=_histogram(phase.waits),
        arrivals=_histogram(phase.arrivals),
        **{field: getattr(phase, field) for field in _names(PhaseMetrics, "phase", "waits", "arrivals")},
    )


def _histogram(histogram: Any) -> Histogram:
    return Histogram(histogram.count, histogram.sum_ns / 1e9, histogram.max_ns / 1e9, tuple(histogram.buckets))


def _names(cls: Any, *but: str) -> Iterator[str]:
    return (name for name in cls.__dataclass_fields__ if name not in but)
