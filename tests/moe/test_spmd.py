# SPDX-License-Identifier: Apache-2.0
"""spmd.py itself, over tcp: what a GPU's run of these tests over NVSHMEM stands on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import spmd

HERE = Path(__file__).parent


@pytest.mark.skipif(spmd.RANKS > 0, reason="it starts the processes of which this is one")
def test_a_process_for_each_rank(tmp_path: Path) -> None:
    failing = tmp_path / "test_failing.py"
    failing.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import spmd\n"
        "def test_one_rank_fails():\n"
        "    spmd.begin('it')\n"
        "    def body(rank):\n"
        "        assert rank != 1, 'rank 1 is wrong'\n"
        "    spmd.on_ranks(range(2), body)\n"
    )
    named = (
        "test_outputs_are_never_views_of_a_region",
        "test_alignment[1]",
        "test_lanes_are_apart",  # its threads are of several ranks
        "test_weights_applied[masked]",  # of three ranks
    )
    command = [sys.executable, str(HERE / "spmd.py"), "2", "-q", "-rs"]
    command += [*(f"{HERE / 'test_options.py'}::{name}" for name in named), str(failing)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 failed, 2 passed, 2 skipped" in ran.stdout
    assert "rank 1 failed" in ran.stdout  # says rank 0
    assert "rank 1 is wrong" in ran.stdout  # says its own output
