# SPDX-License-Identifier: Apache-2.0
"""What a test's child process runs. A module of its own: `conftest` names another file in each folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_child(pipe: Any, function: Callable[..., Any], rank: int, n: int, folder: Path, args: tuple[Any, ...]) -> None:
    """Sends what the function returns or raises."""
    try:
        answer = function(rank, n, folder, *args)
    except Exception as error:
        answer = error
    pipe.send(answer)
