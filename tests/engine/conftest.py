# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / "reference"), str(TESTS / "contract")]
