# SPDX-License-Identifier: Apache-2.0
"""The backend under the strict shim: a network that reorders, holds back, stalls and refuses as EFA may, or more
(docs/backends/libfabric.md). Seeds are Hypothesis's. Each example is a process of its own, with all ranks in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from libfabrics import Libfabric, cases

from eptransport.backends import registry
from eptransport.conformance import Subject, subject
from eptransport.conformance.world import World, slots, warnings

STRICT = st.builds(
    "{}:window={},eagain={},rma={}".format,
    st.integers(0, 2**32),
    st.sampled_from([0, 1, 4, 16, 32]),
    st.sampled_from([0, 0.1, 0.3]),
    st.sampled_from([4096, 65536]),
)
MISCHIEF = ("put off", "overtook", "shuffled", "posts told EAGAIN", "reads told EAGAIN")
# What strict.h counts among violations, in its words.
VIOLATION = re.compile(
    r"without|wrong desc|contexts|unknown here|don't know us|too long|flags|that isn't|overrun|whose memory"
)


def _under(release: dict[str, str], strict: str, seed: int = 1) -> Subject:
    return subject(registry(()).plugins["libfabric"], {**release, "strict": strict}, seed)


def schedule(_rank: int, _n: int, folder: Path, release: dict[str, str], strict: str) -> tuple[str, list[str]]:
    """Two or three ranks write to one another: counted once, with all their bytes, and nothing beside them. Returns the
    shim's own counts and what was warned of."""
    seed = int(strict.partition(":")[0])
    ranks = 2 + seed % 2
    with tempfile.NamedTemporaryFile(dir=folder) as report:
        under = _under(release, f"{strict},report_to={report.name}", seed)
        lines: list[str] = []
        # What is closed isn't looked at: over a network without order who is written to as it leaves may seem lost.
        with World(under, ranks) as world, warnings(lines):
            routes = [world.route(a, b, 1 << 14) for a in range(ranks) for b in range(ranks) if a != b]
            todo = [(route, *piece) for route in routes for piece in slots(world, route.size, 8, 1 << 14)]
            world.random.shuffle(todo)
            world.settle([route.write(offset, length) for route, offset, length in todo])
            for route in routes:
                route.counted(8, "after all writes")
                route.look("after all writes")
        return Path(report.name).read_text(), lines


def moe(_rank: int, _n: int, folder: Path, release: dict[str, str], strict: str, steps: int) -> str:
    """Dispatches and combines of three ranks in each layout, bit for bit. Returns the shim's counts."""
    for name in ("moe", "reference"):
        sys.path.append(str(Path(__file__).parents[1] / name))
    import harness
    import moe_model

    with tempfile.NamedTemporaryFile(dir=folder) as report:
        options = {**release, "strict": f"{strict},report_to={report.name}"}
        groups = harness.groups(3, backend="libfabric", options={f"libfabric.{k}": v for k, v in options.items()})
        config = moe_model.Config(3, 9, 4, 208, "bf16", "e4m3")
        moes = harness.all_to_alls(groups, config)
        for step in range(steps):
            layout = harness.LAYOUTS[step % len(harness.LAYOUTS)]
            harness.run_all(
                harness.Scenario(config, harness.make_batches(config, (9, 30, 14), step), [layout] * 3), moes, groups
            )
        harness.close(groups)
        return Path(report.name).read_text()


Spawn = Callable[..., list[Any]]
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"


def keeps_the_rules(report: str) -> None:
    assert report
    assert not VIOLATION.search(report.replace("without a receive", "")), report


@pytest.mark.parametrize("case", cases("tcp"))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(strict=STRICT)
@example(strict="7:window=16,eagain=0.3,rma=4096")
def test_schedules(case: tuple[Libfabric, str], spawn: Spawn, strict: str) -> None:
    release, provider = case
    (answer,) = spawn(1, schedule, release.options(provider), strict)
    assert not isinstance(answer, Exception), answer
    report, lines = answer
    assert not lines, lines
    keeps_the_rules(report)
    if strict == "7:window=16,eagain=0.3,rma=4096":
        assert all(word in report for word in MISCHIEF), report


@pytest.mark.parametrize("case", cases("tcp"))
def test_moe(case: tuple[Libfabric, str], spawn: Spawn) -> None:
    release, provider = case
    (answer,) = spawn(1, moe, release.options(provider), "5:eagain=0.2,rma=4096", 4)
    assert isinstance(answer, str), answer
    keeps_the_rules(answer)


@pytest.mark.skipif(not LONG, reason="40 s: part of make test-long")
@pytest.mark.long
@pytest.mark.parametrize("case", cases("tcp"))
def test_demo(case: tuple[Libfabric, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained model over processes: the text of each rank is that of the model by itself."""
    release, provider = case
    monkeypatch.setenv("EPT_LIBFABRIC_STRICT", f"3:report_to={tmp_path}/report")
    for name, value in release.environment(provider).items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "eptransport", "demo", "--backend", "libfabric", "--ranks", "2"]
    command += ["--new-tokens", "20", "--tokens", "8", "--iterations", "2", "--rounds", "1"]
    command += ["--picture", f"{tmp_path}/demo.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same text as one process" in done.stdout
    keeps_the_rules((tmp_path / "report").read_text())


def test_a_wrong_word_is_named(spawn: Spawn) -> None:
    """Without the setting's grammar nobody would know that a test's mischief was never turned on."""
    release = next((case for case in cases("tcp") if not case.marks), None)
    if release is None:
        pytest.skip("no libfabric here has provider tcp")
    ((chosen, provider),) = release.values
    (answer,) = spawn(1, schedule, chosen.options(provider), "7:windows=3")
    assert "does not understand" in str(answer)
