# SPDX-License-Identifier: Apache-2.0
"""The device interface on a GPU: the program of litmus.cc, as tests/gpu/run builds and starts it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

# Before the fixture that clears EPT_*: a build folder that was made elsewhere.
BUILD = os.environ.get("EPT_GPU_BUILD")


@pytest.mark.timeout(400)
def test_litmus() -> None:
    environment = dict(os.environ) | ({"EPT_GPU_BUILD": BUILD} if BUILD else {})
    run = Path(__file__).parent / "run"
    done = subprocess.run([run, "litmus"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every count and byte" in done.stdout
