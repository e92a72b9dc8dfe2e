"""Ranks that talk to each other: found through a store, agreed on a backend, connected."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import eptransport
from eptransport._bootstrap import Bootstrap, LocalStore, Store
from eptransport._call import ffi, lib, new_error, timeout_ns
from eptransport._closing import Closing
from eptransport._process import cores, host_id, process
from eptransport._trace import Trace
from eptransport.backends import Candidate, Choice, candidates, unavailable, why
from eptransport.engine import Engine, PeerStatus
from eptransport.errors import (
    ConfigError,
    EptError,
    InvalidArgument,
    MismatchError,
    PeerLost,
    Timeout,
)
from eptransport.settings import Launch, Settings, launch_from_environment

if TYPE_CHECKING:
    import torch

__all__ = ["Group", "Store", "loopback_groups", "loopback_run"]

logger = logging.getLogger("eptransport")

T = TypeVar("T")

SECRET_BYTES = 32
GRACE_S = 5.0
SLICE_S = 0.25
"""How often a rank that waits for connections looks whether another one has failed."""


class Group(Closing):
    """All ranks of an expert-parallel job, connected. Everything else is made from it.

    Collective: every rank makes it, with the same `name` and world size; blocks until all are connected, at most
    `timeout_s` (default: that of the settings). Who takes part comes from, in this order: `store` with `rank` and
    `world_size`; `process_group` (gloo or nccl); the default process group, if torch.distributed is initialised;
    torchrun's environment. The store is used for the set-up alone, and no collective of torch.distributed after it.

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
    ) -> None:
        place = _find_place(store, rank, world_size, process_group)
        self.rank = place.rank
        self.world_size = place.world_size
        self.name = name
        self._store = place.store
        limit = timeout_s if timeout_s is not None else settings.timeout_s if settings is not None else 300.0
        bootstrap = Bootstrap(place.store, place.rank, place.world_size, name, limit)
        self.settings, hello = _first_words(bootstrap, settings, place.rank)
        _set_up_logging(self.settings)
        said = bootstrap.exchange("hello", hello)
        _compare(said, name)
        choice = _agree(self.settings, said)
        local = [other["host"] for other in said].count(hello["host"])
        self.threads = self.settings.threads or max(1, cores() // local)
        self.engine = _connect(bootstrap, choice, self, said, local)
        self._choice = choice
        self._arena_lock = threading.Lock()
        self._arena: Any = None
        self.trace = Trace(self.settings.trace, place.rank) if self.settings.trace else None
        self._fault: torch.Tensor | None = None
        self._active_mask: torch.Tensor | None = None
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
        and was not reset from. On the CPU now; readable in a captured graph where ranks are GPUs."""
        if self._fault is None:
            import torch

            self._fault = torch.zeros((), dtype=torch.int32)
        return self._fault

    @property
    def active_mask(self) -> torch.Tensor:
        """An int32 tensor [world_size], the same one always: 1 where a rank is up, 0 where it has left or is lost, as
        seen at this call. Doesn't block."""
        if self._active_mask is None:
            import torch

            self._active_mask = torch.ones(self.world_size, dtype=torch.int32)
        for rank in range(self.world_size):
            gone = rank != self.rank and self.engine.peer(rank).info.status in (PeerStatus.LEFT, PeerStatus.LOST)
            self._active_mask[rank] = int(not gone)
        return self._active_mask

    def close(self, timeout: float | None = None) -> None:
        """Closes the AllToAlls of the group, says goodbye to the peers, frees everything. Blocks at most `timeout` s
        for what is in flight. Not collective; closing twice is fine."""
        if self.trace is not None and not self.engine.closed:
            self.trace.write()
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
            return self._arena

    def _announce(self, local: int) -> None:
        info = self.engine.info()
        unused = self.settings.unused_by(self.engine.plugin)
        if unused:
            logger.warning("rank %d: backend %s has no use for %s", self.rank, self.backend, ", ".join(unused))
        where = "any core" if not self.settings.proxy_cpus else f"cores {','.join(map(str, self.settings.proxy_cpus))}"
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


def loopback_groups(n: int, settings: Settings | None = None, **arguments: Any) -> list[Group]:
    """`n` ranks in this process, over loopback (or the backend that the settings name), each made on a thread of its
    own and then usable from any. Blocks. `arguments` are those of Group. Raises the first error, and then leaves
    nothing."""
    chosen = settings or Settings()
    if chosen.backend == "auto":
        chosen = chosen.model_copy(update={"backend": "loopback"})
    store = LocalStore()

    def make(rank: int) -> Group:
        return Group(chosen, store=store, rank=rank, world_size=n, **arguments)

    groups, error = _on_threads([lambda rank=rank: make(rank) for rank in range(n)])  # type: ignore[misc]
    if error is not None:
        for group in groups:
            if group is not None:
                group.close()
        raise error
    return [group for group in groups if group is not None]


def loopback_run(groups: Sequence[Group], function: Callable[[Group], T]) -> list[T]:
    """`function(group)` on a thread for each group, as ranks of a job would; what each returned. Blocks until all have
    ended, then raises the first error. When a rank has failed, the others have 5 s to end; then their waits are ended
    with ClosedError, for they may wait for the one that failed."""

    def give_up(yes: bool) -> None:
        for group in groups:
            group.engine._native.abandoned = yes

    results, error = _on_threads(
        [lambda group=group: function(group) for group in groups],  # type: ignore[misc]
        give_up,
    )
    if error is not None:
        raise error
    return results  # type: ignore[return-value]


# ---- who takes part --------------------------------------------------------------------------------------------------


class _Place:
    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise InvalidArgument(f"rank={rank}, world_size={world_size}: rank must be from 0 to world_size - 1")
        self.store = store
        self.rank = rank
        self.world_size = world_size


def _find_place(
    store: Store | None, rank: int | None, world_size: int | None, process_group: torch.distributed.ProcessGroup | None
) -> _Place:
    if process_group is not None:
        if store is not None or rank is not None or world_size is not None:
            raise InvalidArgument("process_group brings its own rank, world size and store; leave those out")
        return _from_process_group(process_group)
    if store is not None:
        if rank is None or world_size is None:
            raise InvalidArgument(f"store needs rank and world_size beside it (rank={rank}, world_size={world_size})")
        return _Place(store, rank, world_size)
    if world_size == 1 and rank in (None, 0):
        return _Place(LocalStore(), 0, 1)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return _checked(_from_process_group(distributed.group.WORLD), rank, world_size, "the default process group")
    return _checked(_from_environment(), rank, world_size, "the environment")


def _checked(place: _Place, rank: int | None, world_size: int | None, source: str) -> _Place:
    for name, given, found in (("rank", rank, place.rank), ("world_size", world_size, place.world_size)):
        if given is not None and given != found:
            raise InvalidArgument(f"{name}={given}, but {source} says {found}")
    return place


def _from_environment() -> _Place:
    launch = launch_from_environment()
    if launch is None:
        raise ConfigError(
            "nobody says which ranks there are: start with torchrun, or give Group a store with rank and world_size, "
            "or a process_group"
        )
    if launch.world_size == 1:
        return _Place(LocalStore(), launch.rank, 1)
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return _Place(
        PrefixStore(f"eptransport/{launch.attempt}", _launchers_store(launch)), launch.rank, launch.world_size
    )


@functools.cache
def _launchers_store(launch: Launch) -> Any:
    """The store at the launcher's address. Kept as long as the process, also where rank 0 serves it: the program may
    use the address for torch.distributed later, which then shares the server instead of racing with its end."""
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        launch.master_addr,
        launch.master_port,
        launch.world_size,
        is_master=launch.rank == 0 and not launch.agent_store,
        timeout=timedelta(seconds=300),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _from_process_group(group: torch.distributed.ProcessGroup) -> _Place:
    rank, world_size = group.rank(), group.size()
    if rank < 0:
        raise InvalidArgument("this process is not in the process group")
    return _Place(_store_of(group) or _store_by_gathering(group, rank, world_size), rank, world_size)


def _store_of(group: torch.distributed.ProcessGroup) -> Store | None:
    """The store that the process group was made with, where this release of torch lets us see it."""
    from torch.distributed import distributed_c10d

    find = getattr(distributed_c10d, "_get_process_group_store", None)
    try:
        return None if find is None else find(group)
    except (RuntimeError, ValueError, KeyError, AttributeError):
        return None


def _store_by_gathering(group: torch.distributed.ProcessGroup, rank: int, world_size: int) -> Store:
    """A store of our own on rank 0; where it is goes through one collective of the process group."""
    import socket

    from torch.distributed import TCPStore, all_gather_object  # type: ignore[attr-defined]

    served = None
    mine: tuple[str, str, int] = (host_id(), "", 0)
    if rank == 0:
        served = TCPStore("0.0.0.0", 0, world_size, is_master=True, wait_for_workers=False)
        mine = (host_id(), socket.getfqdn(), served.port)
    said: list[Any] = [None] * world_size
    all_gather_object(said, mine, group=group)
    if served is not None:
        return served
    host, name, port = said[0]
    return TCPStore("127.0.0.1" if host == host_id() else name, port, world_size, is_master=False)


# ---- what ranks must agree on ----------------------------------------------------------------------------------------


def _first_words(bootstrap: Bootstrap, given: Settings | None, rank: int) -> tuple[Settings, dict[str, Any]]:
    """The settings, and what this rank tells the others about itself. An error is told too, so that none waits for
    it."""
    try:
        settings = given or Settings()
        looked = candidates(settings, one_process=True)
    except EptError as error:
        bootstrap.say("hello", None, error)
        raise
    secret = settings.secret
    return settings, {
        "version": eptransport.__version__,
        "process": process.token,
        "host": host_id(),
        "backend": "auto" if settings.backend == "auto" else looked[0].name,
        "looked": [(found.name, found.plugin.version if found.plugin else "", found.why_not) for found in looked],
        "secret": None if secret is None else "given",
        "made": os.urandom(SECRET_BYTES).hex() if rank == 0 and secret is None else None,
        "group": os.urandom(8).hex(),
    }


_MUST_AGREE = {
    "version": "install one version of eptransport everywhere",
    "backend": "set EPT_BACKEND alike",
    "secret": "set EPT_SECRET on every rank, or on none",
}


def _compare(said: list[dict[str, Any]], name: str) -> None:
    for what, mend in _MUST_AGREE.items():
        first = said[0][what]
        for rank, other in enumerate(said):
            if other[what] != first:
                raise MismatchError(
                    f"ranks of group {name!r} disagree on {what}: rank 0 has {first or 'none'}, rank {rank} has "
                    f"{other[what] or 'none'}; {mend}",
                    operation="set-up",
                    peer=rank,
                )


def _agree(settings: Settings, said: list[dict[str, Any]]) -> Choice:
    """The first backend that every rank can use. All ranks see the same words, so all come to the same answer."""
    one_process = all(other["process"] == said[0]["process"] for other in said)
    refused: list[Candidate] = []
    for found in candidates(settings, one_process=True):
        if settings.backend == "auto" and found.name == "loopback" and not one_process:
            continue
        why_not = _why_not_everywhere(found.name, said)
        if why_not is None and found.plugin is not None:
            return Choice(found.plugin, why(settings, refused), tuple(refused))
        refused.append(Candidate(found.name, found.plugin, found.summary, why_not))
    raise unavailable(settings, refused)


def _why_not_everywhere(name: str, said: list[dict[str, Any]]) -> str | None:
    versions = {}
    reasons: dict[str, list[int]] = {}
    for rank, other in enumerate(said):
        for found, version, why_not in other["looked"]:
            if found == name:
                versions[rank] = version
                if why_not is not None:
                    reasons.setdefault(why_not, []).append(rank)
    if len(reasons) == 1 and len(next(iter(reasons.values()))) == len(said):
        return next(iter(reasons))
    if reasons:
        return "; ".join(f"{why_not} (rank {', '.join(map(str, ranks))})" for why_not, ranks in reasons.items())
    if len(set(versions.values())) > 1:
        return f"ranks have other versions of the plugin: {versions}"
    return None


# ---- connecting ------------------------------------------------------------------------------------------------------


def _connect(bootstrap: Bootstrap, choice: Choice, group: Group, said: list[dict[str, Any]], local: int) -> Engine:
    try:
        engine = Engine(
            choice.plugin,
            rank=group.rank,
            world_size=group.world_size,
            job=f"{group.name}/{bootstrap.generation}/{said[0]['group']}",
            secret=_secret(group.settings, said),
            settings=group.settings,
            spin_s=_spin(group.settings, local),
        )
        address = engine.address()
    except EptError as error:
        bootstrap.say("address", None, error)
        raise
    try:
        addresses = bootstrap.exchange("address", {"address": address.hex()})
        _join(bootstrap, engine)
        try:
            engine.connect([bytes.fromhex(other["address"]) for other in addresses])
            _wait_connected(bootstrap, engine, group.settings.timeout_s)
        except EptError as error:
            # A rank that left because it failed has said why before: all raise that, whoever finds it gone.
            cause = bootstrap.cause_of_loss("connected") if isinstance(error, PeerLost) else None
            bootstrap.say("connected", None, cause or error)
            if cause is not None:
                raise cause from error
            raise
        bootstrap.exchange("connected", {})
    except BaseException:
        engine.close(0)
        raise
    return engine


def _join(bootstrap: Bootstrap, engine: Engine) -> None:
    """The rounds of a backend that joins collectively; others are done at once."""
    blobs: list[bytes] | None = None
    round_number = 0
    while True:
        try:
            out, done = engine.join(blobs)
        except EptError as error:
            bootstrap.say(f"join{round_number}", None, error)
            raise
        if done:
            return
        said = bootstrap.exchange(f"join{round_number}", {"out": out.hex()})
        blobs = [bytes.fromhex(other["out"]) for other in said]
        round_number += 1


def _wait_connected(bootstrap: Bootstrap, engine: Engine, timeout_s: float) -> None:
    """Also ends when another rank gives up, which its connection alone may not tell."""
    remaining = timeout_s
    while True:
        try:
            engine.wait_connected(min(SLICE_S, remaining))
        except Timeout:
            remaining -= SLICE_S
            if remaining <= 0:
                raise
            bootstrap.errors("connected")
        else:
            return


def _secret(settings: Settings, said: list[dict[str, Any]]) -> bytes:
    if settings.secret is None:
        return bytes.fromhex(said[0]["made"])
    return hashlib.sha256(b"eptransport secret\0" + settings.secret.get_secret_value().encode()).digest()


def _spin(settings: Settings, local: int) -> float | None:
    """More ranks than cores: a rank that polls keeps the one it waits for from running."""
    if settings.spin_us is not None:
        return settings.spin_us / 1e6
    return 0.0 if local > cores() else None


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


def _on_threads(
    calls: Sequence[Callable[[], T]], give_up: Callable[[bool], None] | None = None
) -> tuple[list[T | None], BaseException | None]:
    """Results in order (None where one failed), and the error that came first."""
    results: list[T | None] = [None] * len(calls)
    errors: list[BaseException] = []
    failed_at: list[float] = []

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:
            errors.append(error)
            failed_at.append(monotonic())

    threads = [
        threading.Thread(target=run, args=(index,), name=f"ept rank {index}", daemon=True)
        for index in range(len(calls))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(SLICE_S)
            if give_up is not None and failed_at and monotonic() > failed_at[0] + GRACE_S:
                give_up(True)
    if give_up is not None:
        give_up(False)
    return results, errors[0] if errors else None
