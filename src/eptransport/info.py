"""What an engine tells of itself: what it runs with, how its peers stand, its rails and what went over them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

__all__ = ["EngineInfo", "PeerInfo", "PeerStatus", "Rail", "RailCounters", "RailInfo"]


class PeerStatus(IntEnum):
    """What is known of a peer's connection."""

    NEW = 0
    CONNECTING = 1
    UP = 2
    LEFT = 3
    LOST = 4
    MASKED = 5


@dataclass(frozen=True)
class PeerInfo:
    """How a peer stands now."""

    rank: int
    status: PeerStatus
    epoch: int
    credits: int
    """Operations with a signal that may still be posted to it now."""
    queued: int
    """Operations held for want of credits or room."""
    in_flight: int
    """Operations posted, not yet locally complete."""
    silent_s: float
    """Since its last sign of life."""
    why: str
    """Why it was lost."""


@dataclass(frozen=True)
class EngineInfo:
    """What the engine really runs with."""

    rails: int
    credits: int
    proxy_threads: int
    spin_s: float
    registered_bytes: int
    regions: int
    """Exported now."""
    signals: int
    """Exported now."""
    unknown_chans: int
    """Immediates that came for a signal which nobody holds: dropped."""
    waived: tuple[int, ...]
    """Clauses of the contract that the backend doesn't keep."""
    max_message: int
    """Bytes of one operation of the backend; a longer write is cut."""


@dataclass(frozen=True)
class RailInfo:
    """One way out of this machine: a port of a card, an interface, or one of several streams over it."""

    name: str
    fabric: str
    numa: int
    """-1: unknown."""
    bits_per_s: int
    """0: unknown."""


@dataclass(frozen=True)
class RailCounters:
    """What went over a rail so far: payload bytes of writes, writes and signals, messages."""

    tx_bytes: int
    tx_operations: int
    rx_bytes: int
    rx_operations: int
    tx_sends: int
    rx_sends: int
    later: int
    """Times the backend had no room."""
    errors: int
    reconnects: int
    """Times a broken rail to a peer was made again."""
    replayed: int
    """Operations sent again over a rail that was made again; each counts once above."""


class Rail(NamedTuple):
    """A rail and its counters."""

    rail: RailInfo
    counters: RailCounters
