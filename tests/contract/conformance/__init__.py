# SPDX-License-Identifier: Apache-2.0
"""The contract as checks: what every backend must keep, clause by clause, driven through the engine.

    from conformance import checks, subject
    for check in checks(clause=3):
        check.run(subject(plugin))            # returns, or raises Violation with what was seen

No test runner is needed. Read `registry` first, then `world` (several engines in one process, stepped by hand), then
the clauses in order."""

from conformance import (  # noqa: F401  (importing a clause registers its checks)
    clause01_one_sided,
    clause02_unordered,
    clause03_signals,
    clause04_early,
    clause05_zero_length,
    clause06_local_completion,
    clause07_posting,
    clause08_deadlines,
    clause09_errors,
    clause10_quiesce,
    clause12_safety,
    clause13_limits,
)
from conformance.registry import Check, Skip, Violation, checks
from conformance.world import Subject, World, subject

__all__ = ["Check", "Skip", "Subject", "Violation", "World", "checks", "subject"]
