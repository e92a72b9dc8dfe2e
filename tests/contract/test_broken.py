# SPDX-License-Identifier: Apache-2.0
"""The suite tested: a plugin that is broken in one way for each clause, and the check that must see it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as xml

import pytest
from typer.testing import CliRunner

from eptransport.backends import Plugin, registry
from eptransport.cli import app
from eptransport.conformance import checks, subject
from eptransport.conformance.run import Outcome, find, run_subject

FAULTS = {
    "last_byte_missing": "01a",
    "lost_in_a_crowd": "02a",
    "signal_before_data": "03a",
    "double_count": "03e",
    "early_lost": "04a",
    "nothing_for_nothing": "05a",
    "done_too_soon": "06a",
    "blocks_when_full": "07a",
    "blocks_when_idle": "08a",
    "error_swallowed": "09a",
    "lands_late": "10a",
    "lands_after_fence": "11a",
    "fences_nothing": "11b",
    "no_bounds": "12b",
    "revokes_nothing": "12e",
    "regions_mixed_up": "13b",
}
LIMIT_S = 100.0


@pytest.fixture
def broken(out_of_tree: Path) -> Path:
    return out_of_tree / "ept_broken.so"


def under() -> str:
    return registry(()).plugins["tcp"].path


def outcomes(plugin: Plugin, options: Mapping[str, str], numbers: list[str]) -> list[Outcome]:
    wanted = [check for check in checks() if check.number in numbers]
    assert len(wanted) == len(numbers)
    return list(run_subject(subject(plugin, options), wanted, LIMIT_S))


def test_there_is_a_fault_for_every_clause() -> None:
    assert {int(number[:2]) for number in FAULTS.values()} == {check.clause for check in checks()}


def test_nothing_is_seen_where_nothing_is_broken(broken: Path) -> None:
    options = {"under": under()}
    found = outcomes(find(str(broken), options), options, sorted(FAULTS.values()))
    assert [outcome.verdict for outcome in found] == ["passed"] * len(found), found


@pytest.mark.parametrize(("fault", "number"), FAULTS.items())
def test_a_fault_is_seen(broken: Path, fault: str, number: str) -> None:
    options = {"under": under(), "fault": fault}
    (found,) = outcomes(find(str(broken), options), options, [number])
    assert found.verdict == "failed", found
    assert found.text


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
        wanted = [check for check in checks() if check.number in ("01a", "08d")]
        found = list(run_subject(subject(find(str(broken), options), options), wanted, 20.0))
        assert [outcome.verdict for outcome in found] == [verdict, "passed"], found
        assert words in found[0].text
