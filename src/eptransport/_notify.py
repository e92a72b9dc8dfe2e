"""One descriptor of the engine wired to the event loops: how transfers and signals are awaited."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from eptransport.errors import ClosedError, Timeout

__all__ = ["Notifier"]

Poll = Callable[[], bool]
"""True: it has happened. False: not yet. Raises when it never will."""

INLINE_POLL_S = 0.0005
"""How often a loop moves the network where nobody else does (EPT_PROGRESS=inline)."""


class Notifier:
    """The waiters of one engine, of any number of event loops.

    Invariants. The descriptor only says that something happened, so after it each waiter looks for itself. Every loop
    that has a waiter reads the descriptor, but whichever clears it first wakes the others' waiters too: none depends on
    seeing it readable. A request to be notified is one a thing, so each waiter that is left asks again.
    """

    def __init__(self, descriptor: int, clear: Callable[[], Any], inline: bool) -> None:
        self._descriptor = descriptor
        self._clear = clear
        self._inline = inline
        self._lock = threading.RLock()
        self._waiters: dict[asyncio.AbstractEventLoop, list[_Waiter]] = {}
        self._closed = False

    async def until(self, what: str, poll: Poll, ask: Callable[[], Any], timeout: float) -> None:
        """Returns when `poll` says so; raises what it raises, or Timeout after `timeout` seconds. Cancelling forgets
        it."""
        if poll():
            return
        loop = asyncio.get_running_loop()
        if self._inline:
            await self._drive(what, poll, loop.time() + timeout, timeout)
            return
        waiter = _Waiter(loop, poll, ask)
        self._add(waiter)
        deadline = loop.call_later(timeout, waiter.fail, Timeout(f"{what} has not happened in {timeout:g} s"))
        try:
            ask()
            waiter.look()
            await waiter.future
        finally:
            deadline.cancel()
            self._remove(waiter)

    def close(self) -> None:
        """Fails everybody who still waits."""
        with self._lock:
            self._closed = True
            waiters = [waiter for some in self._waiters.values() for waiter in some]
        for waiter in waiters:
            waiter.from_anywhere(waiter.fail, ClosedError("the engine was closed while this was awaited"))

    async def _drive(self, what: str, poll: Poll, deadline: float, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        while not poll():
            if loop.time() > deadline:
                raise Timeout(f"{what} has not happened in {timeout:g} s")
            await asyncio.sleep(INLINE_POLL_S)

    def _add(self, waiter: _Waiter) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError("the engine is closed")
            mine = self._waiters.setdefault(waiter.loop, [])
            if not mine:
                waiter.loop.add_reader(self._descriptor, self._happened)
            mine.append(waiter)

    def _remove(self, waiter: _Waiter) -> None:
        with self._lock:
            mine = self._waiters[waiter.loop]
            mine.remove(waiter)
            if not mine:
                del self._waiters[waiter.loop]
                if not waiter.loop.is_closed():
                    waiter.loop.remove_reader(self._descriptor)

    def _happened(self) -> None:
        try:
            self._clear()
        except ClosedError:
            return  # close() fails the waiters
        here = asyncio.get_running_loop()
        with self._lock:
            waiters = [waiter for some in self._waiters.values() for waiter in some]
        for waiter in waiters:
            if waiter.loop is here:
                waiter.again()
            else:
                waiter.from_anywhere(waiter.again)


class _Waiter:
    """One await. Everything but `from_anywhere` runs in its own loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, poll: Poll, ask: Callable[[], Any]) -> None:
        self.loop = loop
        self.poll = poll
        self.ask = ask
        self.future: asyncio.Future[None] = loop.create_future()

    def look(self) -> None:
        if self.future.done():
            return
        try:
            if self.poll():
                self.future.set_result(None)
        except Exception as error:
            self.future.set_exception(error)

    def again(self) -> None:
        self.look()
        if self.future.done():
            return
        try:
            self.ask()
        except Exception as error:
            self.future.set_exception(error)
            return
        self.look()

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def from_anywhere(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits there any more
            self.loop.call_soon_threadsafe(function, *args)
