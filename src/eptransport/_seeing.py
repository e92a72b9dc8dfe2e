"""What a group shows of itself, and how it lets go of its buffers for a while."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from eptransport._call import lib, timeout_ns
from eptransport.metrics import Metrics, WaitFor, pages, wait_matrix

if TYPE_CHECKING:
    from eptransport._gpu_steps import GpuSteps
    from eptransport.engine import Engine

__all__ = ["Seeing"]


class Seeing:
    """The part of `Group` that docs/seeing.md is about."""

    engine: Engine
    _gpu_steps: weakref.WeakSet[GpuSteps]

    @abstractmethod
    def arena(self) -> Any: ...

    def metrics(self) -> Metrics:
        """What this rank has counted so far. Not collective, doesn't block. Other processes read the same with
        `eptransport.metrics.pages()`, `eptransport top` and `eptransport prometheus`."""
        return self.engine.metrics()

    def wait_matrix(self) -> list[WaitFor]:
        """Who waits for whom, in which phase, how often and how long: the row of this rank, and those of the group's
        other ranks on this machine. Longest total first. Not collective, doesn't block."""
        mine = self.metrics()
        others = [one for one in pages() if one.job == mine.job and (one.pid, one.rank) != (mine.pid, mine.rank)]
        return wait_matrix([mine, *others])

    def why_stuck(self) -> str:
        """Why nothing goes on here: every pending wait with peer, phase, count expected and seen; each peer's queues;
        the rails; when the network last moved. From any thread, while others wait. SIGUSR1 logs the same, and a Timeout
        carries it (`error.why_stuck`)."""
        return self.engine.why_stuck()

    def suspend(self, timeout: float | None = None) -> None:
        """Gives back all memory that the group's AllToAlls share: nothing stays registered but the engine's own 64
        bytes, and what the caller registered. For an engine that sleeps while others need the machine's memory.

        Collective, between steps; blocks until no rank has a step under way, at most `timeout` s. AllToAlls, routings
        and connections stay; calls in between raise Suspended. Suspending twice does nothing. Timeout (a step is under
        way somewhere, or a rank doesn't come), LaneFault (reset first), PeerLost.

        On a GPU it waits for the kernels of this rank on the current stream and on those that its lanes were used on:
        graphs that are replayed on another one must have ended. They stay valid; one that is replayed in between gives
        blank outputs, and changes nothing. UnsupportedError for lanes in a symmetric heap (NVSHMEM)."""
        every = list(self._gpu_steps)
        for steps in every:
            steps.wait_for_kernels()
        for steps in every:
            steps.drop_unreceived()
        self.engine._native.call_arena(lib.ept_arena_suspend, self.arena(), timeout_ns(timeout))

    def resume(self, timeout: float | None = None) -> None:
        """Takes the memory again: the next step gives the bits that it would have given without. Collective; blocks.
        OutOfMemory on every rank where one has none left; all stay suspended then, and may try again."""
        self.engine._native.call_arena(lib.ept_arena_resume, self.arena(), timeout_ns(timeout))
