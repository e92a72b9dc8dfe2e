# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import multiprocessing.process
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import wire as wires
from children import process_context


@pytest.fixture(scope="session")
def _possible() -> str | None:
    return wires.why_not()


@pytest.fixture
def wire(tmp_path: Path, _possible: str | None) -> Iterator[Callable[..., None]]:
    """wire({rank: Link}): a wire in the test's folder, gone when the test ends. Skips where none can be had."""
    if _possible is not None:
        pytest.skip(_possible)
    running: list[multiprocessing.process.BaseProcess] = []

    def start(links: dict[int, wires.Link] | None = None) -> None:
        context = process_context()
        ready = context.Event()
        process = context.Process(target=wires.run_wire, args=(tmp_path, links or {}, ready), daemon=True)
        process.start()
        running.append(process)
        assert ready.wait(60)

    yield start
    for process in running:
        process.kill()
        process.join()
