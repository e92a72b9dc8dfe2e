"""What was posted, until it is complete."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from eptransport._call import lib, timeout_ns
from eptransport.errors import ClosedError, Code, EptError, Timeout

if TYPE_CHECKING:
    from eptransport.engine import Engine

__all__ = ["Transfer"]


class Transfer:
    """Something that was posted. Complete means locally: the source may be reused; it says nothing about the target.

    Dropped unwaited it goes on all the same, and a failure is logged. One wait at a time; the outcome stays.
    """

    def __init__(self, engine: Engine, number: int, what: str) -> None:
        self._engine = engine
        self._id = number
        self._what = what
        self._ended = False
        self._error: EptError | None = None
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> None:
        """Blocks until it is complete, and raises its error if it failed. Timeout leaves it under way."""
        with self._lock:
            self._look(timeout_ns(timeout), allow=0)
        if self._error is not None:
            raise self._error

    @property
    def done(self) -> bool:
        """Complete or failed. Doesn't block."""
        if not self._ended and self._lock.acquire(blocking=False):
            try:
                self._look(0, allow=Code.TIMEOUT)
            finally:
                self._lock.release()
        return self._ended

    def __await__(self) -> Generator[Any, None, None]:
        """As `wait` with the engine's own timeout, without blocking the event loop. Cancelling only forgets the
        wait."""
        engine = self._engine
        yield from (
            engine._notifications()
            .until(
                f"local completion of {self._what}",
                lambda: self.done,
                lambda: None if self._ended else engine._native.call(lib.ept_transfer_notify, self._id),
                engine.settings.timeout_s,
            )
            .__await__()
        )
        if self._error is not None:
            raise self._error

    def _look(self, timeout: int, allow: int) -> None:
        if self._ended:
            return
        try:
            if self._engine._native.call(lib.ept_transfer_wait, self._id, timeout, allow=allow) == Code.OK:
                self._ended = True
        except (Timeout, ClosedError):
            raise
        except EptError as error:
            self._ended, self._error = True, error

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self._engine._orphans.append(self._id)

    def __repr__(self) -> str:
        return f"<Transfer {self._what} of rank {self._engine.rank}{', ended' if self._ended else ''}>"
