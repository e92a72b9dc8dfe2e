# SPDX-License-Identifier: Apache-2.0
"""The contract on every backend that can start here: one test for each check and subject, by clause number.

A process holds one libfabric: so the checks over each release, and those under the strict shim, are made in a process
that is that subject's alone. All others are made in this one, where a debugger finds them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from libfabrics import cases

from eptransport.backends import registry
from eptransport.conformance import Check, Skip, Subject, Waived, checks, subject
from eptransport.conformance.run import LIMIT_S, Worker

SEEDS = [int(seed) for seed in os.environ.get("EPT_CONTRACT_SEEDS", "1 7").split()]
VARIANTS: dict[str, list[dict[str, str]]] = {
    "loopback": [{}, *({"adversary": str(seed)} for seed in SEEDS)],
    "tcp": [{}, {"streams": "1"}, {"streams": "4", "threads": "2"}],
    # The one mode that waives nothing, over connections; the default over shared memory, by a copy of the kernel's.
    "ucx": [{"transports": "tcp", "interface": "lo", "write": "message"}, {"transports": "posix,sysv,cma"}],
}
HELD = {"10a", "10d", "11a", "12a", "12g"}
"""Of the clauses that libfabric's tcp waives: the checks that hold there all the same, and have to go on to."""
NOT_STRICT = {"debian": {"10d"}}
"""But for these under the shim. An endpoint of 1.17 stays open and unpolled when its rank closes before all have said
goodbye, and the shim lets nothing land where nobody polls: writes to that rank end when it was silent for too long."""
STRICT = f"{SEEDS[-1]}:window=8,hold_ms=20,rma=4096"
"""Writes of 4 KiB at most, so that a transfer has pieces that pass one another. Windows shorter than by default: most
checks wait for a transfer before they post the next, and would spend their time on that alone."""


def _here() -> list[Subject]:
    found = []
    for name, plugin in sorted(registry(()).plugins.items()):
        for options in [] if name == "libfabric" else VARIANTS.get(name, [{}]):
            if plugin.probe(options).usable:
                under = subject(plugin, options, int(options.get("adversary", "1")))
                found.append(replace(under, thorough=under.label == "loopback"))
    return found


def _elsewhere() -> list[Any]:
    """libfabric's tcp of each release, and of the newest under the strict shim too: cases of all checks, each with
    whether it has to hold though its clause is waived. A release that isn't here is one case, skipped with the
    reason."""
    found: list[Any] = []
    releases = cases("tcp")
    newest = [case.id for case in releases if not case.marks][-1:]
    for case in releases:
        if case.marks:
            found.append(pytest.param(None, None, False, id=f"libfabric-{case.id}", marks=case.marks))
            continue
        ((release, provider),) = case.values
        for strict in ("", STRICT) if case.id in newest else ("",):
            options = {**release.options(provider), **({"strict": strict} if strict else {})}
            label = f"libfabric-{case.id}" + ("-strict" if strict else "")
            under = replace(subject(registry(()).plugins["libfabric"], options), label=label)
            held = HELD - (NOT_STRICT.get(release.name.split("-")[0], set()) if strict else set())
            for check in checks():
                found.append(
                    pytest.param(check, under, check.number in held, id=f"{check.number}-{check.name}-{label}")
                )
    return found


@pytest.mark.parametrize(
    ("check", "under"),
    [
        pytest.param(check, under, id=f"{check.number}-{check.name}-{under.label}")
        for check in checks()
        for under in _here()
    ],
)
def test_clause(check: Check, under: Subject) -> None:
    # What UCX waives by default, clause 12, holds in all of its checks: no payload of theirs comes by rendezvous.
    held = under.plugin.name == "ucx"
    try:
        check.run(under, try_waived=held)
    except Skip as reason:
        if held and isinstance(reason, Waived):
            raise
        pytest.skip(str(reason))


Ask = Callable[[Check, Subject, bool], tuple[str, str]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Has a check made in the process of its subject."""
    workers: dict[str, Worker] = {}

    def one(check: Check, under: Subject, try_waived: bool) -> tuple[str, str]:
        if under.label not in workers:
            workers[under.label] = Worker(under)
        verdict, text = workers[under.label].ask(check, LIMIT_S, try_waived)
        if verdict in ("crashed", "hung"):
            workers.pop(under.label).end()
        return verdict, text

    yield one
    for worker in workers.values():
        worker.end()


@pytest.mark.parametrize(("check", "under", "held"), _elsewhere())
def test_clause_over_libfabric(check: Check, under: Subject, held: bool, ask: Ask) -> None:
    verdict, text = ask(check, under, held)
    if verdict in ("skipped", "waived") and not held:
        pytest.skip(text)
    assert verdict == "passed", text


def test_every_clause_has_a_check() -> None:
    assert {check.clause for check in checks()} == set(range(1, 14))


def test_something_was_tested() -> None:
    labels = {under.label for under in _here()}
    assert {"loopback", f"loopback-adversary{SEEDS[0]}"} <= labels
    assert any(label.startswith("tcp") for label in labels)
