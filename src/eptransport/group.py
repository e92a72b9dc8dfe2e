"""Ranks that talk to each other: found through a store, agreed on a backend, connected."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import eptransport
from eptransport._agreement import HELLO, agree, compare, first_words
from eptransport._bootstrap import Bootstrap, Store
from eptransport._call import ffi, lib, new_error, timeout_ns
from eptransport._closing import Closing
from eptransport._connect import ADDRESS, addresses_of, connect, make_engine
from eptransport._members import Members, check_rank
from eptransport._membership import Membership
from eptransport._place import find_place
from eptransport._process import cores
from eptransport._record import Shape
from eptransport._seeing import Seeing
from eptransport._stuck import forget, watch
from eptransport._trace import Trace
from eptransport.engine import PeerStatus
from eptransport.errors import ConfigError, EptError, InvalidArgument, Masked
from eptransport.settings import Settings

if TYPE_CHECKING:
    import torch

    from eptransport._gpu_arena import GpuArena
    from eptransport._gpu_steps import GpuSteps

__all__ = ["Group", "Store"]

logger = logging.getLogger("eptransport")

_GONE = (PeerStatus.LEFT, PeerStatus.LOST, PeerStatus.MASKED)


class Group(Seeing, Closing):
    """All ranks of an expert-parallel job, connected. Everything else is made from it.

    Collective: every rank makes it, with the same `name` and world size; blocks until all are connected, at most
    `timeout_s` (default: that of the settings). Who takes part comes from, in this order: `store` with `rank` and
    `world_size`; `process_group` (gloo or nccl); the default process group, if torch.distributed is initialised;
    torchrun's environment. The store is used for the set-up and for changes of the membership, and no collective of
    torch.distributed after the set-up.

    `rejoin=True`, for a process that is started again in the place of one that died, is not collective: it finds the
    running group and blocks until another rank calls `readmit`. Then it makes the AllToAlls that the others have made,
    in their order, and all ranks call `reset` on one of them.

    Any number of groups may share a store, also one after another under one name. Errors come on every rank:
    ConfigError, BackendUnavailable (with every refusal), MismatchError (settings that must agree, with both values),
    AuthError (another secret), Timeout (who didn't come), PeerLost. A context manager; a group that is dropped is
    closed.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        store: Store | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        name: str = "default",
        timeout_s: float | None = None,
        rejoin: bool = False,
    ) -> None:
        place = find_place(store, rank, world_size, process_group)
        self.rank = place.rank
        self.world_size = place.world_size
        self.name = name
        self._store = place.store
        limit = timeout_s if timeout_s is not None else settings.timeout_s if settings is not None else 300.0
        bootstrap = Bootstrap(place.store, place.rank, place.world_size, name, limit, again=rejoin)
        if rejoin and bootstrap.generation == 0:
            raise ConfigError(f"there is no group {name!r} on this store that rank {place.rank} could rejoin")
        self._bootstrap = bootstrap
        self._gpu_arenas: list[GpuArena] = []
        self._gpu_steps: weakref.WeakSet[GpuSteps] = weakref.WeakSet()
        self._stages = 0
        self.settings, hello = first_words(bootstrap, settings, place.rank)
        _set_up_logging(self.settings)
        said = bootstrap.said("hello", HELLO) if rejoin else bootstrap.exchange("hello", hello, HELLO)
        compare([*said, hello] if rejoin else said, name)
        self._choice = agree(self.settings, said)
        local = [other["host"] for other in said].count(hello["host"])
        self.threads = self.settings.threads or max(1, cores() // local)
        if rejoin:
            addresses = addresses_of(bootstrap.said("address", ADDRESS))
            self._members = Members(bootstrap, place.rank, place.world_size, addresses)
            self.engine = make_engine(self, bootstrap.generation, self._choice, said, self._members.next_life())
        else:
            self.engine, addresses = connect(bootstrap, self._choice, self, said)
            self._members = Members(bootstrap, place.rank, place.world_size, addresses)
        self._members.use_engine(self.engine._native)
        if rejoin:
            try:
                self._members.come_back(self.engine.address(), "its process was started again", limit)
            except BaseException:
                self.engine.close(0)
                raise
        self._arena_lock = threading.Lock()
        self._arena: Any = None
        self.trace = Trace(self.settings.trace, place.rank, self.engine) if self.settings.trace else None
        if self.settings.stuck_signal:
            watch(self.engine)
        self._fault: torch.Tensor | None = None
        self._active_mask: torch.Tensor | None = None
        self._seen_active: list[int] = []
        self._announce(local)

    @property
    def backend(self) -> str:
        """The backend that was agreed on."""
        return self.engine.plugin.name

    @property
    def why(self) -> str:
        """Why that backend was taken, and why the better ones were refused."""
        return self._choice.why

    @property
    def fault(self) -> torch.Tensor:
        """A 0-d int32 tensor, the same one always: 0, or the code of the fault that an AllToAll of this group met last
        and was not reset from. On the CPU, or on the GPU where the group's first AllToAll is there, and then readable
        in a captured graph."""
        if self._fault is None:
            import torch

            self._fault = torch.zeros((), dtype=torch.int32, device="cpu")
        return self._fault

    @property
    def active_mask(self) -> torch.Tensor:
        """An int32 tensor [world_size], the same one always: 1 where a rank is up, 0 where it is masked, has left or is
        lost, as seen at this call. Doesn't block. Where `fault` is, and readable in a captured graph likewise."""
        import torch

        if self._active_mask is None:
            self._active_mask = torch.ones(self.world_size, dtype=torch.int32, device=self.fault.device)
            self._seen_active = [1] * self.world_size
        seen = [int(self._is_active(rank)) for rank in range(self.world_size)]
        if seen != self._seen_active:
            self._active_mask.copy_(torch.tensor(seen, dtype=torch.int32))
            self._seen_active = seen
        return self._active_mask

    def _is_active(self, rank: int) -> bool:
        if rank not in self.membership.active:
            return False
        return rank == self.rank or self.engine.peer(rank).info.status not in _GONE

    @property
    def membership(self) -> Membership:
        """Who takes part, as this rank knows it: it learns of a change at once if it asked for it, soon while it waits,
        and at its next dispatch_send at the latest. Doesn't block."""
        return self._members.state

    def mask(self, rank: int, why: str = "asked for by the application") -> None:
        """Goes on without `rank`: from now on nothing of it is awaited, and nothing that it sends changes anything
        here, whether it is dead or not. Its experts' share of a token is left out (`Dispatched.lost`).

        One rank that is up calls it, or several, for the same rank or for others: the store puts the changes in an
        order. A rank that is masked already is no error. Waits for it end with PeerLost; a step under way is lost with
        its lane, which all ranks that are left `reset`. Not collective; blocks for the store alone. Masked if the
        others have masked this rank. On a GPU, called on the stream of a lane, it goes before the lane's next step,
        also one of a captured graph."""
        check_rank(rank, self.rank, self.world_size)
        self._members.mask(rank, why)
        for steps in list(self._gpu_steps):
            steps.take_members()

    def readmit(self, rank: int, timeout: float | None = None) -> None:
        """Takes back a rank that was masked: waits until its new process (`Group(rejoin=True)`) or its
        `group.rejoin()` has said that it is there, at most `timeout` s (default: that of the settings), and connects
        to it. It takes part from the next `reset` on, which all ranks call, it too. One rank calls it; others may.
        Timeout, PeerLost."""
        check_rank(rank, self.rank, self.world_size)
        self._members.readmit(rank, self.settings.timeout_s if timeout is None else timeout)

    def rejoin(self, timeout: float | None = None) -> None:
        """Brings this rank back after the others have masked it while it lived (Masked). Blocks until one of them calls
        `readmit`, at most `timeout` s. Its AllToAlls stay; then all ranks call `reset`. InvalidArgument if it isn't
        masked."""
        try:
            self._members.learn()
        except Masked as masked:
            self.engine.rejoin(self._members.next_life())
            limit = self.settings.timeout_s if timeout is None else timeout
            self._members.come_back(self.engine.address(), masked.message, limit)
        else:
            raise InvalidArgument(f"rank {self.rank} isn't masked, so it can't rejoin")

    def close(self, timeout: float | None = None) -> None:
        """Closes the AllToAlls of the group, says goodbye to the peers, frees everything. Blocks at most `timeout` s
        for what is in flight. Not collective; closing twice is fine."""
        if self.trace is not None:
            self.trace.close()
        forget(self.engine)
        self.engine.close() if timeout is None else self.engine.close(timeout)

    def __repr__(self) -> str:
        return f"<Group {self.name!r} rank {self.rank} of {self.world_size} over {self.backend}>"

    def arena(self) -> Any:
        """The native memory that all AllToAlls of this group share; made at the first call."""
        with self._arena_lock:
            if self._arena is None:
                native = self.engine._native
                handle = ffi.new("ept_arena **")
                native.call(lib.ept_arena_create, handle)
                arena = self._arena = handle[0]
                native.children[id(self)] = lambda: _close_arena(arena, native.rank)
                self._members.use_arena(arena)
            return self._arena

    def exchange_once(self, content: dict[str, Any], shape: Shape) -> list[dict[str, Any]]:
        """Collective, through the store: what each rank says. Every rank makes the same calls in the same order."""
        self._stages += 1
        return self._bootstrap.exchange(f"stage{self._stages}", content, shape)

    def say_once(self, error: EptError) -> None:
        """In place of `exchange_once`: this rank failed, which the others then raise."""
        self._stages += 1
        self._bootstrap.say(f"stage{self._stages}", None, error)

    def _announce(self, local: int) -> None:
        info = self.engine.info()
        unused = self.settings.unused_by(self.engine.plugin)
        if unused:
            logger.warning("rank %d: backend %s has no use for %s", self.rank, self.backend, ", ".join(unused))
        where = (
            "cores near the rails"
            if not self.settings.proxy_cpus
            else f"cores {','.join(map(str, self.settings.proxy_cpus))}"
        )
        logger.info(
            "eptransport %s, group %r: rank %d of %d (%d on this machine), backend %s (%s), %d bytes registered, "
            "%d proxy thread on %s, waits spin %g us",
            eptransport.__version__,
            self.name,
            self.rank,
            self.world_size,
            local,
            self.backend,
            self.why,
            info.registered_bytes,
            info.proxy_threads,
            where,
            info.spin_s * 1e6,
        )


def _close_arena(arena: Any, rank: int) -> None:
    error = new_error()
    if lib.ept_arena_close(arena, timeout_ns(5.0), error) < 0:
        logger.warning("rank %d: closing the arena: %s", rank, ffi.string(error.text).decode())


def _set_up_logging(settings: Settings) -> None:
    """EPT_LOG is meant to show something, also in a program that never set logging up."""
    if settings.log is None:
        return
    logger.setLevel(settings.log.upper())
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
