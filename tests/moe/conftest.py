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

import eptransport as ept  # noqa: E402


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
