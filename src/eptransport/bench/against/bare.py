"""Bare TCP sockets: what the machine does without any library. The floor of every ratio."""

from __future__ import annotations

import platform
import threading
from collections.abc import Sequence
from pathlib import Path

from eptransport.bench import native
from eptransport.bench.against.side import MOST_BYTES, Recipe, Side
from eptransport.bench.processes import ProcessRank
from eptransport.bench.ranks import Mesh

__all__ = ["NAME", "find"]

NAME = "bare sockets"


def find(folder: Path) -> list[Recipe]:
    del folder
    kernel = platform.release()
    return [
        Recipe(
            NAME,
            "spinning ping-pong; blocking stream",
            kernel,
            _One,
            only=("latency", "bandwidth"),
        ),
        Recipe("bare, 2 streams", "two blocking streams, a thread each", kernel, _Two, only=("bandwidth",)),
    ]


class _One(Side):
    def __init__(self, rank: ProcessRank) -> None:
        self._side, self._mesh = rank.rank, Mesh(rank)
        self._fd = self._mesh.fds[1 - rank.rank]
        self._buffer = native.Buffer(MOST_BYTES)

    def latency(self, size: int, count: int) -> Sequence[float]:
        return [sample / 1e3 for sample in native.tcp_pingpong(self._fd, self._side, size, count)]

    def stream(self, size: int, count: int, depth: int) -> float:
        return native.tcp_stream(self._fd, self._side, self._buffer, size, count, depth)

    def close(self) -> None:
        self._mesh.close()


class _Two(Side):
    """Half of the messages over each of two sockets."""

    def __init__(self, rank: ProcessRank) -> None:
        self._ends = [_One(rank), _One(rank)]

    def latency(self, size: int, count: int) -> Sequence[float]:
        return self._ends[0].latency(size, count)

    def stream(self, size: int, count: int, depth: int) -> float:
        seconds: list[float] = []
        errors: list[BaseException] = []

        def run(end: _One) -> None:
            try:
                seconds.append(end.stream(size, max(1, count // 2), max(1, depth // 2)))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(end,)) for end in self._ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return max(seconds)

    def close(self) -> None:
        for end in self._ends:
            end.close()
