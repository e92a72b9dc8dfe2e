# SPDX-License-Identifier: Apache-2.0
"""The contract on every backend that can start here: one test for each check and subject, by clause number."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from libfabrics import releases

from eptransport.backends import registry
from eptransport.conformance import Check, Skip, Subject, Waived, checks, subject

SEEDS = [int(seed) for seed in os.environ.get("EPT_CONTRACT_SEEDS", "1 7").split()]
VARIANTS: dict[str, list[dict[str, str]]] = {
    "loopback": [{}, *({"adversary": str(seed)} for seed in SEEDS)],
    "tcp": [{}, {"streams": "1"}, {"streams": "4"}],
    # One release: a process holds one libfabric, and checks run in this one.
    "libfabric": [release.options("tcp") for release in releases() if not release.missing][:1],
}
HELD = {"libfabric": {"10a", "10d", "11a", "12a", "12g"}}
"""Of the clauses that a backend waives: the checks that hold there all the same, and have to go on to."""


def _subjects() -> list[Subject]:
    found = []
    for name, plugin in sorted(registry(()).plugins.items()):
        for options in VARIANTS.get(name, [{}]):
            if plugin.probe(options).usable:
                under = subject(plugin, options, int(options.get("adversary", "1")))
                found.append(replace(under, thorough=under.label == "loopback"))
    return found


CASES = [
    pytest.param(check, under, id=f"{check.number}-{check.name}-{under.label}")
    for check in checks()
    for under in _subjects()
]


@pytest.mark.parametrize(("check", "under"), CASES)
def test_clause(check: Check, under: Subject) -> None:
    held = check.number in HELD.get(under.plugin.name, ())
    try:
        check.run(under, try_waived=held)
    except Skip as reason:
        if held and isinstance(reason, Waived):
            raise
        pytest.skip(str(reason))


def test_every_clause_has_a_check() -> None:
    assert {check.clause for check in checks()} == set(range(1, 14))


def test_something_was_tested() -> None:
    labels = {under.label for under in _subjects()}
    assert {"loopback", f"loopback-adversary{SEEDS[0]}"} <= labels
    assert any(label.startswith("tcp") for label in labels)
