"""A group's membership, carried out: what the log says is done to the engine and to the arena, in the log's order.

Invariants. A change is carried out once, in order, by whichever call learns of it first: a call of this group that asks
the log, or a wait, which looks when the engine has heard of a newer membership than the one that is carried out.
The engine masks before the arena leaves out, so nothing of a masked rank can come any more when steps go on without it.
A rank that reads that it is masked itself does nothing but say so, from then on, until it has come back.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from eptransport import _record as record
from eptransport._call import ffi, lib, sized, timeout_ns
from eptransport._membership import Change, Membership, MembershipLog
from eptransport.errors import (
    ClosedError,
    EptError,
    InvalidArgument,
    LaneFault,
    Masked,
    PeerLost,
    Timeout,
    TransportError,
)

if TYPE_CHECKING:
    from eptransport._bootstrap import Bootstrap
    from eptransport._engine_native import NativeEngine

__all__ = ["BY_MEMBERSHIP", "Members"]

BY_MEMBERSHIP = (PeerLost, LaneFault, Timeout)
"""What a call raises when ranks take part no longer, or again, as the others see it: what `Members.after` is for."""

logger = logging.getLogger("eptransport")

POLL_S = 0.01


class Members:
    """One rank's part in the membership of its group."""

    def __init__(self, bootstrap: Bootstrap, rank: int, world_size: int, addresses: list[bytes]) -> None:
        self.rank = rank
        self.life = 0
        """Which of this rank's processes, or of its returns, this is."""
        self.made = 0
        """AllToAlls that this rank has made, for one that comes back to make as many."""
        self._world = world_size
        self._store = bootstrap.store
        self._prefix = f"{bootstrap.prefix}/return"
        self._log = MembershipLog(bootstrap.store, bootstrap.prefix, world_size)
        self._addresses = addresses
        self._lock = threading.RLock()
        self._engine: NativeEngine | None = None
        self._arena: Any = None
        self._masked: Change | None = None
        self._expected = 0
        self._places = b""

    @property
    def state(self) -> Membership:
        return self._log.state

    # -- what it is carried out on --

    def use_engine(self, engine: NativeEngine) -> None:
        self._engine = engine
        engine.on_look = self.look

    def use_arena(self, arena: Any) -> None:
        """A new arena takes the membership as it is."""
        with self._lock:
            self._arena = arena
            if self.state.epoch or self.life:
                self._tell_arena()
            if self._expected:
                places = self._places or ffi.NULL
                self._native(lib.ept_arena_expect, arena, self._expected, places, len(self._places))

    # -- learning --

    def refuse_masked(self) -> None:
        """Raises Masked where the others go on without this rank."""
        if (change := self._masked) is not None:
            raise Masked(
                f"rank {self.rank} was masked by rank {change.by} (membership {change.epoch}): {change.why}; "
                "group.rejoin() brings it back",
                operation="membership",
                peer=self.rank,
            )

    def learn(self) -> None:
        """Asks the store, and carries out what this rank hasn't yet. Raises Masked."""
        with self._lock:
            self._carry_out(self._log.read())
        self.refuse_masked()

    def learn_if_told(self) -> None:
        """The same, if the engine has heard of a newer membership; costs next to nothing otherwise."""
        self.refuse_masked()
        if self._heard() > self.state.epoch:
            self.learn()

    def after(self, error: EptError, on_lost: str) -> None:
        """A call has failed, which a change of the membership may have caused. Raises Masked if it has masked this
        rank. With `on_lost` "mask" a rank that is lost is masked."""
        try:
            self.learn()
            lost = error.peer
            if on_lost != "mask" or lost is None or lost == self.rank:
                return
            # A lane on a GPU tells of every first cause as LaneFault.
            if isinstance(error, PeerLost) or (isinstance(error, LaneFault) and self._is_gone(lost)):
                self.mask(lost, f"lost: {error.message}")
        except Masked as masked:
            raise masked from error
        except EptError as problem:
            logger.warning("rank %d: %s", self.rank, problem)

    def look(self) -> None:
        """From inside a native wait, or beside a kernel's: the rank that is waited for may be one that was masked."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._heard() > self.state.epoch:
                self._carry_out(self._log.read())
        except ClosedError:
            pass
        except EptError as problem:
            logger.warning("rank %d: %s", self.rank, problem)
        finally:
            self._lock.release()

    def _is_gone(self, rank: int) -> bool:
        info = sized("ept_peer_info")
        self._call(lib.ept_engine_peer, rank, info)
        return info.status in (lib.EPT_PEER_LOST, lib.EPT_PEER_LEFT)

    def _heard(self) -> int:
        epoch = ffi.new("uint32_t *")
        assert self._engine is not None
        self._engine.call(lib.ept_engine_membership, epoch)
        return int(epoch[0])

    # -- changing --

    def mask(self, rank: int, why: str) -> None:
        def wanted(state: Membership) -> Change | None:
            return None if rank not in state.active else Change("mask", rank, self.rank, why)

        with self._lock:
            self._carry_out(self._log.propose(wanted))
            self._tell_others()
        self.refuse_masked()

    def readmit(self, rank: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        self.learn()
        if rank not in self.state.active:
            life, address = self._wait_for_return(rank, deadline, timeout_s)
            step, places = ffi.new("uint64_t *"), ""
            if self._arena is not None:
                self._native(lib.ept_arena_step, self._arena, step)
                places = self._all_places()

            def wanted(state: Membership) -> Change | None:
                if rank in state.active:
                    return None
                return Change("readmit", rank, self.rank, "", life, address, int(step[0]), self.made, places)

            with self._lock:
                self._carry_out(self._log.propose(wanted))
                self._tell_others()
            self.refuse_masked()
        self._call(lib.ept_engine_wait_peer, rank, timeout_ns(max(0.0, deadline - time.monotonic())))

    # -- coming back --

    def next_life(self) -> int:
        """The number of this rank's next life. Nobody has had it before."""
        self.life = self._ask(self._store.add, self._life_key(self.rank), 1)
        return self.life

    def come_back(self, address: bytes, why: str, timeout_s: float) -> None:
        """Says that this rank is there again, waits until another one readmits it, and connects to all that take part.
        The engine has no links yet."""
        deadline = time.monotonic() + timeout_s
        word = json.dumps({"address": address.hex()})
        self._ask(self._store.set, f"{self._prefix}/{self.rank}/{self.life}", word)
        with self._lock:

            def wanted(state: Membership) -> Change | None:
                return Change("mask", self.rank, self.rank, why) if self.rank in state.active else None

            self._log.propose(wanted)
        while self._missing():
            if time.monotonic() > deadline:
                raise Timeout(
                    f"rank {self.rank} is there again since {timeout_s:g} s, and no other rank has called "
                    f"group.readmit({self.rank})",
                    operation="rejoin",
                )
            time.sleep(POLL_S)
            with self._lock:
                self._log.read()
        with self._lock:
            self._masked = None
            self._expected = max(0, self._log.returns[self.rank].objects - self.made)
            self._places = bytes.fromhex(self._log.returns[self.rank].places)
            for masked in self.state.masked:
                self._mask_engine(masked.rank, masked.epoch, masked.why)
            others = [rank for rank in self.state.active if rank != self.rank]
            for rank in others:
                self._open(rank)
            if self._arena is not None:
                self._tell_arena()
        for rank in others:
            try:
                self._call(lib.ept_engine_wait_peer, rank, timeout_ns(max(0.0, deadline - time.monotonic())))
            except PeerLost:
                self.learn()
                if rank in self.state.active:
                    raise

    def _missing(self) -> bool:
        change = self._log.returns.get(self.rank)
        return change is None or change.life != self.life or self.rank not in self.state.active

    def _wait_for_return(self, rank: int, deadline: float, timeout_s: float) -> tuple[int, str]:
        """The newest life of a rank that was masked, and its address."""
        last = self._log.returns[rank].life if rank in self._log.returns else 0
        while True:
            life = self._ask(self._store.add, self._life_key(rank), 0)
            key = f"{self._prefix}/{rank}/{life}"
            if life > last and self._ask(self._store.check, [key]):
                try:
                    said = record.check(record.read(self._ask(self._store.get, key)), {"address": record.hexadecimal})
                except record.Garbled as problem:
                    raise TransportError(
                        f"what rank {rank} put into the store to come back makes no sense: {problem}",
                        operation="readmit",
                        peer=rank,
                    ) from problem
                return life, said["address"]
            if time.monotonic() > deadline:
                raise Timeout(
                    f"rank {rank} has not come back in {timeout_s:g} s: its process makes Group(rejoin=True), or calls "
                    "group.rejoin() if it was masked and lives",
                    operation="readmit",
                    peer=rank,
                )
            time.sleep(POLL_S)

    # -- how it is carried out --

    def _carry_out(self, changes: list[Change]) -> None:
        for change in changes:
            logger.info("rank %d: membership %d: %s", self.rank, change.epoch, _words(change))
            if change.rank == self.rank:
                if change.kind == "mask":
                    self._masked = change
            elif self._masked is not None:
                continue
            elif change.kind == "mask":
                self._mask_engine(change.rank, change.epoch, change.why)
            else:
                self._open(change.rank)
        if changes and self._arena is not None and self._masked is None:
            self._tell_arena()

    def _mask_engine(self, rank: int, epoch: int, why: str) -> None:
        self._call(lib.ept_engine_mask, rank, epoch, why.encode())

    def _open(self, rank: int) -> None:
        """A link to a rank in its present life."""
        change = self._log.returns.get(rank)
        life, address = (change.life, bytes.fromhex(change.address)) if change else (0, self._addresses[rank])
        self._call(lib.ept_engine_readmit, rank, life, address, len(address))

    def _tell_arena(self) -> None:
        active = bytes(rank in self.state.active for rank in range(self._world))
        self._native(lib.ept_arena_members, self._arena, self.state.epoch, active, self.state.step)

    def _tell_others(self) -> None:
        if self.state.epoch and self._masked is None:
            self._call(lib.ept_engine_tell_membership, self.state.epoch)

    def _call(self, function: Any, *args: Any) -> None:
        assert self._engine is not None
        self._engine.call(function, *args)

    def _native(self, function: Any, arena: Any, *args: Any) -> None:
        """A call of the arena, which lives as long as the engine."""
        assert self._engine is not None
        self._engine.call(lambda _, *rest: function(arena, *rest), *args)

    def _all_places(self) -> str:
        """Where each rank computes, in hex: for a process that makes AllToAlls which the others have already."""
        length = ffi.new("size_t *")
        self._native(lib.ept_arena_places, self._arena, ffi.NULL, length)
        places = ffi.new("uint8_t[]", length[0])
        self._native(lib.ept_arena_places, self._arena, places, length)
        return bytes(places).hex()

    def _life_key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}/lives"

    def _ask(self, what: Any, *args: Any) -> Any:
        try:
            return what(*args)
        except (RuntimeError, ValueError) as problem:
            raise TransportError(f"the store failed: {problem}", operation="membership") from problem


def _words(change: Change) -> str:
    if change.kind == "mask":
        return f"rank {change.by} masked rank {change.rank}: {change.why}"
    return f"rank {change.by} readmitted rank {change.rank}, in its life {change.life}, from step {change.step} on"


def check_rank(rank: int, own: int, world_size: int) -> None:
    """Whether it is another rank of the group."""
    if not 0 <= rank < world_size or rank == own:
        raise InvalidArgument(f"rank={rank}: must be another rank, of 0 to {world_size - 1}; this one is {own}")
