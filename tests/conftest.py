# SPDX-License-Identifier: Apache-2.0
"""What tests may lean on: an environment without EPT_*, ranks as threads or as processes, plugins built here."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import process_context, run_child
from hypothesis import settings

import eptransport as ept

LIMIT_S = 120.0

# The same examples at every run: what fails after a change fails because of it. `make test-long` and
# `--hypothesis-profile=random` (with `--hypothesis-seed=N`) draw others.
settings.register_profile("same", derandomize=True, database=None)
settings.register_profile("random", derandomize=False)
settings.register_profile("long", derandomize=False)
settings.load_profile("long" if os.environ.get("HYPOTHESIS_PROFILE") == "long" else "same")


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EPT_")]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ranks() -> Iterator[Callable[..., list[ept.Group]]]:
    """ranks(n, backend="loopback", **settings): n ranks in this process, closed when the test ends."""
    made: list[ept.Group] = []

    def make(n: int, backend: str = "loopback", **fields: Any) -> list[ept.Group]:
        groups = ept.loopback_groups(n, ept.Settings(**{"backend": backend, "timeout_s": 30.0, "threads": 1, **fields}))
        made.extend(groups)
        return groups

    yield make
    for group in made:
        group.close(0)


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., list[Any]]:
    """spawn(n, function, *args): what function(rank, n, folder, *args) returned or raised, in n new processes."""

    def run(n: int, function: Callable[..., Any], *args: Any, limit_s: float = LIMIT_S) -> list[Any]:
        context = process_context()
        pipes, processes = [], []
        for rank in range(n):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=run_child, args=(there, function, rank, n, tmp_path, args), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            answers = []
            for rank, pipe in enumerate(pipes):
                assert pipe.poll(limit_s), f"rank {rank} has not ended in {limit_s} s"
                answers.append(pipe.recv())
            for process in processes:
                process.join(10)
            return answers
        finally:
            for process in processes:
                process.kill()

    return run


@pytest.fixture
def build_plugin(tmp_path: Path) -> Callable[[str, str], Path]:
    """build_plugin(name, source): C source compiled against the installed headers alone, as a plugin's author would."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "a C compiler builds the plugins of this test"

    def build(name: str, source: str) -> Path:
        (tmp_path / f"{name}.c").write_text(source)
        library = tmp_path / f"{name}.so"
        include = f"-I{ept.include_dir()}"
        command = [compiler, "-shared", "-fPIC", include, "-o", str(library), str(tmp_path / f"{name}.c")]
        subprocess.run(command, check=True)
        return library

    return build


@pytest.fixture(scope="session")
def out_of_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the plugins of tests/plugins and their drivers, built from the installed headers alone. The workers
    of a run have one: who comes second finds it built."""
    assert shutil.which("make"), "make builds the plugins of tests/plugins"
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "out_of_tree"
    folder = Path(__file__).parent / "plugins"
    # -O0: 13 s of CPU instead of 20, which on a machine with other work was once more than a test may take.
    command = ["make", "-s", "-j2", "-C", str(folder), f"HEADERS={ept.include_dir()}", f"OUT={out}", "FLAGS=-O0"]
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(command, check=True)
    return out
