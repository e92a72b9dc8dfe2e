"""Where the time of AllToAll calls goes, as a Chrome trace: EPT_TRACE=FILE, opened in a trace viewer."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator

__all__ = ["Trace"]

MOST_SPANS = 1_000_000
"""Then it stops: a server may run for days."""


class Trace:
    """Spans of one rank; all ranks on this machine share the clock."""

    def __init__(self, path: str, rank: int) -> None:
        base, extension = os.path.splitext(path)
        self.path = f"{base}.rank{rank}{extension or '.json'}"
        self._rank = rank
        self._spans: list[tuple[str, int, int, int, int]] = []

    @contextlib.contextmanager
    def span(self, name: str, lane: int) -> Iterator[None]:
        begin = time.monotonic_ns()
        try:
            yield
        finally:
            if len(self._spans) < MOST_SPANS:
                self._spans.append((name, lane, threading.get_ident(), begin, time.monotonic_ns()))

    def write(self) -> None:
        events = [
            {
                "name": name,
                "ph": "X",
                "pid": self._rank,
                "tid": lane,
                "ts": begin / 1e3,
                "dur": (end - begin) / 1e3,
                "args": {"thread": thread},
            }
            for name, lane, thread, begin, end in self._spans
        ]
        with open(self.path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ns"}, file)
