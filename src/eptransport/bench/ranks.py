"""The ranks that take part in a measurement, and how they meet.

A job is a picklable object with `run(rank)`. `run_job` runs it on every rank and gives back what each returned: as
processes (`spawn`), or as threads of this process where the backend is loopback. `Rank` is what the job sees, alike for
all.
"""

from __future__ import annotations

import abc
import contextlib
import mmap
import multiprocessing
import os
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol

from eptransport._bootstrap import LocalStore
from eptransport._process import cores
from eptransport.bench import native
from eptransport.errors import ClosedError, EptError, InternalError, PeerLost, Timeout, UnsupportedError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from eptransport import Group, Settings

__all__ = ["Job", "Mesh", "Rank", "StoreRank", "run_job"]

HOST = "127.0.0.1"
MEET_TIMEOUT_S = 300.0


class Job(Protocol):
    def run(self, rank: Rank) -> Any: ...


class Rank(abc.ABC):
    """One rank of a job, in its own process or thread."""

    def __init__(self, rank: int, world: int, shared: native.Shared) -> None:
        self.rank = rank
        self.world = world
        self.shared = shared

    @abc.abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """What every rank brought, in rank order. For set-up, not for the clock."""

    @abc.abstractmethod
    def group(self, settings: Settings) -> Group:
        """This rank's group over all ranks of the job."""

    @abc.abstractmethod
    def store(self) -> Store:
        """For torch.distributed; UnsupportedError where ranks are threads."""

    def progress(self, done: int) -> None:
        """Says that so many units of the job's work are done."""
        del done

    @property
    def threads(self) -> bool:
        """Ranks are threads of one process."""
        return False

    def barrier(self) -> None:
        """Quick and cheap: between iterations."""
        native.barrier(self.shared, self.world)

    def pin(self) -> None:
        """One core a rank, as long as there are so many."""
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[self.rank % len(allowed)]})

    def cpu_seconds(self) -> float:
        """CPU time so far; where ranks share a process, rank 0 has it all."""
        return time.process_time() if not self.threads or self.rank == 0 else 0.0

    @property
    def cores(self) -> int:
        """Cores for each rank of the job."""
        return max(1, cores() // self.world)


class Mesh:
    """A plain TCP socket between every two ranks, for the floors.

    With reno where the system has it: inside one machine nothing is congested, and the pacing of bbr, the default of
    some systems, would halve the bandwidth and so make a floor that is easy to reach.
    """

    def __init__(self, rank: Rank) -> None:
        self._sockets: list[socket.socket | None] = [None] * rank.world
        with socket.create_server((HOST, 0), backlog=rank.world) as server:
            server.settimeout(MEET_TIMEOUT_S)
            ports = rank.gather(server.getsockname()[1])
            for other in range(rank.rank):
                peer = socket.create_connection((HOST, ports[other]), timeout=MEET_TIMEOUT_S)
                peer.sendall(rank.rank.to_bytes(4, "little"))
                self._sockets[other] = peer
            for _ in range(rank.rank + 1, rank.world):
                peer, _ = server.accept()
                peer.settimeout(MEET_TIMEOUT_S)
                self._sockets[int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "little")] = peer
        for open_socket in self._sockets:
            if open_socket is not None:
                open_socket.setblocking(True)
                with contextlib.suppress(OSError):
                    open_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")

    @property
    def fds(self) -> list[int]:
        return [-1 if each is None else each.fileno() for each in self._sockets]

    def close(self) -> None:
        for each in self._sockets:
            if each is not None:
                each.close()


def run_job(job: Job, world: int, *, threads: bool = False, progress: Callable[[int], None] | None = None) -> list[Any]:
    """What `job.run` returned on each rank, in rank order. A rank's error is raised, and the other ranks are ended."""
    return (_run_threads if threads else _run_processes)(job, world, progress or (lambda done: None))


# ---- processes: each talks to this one through a pipe ----------------------------------------------------------------


def _run_processes(job: Job, world: int, progress: Callable[[int], None]) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.NamedTemporaryFile(prefix="eptransport-bench-", dir=_memory_folder()) as file:
        file.truncate(native.Shared.BYTES)
        ranks: list[_Child] = []
        try:
            for rank in range(world):
                here, there = context.Pipe()
                process = context.Process(target=_child, args=(there, file.name, rank, world, job), daemon=True)
                process.start()
                there.close()
                ranks.append(_Child(rank, process, here))
            results = _serve(ranks, progress)
            for child in ranks:
                child.pipe.close()
            for child in ranks:
                child.process.join(5)
            return results
        finally:
            # What is still there waits for a rank that failed, or for nobody: its result is known or not wanted.
            for child in ranks:
                child.process.kill()
            for child in ranks:
                child.process.join()
                child.pipe.close()


@dataclass
class _Child:
    rank: int
    process: Any
    pipe: Connection
    gathered: list[Any] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)


