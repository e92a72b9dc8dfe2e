"""SIGUSR1 asks every group of this process why nothing goes on; the answer goes to the log.

The signal's handler is native and only wakes a thread here, so a report comes also while the main thread is inside a
native wait, where Python's own handlers don't run. It is installed with the first group, where the program has none and
doesn't ignore the signal; it is given back with the last one.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import weakref
from typing import TYPE_CHECKING

from eptransport._call import call, ffi, lib
from eptransport._process import process
from eptransport.errors import EptError

if TYPE_CHECKING:
    from eptransport.engine import Engine

__all__ = ["forget", "report_all", "watch"]

logger = logging.getLogger("eptransport")


class _Watcher:
    """Invariant: the thread lives as long as the process, and the handler from the first watched engine to the last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self.thread: threading.Thread | None = None
        self.generation = process.generation


_watcher = _Watcher()


def watch(engine: Engine) -> bool:
    """False: the program has a handler of its own, which stays."""
    watcher = _current()
    with watcher.lock:
        descriptor = ffi.new("int32_t *")
        if call(lib.ept_stuck_signal, int(signal.SIGUSR1), descriptor):
            return False
        watcher.engines.add(engine)
        weakref.finalize(engine, _give_back)  # also where it is dropped rather than closed
        if watcher.thread is None:
            watcher.thread = threading.Thread(target=_read, args=(descriptor[0],), name="ept why_stuck", daemon=True)
            watcher.thread.start()
        return True


def forget(engine: Engine) -> None:
    watcher = _current()
    with watcher.lock:
        watcher.engines.discard(engine)
        _give_back()


def _give_back() -> None:
    watcher = _current()
    with watcher.lock:
        if not watcher.engines:
            lib.ept_stuck_signal_off()


def report_all() -> None:
    """What each open engine has to say."""
    watcher = _current()
    with watcher.lock:
        engines = sorted(watcher.engines, key=lambda engine: (id(type(engine)), engine.rank))
    for engine in engines:
        try:
            _say(engine.why_stuck())
        except EptError as error:
            _say(f"rank {engine.rank}: {error}")


def _say(report: str) -> None:
    if logger.isEnabledFor(logging.WARNING):
        logger.warning("%s", report)
    else:  # whoever sends the signal wants to see it
        print(report, file=sys.stderr, flush=True)


def _read(descriptor: int) -> None:
    while True:
        try:
            os.read(descriptor, 8)
        except OSError:
            return
        report_all()


def _current() -> _Watcher:
    """A forked child begins anew: it has neither the thread nor the handler."""
    global _watcher
    if _watcher.generation != process.generation:
        _watcher = _Watcher()
    return _watcher
