# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine between processes over libfabric: bit for bit what the reference says, in every layout."""

from __future__ import annotations

from pathlib import Path

import launch
import pytest
from every_layout import steps
from libfabrics import Libfabric, cases


@pytest.mark.parametrize(("world", "rails", "sent"), [(2, 2, "bf16"), (4, 1, "e4m3")])
@pytest.mark.parametrize("case", cases("tcp", "shm", "verbs"))
def test_ranks_as_processes(case: tuple[Libfabric, str], tmp_path: Path, world: int, rails: int, sent: str) -> None:
    release, provider = case
    options = {f"libfabric.{name}": value for name, value in release.options(provider).items()}
    options["libfabric.rails"] = str(rails)
    written = launch.run(world, steps, tmp_path, "libfabric", options, sent, limit_s=600)  # soft-RoCE is emulated
    assert all(len(each) == rails and min(each) > 0 for each in written), written
