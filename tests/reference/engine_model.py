# SPDX-License-Identifier: Apache-2.0
"""The point-to-point contract, plain and slow: what the engines are compared with at every step.

Nothing here is taken from the library. A network that promises no order leaves several answers open while transfers are
under way, so the model holds sets of answers: a byte is what it was, or what any transfer under way brings. When all is
quiet, what was brought must be there. Read it in this order:

    Memory      bytes that peers may write, with the writes that are under way
    Signal      a count, with the transfers under way that will raise it
    Transfer    the writes that were posted together
    Inbox       messages, of which no order is promised
    Model       all of it: what a step does, and what may be seen after it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, Any]


class Difference(AssertionError):
    """What was seen is not among what the contract allows."""


@dataclass(eq=False)
class Memory:
    """Bytes of one rank that others may write. `seen` reads the real ones."""

    name: str
    rank: int
    seen: Callable[[], Bytes]
    settled: Bytes = field(init=False)
    writes: list[Write] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.settled = self.seen().copy()

    def look(self, quiet: bool) -> None:
        """While transfers are under way a byte is the old one or one that is brought; when all is quiet it is brought."""
        seen = self.seen()
        covered = np.zeros(len(seen), dtype=bool)
        right = np.zeros(len(seen), dtype=bool)
        for write in self.writes:
            covered[write.at] = True
            right[write.at] |= seen[write.at] == write.data
        if not quiet:
            covered[:] = False
        right |= ~covered & (seen == self.settled)
        if not right.all():
            first = int(np.argmin(right))
            raise Difference(
                f"{self.name}: byte {first} is {seen[first]}, it was {self.settled[first]}; {int((~right).sum())} bytes "
                f"are wrong, {'all is quiet' if quiet else 'transfers are under way'}, writes under way or just ended: "
                f"{[write.where() for write in self.writes]}"
            )
        if quiet:
            self.freeze()

    def freeze(self) -> None:
        """From now on only what is posted later may change it."""
        self.settled = self.seen().copy()
        self.writes.clear()


@dataclass(eq=False)
class Region:
    """A part of a memory that one rank may write."""

    memory: Memory
    writer: int
    offset: int
    length: int
    revoked: bool = False


@dataclass(eq=False)
class Write:
    region: Region
    offset: int
    data: Bytes

    @property
    def at(self) -> slice:
        start = self.region.offset + self.offset
        return slice(start, start + len(self.data))

    def where(self) -> str:
        return f"[{self.at.start}, {self.at.stop}) by rank {self.region.writer}"

    def visible(self) -> bool:
        """All of it can be read, but where another write under way has the same bytes to bring."""
        others = np.zeros(len(self.data), dtype=bool)
        for other in self.region.memory.writes:
            if other is not self:
                low, high = max(self.at.start, other.at.start), min(self.at.stop, other.at.stop)
                if low < high:
                    others[low - self.at.start : high - self.at.start] = True
        return bool((others | (self.region.memory.seen()[self.at] == self.data)).all())


@dataclass(eq=False)
class Transfer:
    """One part for each (peer, signal): all writes of a part raise its signal once."""

    writes: list[Write]
    signal: Signal | None
    must_fail: bool = False
    may_fail: bool = False


@dataclass(eq=False)
class Signal:
    name: str
    rank: int
    source: int
    settled: int = 0
    transfers: list[Transfer] = field(default_factory=list)

    def look(self, value: int, quiet: bool) -> None:
        """Never ahead of the transfers that can wholly be read; all of them when all is quiet."""
        certain = [transfer for transfer in self.transfers if not (transfer.may_fail or transfer.must_fail)]
        doubtful = [transfer for transfer in self.transfers if transfer.may_fail]
        there = sum(all(write.visible() for write in transfer.writes) for transfer in certain)
        most = self.settled + there + len(doubtful)
        least = self.settled + (len(certain) if quiet else 0)
        if not least <= value <= most:
            raise Difference(
                f"{self.name} is {value}; it was {self.settled} and {len(certain)} transfers are under way or just ended, "
                f"of which {there} can wholly be read, {len(doubtful)} more were cut off by a revoke; "
                f"{'all is quiet' if quiet else 'transfers are under way'}"
            )
        if quiet:
            self.settled = value
            self.transfers.clear()


@dataclass(eq=False)
class Inbox:
    """Messages by (receiver, tag): which came from whom, in any order."""

    waiting: Counter[tuple[int, bytes]] = field(default_factory=Counter)

    def take(self, sender: int, data: bytes) -> None:
        if not self.waiting[sender, data]:
            raise Difference(f"a message of {len(data)} bytes from rank {sender} came that nobody sent, or came twice")
        self.waiting[sender, data] -= 1

    def empty(self) -> None:
        missing = +self.waiting
        if missing:
            raise Difference(f"messages got lost, from {sorted((sender, len(data)) for sender, data in missing)}")


@dataclass
class Model:
    memories: list[Memory] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    inboxes: dict[tuple[int, int], Inbox] = field(default_factory=dict)

    # ---- what a step does

    def memory(self, name: str, rank: int, seen: Callable[[], Bytes]) -> Memory:
        self.memories.append(Memory(name, rank, seen))
        return self.memories[-1]

    def signal(self, name: str, rank: int, source: int) -> Signal:
        self.signals.append(Signal(name, rank, source))
        return self.signals[-1]

    def post(self, parts: Sequence[tuple[Region | None, Signal | None, list[tuple[int, Bytes]]]]) -> list[Transfer]:
        """Each part: a region, the signal that it raises, and (offset in the region, bytes)."""
        posted = []
        for region, signal, pieces in parts:
            writes = [Write(region, offset, data) for offset, data in pieces if region is not None]
            refused = region is not None and region.revoked and any(len(data) for _, data in pieces)
            transfer = Transfer(writes, signal, must_fail=refused)
            if region is not None and not refused:
                region.memory.writes += writes
            if signal is not None:
                signal.transfers.append(transfer)
            posted.append(transfer)
        return posted

    def revoke(self, memory: Memory, rank: int | None) -> list[Transfer]:
        """From its return on nothing that `rank` (None: all) has in flight changes the memory, half landed or not. Returns
        the transfers that it may have cut off."""
        cut = [write for write in memory.writes if rank is None or write.region.writer == rank]
        memory.look(quiet=False)
        rest = [write for write in memory.writes if write not in cut]
        # What is certain of the bytes that `rank` wrote is what can be seen now; what others bring is still to come.
        seen = memory.seen()
        for write in cut:
            memory.settled[write.at] = seen[write.at]
        memory.writes = rest
        touched = []
        for signal in self.signals:
            for transfer in signal.transfers:
                if any(write in cut for write in transfer.writes):
                    transfer.may_fail = True
                    touched.append(transfer)
        return touched

    def send(self, to: int, tag: int, sender: int, data: bytes) -> None:
        self.inboxes.setdefault((to, tag), Inbox()).waiting[sender, data] += 1

    # ---- what may be seen after it

    def look(self, value: Callable[[Signal], int], quiet: bool) -> None:
        # Counts first: what is read after a count may only be more than the count promised.
        values = [(signal, value(signal)) for signal in self.signals]
        for signal, count in values:
            signal.look(count, quiet)
        for memory in self.memories:
            if not memory.closed:
                memory.look(quiet)
