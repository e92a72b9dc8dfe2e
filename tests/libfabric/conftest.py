# SPDX-License-Identifier: Apache-2.0
"""What the tests of the backend libfabric import besides their own folder."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / folder) for folder in ("processes", "moe", "reference")]
