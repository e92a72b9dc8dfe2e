"""The ranks that take part in a measurement, and how they meet.

A job is a picklable object with `run(rank)`. `run_job` runs it on every rank and gives back what each returned: as
processes (`spawn`), or as threads of this process where the backend is loopback. `Rank` is what the job sees, alike for
all.
"""

from __future__ import annotations

import abc
import contextlib
import mmap
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from eptransport._bootstrap import LocalStore
from eptransport._process import cores
from eptransport.bench import native
from eptransport.errors import ClosedError, PeerLost, Timeout, UnsupportedError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from eptransport import Group, Settings

__all__ = ["HOST", "Job", "Mesh", "Rank", "StoreRank", "memory_folder", "run_job"]

HOST = "127.0.0.1"
MEET_TIMEOUT_S = 300.0


def memory_folder() -> str | None:
    """Where a file that ranks share is memory."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


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
    progress = progress or (lambda done: None)
    if threads:
        return _run_threads(job, world, progress)
    from eptransport.bench.processes import Processes  # which builds on this module

    with Processes(job.run, world, progress) as processes:
        return processes.results()


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
            with tempfile.NamedTemporaryFile(prefix="eptransport-demo-", dir=memory_folder(), delete=False) as file:
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
