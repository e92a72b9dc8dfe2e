"""Who takes part in a job, as the store has it: a log of changes in one order that all ranks read alike.

Invariants. Change n stands under one key, and what stands there once never changes: whoever wants to make a change
reads all there are, then sets the next key if it is still empty (`compare_set`, which the store does as one step). Who
comes too late has read a change more, and asks itself again whether its own is still wanted. So there are no holes, the
number of changes read (the epoch) names one membership, and several ranks that mask the same rank make one change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from eptransport import _record as record
from eptransport._bootstrap import Store
from eptransport.errors import TransportError, UnsupportedError

__all__ = ["Change", "MaskedRank", "Membership", "MembershipLog"]


@dataclass(frozen=True)
class MaskedRank:
    """A rank that takes no part."""

    rank: int
    why: str
    by: int
    """The rank that asked for it first."""
    epoch: int
    """Of the membership, since when."""


@dataclass(frozen=True)
class Membership:
    """Who takes part. The same epoch is the same membership, on every rank."""

    epoch: int
    active: tuple[int, ...]
    masked: tuple[MaskedRank, ...] = ()
    step: int = 0
    """No rank takes a step (a generation of a lane) below this one after the reset that took in who came back last."""

    def why(self, rank: int) -> str | None:
        """Why a rank is masked; None: it isn't."""
        return next((each.why for each in self.masked if each.rank == rank), None)


@dataclass(frozen=True)
class Change:
    """One entry of the log."""

    kind: Literal["mask", "readmit"]
    rank: int
    by: int
    why: str = ""
    life: int = 0
    """A readmitted rank's: which of its processes, or of its returns, it is."""
    address: str = ""
    """Of that life, in hex."""
    step: int = 0
    objects: int = 0
    """AllToAlls that the rank which readmits has made."""
    places: str = ""
    """Where the ranks compute that have made them, in hex, as `ept_arena_places` tells."""
    epoch: int = 0
    """Where it stands in the log."""


def _a_count(value: object) -> bool:
    return record.a_number(value) and 0 <= int(value) < 2**63  # type: ignore[call-overload]


_SHAPE: record.Shape = {
    "kind": lambda value: value in ("mask", "readmit"),
    **dict.fromkeys(("rank", "by", "life", "step", "objects"), _a_count),
    "why": record.a_text,
    "address": record.hexadecimal,
    "places": record.hexadecimal,
}


class MembershipLog:
    """One rank's view of the log. Not for several threads at once."""

    def __init__(self, store: Store, prefix: str, world_size: int) -> None:
        self._store = store
        self._prefix = f"{prefix}/membership"
        self._world = world_size
        self.state = Membership(0, tuple(range(world_size)))
        self.returns: dict[int, Change] = {}
        """The last readmission of each rank that has come back at least once."""

    def read(self) -> list[Change]:
        """The changes that this view didn't have, in order; `state` has them from now on."""
        found = []
        while self._ask(self._store.check, [self._key(self.state.epoch + 1)]):
            found.append(self._take(self._ask(self._store.get, self._key(self.state.epoch + 1))))
        return found

    def propose(self, wanted: Callable[[Membership], Change | None]) -> list[Change]:
        """Makes the change that `wanted` asks for in the light of all the others; None: none is needed any more.
        Returns the changes that this view didn't have, with its own, if it was made, as the last."""
        compare_set = getattr(self._store, "compare_set", None)
        if compare_set is None:
            raise UnsupportedError(
                f"the store {type(self._store).__name__} has no compare_set(key, expected, desired), which a change of "
                "the membership needs; every torch.distributed store has it",
                operation="mask",
            )
        found = self.read()
        while (change := wanted(self.state)) is not None:
            key, word = self._key(self.state.epoch + 1), json.dumps(asdict(change))
            found.append(self._take(self._ask(compare_set, key, "", word)))
            if replace(found[-1], epoch=0) == replace(change, epoch=0):
                break  # or somebody has made the very same change, which is as good
        return found

    def _take(self, word: bytes | str) -> Change:
        epoch = self.state.epoch + 1
        try:
            said = record.check(record.read(word), _SHAPE)
            if said["rank"] >= self._world or said["by"] >= self._world:
                raise record.Garbled(f"it is about rank {said['rank']}, by rank {said['by']}, of {self._world}")
        except record.Garbled as problem:
            raise TransportError(
                f"change {epoch} of the membership, as the store has it, makes no sense: {problem}",
                operation="membership",
            ) from problem
        change = Change(**{name: said[name] for name in _SHAPE}, epoch=epoch)
        self.state = _after(self.state, change)
        if change.kind == "readmit":
            self.returns[change.rank] = change
        return change

    def _key(self, epoch: int) -> str:
        return f"{self._prefix}/{epoch}"

    def _ask(self, what: Callable[..., Any], *args: Any) -> Any:
        try:
            return what(*args)
        except (RuntimeError, ValueError) as problem:
            raise TransportError(
                f"the store, which has who takes part, failed: {problem}", operation="membership"
            ) from problem


def _after(before: Membership, change: Change) -> Membership:
    active = [rank for rank in before.active if rank != change.rank]
    masked = [each for each in before.masked if each.rank != change.rank]
    step = before.step
    if change.kind == "mask":
        masked.append(MaskedRank(change.rank, change.why, change.by, change.epoch))
    else:
        active.append(change.rank)
        step = max(step, change.step)
    return Membership(change.epoch, tuple(sorted(active)), tuple(sorted(masked, key=lambda each: each.rank)), step)
