"""Who is inside a native object: it is freed only when nobody is."""

from __future__ import annotations

import threading

from eptransport._process import process
from eptransport.errors import ClosedError

__all__ = ["CLOSE_S", "Guard"]

CLOSE_S = 5.0
"""How long a close waits for the threads that are inside."""


class Guard:
    """Counts the threads inside native calls on one object.

    Invariants. `users` has an item for each thread inside. Once `shut` it is never open again, and nobody enters. In a
    forked child nobody enters at all: native threads don't exist there, and the sockets are the parent's.

    Entering and leaving take no lock: they are in the path of every write, and two locks there cost a microsecond. Who
    enters first adds its item and then looks at `is_shut`; `shut` first sets that and then looks at `users`. Each of
    these steps is atomic, so at least one of the two sees the other. Who sees that it is shut takes its item back and
    has not been inside. Where `shut` saw an item, whoever takes the last one sees `is_shut` and says that it is idle.
    So when that is said nobody is inside, and nobody comes in any more. The lock of `shut` may be taken again by its
    own thread, for a signal handler may run between any two lines.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.is_shut = False
        self._users: list[None] = []
        self._lock = threading.RLock()
        self._idle = threading.Event()
        self._generation = process.generation

    @property
    def forked(self) -> bool:
        return self._generation != process.generation

    def enter(self) -> None:
        if self._generation != process.generation:
            raise ClosedError(f"{self.what} is the parent process's: a forked child must make a group of its own")
        self._users.append(None)
        if self.is_shut:
            self.leave()
            raise ClosedError(f"{self.what} is closed")

    def leave(self) -> None:
        self._users.pop()
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
