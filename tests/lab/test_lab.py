# SPDX-License-Identifier: Apache-2.0
"""The backend verbs on soft-RoCE, in an emulated machine: `make test-lab`. Skips where the lab was not set up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAB = Path(__file__).parent / "rdma-lab"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdma-lab"
LIMIT_S = 3000
"""For one boot and what runs in it. Two idle cores need a tenth of it; the emulator shares them with all else."""


def why_not() -> str | None:
    import eptransport as ept

    if "EPT_TEST_LAB" not in os.environ:
        return "takes minutes in an emulated machine: make test-lab"
    if os.geteuid() != 0:
        return "the lab shows the guest all files: it needs root"
    if shutil.which("qemu-system-x86_64") is None or not (CACHE / "version").exists():
        return "tests/lab/rdma-lab setup was not run"
    if "verbs" not in ept.registry().plugins:
        return "built without libibverbs headers"
    return None


def in_lab(*command: str, nics: int = 2, env: dict[str, str] | None = None) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [str(LAB), "--timeout", str(LIMIT_S), "--nics", str(nics), "--", *command],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=LIMIT_S + 60,
        check=False,
    )
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    if done.returncode == 125:
        pytest.skip(f"the lab failed: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(LIMIT_S + 120)
@pytest.mark.parametrize("options", [("devices=rxe0",), ("devices=rxe0,rxe1", "shuffle=7")], ids=["one", "shuffled"])
def test_the_contract(options: tuple[str, ...]) -> None:
    chosen = [word for option in options for word in ("--option", option)]
    in_lab(sys.executable, "-m", "eptransport", "conformance", "verbs", "--timeout", "900", *chosen)


@pytest.mark.timeout(LIMIT_S + 120)
@pytest.mark.parametrize("stage", ["two", "four", "shuffled", "loss", "nic", "link"])
def test_dispatch_and_combine(stage: str) -> None:
    build = Path(__file__).parents[2] / "build" / "native"
    program = build / "tests" / "native" / "verbs_lab"
    if why_not() is None and not program.exists():
        pytest.skip("meson compile -C build/native verbs_lab was not run")
    in_lab(str(program), stage, nics=4, env={"EPT_TEST_PLUGINS": str(build / "plugins")})
