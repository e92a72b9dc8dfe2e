"""Our sides, through the same questions as everybody else's: the native loops, and the Python API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eptransport.bench import native
from eptransport.bench.against.side import MOST_BYTES, Recipe, Side
from eptransport.bench.processes import ProcessRank

__all__ = ["NATIVE", "PYTHON", "find", "variants"]

NATIVE = "eptransport"
PYTHON = "eptransport.py"

IDLE_S = 3600.0
"""While the other sides are measured ours says nothing to its peer, and is not dead for that."""


def find(folder: Path, backend: str, options: dict[str, Any]) -> list[Recipe]:
    from eptransport import __version__

    del folder
    options = {"backend": backend, "dead_s": IDLE_S, **options}
    return [
        _native(NATIVE, "", options),
        Recipe(
            PYTHON,
            "the same through the Python API; post: until Transfer.wait returns",
            __version__,
            _Open(_Python, options),
            python=True,
        ),
    ]


def variants(backend: str, options: dict[str, Any], setting: str, values: Sequence[str]) -> list[Recipe]:
    """Our native loop once for each value of a setting, which its processes find in their environment."""
    options = {"backend": backend, "dead_s": IDLE_S, **options}
    return [_native(f"{setting}={value}", " under this setting", options, {setting: value}) for value in values]


def _native(name: str, more: str, options: dict[str, Any], environment: dict[str, str] | None = None) -> Recipe:
    from eptransport import __version__

    return Recipe(
        name,
        f"a write with a signal, native loop{more}",
        __version__,
        _Open(_Native, options),
        environment=environment or {},
        only=("latency", "bandwidth", "rate"),
    )


class _Open:
    def __init__(self, kind: type[_Native] | type[_Python], options: dict[str, Any]) -> None:
        self._kind, self._options = kind, options

    def __call__(self, rank: ProcessRank) -> Side:
        from eptransport import Settings

        return self._kind(rank, rank.group(Settings(**self._options)))


class _Native(Side):
    def __init__(self, rank: ProcessRank, group: Any) -> None:
        from eptransport._call import ffi

        self._group = group
        engine = int(ffi.cast("uintptr_t", group.engine.handle))
        self._pair = native.Pair(engine, 1 - rank.rank, rank.rank, MOST_BYTES)

    def latency(self, size: int, count: int) -> Sequence[float]:
        return [sample / 1e3 for sample in self._pair.pingpong(size, count)]

    def stream(self, size: int, count: int, depth: int) -> float:
        return self._pair.stream(size, count, depth)

    def close(self) -> None:
        self._pair.close()
        self._group.close()


class _Python(Side):
    """As a user of `Engine` would write it: everything registered once, then writes and waits."""

    def __init__(self, rank: ProcessRank, group: Any) -> None:
        import mmap

        self._side, self._group = rank.rank, group
        engine = group.engine
        self._landing, self._source = mmap.mmap(-1, MOST_BYTES), mmap.mmap(-1, MOST_BYTES)
        self._source[:] = b"\x5a" * MOST_BYTES
        memory, self._memory = engine.register(self._landing), engine.register(self._source)
        self._signal = engine.signal(1 - rank.rank, "bench")
        self._target = 0
        card = memory.export(1 - rank.rank), self._signal.export()
        region, signal = rank.gather(card)[1 - rank.rank]
        self._peer = engine.peer(1 - rank.rank)
        self._region, self._remote = self._peer.import_region(region), self._peer.import_signal(signal)

    def _write(self, size: int, offset: int = 0) -> Any:
        return self._peer.write(
            self._memory, self._region, size, source_offset=offset, destination_offset=offset, signal=self._remote
        )

    def _wait(self, count: int = 1) -> None:
        self._target += count
        self._signal.wait(self._target)

    def latency(self, size: int, count: int) -> Sequence[float]:
        samples = []
        for index in range(count):
            mark = index % 251 + 1
            start = time.perf_counter_ns()
            # The source is free only when it is this side's turn: the peer has written since the turn before.
            if self._side == 0:
                self._source[0] = mark
                self._write(size)
            self._wait()
            if self._landing[0] != mark:
                raise AssertionError(f"turn {index}: the signal rose before its bytes were there")
            if self._side == 1:
                self._source[0] = mark
                self._write(size)
            samples.append((time.perf_counter_ns() - start) / 2e3)
        return samples

    def stream(self, size: int, count: int, depth: int) -> float:
        start = time.perf_counter()
        if self._side == 1:
            self._wait(count)
            self._write(0).wait()
            return 0.0
        transfers: list[Any] = []
        for index in range(count):
            if index >= depth:
                transfers[index % depth].wait()
                transfers[index % depth] = self._write(size, index % depth * size)
            else:
                transfers.append(self._write(size, index * size))
        for transfer in transfers:
            transfer.wait()
        self._wait()
        return time.perf_counter() - start

    def posts(self, size: int, count: int) -> Sequence[float]:
        samples: list[float] = []
        if self._side == 1:
            self._wait(count)
            self._write(0).wait()
            return samples
        for _ in range(count):
            start = time.perf_counter_ns()
            self._write(size).wait()
            samples.append((time.perf_counter_ns() - start) / 1e3)
        self._wait()
        return samples

    def close(self) -> None:
        self._group.close()
