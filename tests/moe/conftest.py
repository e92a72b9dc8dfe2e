# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "reference")]

import harness  # noqa: E402
import spmd  # noqa: E402

import eptransport as ept  # noqa: E402

# With EPT_TEST_DEVICE=cuda: what a GPU rank does otherwise, and why.
NOT_ON_A_GPU = {
    "test_bad_input_is_refused_and_nothing_is_lost[id too": "a kernel reads the ids: one that is out of range faults "
    "the lane, where a CPU rank refuses the call and goes on",
    "test_many_ranks_in_one_process": "kernels of more than 32 ranks of one process wait behind one another",
    "test_objects_share_one_arena": "lanes on a GPU don't grow: a larger AllToAll that comes later has its own, or is "
    "refused",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if harness.DEVICE == "cpu":
        return
    for item in items:
        if HERE in Path(item.path).parents:
            for name, why in NOT_ON_A_GPU.items():
                if name in item.nodeid:
                    item.add_marker(pytest.mark.skip(reason=why))


NOT_OF_PROCESSES = {
    "test_streaming.py": "kernels that put by themselves refuse calls that may be streamed",
    "test_machine.py": "it drives all ranks from one place",
    "test_links.py": "it breaks tcp's connections",
}
"""With tests/moe/spmd.py, and why."""


@pytest.fixture(autouse=True)
def together(request: pytest.FixtureRequest) -> None:
    if not spmd.RANKS:
        return
    spmd.begin(request.node.nodeid)
    for name, why in NOT_OF_PROCESSES.items():
        if name in request.node.nodeid and (name != "test_streaming.py" or spmd.BACKEND == "nvshmem"):
            pytest.skip(why)
    if "make_groups" not in request.fixturenames:
        pytest.skip("it makes its groups by itself")


@pytest.fixture
def make_groups() -> Iterator[Callable[..., list[ept.Group]]]:
    """make_groups(n, adversary=7, **settings): n ranks over loopback, closed when the test ends."""
    made: list[list[ept.Group]] = []

    def make(n: int, **settings: Any) -> list[ept.Group]:
        made.append(harness.groups(n, **settings))
        return made[-1]

    yield make
    for groups in reversed(made):
        harness.close(groups)
