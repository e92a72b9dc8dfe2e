"""Ranks that are threads of one process: groups over loopback, and a function run on each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, TypeVar

from eptransport._bootstrap import LocalStore
from eptransport.group import Group
from eptransport.settings import Settings

__all__ = ["loopback_groups", "loopback_run"]

T = TypeVar("T")

GRACE_S = 5.0
SLICE_S = 0.25
"""How often it looks whether a rank has failed."""


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
