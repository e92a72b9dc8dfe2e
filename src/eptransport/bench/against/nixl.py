"""NIXL with its UCX backend over tcp, from Python: prepared transfers, a notification where the target must know."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from eptransport.bench.against.python_memory import TwoBuffers
from eptransport.bench.against.side import Absent, Recipe, Side
from eptransport.bench.processes import ProcessRank

__all__ = ["find"]

PACKAGES = ("nixl_cu12", "nixl_cu13")
TIMEOUT_S = 50.0
"""Less than what a side is granted for one measure, so that it says what it waited for."""


def find(folder: Path) -> list[Recipe]:
    del folder
    package = next((name for name in PACKAGES if importlib.util.find_spec(name) is not None), None)
    if package is None:
        raise Absent("there is no nixl_cu12 or nixl_cu13: pip install nixl-cu12")
    return [
        Recipe(
            "nixl",
            "UCX backend over tcp, prepared transfers, no progress thread; one way and streams with a notification "
            "each; post: until check_xfer_state says DONE",
            metadata.version(package.replace("_", "-")),
            _Open(package),
            python=True,
            # Its UCX is its own copy, and its log would go between the lines of the table.
            environment={"UCX_TLS": "tcp", "NIXL_LOG_LEVEL": "ERROR", "UCX_WARN_UNUSED_ENV_VARS": "n"},
        )
    ]


class _Open:
    def __init__(self, package: str) -> None:
        self._package = package

    def __call__(self, rank: ProcessRank) -> Side:
        return _Nixl(rank, importlib.import_module(f"{self._package}._api"))


class _Nixl(Side):
    def __init__(self, rank: ProcessRank, api: Any) -> None:
        self._side = rank.rank
        # Its progress thread beside two ranks that poll makes three that spin on two cores: 1.1 ms for 8 bytes.
        self._agent = api.nixl_agent(f"rank {rank.rank}", api.nixl_agent_config(enable_prog_thread=False))
        self._memory = TwoBuffers()
        both = (self._memory.landing_address, self._memory.source_address)
        self._agent.register_memory(
            self._agent.get_reg_descs([(address, TwoBuffers.LENGTH, 0, "") for address in both], "DRAM")
        )
        cards = rank.gather((self._agent.get_agent_metadata(), self._memory.landing_address))
        blob, self._there = cards[1 - rank.rank]
        self._peer = self._agent.add_remote_agent(blob)
        self._handles: dict[tuple[int, int, bytes], Any] = {}
        self._come = 0

    def _handle(self, offset: int, size: int, notification: bytes) -> Any:
        key = offset, size, notification
        if key not in self._handles:
            here, there = (
                self._agent.get_xfer_descs([(base + offset, size, 0)], "DRAM")
                for base in (self._memory.source_address, self._there)
            )
            self._handles[key] = self._agent.initialize_xfer("WRITE", here, there, self._peer, notification)
        return self._handles[key]

    def _give(self, handle: Any, notification: bytes = b"") -> None:
        """Until it is done: without a progress thread the notification is sent when one asks for the state."""
        if not self._post(handle, notification):
            self._finish(handle)

    def _post(self, handle: Any, notification: bytes = b"") -> bool:
        state = self._agent.transfer(handle, notification)
        if state == "ERR":
            raise RuntimeError("nixl refused a transfer")
        return bool(state == "DONE")

    def _finish(self, handle: Any) -> None:
        deadline = 0.0
        while (state := self._agent.check_xfer_state(handle)) != "DONE":
            if state == "ERR":
                raise RuntimeError("a transfer of nixl failed")
            deadline = _soon(deadline, "a transfer's DONE")

    def _until(self, count: int) -> None:
        """Until so many notifications have come in all."""
        deadline = 0.0
        while self._come < count:
            self._come += sum(len(found) for found in self._agent.get_new_notifs().values())
            deadline = _soon(deadline, f"notification {count}, {self._come} have come")

    def latency(self, size: int, count: int) -> Sequence[float]:
        handle, landing, source = self._handle(0, size, b"n"), self._memory.landing, self._memory.source
        start_come = self._come
        samples = []
        for index in range(count):
            mark = index % 251 + 1
            start = time.perf_counter_ns()
            if self._side == 0:
                source[0] = mark
                self._give(handle, b"n")
            self._until(start_come + index + 1)
            if landing[0] != mark:
                raise AssertionError(f"turn {index}: the notification came before its bytes")
            if self._side == 1:
                source[0] = mark  # not before: until the peer has written again the last turn's may be read from it
                self._give(handle, b"n")
            samples.append((time.perf_counter_ns() - start) / 2e3)
        return samples

    def stream(self, size: int, count: int, depth: int) -> float:
        come = self._come
        answer = self._handle(0, 1, b"a")
        handles = [self._handle(slot * size, size, b"n") for slot in range(depth)]
        busy = [False] * depth
        start = time.perf_counter()
        if self._side == 1:
            self._until(come + count)
            self._give(answer, b"a")
            return 0.0
        for index in range(count):
            slot = index % depth
            if busy[slot]:
                self._finish(handles[slot])
            busy[slot] = not self._post(handles[slot], b"n")
        for slot in range(depth):
            if busy[slot]:
                self._finish(handles[slot])
        self._until(come + 1)
        return time.perf_counter() - start

    def posts(self, size: int, count: int) -> Sequence[float]:
        come = self._come
        samples: list[float] = []
        answer, handle = self._handle(0, 1, b"a"), self._handle(0, size, b"")
        if self._side == 0:
            for _ in range(count):
                start = time.perf_counter_ns()
                self._give(handle)
                samples.append((time.perf_counter_ns() - start) / 1e3)
            self._give(answer, b"a")
        else:
            self._until(come + 1)  # which moves its end of the network
        return samples

    def close(self) -> None:
        for handle in self._handles.values():
            handle.release()


def _soon(deadline: float, what: str) -> float:
    """Looks at the clock at the first question and then each time; raises past the deadline."""
    now = time.monotonic()
    if deadline and now > deadline:
        raise TimeoutError(f"nixl: {what} in {TIMEOUT_S:g} s")
    return deadline or now + TIMEOUT_S
