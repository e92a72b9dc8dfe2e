"""The guard of a native object: once it says idle nobody is inside, and nobody comes in any more."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

import eptransport as ept
from eptransport._guard import Guard

THREADS = 4
ROUNDS = 60


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads change places at nearly every line."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_nobody_is_inside_once_it_is_idle() -> None:
    for _ in range(ROUNDS):
        guard = Guard("a thing")
        idle = threading.Event()
        inside_after: list[str] = []
        entered = [0] * THREADS

        def user(
            number: int, guard: Guard = guard, idle: threading.Event = idle, wrong: list[str] = inside_after,
            entered: list[int] = entered,
        ) -> None:  # fmt: skip
            while True:
                try:
                    guard.enter()
                except ept.ClosedError:
                    return
                entered[number] += 1
                if idle.is_set():
                    wrong.append(f"thread {number} is inside")
                guard.leave()

        threads = [threading.Thread(target=user, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        while not all(entered):
            pass
        assert guard.shut()
        assert not guard.shut()
        assert guard.wait_idle(120)
        idle.set()
        for thread in threads:
            thread.join()
        assert not inside_after


def test_who_is_inside_is_waited_for() -> None:
    guard = Guard("a thing")
    guard.enter()
    guard.enter()
    assert guard.shut()
    assert not guard.wait_idle(0)
    guard.leave()
    assert not guard.wait_idle(0)
    with pytest.raises(ept.ClosedError, match="a thing is closed"):
        guard.enter()
    assert not guard.wait_idle(0)  # who was turned away was never inside
    guard.leave()
    assert guard.wait_idle(0)
