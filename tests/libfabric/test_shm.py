# SPDX-License-Identifier: Apache-2.0
"""Provider shm: where it is open, and that what once hung over it doesn't (writes of nothing, which credits and signals
are made of)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from libfabrics import Libfabric, cases

from eptransport.backends import registry
from eptransport.conformance import checks, subject
from eptransport.conformance.run import run_subject

Spawn = Callable[..., list[Any]]

SHM = Path("/dev/shm")
NUMBERS = ("01d", "01e", "04b", "05a", "07d")


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    yield
    for file in SHM.iterdir():  # of a process that was killed
        if (name := re.fullmatch(r"(\d+):\d+:\d+", file.name)) and not Path("/proc", name[1]).exists():
            file.unlink(missing_ok=True)


@pytest.mark.parametrize("case", cases("shm"))
def test_the_contract_over_shm(case: tuple[Libfabric, str], no_leftovers: None) -> None:
    release, provider = case
    assert release.name.startswith("debian-1."), "shm of 2.x is not to be open"
    under = subject(registry(()).plugins["libfabric"], release.options(provider))
    wanted = [check for check in checks() if check.number in NUMBERS]
    # In a process of its own, as each check is.
    said = {outcome.check: outcome.verdict + outcome.text for outcome in run_subject(under, wanted)}
    assert said == dict.fromkeys(NUMBERS, "passed")


def refusal(_rank: int, _n: int, _folder: Path, options: dict[str, str]) -> tuple[bool, str, str]:
    probe = registry(()).plugins["libfabric"].probe(options)
    return probe.usable, probe.why_not, probe.mend


def test_shm_of_later_releases_is_refused(spawn: Spawn) -> None:
    """It ends the process now and then, when two endpoints get to know each other."""
    later = [case.values[0][0] for case in cases("tcp") if not case.marks and "2." in case.values[0][0].name]
    if not later:
        pytest.skip("no libfabric of 2.x here")
    ((usable, why_not, mend),) = spawn(1, refusal, later[0].options("shm"))
    assert not usable
    assert "provider shm of libfabric 2." in why_not
    assert "EPT_LIBFABRIC_UNPROVEN" in mend
