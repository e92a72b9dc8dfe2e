# SPDX-License-Identifier: Apache-2.0
"""The suite tested: a plugin that is broken in one way for each clause, and the check that must see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import pytest
from typer.testing import CliRunner

from eptransport.backends import Plugin, Probe, registry
from eptransport.cli import app
from eptransport.conformance import checks, clause12_safety, subject
from eptransport.conformance.run import Outcome, find, run_subject

FAULTS = {
    "last_byte_missing": ("01a", "1 bytes of the block at rank 1 differ"),
    "lost_in_a_crowd": ("02a", "bytes of the block at rank 1 differ"),
    "signal_before_data": ("03a", "transfers are there"),
    "double_count": ("03e", "were due"),
    "early_lost": ("04a", "expected"),
    "nothing_for_nothing": ("05a", "that the signal reached 1"),
    "done_too_soon": ("06a", "overwritten at its completion"),
    "blocks_when_full": ("07a", "it blocked"),
    "blocks_when_idle": ("08a", "a wait for a signal with a deadline of 0.2 s ended after"),
    "error_swallowed": ("09a", "a write that was refused ended with None"),
    "lands_late": ("10a", "overwritten behind a local quiesce"),
    "lands_after_fence": ("11a", "that a masked rank is told that its link ended"),
    "fences_nothing": ("11b", "that ranks 0 and 1 are connected again"),
    "no_bounds": ("12b", "a write past the end by a forged length was let through"),
    "revokes_nothing": ("12e", "a write after a revoke was let through"),
    "regions_mixed_up": ("13a", "bytes of the block at rank 1 differ"),
}
"""By what is broken: the check that must see it, and what it must say."""
LIMIT_S = 180.0
"""Of a check on a machine with much other work; the longest takes 14 s at a load of 20 on two cores."""
PATIENCE_S = 4.0
"""With what never comes from a plugin that is broken. The sentence says that it was this fault which was seen, not a
machine that is slow."""


@pytest.fixture
def broken(out_of_tree: Path) -> Path:
    return out_of_tree / "ept_broken.so"


def under() -> str:
    return registry(()).plugins["tcp"].path


def outcomes(plugin: Plugin, options: Mapping[str, str], numbers: list[str], **fields: float) -> list[Outcome]:
    wanted = [check for check in checks() if check.number in numbers]
    assert len(wanted) == len(numbers)
    return list(run_subject(replace(subject(plugin, options), **fields), wanted, LIMIT_S))


class Bounded(Plugin):
    """tcp, if it checked bounds and no keys."""

    def probe(self, options: Mapping[str, str] | None = None) -> Probe:
        return replace(super().probe(options), protection="region")


def test_a_forged_reader_is_refused_where_keys_are_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """12d writes by another rank's region where keys are a peer's own. A card's serve whoever knows them (design.md,
    clause 12), so there it asks no more than that such a region can't be imported as it is."""
    tcp = registry(()).plugins["tcp"]
    bounded = Bounded(**{field.name: getattr(tcp, field.name) for field in fields(tcp)})
    (check,) = (each for each in checks(12) if each.number == "12d")
    attempts: list[Any] = []
    attempt = clause12_safety._attempt

    def counted(*args: Any) -> Any:
        attempts.append(args)
        return attempt(*args)

    monkeypatch.setattr(clause12_safety, "_attempt", counted)
    check.run(subject(bounded, {}))
    assert not attempts
    check.run(subject(tcp, {}))
    assert len(attempts) == 1


def test_there_is_a_fault_for_every_clause() -> None:
    assert {int(number[:2]) for number, _ in FAULTS.values()} == {check.clause for check in checks()}


def test_nothing_is_seen_where_nothing_is_broken(broken: Path) -> None:
    options = {"under": under()}
    found = outcomes(find(str(broken), options), options, sorted(number for number, _ in FAULTS.values()))
    assert [outcome.verdict for outcome in found] == ["passed"] * len(found), found


@pytest.mark.parametrize(("fault", "number", "words"), [(fault, *seen) for fault, seen in FAULTS.items()])
def test_a_fault_is_seen(broken: Path, fault: str, number: str, words: str) -> None:
    options = {"under": under(), "fault": fault}
    (found,) = outcomes(find(str(broken), options), options, [number], patience_s=PATIENCE_S)
    assert found.verdict == "failed", found
    assert words in found.text


def test_the_command_tells_what_is_broken(broken: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    arguments = ["conformance", str(broken), "--clause", "12", "--option", f"under={under()}", "--junit", str(report)]
    done = CliRunner().invoke(app, [*arguments, "--option", "fault=no_bounds"])
    assert done.exit_code == 1, done.output
    assert "12b failed on" in done.output
    assert "1 failed" in done.output
    (suite,) = xml.parse(report).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("7", "1")
    (case,) = [case for case in suite if len(case)]
    assert case.get("name", "").startswith("12b ")
    assert case[0].tag == "failure"
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output


def test_the_command_refuses_what_it_does_not_know() -> None:
    for arguments, words in (
        (["tpc"], "did you mean tcp"),
        (["tcp", "--clause", "14"], "clause 14 has no check"),
        (["tcp", "--option", "stream=2"], "has no setting stream"),
        (["tcp", "--option", "streams"], "NAME=VALUE"),
        (["tcp", "--junit", "/nowhere/at/all.xml"], "does not exist"),
    ):
        done = CliRunner().invoke(app, ["conformance", *arguments])
        assert done.exit_code == 2, (arguments, done.output)
        assert words in " ".join(done.output.split()), done.output


def test_a_backend_that_ends_or_holds_its_process_is_told_and_the_run_goes_on(broken: Path) -> None:
    for fault, verdict, words in (("crashes", "crashed", "SIGABRT"), ("never_returns", "hung", "did not end")):
        options = {"under": under(), "fault": fault}
        first, second = (check for check in checks() if check.number in ("01a", "08d"))
        wanted = [replace(first, limit_s=PATIENCE_S if verdict == "hung" else None), second]
        found = list(run_subject(subject(find(str(broken), options), options), wanted, LIMIT_S))
        assert [outcome.verdict for outcome in found] == [verdict, "passed"], found
        assert words in found[0].text
