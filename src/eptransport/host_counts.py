# SPDX-License-Identifier: Apache-2.0
"""A dispatch's counts on the host, for who must know them without waiting for the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TYPE_CHECKING

from eptransport.errors import InvalidArgument, Timeout

if TYPE_CHECKING:
    import torch

__all__ = ["Counts", "HostCounts"]

SPIN_S = 200e-6
"""A wait looks so long without a pause: a dispatch takes about as long."""
PAUSE_S = 50e-6
"""Between looks then; what Linux makes of a shorter one is as long."""


@dataclass(frozen=True)
class Counts:
    """What a dispatch brought, as the host was told when it ended."""

    epoch: int
    """How many dispatches were mirrored in this lane of this AllToAll, this one included. It never goes down, also over
    a reset, and a replay of a captured graph adds one for each dispatch that it has."""
    counts: torch.Tensor
    """[local experts] int32 on the CPU, the caller's own: as `Dispatched.counts`."""
    num_rows: int
    """As `Dispatched.num_rows`."""
    faulted: bool
    """The lane had met a fault: counts are all 0, and `AllToAll.check` says why."""


class HostCounts:
    """The mirror of a lane's counts (`dispatch(..., mirror_counts=True)`): there is one a lane of an AllToAll, and each
    dispatch that asks for it overwrites what the one before had left. A reader tells by the epoch which it sees.

    On a GPU the last block of the receiving kernel writes it into pinned memory. Looking asks no GPU, and may be done
    by any thread, while streams capture, and while kernels run; nothing here is collective."""

    def __init__(self, look: Callable[[], tuple[int, Counts] | None], ticket: int | None, timeout_s: float) -> None:
        self._look = look
        self._ticket = ticket
        self._timeout_s = timeout_s

    def read(self) -> Counts | None:
        """What stands there now, of whichever dispatch; None: none that asked has ended yet. Doesn't block."""
        found = self._look()
        return None if found is None else found[1]

    @property
    def epoch(self) -> int:
        """That of `read()`; 0: none yet."""
        found = self._look()
        return 0 if found is None else found[1].epoch

    def wait(self, *, after: int | None = None, timeout_s: float | None = None) -> Counts:
        """Blocks until the counts of the dispatch that gave this are there or, with `after`, those of any of a later
        epoch. A dispatch that was captured has no counts of its own but those of its replays: it needs `after`, the
        epoch that stood there before the replay.

        Timeout (that of the settings, or timeout_s). InvalidArgument: a later dispatch of the lane has overwritten
        them, or `after` is missing."""
        if after is None and self._ticket is None:
            raise InvalidArgument("this dispatch was captured: wait(after=EPOCH), the epoch before the replay")
        begun = monotonic()
        limit = self._timeout_s if timeout_s is None else timeout_s
        while True:
            found = self._look()
            if found is not None:
                ticket, counts = found
                if after is not None:
                    if counts.epoch > after:
                        return counts
                elif ticket == self._ticket:
                    return counts
                elif self._ticket is not None and ticket > self._ticket:
                    raise InvalidArgument(
                        "the counts of a later dispatch of this lane stand there already: wait before the next one is "
                        "called, or take another lane"
                    )
            waited = monotonic() - begun
            if waited > limit:
                raise Timeout(
                    f"the counts of a dispatch did not come to the host within {waited:.1f} s; the mirror stands at "
                    f"epoch {0 if found is None else found[1].epoch}: see check()",
                    operation="counts_host",
                )
            sleep(0 if waited < SPIN_S else PAUSE_S)
