"""How ranks find each other: a store of keys and values, and what every rank puts there for the others to read."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from eptransport import _record as record
from eptransport.errors import EptError, MismatchError, PeerLost, Timeout, TransportError, error_class

__all__ = ["Bootstrap", "LocalStore", "Store"]

FIRST_POLL_S = 0.0002
LONGEST_POLL_S = 0.02
_ERROR: record.Shape = {
    "code": record.a_number,
    "text": record.a_text,
    "peer": record.optional(record.a_number),
}
LAST_WORDS_S = 1.0
"""How long a word of a rank that has left may be under way to the store: `set` needn't wait for it to arrive."""


class Store(Protocol):
    """What is used of a `torch.distributed.Store`, all of which are one (TCPStore, FileStore, HashStore, PrefixStore).

    The store is trusted: without `EPT_SECRET` the job's secret goes through it. `mask` and `readmit` also use
    `compare_set(key, expected, desired)`, which sets a key that has the value `expected` (nothing: "") and returns what
    stands there then.
    """

    def set(self, key: str, value: str, /) -> Any: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def check(self, keys: list[str], /) -> bool: ...


class LocalStore:
    """A store for ranks that are threads of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        with self._lock:
            self._values[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        with self._lock:
            return self._values[key]

    def add(self, key: str, amount: int, /) -> int:
        with self._lock:
            total = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(total).encode()
            return total

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        with self._lock:
            if self._values.get(key, b"") == expected.encode():
                self._values[key] = desired.encode()
            return self._values.get(key, expected.encode())

    def check(self, keys: list[str], /) -> bool:
        with self._lock:
            return all(key in self._values for key in keys)


class Bootstrap:
    """The set-up of one group. In each stage every rank says something, or its error, which all then raise.

    Invariant. The prefix holds the number of times that this rank has made a group of this name on this store. Making
    one is collective, and a rank counts before anything of it can fail, so all have the same number, and what an
    earlier group left there, or a failed attempt, is never read.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, name: str, timeout_s: float, *, again: bool = False
    ) -> None:
        """`again`: reads what was said when the group was made, and takes no part in making one."""
        self.store = self._store = store
        self._rank = rank
        self._world = world_size
        self._name = name
        self._timeout_s = timeout_s
        try:
            self.generation = store.add(f"ept/{name}/{rank}", 0 if again else 1)
        except (RuntimeError, ValueError) as problem:
            raise self._failed(problem) from problem
        self.prefix = self._prefix = f"ept/{name}/{self.generation}"

    def say(self, stage: str, content: dict[str, Any] | None, error: EptError | None = None) -> None:
        """Puts this rank's word of a stage."""
        if error is not None:
            said: dict[str, Any] = {"error": {"code": int(error.code), "text": error.message, "peer": error.peer}}
        else:
            said = {"said": content, "world_size": self._world}
        try:
            self._store.set(self._key(stage, self._rank), json.dumps(said))
        except RuntimeError as problem:
            raise self._failed(problem) from problem

    def exchange(self, stage: str, content: dict[str, Any], shape: record.Shape) -> list[dict[str, Any]]:
        """Says `content` and waits for all: what each rank said, in rank order, each of that shape. An error that any
        rank said is raised."""
        self.say(stage, content)
        ranks = range(self._world)
        self._wait(stage, list(ranks))
        return [self._of_shape(stage, rank, self._heard(stage, rank), shape) for rank in ranks]

    def said(self, stage: str, shape: record.Shape) -> list[dict[str, Any]]:
        """What each rank said in a stage that is long past."""
        ranks = range(self._world)
        self._wait(stage, list(ranks))
        return [self._of_shape(stage, rank, self._heard(stage, rank), shape) for rank in ranks]

    def errors(self, stage: str) -> None:
        """Raises an error that some rank has said, if one has; doesn't wait."""
        for rank in range(self._world):
            if rank != self._rank and self._has([self._key(stage, rank)]):
                self._heard(stage, rank)

    def cause_of_loss(self, stage: str) -> EptError | None:
        """To be asked when a peer is lost: the error that a rank said before it left, if one comes to be known soon.
        That another rank has lost a peer too is no cause."""
        deadline = time.monotonic() + LAST_WORDS_S
        while True:
            for rank in range(self._world):
                try:
                    said = self._word(stage, rank) if self._has([self._key(stage, rank)]) else {}
                except TransportError:  # the store may have gone with the rank that served it
                    return None
                if "error" in said:
                    error = self._error(stage, rank, said["error"])
                    if not isinstance(error, PeerLost):
                        return error
            if time.monotonic() > deadline:
                return None
            time.sleep(LONGEST_POLL_S)

    def _wait(self, stage: str, missing: list[int]) -> None:
        """Until all of them have said their word. A rank that failed ends it early: the others may never come."""
        deadline = time.monotonic() + self._timeout_s
        pause = FIRST_POLL_S
        while missing and not self._has([self._key(stage, rank) for rank in missing]):
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_POLL_S)
            if pause == LONGEST_POLL_S:
                missing = self._still_missing(stage, missing)
            if missing and time.monotonic() > deadline:
                raise self._late(stage, missing)

    def _still_missing(self, stage: str, ranks: list[int]) -> list[int]:
        here = [rank for rank in ranks if self._has([self._key(stage, rank)])]
        for rank in here:
            self._heard(stage, rank)
        return [rank for rank in ranks if rank not in here]

    def _heard(self, stage: str, rank: int) -> dict[str, Any]:
        said = self._word(stage, rank)
        if "error" in said:
            raise self._error(stage, rank, said["error"])
        self._of_shape(
            stage, rank, said, {"world_size": record.a_number, "said": lambda value: isinstance(value, dict)}
        )
        if said["world_size"] != self._world:
            raise MismatchError(
                f"ranks of group {self._name!r} disagree on world_size: rank {self._rank} has {self._world}, "
                f"rank {rank} has {said['world_size']}",
                operation=stage,
                peer=rank,
            )
        content: dict[str, Any] = said["said"]
        return content

    def _word(self, stage: str, rank: int) -> dict[str, Any]:
        try:
            return record.read(self._store.get(self._key(stage, rank)))
        except record.Garbled as problem:
            raise self._garbled(stage, rank, problem) from None
        except RuntimeError as problem:
            raise self._failed(problem) from problem

    def _of_shape(self, stage: str, rank: int, said: object, shape: record.Shape) -> dict[str, Any]:
        try:
            return record.check(said, shape)
        except record.Garbled as problem:
            raise self._garbled(stage, rank, problem) from None

    def _error(self, stage: str, rank: int, told: object) -> EptError:
        said = self._of_shape(stage, rank, told, _ERROR)
        prefix = "" if rank == self._rank else f"rank {rank} of group {self._name!r} failed: "
        return error_class(said["code"])(prefix + said["text"], operation=stage, peer=said["peer"])

    def _has(self, keys: list[str]) -> bool:
        try:
            return self._store.check(keys)
        except RuntimeError as problem:
            raise self._failed(problem) from problem

    def _key(self, stage: str, rank: int) -> str:
        return f"{self._prefix}/{stage}/{rank}"

    def _late(self, stage: str, missing: Sequence[int]) -> Timeout:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        come = self._world - len(missing)
        return Timeout(
            f"rank {self._rank} of group {self._name!r} waited {self._timeout_s:g} s for rank {shown} in the set-up's "
            f"stage {stage}: {come} of {self._world} ranks have come. Every rank must make the group, with the same "
            "name, world size and store",
            operation=stage,
            peer=missing[0] if missing else None,
            expected=self._world,
            seen=come,
        )

    def _garbled(self, stage: str, rank: int, problem: ValueError) -> TransportError:
        return TransportError(
            f"what stands in the store of group {self._name!r} for rank {rank}, stage {stage}, was not written by a "
            f"rank of this version: {problem}. Only the job's ranks may reach the store",
            operation=stage,
            peer=rank,
        )

    def _failed(self, problem: RuntimeError | ValueError) -> TransportError:
        return TransportError(f"the store of group {self._name!r} failed: {problem}", operation="set-up")
