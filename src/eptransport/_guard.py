"""Who is inside a native object: it is freed only when nobody is."""

from __future__ import annotations

import threading

from eptransport._process import process
from eptransport.errors import ClosedError

__all__ = ["Guard"]


class Guard:
    """Counts the threads inside native calls on one object.

    Invariants. `users` counts them, under the lock. Once `shut` it is never open again, and nobody enters. In a forked
    child nobody enters at all: native threads don't exist there, and the sockets are the parent's. The lock may be
    taken again by its own thread, for a signal handler may run between any two lines.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.is_shut = False
        self._users = 0
        self._lock = threading.RLock()
        self._idle = threading.Event()
        self._generation = process.generation

    @property
    def forked(self) -> bool:
        return self._generation != process.generation

    def enter(self) -> None:
        if self._generation != process.generation:
            raise ClosedError(f"{self.what} is the parent process's: a forked child must make a group of its own")
        with self._lock:
            if self.is_shut:
                raise ClosedError(f"{self.what} is closed")
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self.is_shut and not self._users:
                self._idle.set()

    def shut(self) -> bool:
        """Lets nobody in any more. False: it was shut before."""
        with self._lock:
            if self.is_shut:
                return False
            self.is_shut = True
            if not self._users:
                self._idle.set()
            return True

    def wait_idle(self, timeout: float) -> bool:
        """After `shut`: until the last one has left."""
        return self._idle.wait(timeout)
