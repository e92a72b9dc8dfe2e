"""The guard of a native object: once it says idle nobody is inside, and nobody comes in any more."""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def test_a_gpus_steps_call_nothing_behind_their_guard() -> None:
    """A GPU rank's dispatch after a close ended the process: it asked the freed object for a size. No GPU is needed to
    see that each native function goes through what enters the guard."""
    from eptransport import _gpu_steps

    tree = ast.parse(Path(_gpu_steps.__file__).read_text())
    direct = [
        f"line {node.lineno}: {ast.unparse(node.func)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("lib.ept_")
    ]
    assert direct == []


def test_a_closed_object_gives_no_number() -> None:
    from eptransport._gpu_steps import GpuSteps

    asked: list[str] = []
    steps = object.__new__(GpuSteps)
    native: Any = SimpleNamespace(guard=Guard("this AllToAll"), pointer="the object")
    steps._native = native

    def size(pointer: str, count: int) -> int:
        asked.append(pointer)
        return 16 * count

    assert steps._number(size, 3) == 48
    native.guard.shut()
    assert native.guard.wait_idle(0)
    with pytest.raises(ept.ClosedError, match="this AllToAll is closed"):
        steps._number(size, 3)
    assert asked == ["the object"]
