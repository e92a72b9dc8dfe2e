# SPDX-License-Identifier: Apache-2.0
"""These tests with a process for each rank, over a backend that allows no other way (NVSHMEM: a PE is a process).

Each of N processes runs the same pytest on the same tests, as one rank of every group that they make: there its own
group is real and the others' are Absent, and what is to run on all ranks (harness.on_ranks) runs on this one, and the
answers go round. So a test whose ranks are what its threads do is taken as it is. One that makes a group of another
size is skipped, and one that looks at another rank's objects from outside, on every rank.

    python tests/moe/spmd.py N [pytest's arguments]      EPT_TEST_BACKEND=tcp, or what is to be tested

Answers go through files: nothing of the product carries what is said of it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

RANKS = int(os.environ.get("EPT_TEST_RANKS", "0"))
"""0: ranks are threads, as always."""
RANK = int(os.environ.get("EPT_TEST_RANK", "0"))
BACKEND = os.environ.get("EPT_TEST_BACKEND", "tcp")
FOLDER = Path(os.environ.get("EPT_TEST_FOLDER", "."))
WAIT_S = 90.0
"""For another rank's answer: longer than any deadline of a group."""

_test = 0
"""The number of the test that is under way; the same on every rank."""
_count = 0
"""What this rank has said in it."""


class Absent:
    """What another process has."""

    def __init__(self, rank: int) -> None:
        object.__setattr__(self, "_rank", rank)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        skip(f"it looks at {name} of rank {self._rank} from outside")


def skip(why: str) -> NoReturn:
    """On all ranks: the others learn of it where they wait for this one."""
    import pytest

    say(("skip", why))
    pytest.skip(why)


def begin(test: str) -> None:
    """Every rank begins it when all have ended the one before."""
    global _count, _test
    _test, _count = _test + 1, 0
    assert set(exchange(("test", test))) == {test}, "ranks are at different tests"


def place_of(rank: int, test: int, count: int) -> Path:
    return FOLDER / f"{test}-{count}-{rank}"


def say(what: Any) -> None:
    place = place_of(RANK, _test, _count)
    written = place.with_suffix(".part")
    written.write_bytes(packed(what))
    written.rename(place)


def packed(what: Any) -> bytes:
    try:
        return pickle.dumps(what)
    except Exception:  # such as an AllToAll: nobody else could use it
        return pickle.dumps((what[0], Absent(RANK)))


def exchange(mine: Any) -> list[Any]:
    """What every rank says. Raises what another one failed by, and skips where it skips."""
    import pytest

    global _count
    say(mine)
    all_said = []
    until = time.monotonic() + WAIT_S
    for rank in range(RANKS):
        place = place_of(rank, _test, _count)
        while not place.exists():
            left = time.monotonic() > until or place_of(rank, _test + 1, 0).exists()
            if left and not place.exists():  # it may have said this, and gone on, since the look before
                raise AssertionError(f"rank {rank} says nothing more in this test")
            time.sleep(0.002)
        all_said.append(pickle.loads(place.read_bytes()))
    _count += 1
    for rank, (kind, value) in enumerate(all_said):
        if rank != RANK and kind == "skip":
            pytest.skip(value)
        if rank != RANK and kind == "failed":
            raise AssertionError(f"rank {rank} failed: {value}")
    return [value for _, value in all_said]


def on_ranks(ranks: Sequence[int], run: Callable[[int], Any]) -> dict[int, Any]:
    """run(rank) on each of those, and their answers everywhere."""
    if RANK not in ranks:
        answers = exchange(("answer", None))
        return {rank: answers[rank] for rank in ranks}
    import pytest

    try:
        answer = run(RANK)
    except BaseException as error:
        if not isinstance(error, pytest.skip.Exception):
            say(("failed", repr(error)))
        raise
    answers = exchange(("answer", answer))
    answers[RANK] = answer
    return {rank: answers[rank] for rank in ranks}


def group(settings: Any) -> list[Any]:
    """Every rank's group: this one's, and the others' as they are seen from here."""
    import torch

    import eptransport as ept

    global _count
    folder = FOLDER / f"store-{_test}-{_count}"
    store = torch.distributed.FileStore(str(folder), RANKS)
    _count += 1
    made = ept.Group(settings, store=store, rank=RANK, world_size=RANKS)
    return [made if rank == RANK else Absent(rank) for rank in range(RANKS)]


def main(ranks: int, arguments: list[str]) -> int:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(prefix="ept-spmd-") as folder:
        base = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(arguments or [str(here)])]
        processes = []
        for rank in range(ranks):
            its = {"EPT_TEST_RANK": str(rank), "EPT_TEST_RANKS": str(ranks), "EPT_TEST_FOLDER": folder}
            output = None if rank == 0 else (Path(folder) / f"out-{rank}").open("w")
            processes.append(subprocess.Popen(base, env={**os.environ, **its}, stdout=output, stderr=output))
        codes = [process.wait() for process in processes]
        for rank, code in enumerate(codes):
            if rank > 0 and code not in (0, 5):
                print(f"== rank {rank}\n" + (Path(folder) / f"out-{rank}").read_text()[-4000:])
        return max(0 if code == 5 else abs(code) for code in codes)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
