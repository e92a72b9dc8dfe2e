"""The contract as checks: what every backend must keep, clause by clause, driven through the engine.

    from eptransport.conformance import checks, subject
    for check in checks(clause=3):
        check.run(subject(plugin))            # returns, or raises Violation with what was seen

`eptransport conformance` runs them on any backend, each where it may end or hang (`run`); the tests of this repository
run them under pytest. Read `registry` first, then `world` (several engines in one process, stepped by hand), then the
clauses in order. Needs numpy."""

from eptransport.conformance import (  # noqa: F401  (importing a clause registers its checks)
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
    clause11_membership,
    clause12_safety,
    clause13_limits,
)
from eptransport.conformance.registry import Check, Skip, Violation, Waived, checks
from eptransport.conformance.world import Subject, World, subject

__all__ = ["TITLES", "Check", "Skip", "Subject", "Violation", "Waived", "World", "checks", "subject"]

TITLES = {
    1: "one-sided",
    2: "unordered",
    3: "a signal counts transfers",
    4: "early arrivals count",
    5: "zero length",
    6: "local completion",
    7: "posting never blocks",
    8: "every wait has a deadline",
    9: "errors are values",
    10: "quiesced",
    11: "dead peers and membership",
    12: "memory is safe",
    13: "any number",
}
"""Of docs/contract.md."""
