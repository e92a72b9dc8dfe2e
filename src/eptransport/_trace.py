"""Where the time of AllToAll calls goes, as a Chrome trace: EPT_TRACE=FILE, opened in Perfetto or chrome://tracing.

One file a rank, FILE with `.rankN` before its extension; `merge` makes one of several. A rank is a process of the
trace, and each of its lanes has a track a phase. All ranks on one machine share the clock.

Invariant: after each flush (every 0.2 s) the file is one whole JSON document, with an event a line. A flush writes the
new events over the closing brackets, and the brackets behind them, in one call. A signal that kills amid that call cuts
it at a page: the lines before the cut are whole, and `merge` takes those.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eptransport._call import ffi, lib, text
from eptransport.errors import ClosedError

if TYPE_CHECKING:
    from eptransport.engine import Engine

__all__ = ["Trace", "merge"]

MOST_EVENTS = 1_000_000
"""Then it stops: a server may run for days. Some 150 MB."""
CAPACITY = 65_536
"""Spans between two flushes; a step of 8 ranks makes some 60."""
BATCH = 4096
FLUSH_S = 0.2
TRACKS = 4
"""Phases of a lane: those of ept_metrics_phase_id."""
PHASES = ("dispatch", "combine", "late weights", "transfer")
_END = "\n]}\n"


class Trace:
    """The trace of one rank, written while it goes."""

    def __init__(self, path: str, rank: int, engine: Engine) -> None:
        base, extension = os.path.splitext(path)
        self.path = f"{base}.rank{rank}{extension or '.json'}"
        self._rank = rank
        self._native = engine._native  # not the engine, which ends when its owner drops it
        self._outer: deque[tuple[str, int, int, int, int]] = deque()
        self._lock = threading.Lock()
        self._tracks: set[int] = set()
        self._written = 0
        self._lost = 0
        self._stop = threading.Event()
        self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 (open as long as the trace)
        head = f'{{"displayTimeUnit": "ns", "otherData": {{"rank": {rank}}}, "traceEvents": [\n'
        head += self._metadata("process_name", f"rank {rank}")
        self._end = 0
        self._put(head + _END)
        self._end = len(head)
        self._native.call(lib.ept_engine_trace, CAPACITY)
        self._thread = threading.Thread(target=self._run, name=f"ept trace {rank}", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def span(self, name: str, lane: int) -> Iterator[None]:
        """A whole call, what Python does for it included."""
        begin = time.monotonic_ns()
        try:
            yield
        finally:
            phase = 0 if name.startswith("dispatch") else 1
            self._outer.append((name, lane, phase, begin, time.monotonic_ns()))

    def write(self) -> None:
        """Writes what has happened since the last time."""
        with self._lock:
            if self._file.closed:
                return
            events = self._native_events()
            for _ in range(len(self._outer)):  # more may come meanwhile
                name, lane, phase, begin, end = self._outer.popleft()
                events.append(self._event(name, lane, phase, begin, end, {}))
            room = MOST_EVENTS - self._written
            self._lost += max(0, len(events) - room)
            events = events[:room]
            if events:
                self._written += len(events)
                self._append(events)

    def close(self) -> None:
        """Writes the rest, and ends."""
        self._stop.set()
        self._thread.join()
        self.write()
        with self._lock:
            if self._lost and not self._file.closed:
                self._append([self._metadata("lost_spans", str(self._lost))])
            self._file.close()

    def _append(self, events: list[str]) -> None:
        added = ",\n" + ",\n".join(events)
        self._put(added + _END)
        self._end += len(added)

    def _put(self, text: str) -> None:
        """In one call of the system: a buffered file would make several, and between two of them no brackets would
        stand at the end. All is ASCII, so characters are bytes."""
        left, at = text.encode("ascii"), self._end
        while left:
            wrote = os.pwrite(self._file.fileno(), left, at)
            left, at = left[wrote:], at + wrote

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_S):
            try:
                self.write()
            except (ClosedError, OSError, ValueError):
                return

    def _native_events(self) -> list[str]:
        spans, count, lost = ffi.new("ept_span[]", BATCH), ffi.new("size_t *"), ffi.new("uint64_t *")
        events: list[str] = []
        while not self._native.closed:
            count[0] = BATCH
            self._native.call(lib.ept_engine_spans, spans, count, lost)
            for index in range(count[0]):
                span = spans[index]
                about: dict[str, Any] = {}
                if span.peer != lib.EPT_NO_PEER:
                    about = {"peer": span.peer, "generation": span.generation}
                events.append(self._event(text(span.name), span.lane, span.phase, span.begin_ns, span.end_ns, about))
            if count[0] < BATCH:
                break
        self._lost = max(self._lost, lost[0])
        return events

    def _event(self, name: str, lane: int, phase: int, begin: int, end: int, about: dict[str, Any]) -> str:
        track = lane * TRACKS + phase
        event = (
            f'{{"name": "{name}", "ph": "X", "pid": {self._rank}, "tid": {track}, "ts": {_us(begin)}, '
            f'"dur": {_us(end - begin)}, "args": {json.dumps(about)}}}'
        )
        if track in self._tracks:
            return event
        self._tracks.add(track)
        order = self._metadata("thread_sort_index", track, track)
        return f"{self._metadata('thread_name', f'lane {lane} {PHASES[phase]}', track)},\n{order},\n{event}"

    def _metadata(self, name: str, value: str | int, track: int = 0) -> str:
        key = "sort_index" if name == "thread_sort_index" else "name"
        return json.dumps(
            {"name": name, "ph": "M", "pid": self._rank, "tid": track, "args": {key: value}},
        )


def merge(files: Sequence[str | os.PathLike[str]], into: str | os.PathLike[str]) -> int:
    """One trace of those of several ranks, or of one that was killed; how many events it has. Of a file whose end is
    cut the whole lines are taken. ValueError: a file is no trace of ours."""
    events = [event for file in files for event in _events(Path(file))]
    text = '{"displayTimeUnit": "ns", "traceEvents": [\n' + ",\n".join(events) + _END
    Path(into).write_text(text, encoding="ascii")
    return len(events)


def _events(file: Path) -> Iterator[str]:
    """As they stand there: floats of Python have not the digits for nanoseconds since the machine started."""
    head, *lines = file.read_text(encoding="ascii").split("\n")
    if not head.endswith('"traceEvents": ['):
        raise ValueError(f"{file} is no trace that EPT_TRACE wrote: its first line is {head[:80]!r}")
    for number, line in enumerate(lines):
        event = line.removesuffix(",")
        if event in ("", "]", "]}"):
            continue
        try:
            json.loads(event)
        except json.JSONDecodeError as problem:
            if number == len(lines) - 1:
                return
            raise ValueError(f"{file}, line {number + 2}, is no event: {problem}") from None
        yield event


def _us(ns: int) -> str:
    """Exact: a float of microseconds since the machine started has lost its nanoseconds, and spans their order."""
    return f"{ns // 1000}.{ns % 1000:03d}"
