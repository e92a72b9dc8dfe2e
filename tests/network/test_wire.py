# SPDX-License-Identifier: Apache-2.0
"""That the wire of the other tests does what it says, seen by datagrams between two namespaces."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wire import Joined, Link, address, join

COUNT, SIZE = 300, 200
PORT = 4000


def meet(rank: int, folder: Path) -> tuple[Joined, socket.socket]:
    """Both know each other's hardware address, so that no question for it is lost later."""
    joined = join(folder, rank)
    ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    ear.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 212992)  # holds all that is sent, read or not
    ear.bind((address(rank), PORT))
    ear.settimeout(0.05)
    deadline = time.monotonic() + 60
    heard = answered = False
    while not (heard and answered):
        assert time.monotonic() < deadline
        ear.sendto(b"heard" if heard else b"hello", (address(1 - rank), PORT))
        try:
            said = ear.recv(100)
        except TimeoutError:
            continue
        heard = True
        answered = answered or said == b"heard"
    ear.sendto(b"heard", (address(1 - rank), PORT))
    (folder / f"met{rank}").touch()
    while not (folder / f"met{1 - rank}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    ear.settimeout(0.3)
    while True:  # what is left of the meeting
        try:
            ear.recv(100)
        except TimeoutError:
            break
    (folder / f"quiet{rank}").touch()
    while not (folder / f"quiet{1 - rank}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return joined, ear


def echo(rank: int, world: int, folder: Path) -> Any:
    """Rank 0's round trips, s."""
    _, ear = meet(rank, folder)
    trips = []
    ear.settimeout(60)
    for i in range(5):
        begin = time.monotonic()
        if rank == 0:
            ear.sendto(b"%d" % i, (address(1), PORT))
            assert ear.recv(100) == b"%d" % i
            trips.append(time.monotonic() - begin)
        else:
            ear.sendto(ear.recv(100), (address(0), PORT))
    return trips


def one_way(rank: int, world: int, folder: Path, link: dict[str, Any]) -> Any:
    """Rank 0 sends COUNT numbered datagrams of SIZE bytes under `link`. When it began and what the wire counted; what
    rank 1 got, and when it had all."""
    joined, ear = meet(rank, folder)
    done = folder / "done"
    if rank == 0:
        joined.change(0, **link)
        before = joined.counts(0)
        begin = time.monotonic()
        for i in range(COUNT):
            ear.sendto(b"%-*d" % (SIZE, i), (address(1), PORT))
            time.sleep(0.0005)
        deadline = time.monotonic() + 60
        while joined.counts(0)["seen"] - before["seen"] < COUNT:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        after = joined.counts(0)
        counts = {name: after[name] - before[name] for name in after}
        (folder / "counted").write_text(str(COUNT - counts["dropped"]))
        (folder / "counted").rename(done)
        return begin, counts
    got: list[int] = []
    ear.settimeout(0.5)
    deadline = time.monotonic() + 60
    while not done.exists() or len(got) < int(done.read_text()):
        assert time.monotonic() < deadline, f"{len(got)} came"
        with contextlib.suppress(TimeoutError):
            got.append(int(ear.recv(SIZE)))
    end = time.monotonic()
    with contextlib.suppress(TimeoutError):  # none comes that shouldn't
        while True:
            got.append(int(ear.recv(SIZE)))
    return end, got


def test_delay(wire: Callable[..., None], spawn: Callable[..., list[Any]]) -> None:
    wire({0: Link(delay_s=0.02), 1: Link(delay_s=0.01)})
    trips, _ = spawn(2, echo)
    assert min(trips) >= 2 * 0.03


def test_loss(wire: Callable[..., None], spawn: Callable[..., list[Any]]) -> None:
    wire()
    (_, counts), (_, got) = spawn(2, one_way, {"loss": 0.1})
    assert counts["seen"] == COUNT
    assert len(got) == COUNT - counts["dropped"]
    assert got == sorted(set(got))
    # The decisions of the seed, which is 1 and the rank's number, 0. The meeting drew none: no loss was set then.
    draw = random.Random(1)
    assert counts["dropped"] == sum(draw.random() < 0.1 for _ in range(COUNT))
    assert 10 < counts["dropped"] < 90


def test_reordering(wire: Callable[..., None], spawn: Callable[..., list[Any]]) -> None:
    wire()
    (_, counts), (_, got) = spawn(2, one_way, {"delay_s": 0.02, "reorder": 0.2})
    assert counts["dropped"] == 0
    assert counts["overtook"] > 10
    assert sorted(got) == list(range(COUNT))
    assert got != sorted(got)


def test_down(wire: Callable[..., None], spawn: Callable[..., list[Any]]) -> None:
    wire()
    (_, counts), (_, got) = spawn(2, one_way, {"down": True})
    assert counts["dropped"] == COUNT
    assert got == []


def test_rate(wire: Callable[..., None], spawn: Callable[..., list[Any]]) -> None:
    wire()
    rate = 100_000
    (begin, counts), (end, got) = spawn(2, one_way, {"bytes_per_s": rate})
    assert len(got) == COUNT - counts["dropped"]
    # Each is a frame of 42 bytes and its own; unhindered they take COUNT times half a millisecond.
    assert end - begin >= (len(got) - 1) * (SIZE + 42) / rate
    assert (len(got) - 1) * (SIZE + 42) / rate > 2 * COUNT * 0.0005
