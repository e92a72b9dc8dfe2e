"""Ranks that are processes of this machine, each of which talks to the process that started it through a pipe."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from eptransport._bootstrap import LocalStore
from eptransport._closing import Closing
from eptransport.bench import native
from eptransport.bench.ranks import HOST, Rank, memory_folder
from eptransport.errors import EptError, InternalError, PeerLost, Timeout

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from eptransport import Group, Settings

__all__ = ["ProcessRank", "Processes"]


class Processes(Closing):
    """A process a rank, started with `body(rank)`. What a body returns is its last result; it may give others before
    (`ProcessRank.answer`) and be told what to do next (`tell`, `ProcessRank.told`). Closing ends those that are
    left."""

    def __init__(
        self, body: Callable[[ProcessRank], Any], world: int, progress: Callable[[int], None] = lambda done: None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._progress = progress
        self._store = LocalStore()
        self._ranks: list[_Child] = []
        self._idle = False
        """Every rank has given its result, so each ends by itself when its pipe closes."""
        self._file = tempfile.NamedTemporaryFile(prefix="eptransport-bench-", dir=memory_folder())  # noqa: SIM115
        self._file.truncate(native.Shared.BYTES)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for rank in range(world):
                here, there = context.Pipe()
                process = context.Process(target=_child, args=(there, self._file.name, rank, world, body), daemon=True)
                process.start()
                there.close()
                self._ranks.append(_Child(rank, process, here))
            undo.pop_all()

    def tell(self, value: Any) -> None:
        """What `told` of every rank returns next."""
        for child in self._ranks:
            with contextlib.suppress(BrokenPipeError):  # that it has ended is said by `results`, with its exit code
                child.pipe.send(value)

    def results(self, timeout_s: float | None = None) -> list[Any]:
        """The next result of every rank, in rank order; answers gathers and serves the store meanwhile. Raises what a
        rank raised, PeerLost where one has ended, Timeout where a result has not come in `timeout_s`."""
        self._idle = False
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        by_pipe = {child.pipe: child for child in self._ranks}
        results: dict[int, Any] = {}
        waiting = dict(by_pipe)
        while waiting:
            for ready in self._ready(list(waiting), deadline, timeout_s):
                child = by_pipe[ready]
                try:
                    kind, value = child.pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise _ended(child) from None
                if kind == "error":
                    raise value
                if kind == "progress":
                    self._progress(value)
                elif kind == "gather":
                    child.gathered.append(value)
                elif kind == "store":
                    operation, arguments = value
                    child.pipe.send(getattr(self._store, operation)(*arguments))
                else:
                    results[child.rank] = value
                    del waiting[child.pipe]
            if all(child.gathered for child in self._ranks):
                values = [child.gathered.pop(0) for child in self._ranks]
                for child in self._ranks:
                    child.pipe.send(values)
        self._idle = True
        return [results[child.rank] for child in self._ranks]

    def _ready(self, pipes: Sequence[Connection], deadline: float | None, timeout_s: float | None) -> list[Any]:
        ready = wait(pipes, None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = [child for child in self._ranks if child.pipe in pipes]
            raise Timeout(
                f"rank {silent[0].rank} of the bench gave no result in {timeout_s:g} s",
                operation="bench",
                peer=silent[0].rank,
            )
        return ready

    def close(self) -> None:
        for child in self._ranks:
            child.pipe.close()
        for child in self._ranks:
            if self._idle:
                child.process.join(5)
            # One that is still there waits for a rank that failed, or for nobody: its result is not wanted.
            child.process.kill()
            child.process.join()
        self._file.close()


@dataclass
class _Child:
    rank: int
    process: Any
    pipe: Connection
    gathered: list[Any] = field(default_factory=list)


def _ended(child: _Child) -> PeerLost:
    child.process.join(5)
    code = child.process.exitcode
    how = f"exit code {code}"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-code).name
    return PeerLost(
        f"rank {child.rank} of the bench ended with {how} before its result", operation="bench", peer=child.rank
    )


class _PipeStore:
    """The store of the process that started the ranks, seen from one of them. For a group's set-up: needs no torch."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def set(self, key: str, value: str, /) -> None:
        self._ask("set", key, value)

    def get(self, key: str, /) -> bytes:
        value: bytes = self._ask("get", key)
        return value

    def add(self, key: str, amount: int, /) -> int:
        total: int = self._ask("add", key, amount)
        return total

    def check(self, keys: list[str], /) -> bool:
        here: bool = self._ask("check", keys)
        return here

    def _ask(self, operation: str, *arguments: Any) -> Any:
        self._pipe.send(("store", (operation, arguments)))
        return self._pipe.recv()


class ProcessRank(Rank):
    def __init__(self, rank: int, world: int, shared: native.Shared, pipe: Connection) -> None:
        super().__init__(rank, world, shared)
        self._pipe = pipe
        self._store: Store | None = None

    def answer(self, value: Any) -> None:
        """A result before the last one."""
        self._pipe.send(("result", value))

    def told(self) -> Any:
        """What the process that started the ranks says next; EOFError when it has left."""
        return self._pipe.recv()

    def gather(self, value: Any) -> list[Any]:
        self._pipe.send(("gather", value))
        values: list[Any] = self._pipe.recv()
        return values

    def progress(self, done: int) -> None:
        if self.rank == 0:
            self._pipe.send(("progress", done))

    def store(self) -> Store:
        if self._store is None:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            if self.rank == 0:
                self._store = TCPStore(HOST, 0, self.world, is_master=True, wait_for_workers=False)
            port = self.gather(self._store.port if self._store is not None else 0)[0]
            if self._store is None:
                self._store = TCPStore(HOST, port, self.world, is_master=False)
        return self._store

    def group(self, settings: Settings) -> Group:
        from eptransport import Group

        return Group(settings, store=_PipeStore(self._pipe), rank=self.rank, world_size=self.world)


def _child(pipe: Connection, shared_file: str, rank: int, world: int, body: Callable[[ProcessRank], Any]) -> None:
    try:
        with open(shared_file, "r+b") as file:
            shared = native.Shared(mmap.mmap(file.fileno(), native.Shared.BYTES))
        pipe.send(("result", body(ProcessRank(rank, world, shared, pipe))))
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send(("error", _portable(error, rank)))
    # Whoever serves the store leaves last: the pipe is closed by the other side when it has every result.
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()


def _portable(error: BaseException, rank: int) -> EptError:
    """An error that can travel: ours as it is, any other with its traceback."""
    if isinstance(error, EptError):
        return error
    return InternalError(f"rank {rank} of the bench failed:\n{''.join(traceback.format_exception(error))}")
