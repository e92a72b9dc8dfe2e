# SPDX-License-Identifier: Apache-2.0
"""The backend verbs on soft-RoCE, in an emulated machine: `make test-lab`.

One machine is booted and makes one PART after the other, within a box of BOX_S seconds. A part that was not reached,
and a machine that does not come up or ends, is a skip with the reason; a part that failed is a failure. The emulator
stands still for seconds now and then: what fails is made a second time, and both are told."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAB = Path(__file__).parent / "rdma-lab"
BUILD = ROOT / "build" / "test"
PROGRAM = BUILD / "tests" / "native" / "verbs_lab"
BOX_S = float(os.environ.get("EPT_LAB_BOX_S", "420"))
"""All parts take 240 s on two cores that others use too."""
BOOT_S = 120
"""10 s on such cores."""

MOE = ("two", "four", "processes", "loss", "retry", "rnr", "link", "nic", "killed", "shuffled")
"""Stages of tests/native/verbs_lab.cc."""
CONTRACT = {
    "contract": ("all", "devices=rxe0"),
    # Two queue pairs on each of two NICs, whose completions are handled in an order that is drawn: what is not about
    # that (posting, deadlines, lives, limits) was seen above.
    "contract-shuffled": ("1,2,3,4,5,6,9,10,12", "devices=rxe0,rxe1", "qps=2", "shuffle=7"),
}
PARTS = (*MOE, *CONTRACT)


def command(part: str) -> list[str]:
    if part in CONTRACT:
        return [sys.executable, str(Path(__file__).with_name("contract.py")), "verbs", *CONTRACT[part]]
    return ["env", f"EPT_TEST_PLUGINS={BUILD / 'plugins'}", str(PROGRAM), part]


def attempts(part: str) -> str:
    return "1" if part in CONTRACT else "12"  # contract.py makes single checks a second time


def script(parts: list[str]) -> str:
    well = "for n in 0 1 2 3; do ip link set eth$n up; tc qdisc del dev eth$n root 2> /dev/null; done"
    lines = ["exec 2>&1", "PATH=$PATH:/usr/sbin:/sbin"]
    for part in parts:
        words = shlex.join(command(part))
        for attempt in attempts(part):
            lines += [
                f"echo '== {part} {attempt} begins'",
                f"began=$EPOCHREALTIME; {words}; status=$?",
                f'echo "== {part} {attempt} ended $status $began $EPOCHREALTIME"',
                f"if [ $status != 0 ]; then {well}",
            ]
        lines += ["fi" for _ in attempts(part)]
    return "\n".join(lines)


@dataclass
class Result:
    verdict: str
    """passed, failed, or why nothing is known."""
    text: str = ""


def results(parts: list[str], output: str, end: str) -> dict[str, Result]:
    """Of what the machine said, and of how it ended."""
    found = {}
    for part in parts:
        made = re.findall(rf"^== {part} (\d) begins\n(.*?)(?:^== {part} \1 ended (\d+)|\Z)", output, re.M | re.S)
        text = "".join(said for _, said, _ in made)
        ended = [status for _, _, status in made if status]
        if "0" in ended:
            found[part] = Result("passed", text)
        elif len(ended) == len(attempts(part)):
            found[part] = Result("failed", text)
        else:
            where = "amid it" if made else "before it"
            found[part] = Result(f"{end}, {where}", text)
    return found


def why_not() -> str | None:
    import eptransport as ept

    if "EPT_TEST_LAB" not in os.environ:
        return "takes minutes in an emulated machine: make test-lab"
    if os.geteuid() != 0:
        return "the lab shows the machine all files: it needs root"
    if subprocess.run([str(LAB), "ready"], check=False).returncode != 0:
        log = ROOT / "build" / "lab-setup.log"
        lines = log.read_text().strip().splitlines() if log.exists() else []
        return f"the lab is not set up: {lines[-1] if lines else 'tests/lab/rdma-lab setup'}"
    if "verbs" not in ept.registry().plugins or not PROGRAM.exists():
        return "built without libibverbs headers"
    return None


@pytest.fixture(scope="session")
def seen(request: pytest.FixtureRequest) -> dict[str, Result]:
    """What came of each part that is asked for."""
    items = [item for item in request.session.items if item.path == Path(__file__)]
    chosen = {item.callspec.params["part"] for item in items}  # type: ignore[attr-defined]
    parts = [part for part in PARTS if part in chosen]
    reason = why_not()
    if reason is not None:
        return {part: Result(reason) for part in parts}
    # The emulator is what the limits here were measured with. KVM is faster, where it works.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EPT_")}
    environment.setdefault("RDMA_LAB_ACCEL", "tcg")
    options = ["--timeout", f"{BOX_S:.0f}", "--boot", str(BOOT_S), "--nics", "4", "--mem", "2048"]
    log = ROOT / "build" / "lab.log"
    with log.open("wb") as out:
        done = subprocess.run(
            [str(LAB), *options, "--", "bash", "-c", script(parts)],
            env=environment,
            stdout=out,
            stderr=subprocess.PIPE,
            check=False,
        )
    said = done.stderr.decode(errors="replace").strip().splitlines()
    for line in said[-1:]:
        print(line)
    end = f"the box of {BOX_S:.0f} s ended" if done.returncode == 124 else said[-1] if said else "no word of the lab"
    output = log.read_text(errors="replace")
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    assert reporter is not None
    for part, attempt, status, *times in re.findall(r"^== (\S+) (\d) ended (\d+) (\S+) (\S+)$", output, re.M):
        took_s = float(times[1]) - float(times[0])
        reporter.write_line(f"lab: {part}, attempt {attempt}: status {status} after {took_s:.1f} s")
    return results(parts, output, end)


@pytest.mark.timeout(BOX_S + 120)
@pytest.mark.parametrize("part", PARTS)
def test_part(part: str, seen: dict[str, Result]) -> None:
    result = seen[part]
    print(result.text)
    if result.verdict not in ("passed", "failed"):
        pytest.skip(result.verdict)
    assert result.verdict == "passed", result.text
