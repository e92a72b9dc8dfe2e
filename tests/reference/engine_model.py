# SPDX-License-Identifier: Apache-2.0
"""The point-to-point contract, plain and slow: what the engines are compared with at every step.

Nothing here is taken from the library. A network that promises no order leaves several answers open while transfers are
under way, so the model holds sets of answers: a byte is what it was, or what any transfer under way brings. When all is
quiet, what was brought must be there. Read it in this order:

    Memory      bytes that peers may write, with the writes that are under way
    Signal      a count, with the transfers under way that will raise it
    Transfer    writes that raise one signal together, and what may become of them
    Inbox       messages, of which no order is promised
    Model       all of it: what a step does, and what may be seen after it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
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
    bringers: np.ndarray[tuple[int], np.dtype[np.int32]] = field(init=False)
    """Of each byte: how many of `writes` bring one there. Kept, since a paged write has thousands of writes and each
    is asked after every step what the others cover."""
    cut_off: np.ndarray[tuple[int], np.dtype[np.bool_]] = field(init=False)
    """Where a write that was cut off by a revoke may have landed over what another brought: what was there then
    (`settled`) may stay."""

    def __post_init__(self) -> None:
        self.settled = self.seen().copy()
        self.bringers = np.zeros(len(self.settled), dtype=np.int32)
        self.cut_off = np.zeros(len(self.settled), dtype=bool)

    def add(self, writes: Sequence[Write]) -> None:
        self.writes += writes
        for write in writes:
            self.bringers[write.at] += 1

    def cut(self, rank: int | None) -> list[Write]:
        """Forgets the writes of `rank` (None: all), and says which those were. What others bring there is still to
        come, or has come and was written over."""
        seen = self.seen()
        cut = [write for write in self.writes if rank is None or write.region.writer == rank]
        self.writes = [write for write in self.writes if rank is not None and write.region.writer != rank]
        for write in cut:
            self.bringers[write.at] -= 1
            self.settled[write.at] = seen[write.at]
            self.cut_off[write.at] = True
        return cut

    def look(self, quiet: bool) -> None:
        """While transfers are under way a byte is the old one or one that is brought; when all is quiet it is
        brought."""
        seen = self.seen()
        covered = np.zeros(len(seen), dtype=bool)
        right = np.zeros(len(seen), dtype=bool)
        for write in self.writes:
            covered[write.at] |= not write.failed
            right[write.at] |= seen[write.at] == write.data
        if not quiet:
            covered[:] = False
        right |= (~covered | self.cut_off) & (seen == self.settled)
        if not right.all():
            first = int(np.argmin(right))
            raise Difference(
                f"{self.name}: byte {first} is {seen[first]}, it was {self.settled[first]}; {int((~right).sum())} "
                f"bytes are wrong, {'all is quiet' if quiet else 'transfers are under way'}, writes since then: "
                f"{[write.where() for write in self.writes]}"
            )
        if quiet:
            self.freeze()

    def freeze(self) -> None:
        """From now on only what is posted later may change it."""
        self.settled = self.seen().copy()
        self.writes.clear()
        self.bringers[:] = 0
        self.cut_off[:] = False


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
    failed: bool = False
    """Any part of it may have landed."""

    @property
    def at(self) -> slice:
        start = self.region.offset + self.offset
        return slice(start, start + len(self.data))

    def where(self) -> str:
        return f"[{self.at.start}, {self.at.stop}) by rank {self.region.writer}"

    def visible(self) -> bool:
        """All of it can be read, but where another write under way has the same bytes to bring."""
        memory = self.region.memory
        seen = memory.seen()[self.at]
        others = memory.bringers[self.at] > 1  # it is one of them itself
        others |= memory.cut_off[self.at] & (seen == memory.settled[self.at])
        return bool((others | (seen == self.data)).all())


class Fate(Enum):
    DUE = "will land"
    REFUSED = "changes nothing and fails"
    CUT = "was under way at a revoke: may have landed, may be counted, may fail"
    DOUBTFUL = "may fail half landed; its outcome will tell"
    FAILED = "has failed, half landed, and is not counted"


@dataclass(eq=False)
class Transfer:
    """Writes that raise one signal together."""

    writes: list[Write]
    signal: Signal | None
    fate: Fate = Fate.DUE

    def ended(self, failed: bool) -> None:
        """What its poster was told."""
        if (
            failed
            not in {
                Fate.DUE: (False,),
                Fate.REFUSED: (True,),
                Fate.CUT: (False, True),
                Fate.DOUBTFUL: (False, True),
                Fate.FAILED: (True,),
            }[self.fate]
        ):
            raise Difference(f"a transfer that {self.fate.value} {'failed' if failed else 'ended well'}")
        if self.fate is Fate.DOUBTFUL:
            self.fate = Fate.FAILED if failed else Fate.DUE
            for write in self.writes:
                write.failed = failed


@dataclass(eq=False)
class Signal:
    name: str
    rank: int
    source: int
    settled: int = 0
    transfers: list[Transfer] = field(default_factory=list)

    def look(self, value: int, quiet: bool) -> None:
        """Never ahead of the transfers that can wholly be read; all of them when all is quiet."""
        of = {fate: [each for each in self.transfers if each.fate is fate] for fate in Fate}
        there = sum(all(map(Write.visible, each.writes)) for each in of[Fate.DUE] + of[Fate.DOUBTFUL])
        most = self.settled + there + len(of[Fate.CUT])
        least = self.settled + (len(of[Fate.DUE]) if quiet else 0)
        if not least <= value <= most:
            raise Difference(
                f"{self.name} is {value}, it was {self.settled}; since then transfers were posted that: "
                + ", ".join(f"{fate.value} ({len(each)})" for fate, each in of.items() if each)
                + f"; {there} can wholly be read, {'all is quiet' if quiet else 'transfers are under way'}"
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
    """Everything that the ranks share. `flaky`: the network may fail a write, half landed."""

    flaky: bool = False
    memories: list[Memory] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    inboxes: dict[tuple[int, int], Inbox] = field(default_factory=dict)

    # ---- what a step does

    def memory(self, name: str, rank: int, seen: Callable[[], Bytes]) -> Memory:
        self.memories.append(Memory(name, rank, seen))
        return self.memories[-1]

    def region(self, memory: Memory, writer: int, offset: int, length: int) -> Region:
        self.regions.append(Region(memory, writer, offset, length))
        return self.regions[-1]

    def signal(self, name: str, rank: int, source: int) -> Signal:
        self.signals.append(Signal(name, rank, source))
        return self.signals[-1]

    def post(self, region: Region | None, signal: Signal | None, pieces: Sequence[tuple[int, Bytes]]) -> Transfer:
        """`pieces`: (offset in the region, bytes). Without any the signal alone rises."""
        writes = [Write(region, offset, data) for offset, data in pieces if region is not None and len(data)]
        transfer = Transfer(writes, signal)
        if region is not None and writes:
            if region.revoked:
                transfer.fate = Fate.REFUSED
            else:
                region.memory.add(writes)
                transfer.fate = Fate.DOUBTFUL if self.flaky else Fate.DUE
        if signal is not None:
            signal.transfers.append(transfer)
        return transfer

    def revoke(self, memory: Memory, rank: int | None, under_way: Sequence[Transfer]) -> None:
        """From its return on nothing that `rank` (None: all) has in flight changes the memory, half landed or not.
        `under_way`: all transfers whose end was not told before."""
        memory.look(quiet=False)
        cut = memory.cut(rank)
        gone = set(map(id, cut))
        signalled = [transfer for signal in self.signals for transfer in signal.transfers]
        for transfer in (*signalled, *under_way):
            if any(id(write) in gone for write in transfer.writes):
                transfer.fate = Fate.CUT
        for region in self.regions:
            if region.memory is memory and rank in (None, region.writer):
                region.revoked = True

    def send(self, to: int, tag: int, sender: int, data: bytes) -> None:
        self.inboxes.setdefault((to, tag), Inbox()).waiting[sender, data] += 1

    # ---- what may be seen after it

    def look(self, value: Callable[[Signal], int], quiet: bool) -> None:
        # Counts first: what is read after a count may only be more than the count promised.
        values = [(signal, value(signal)) for signal in self.signals]
        for signal, count in values:
            signal.look(count, quiet)
        for memory in self.memories:
            memory.look(quiet)
