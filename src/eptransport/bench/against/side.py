"""What is measured side by side: one `Side` a library, each in two processes of its own, all by the same questions.

A library that can be measured here is found as a `Recipe`, which travels to the two processes and opens the side
there. One that can't says why, with the mend, by `Absent`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eptransport.bench.processes import ProcessRank

__all__ = ["LARGEST", "MOST_BYTES", "Absent", "Find", "Recipe", "Side"]

LARGEST = 1 << 20
"""The largest size that a side is asked for, in bytes."""
MOST_BYTES = 16 * LARGEST
"""Of a stream's buffers: size times depth at most. A side may allocate so much once, and register it."""


class Absent(Exception):
    """A library that can't be measured here: why, and how to get it."""


class Side(abc.ABC):
    """One rank's end of a library: rank 0 initiates, rank 1 answers. Every method is called on both ranks alike, after
    a barrier, and should end by itself, with an error, where the other side doesn't come: one that hangs is ended from
    outside, and then nobody learns what it waited for."""

    detail = ""
    """What the library says of itself, once it is open."""

    @abc.abstractmethod
    def latency(self, size: int, count: int) -> Sequence[float]:
        """`count` ping-pongs of `size` bytes, one in flight. On rank 0 us one way of each: half a round trip from
        before the post until the answer's bytes can be read. Rank 1's result is not looked at."""

    @abc.abstractmethod
    def stream(self, size: int, count: int, depth: int) -> float:
        """`count` messages of `size` bytes from rank 0 to rank 1, at most `depth` not locally complete, each from and
        into one of `depth` buffers. Seconds on rank 0, from before the first post until rank 1 has answered that all
        are there."""

    def posts(self, size: int, count: int) -> Sequence[float] | None:
        """us from before a post until this library says that it is done, one at a time; None where that is no time of
        its own. On rank 0; rank 1 lets the network move meanwhile."""
        del size, count
        return None

    def close(self) -> None:
        """Gives everything back. The other rank may have closed already."""
        return


@dataclass(frozen=True)
class Recipe:
    """A side that can be opened here; pickled to its two processes."""

    name: str
    how: str
    """What is measured, and whose loop: one line under the table."""
    version: str
    open: Callable[[ProcessRank], Side]
    """Called in both processes, at module level so that it can be pickled; connects before it returns."""
    python: bool = False
    """Driven from Python, so to be read beside our Python API and not beside our native loops."""
    environment: dict[str, str] = field(default_factory=dict)
    """Set in the two processes before anything of the library is loaded."""
    only: tuple[str, ...] = ("latency", "bandwidth", "rate", "post")
    """The kinds of measure that it has."""


Find = Callable[[Path], "list[Recipe]"]
"""The sides of one name of `--against`; raises Absent. The folder is for what it builds, and lives as long as the
run."""
