# SPDX-License-Identifier: Apache-2.0
"""A step in which two ranks wait for a third, which comes when both are seen to wait."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

import eptransport as ept

LIMIT_S = 90


def dispatch_with_rank_2_late(groups: Sequence[ept.Group]) -> None:
    def run(group: ept.Group) -> None:
        moe = ept.AllToAll(group, num_experts=3, top_k=1, hidden=64, max_tokens=4, threads=1)
        if group.rank == 2:
            deadline = time.monotonic() + LIMIT_S
            while not all(
                any(cell.peer == 2 and cell.now_s > 0.2 for cell in other.metrics().waits()) for other in groups[:2]
            ):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        moe.dispatch(torch.ones(4, 64, dtype=torch.bfloat16), torch.zeros(4, 1, dtype=torch.int64))

    ept.loopback_run(groups, run)