def _serve(ranks: Sequence[_Child], progress: Callable[[int], None]) -> list[Any]:
    """Answers gathers and serves the store until every rank has brought its result."""
    store = LocalStore()
    by_pipe = {child.pipe: child for child in ranks}
    waiting = dict(by_pipe)
    while waiting:
        for ready in wait(list(waiting)):
            child = by_pipe[ready]  # type: ignore[index]
            try:
                kind, value = child.pipe.recv()
            except (EOFError, ConnectionResetError):
                child.process.join(5)
                raise PeerLost(
                    f"rank {child.rank} of the bench ended with exit code {child.process.exitcode} before its result",
                    operation="bench",
                    peer=child.rank,
                ) from None
            if kind == "error":
                raise value
            if kind == "progress":
                progress(value)
            elif kind == "gather":
                child.gathered.append(value)
            elif kind == "store":
                operation, arguments = value
                child.pipe.send(getattr(store, operation)(*arguments))
            else:
                child.results.append(value)
                del waiting[child.pipe]
        if all(child.gathered for child in ranks):
            values = [child.gathered.pop(0) for child in ranks]
            for child in ranks:
                child.pipe.send(values)
    return [child.results[0] for child in ranks]


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


class _ProcessRank(Rank):
    def __init__(self, rank: int, world: int, shared: native.Shared, pipe: Connection) -> None:
        super().__init__(rank, world, shared)
        self._pipe = pipe
        self._store: Store | None = None

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


def _child(pipe: Connection, shared_file: str, rank: int, world: int, job: Job) -> None:
    try:
        with open(shared_file, "r+b") as file:
            shared = native.Shared(mmap.mmap(file.fileno(), native.Shared.BYTES))
        pipe.send(("result", job.run(_ProcessRank(rank, world, shared, pipe))))
    except BaseException as error:
        pipe.send(("error", _portable(error, rank)))
    # Whoever serves the store leaves last: the pipe is closed by the other side when it has every result.
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()


def _portable(error: BaseException, rank: int) -> EptError:
    """An error that can travel: ours as it is, any other with its traceback."""
    if isinstance(error, EptError):
        return error
    return InternalError(f"rank {rank} of the bench failed:\n{''.join(traceback.format_exception(error))}")


def _memory_folder() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


# ---- threads: loopback's ranks ---------------------------------------------------------------------------------------


def _run_threads(job: Job, world: int, progress: Callable[[int], None]) -> list[Any]:
    room = _Room(world)
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = job.run(_ThreadRank(rank, world, room, progress))
        except BaseException as error:
            errors.append(error)
            room.meeting.abort()
            native.break_barrier(room.shared)

    threads = [threading.Thread(target=body, args=(rank,), name=f"bench rank {rank}") for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        # The first, unless it only heard of another one.
        heard = (threading.BrokenBarrierError, ClosedError, PeerLost)
        raise next((error for error in errors if not isinstance(error, heard)), errors[0])
    return results


class _Room:
    def __init__(self, world: int) -> None:
        self.shared = native.Shared(mmap.mmap(-1, native.Shared.BYTES))
        self.meeting = threading.Barrier(world, timeout=MEET_TIMEOUT_S)
        self.values: list[Any] = [None] * world
        self.store = LocalStore()


class _ThreadRank(Rank):
    def __init__(self, rank: int, world: int, room: _Room, progress: Callable[[int], None]) -> None:
        super().__init__(rank, world, room.shared)
        self._room = room
        self._progress = progress

    @property
    def threads(self) -> bool:
        return True

    def gather(self, value: Any) -> list[Any]:
        self._room.values[self.rank] = value
        self._room.meeting.wait()
        values = list(self._room.values)
        self._room.meeting.wait()
        return values

    def progress(self, done: int) -> None:
        if self.rank == 0:
            self._progress(done)

    def store(self) -> Store:
        raise UnsupportedError("torch.distributed needs a process a rank, and these ranks are threads of one")

    def group(self, settings: Settings) -> Group:
        from eptransport import Group

        return Group(settings, store=self._room.store, rank=self.rank, world_size=self.world)


# ---- ranks that somebody else started (torchrun) ---------------------------------------------------------------------


class StoreRank(Rank):
    """A rank that meets the others through a store they share; all on one machine."""

    def __init__(self, store: Store, rank: int, world: int, group: Group) -> None:
        self._store = store
        self._group = group
        self._round = 0
        if rank == 0:
            with tempfile.NamedTemporaryFile(prefix="eptransport-demo-", dir=_memory_folder(), delete=False) as file:
                file.truncate(native.Shared.BYTES)
            store.set("eptransport/bench/shared", file.name)
        self._path = store.get("eptransport/bench/shared").decode()
        with open(self._path, "r+b") as opened:
            super().__init__(rank, world, native.Shared(mmap.mmap(opened.fileno(), native.Shared.BYTES)))
        self.gather(None)
        if rank == 0:
            os.unlink(self._path)

    def gather(self, value: Any) -> list[Any]:
        import pickle

        self._round += 1
        prefix = f"eptransport/bench/{self._round}"
        self._store.set(f"{prefix}/{self.rank}", pickle.dumps(value).hex())
        deadline = time.monotonic() + MEET_TIMEOUT_S
        values = []
        for other in range(self.world):
            key = f"{prefix}/{other}"
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    raise Timeout(f"rank {other} did not come within {MEET_TIMEOUT_S:.0f} s", peer=other)
                time.sleep(0.001)
            values.append(pickle.loads(bytes.fromhex(self._store.get(key).decode())))
        return values

    def store(self) -> Store:
        return self._store

    def group(self, settings: Settings) -> Group:
        del settings
        return self._group
