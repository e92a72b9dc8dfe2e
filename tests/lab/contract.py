# SPDX-License-Identifier: Apache-2.0
"""The contract's checks on a backend, a line each as it ends: what is cut off has told what it had. For the lab.

    python tests/lab/contract.py verbs 1,2,3 devices=rxe0    # clauses, or `all`; settings of the backend

Ends with 1 if a check did not pass. The emulated machine stands still for seconds now and then, which some checks take
for a fault: one that fails is made a second time, and both are said."""

from __future__ import annotations

import sys

from eptransport.conformance import checks
from eptransport.conformance.run import find, run_subject, subjects

PATIENCE_S = 60.0
"""Twice what a check takes by itself: a process starts in 10 s here, five times as slowly as outside."""
LIMIT_S = 360.0
"""Of one check, in which several such waits may come one after the other."""


def main() -> int:
    backend, clauses, *rest = sys.argv[1:]
    options = dict(option.split("=", 1) for option in rest)
    wanted = [check for check in checks() if clauses == "all" or str(check.clause) in clauses.split(",")]
    (under,) = subjects(find(backend, options), 1, options, PATIENCE_S)
    for again in ("", ", made a second time"):
        failed = []
        for seen in run_subject(under, wanted, LIMIT_S):
            print(f"{seen.check} {seen.name}: {seen.verdict} in {seen.seconds:.1f} s{again} {seen.text}", flush=True)
            if seen.broken or seen.verdict == "waived":
                failed.append(seen.check)
        wanted = [check for check in wanted if check.number in failed]
        if not wanted:
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
