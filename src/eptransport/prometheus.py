"""The counters of every rank of this user on this machine as Prometheus text (exposition format 0.0.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from eptransport.metrics import Histogram, Metrics, PeerMetrics, PhaseMetrics, RailMetrics, bucket_bounds_ns, pages

__all__ = ["CONTENT_TYPE", "prometheus_text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Sample(NamedTuple):
    labels: dict[str, str]
    value: float | Histogram


class _Family(NamedTuple):
    name: str
    kind: str
    doc: str
    samples: list[_Sample]


def prometheus_text(metrics: Iterable[Metrics] | None = None) -> str:
    """`metrics`, or those of all ranks of this user on this machine. Doesn't block and needs no group."""
    found = list(pages() if metrics is None else metrics)
    lines: list[str] = []
    for family in _families(found):
        if not family.samples:
            continue
        name = f"eptransport_{family.name}"
        lines += [f"# HELP {name} {family.doc}", f"# TYPE {name} {family.kind}"]
        for sample in family.samples:
            lines += _lines(name, sample)
    return "\n".join(lines) + "\n" if lines else ""


def _families(found: list[Metrics]) -> Iterator[_Family]:
    yield _Family("up", "gauge", "A rank is there.", [_Sample(_engine(one), 1) for one in found])
    for name, kind, doc in _ENGINE:
        yield _Family(name, kind, doc, [_Sample(_engine(one), getattr(one, _field(name))) for one in found])
    for name, kind, doc in _RAIL:
        yield _Family(f"rail_{name}", kind, doc, list(_of_rails(found, _value(name))))
    for name, kind, doc in _PEER:
        yield _Family(f"peer_{name}", kind, doc, list(_of_peers(found, _value(name))))
    yield _Family(
        "peer_completion_seconds",
        "histogram",
        "From the post of an operation to its local completion.",
        list(_of_peers(found, lambda peer: peer.completions)),
    )
    for name, kind, doc in _PHASE:
        yield _Family(f"phase_{name}", kind, doc, list(_of_phases(found, _value(name))))
    yield _Family(
        "phase_wait_seconds",
        "histogram",
        "How long calls of this rank stood still for the peer.",
        list(_of_phases(found, lambda phase: phase.waits)),
    )
    yield _Family(
        "phase_wait_max_seconds",
        "gauge",
        "The longest of them.",
        list(_of_phases(found, lambda phase: phase.waits.max_s)),
    )
    yield _Family(
        "phase_arrival_seconds",
        "histogram",
        "From the begin of a call here until the peer's first message was here.",
        list(_of_phases(found, lambda phase: phase.arrivals)),
    )


_ENGINE = (
    ("registered_bytes", "gauge", "Memory registered with the network."),
    ("regions", "gauge", "Regions exported."),
    ("signals", "gauge", "Signals that exist."),
    ("suspended", "gauge", "1: its buffers were given back."),
    ("unknown_chans_total", "counter", "Immediates for a signal that nobody holds, dropped."),
    ("expired_waits_total", "counter", "Waits that ran into their deadline."),
)
_TRAFFIC = (
    ("tx_bytes_total", "counter", "Payload bytes of writes sent."),
    ("tx_operations_total", "counter", "Writes and signals sent."),
    ("rx_bytes_total", "counter", "Payload bytes of writes received."),
    ("rx_operations_total", "counter", "Writes and signals received."),
    ("tx_sends_total", "counter", "Small messages sent."),
    ("rx_sends_total", "counter", "Small messages received."),
    ("later_total", "counter", "Times the backend had no room."),
)
_RAIL = (
    *_TRAFFIC,
    ("errors_total", "counter", "Operations that failed."),
    ("reconnects_total", "counter", "Times a broken rail was made again."),
    ("replayed_total", "counter", "Operations sent again over it."),
)
_PEER = (
    *_TRAFFIC,
    ("retries_total", "counter", "Posts of what the backend had had no room for."),
    ("held_total", "counter", "Writes queued for want of credits or room."),
    ("refused_total", "counter", "Calls told to come later, since that queue was full."),
    ("failed_total", "counter", "Operations that ended with an error."),
    ("credits_spent_total", "counter", "Credits spent on it."),
    ("credits_granted_total", "counter", "Credits granted by it."),
    ("credits", "gauge", "Credits left."),
    ("queued", "gauge", "Operations queued."),
    ("in_flight", "gauge", "Operations posted and not complete."),
    ("status", "gauge", "0 new, 1 connecting, 2 up, 3 left, 4 lost."),
    ("epoch", "gauge", "Its life."),
)
_PHASE = (
    ("tx_bytes_total", "counter", "Bytes of messages sent, headers included."),
    ("tx_messages_total", "counter", "Messages sent."),
    ("tx_rows_total", "counter", "Rows sent."),
    ("rx_bytes_total", "counter", "Bytes of messages received, headers included."),
    ("rx_messages_total", "counter", "Messages received."),
    ("rx_rows_total", "counter", "Rows received."),
    ("tx_later_total", "counter", "Messages that found the queue full."),
    ("tx_grants_total", "counter", "Chunks granted to it."),
    ("tx_acks_total", "counter", "Slots acknowledged by a message of their own."),
)


def _field(name: str) -> str:
    return name.removesuffix("_total")


def _value(name: str) -> Callable[[object], float]:
    return lambda of: float(getattr(of, _field(name)))


def _engine(one: Metrics) -> dict[str, str]:
    return {"job": one.job, "group": one.group, "rank": str(one.rank), "pid": str(one.pid), "backend": one.backend}


def _of_rails(found: list[Metrics], value: Callable[[RailMetrics], float]) -> Iterator[_Sample]:
    for one in found:
        for index, rail in enumerate(one.rails):
            yield _Sample({**_engine(one), "rail": f"{index}:{rail.name}"}, value(rail))


def _of_peers(found: list[Metrics], value: Callable[[PeerMetrics], float | Histogram]) -> Iterator[_Sample]:
    for one in found:
        for peer in one.peers:
            yield _Sample({**_engine(one), "peer": str(peer.rank)}, value(peer))


def _of_phases(found: list[Metrics], value: Callable[[PhaseMetrics], float | Histogram]) -> Iterator[_Sample]:
    """Phases in which nothing has happened are left out: a group of 64 ranks has 252 of them a rank."""
    for one in found:
        for peer in one.peers:
            for phase in peer.phases:
                if phase.tx_messages or phase.rx_messages or phase.waits.count or phase.tx_grants:
                    yield _Sample({**_engine(one), "peer": str(peer.rank), "phase": phase.phase}, value(phase))


def _lines(name: str, sample: _Sample) -> Iterator[str]:
    if not isinstance(sample.value, Histogram):
        yield f"{name}{_labels(sample.labels)} {_number(sample.value)}"
        return
    seen = 0
    bounds = bucket_bounds_ns()[:-1]
    for bound, count in zip(bounds, sample.value.buckets, strict=False):
        seen += count
        yield f"{name}_bucket{_labels({**sample.labels, 'le': _number(bound / 1e9)})} {seen}"
    # Counted by itself, which may be a record behind: a histogram must agree with itself.
    seen += sample.value.buckets[-1]
    yield f"{name}_bucket{_labels({**sample.labels, 'le': '+Inf'})} {seen}"
    yield f"{name}_sum{_labels(sample.labels)} {_number(sample.value.total_s)}"
    yield f"{name}_count{_labels(sample.labels)} {seen}"


def _labels(labels: dict[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
