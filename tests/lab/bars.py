# SPDX-License-Identifier: Apache-2.0
"""Our write with a signal beside the bare loop of write-with-immediate, over soft-RoCE: two questions of
`eptransport bench p2p --backend verbs --against verbs`, and of its sides the native ones. For the lab, where all of it
takes an hour.

    export CPATH=$PWD/build/libfabric/include EPT_VERBS_DEVICES=rxe0
    tests/lab/rdma-lab -- .venv/bin/python tests/lab/bars.py"""

from __future__ import annotations

import sys
from typing import Any

from eptransport.bench.against import compare, own
from eptransport.bench.against.compare import AgainstJob


class Short(AgainstJob):
    @property
    def questions(self) -> list[Any]:
        return [question for question in super().questions if question.kind in ("latency", "bandwidth")]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    find = own.find
    own.find = lambda *given: [side for side in find(*given) if not side.python]  # type: ignore[assignment]
    compare.OPEN_S = compare.ANSWER_S = 300.0
    job = Short(("verbs",), "verbs", latency_bytes=(8,), stream_bytes=16 << 20, iterations=300, rounds=rounds)
    result = compare.run(job)
    for side in result.sides:
        print(side.name, side.version, side.failed or "")
        for figure in side.figures:
            if figure.kind in ("latency", "bandwidth"):
                told = ", ".join(f"{value:.4g}" for value in figure.value.rounds)
                print(f"  {figure.kind} of {figure.bytes} B, {figure.unit}: {told}; ratio {figure.ratio}")
    for name, why in result.skipped.items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    main()
