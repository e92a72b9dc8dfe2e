"""Mooncake's transfer engine over tcp, from Python. Its own threads move the bytes; the target looks at its memory."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from eptransport.bench.against.python_memory import ORDER, TwoBuffers
from eptransport.bench.against.side import Absent, Recipe, Side
from eptransport.bench.processes import ProcessRank
from eptransport.bench.ranks import HOST

__all__ = ["find"]

PACKAGES = (
    "mooncake-transfer-engine-non-cuda",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
)
TIMEOUT_S = 50.0
"""Less than what a side is granted for one measure, so that it says what it waited for."""


def find(folder: Path) -> list[Recipe]:
    del folder
    if importlib.util.find_spec("mooncake") is None:
        raise Absent("there is no mooncake: pip install mooncake-transfer-engine-non-cuda")
    return [
        Recipe(
            "mooncake",
            "transfer engine over tcp; one way: transfer_sync_write, the target looks at the last bytes; streams: "
            "transfer_submit_write; post: until transfer_sync_write returns",
            _version(),
            _Mooncake,
            python=True,
            environment={"MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "2"},
        )
    ]


def _version() -> str:
    for package in PACKAGES:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


class _Mooncake(Side):
    def __init__(self, rank: ProcessRank) -> None:
        try:
            from mooncake.engine import TransferEngine
        except ImportError as problem:
            hint = "it needs the system's libraries: apt-get install libibverbs1 libnuma1 libcurl4"
            raise ImportError(f"{problem}; {hint}") from None

        self._side = rank.rank
        self._memory = TwoBuffers()
        self._engine = TransferEngine()
        _check(self._engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""), "initialize")
        for address in (self._memory.landing_address, self._memory.source_address):
            _check(self._engine.register_memory(address, TwoBuffers.LENGTH), "register_memory")
        cards = rank.gather((f"{HOST}:{self._engine.get_rpc_port()}", self._memory.landing_address))
        self._peer, self._there = cards[1 - rank.rank]
        self._turn = 0

    def _mark(self) -> bytes:
        """What the memory did not hold before; the same on both sides."""
        self._turn += 1
        return self._turn.to_bytes(8, "big")

    def _put_mark(self, end: int, size: int, mark: bytes) -> None:
        """At the end of the `size` bytes that end there."""
        room = min(size, len(mark))
        self._memory.source[end - room : end] = mark[-room:]

    def _write(self, offset: int, size: int) -> None:
        source = self._memory.source_address + offset
        _check(self._engine.transfer_sync_write(self._peer, source, self._there + offset, size), "transfer_sync_write")

    def _submit(self, offset: int, size: int) -> Any:
        source = self._memory.source_address + offset
        batch = self._engine.transfer_submit_write(self._peer, source, self._there + offset, size)
        _check(min(batch, 0), "transfer_submit_write")
        return batch

    def _finish(self, batch: Any) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not (state := self._engine.transfer_check_status(batch)):
            _yield(deadline, "the end of a transfer")
        _check(min(state, 0), "transfer_check_status")

    def _until(self, end: int, size: int, mark: bytes) -> None:
        room = min(size, len(mark))
        expected, landing = mark[-room:], self._memory.landing
        deadline = time.monotonic() + TIMEOUT_S
        while landing[end - room : end] != expected:
            _yield(deadline, "the peer's write")

    def latency(self, size: int, count: int) -> Sequence[float]:
        samples = []
        for _ in range(count):
            mark = self._mark()
            start = time.perf_counter_ns()
            self._put_mark(size, size, mark)
            if self._side == 0:
                self._write(0, size)
            self._until(size, size, mark)
            if self._side == 1:
                self._write(0, size)
            samples.append((time.perf_counter_ns() - start) / 2e3)
        return samples

    def stream(self, size: int, count: int, depth: int) -> float:
        mark = self._mark()
        # The last write into each slot carries the mark: each may have a connection of its own and speaks for no other.
        slots = range(min(count, depth))
        start = time.perf_counter()
        if self._side == 1:
            for slot in slots:
                self._until((slot + 1) * size, size, mark)
            self._answer(mark)
            return 0.0
        batches: list[Any] = []
        for index in range(count):
            slot = index % depth
            if index >= depth:
                self._finish(batches[slot])
            if index >= count - depth:
                self._put_mark((slot + 1) * size, size, mark)
            batch = self._submit(slot * size, size)
            if index < depth:
                batches.append(batch)
            else:
                batches[slot] = batch
        for batch in batches:
            self._finish(batch)
        self._until(ORDER + 8, 8, mark)
        return time.perf_counter() - start

    def _answer(self, mark: bytes) -> None:
        self._put_mark(ORDER + 8, 8, mark)
        self._write(ORDER, 8)

    def posts(self, size: int, count: int) -> Sequence[float]:
        samples: list[float] = []
        mark = self._mark()
        if self._side == 0:
            for _ in range(count):
                start = time.perf_counter_ns()
                self._write(0, size)
                samples.append((time.perf_counter_ns() - start) / 1e3)
            self._answer(mark)
        else:
            self._until(ORDER + 8, 8, mark)
        return samples


def _check(code: int, what: str) -> None:
    if code < 0:
        raise RuntimeError(f"mooncake's {what} answered {code}")


def _yield(deadline: float, what: str) -> None:
    # Its threads need the cores that the two ranks poll on.
    os.sched_yield()
    if time.monotonic() > deadline:
        raise TimeoutError(f"mooncake: {what} has not come in {TIMEOUT_S:g} s")
