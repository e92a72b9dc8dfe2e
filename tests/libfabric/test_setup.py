# SPDX-License-Identifier: Apache-2.0
"""What a machine without libfabric or its headers gets: a package that works and says what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from libfabrics import built

import eptransport

FETCH = Path(__file__).parent / "fetch.py"


@pytest.fixture(scope="module")
def without_headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed package as a build without headers leaves it: all but the plugin."""
    folder = tmp_path_factory.mktemp("package")
    ours = Path(eptransport.__file__).parent
    shutil.copytree(ours, folder / "eptransport", ignore=shutil.ignore_patterns("ept_libfabric.so", "__pycache__"))
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_without_headers_doctor_says_so(without_headers: Path) -> None:
    done = run(without_headers, "-m", "eptransport", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    row = next(backend for backend in found["backends"] if backend["name"] == "libfabric")
    assert not row["usable"]
    assert row["finding"] == "built without libfabric headers"
    assert row["mend"] == "install libfabric-dev (>= 1.17) and reinstall"
    processes = found["choices"][0]
    assert processes["backend"] == "tcp"
    assert "libfabric refused: built without libfabric headers" in processes["why"]


def test_without_headers_asking_for_it_says_so(without_headers: Path) -> None:
    code = "import eptransport as ept; print(ept.__file__); ept.choose(ept.Settings(), 2)"
    done = run(without_headers, "-c", code, EPT_BACKEND="libfabric")
    assert str(without_headers) in done.stdout
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "backend libfabric: built without libfabric headers; install libfabric-dev (>= 1.17) and reinstall" in last


def fetch(out: Path, path: Path, pip: str = "no-such-pip") -> tuple[str, dict[str, dict[str, str]]]:
    """What the set-up prints and records on a machine whose only programs are those of `path`."""
    command = [sys.executable, str(FETCH), str(out), "--pip", pip, "--patchelf", "no-such-patchelf"]
    done = subprocess.run(command, env={"PATH": str(path)}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, json.loads((out / "found.json").read_text())


def test_set_up_goes_on_where_nothing_can_be_had(tmp_path: Path) -> None:
    """Neither Debian nor a pip: a line each, no error, and no half of anything left behind."""
    (tmp_path / "bin").mkdir()
    said, found = fetch(tmp_path / "out", tmp_path / "bin")
    lines = said.splitlines()
    assert len(lines) == 2, said
    assert "apt-get is not here" in lines[0]
    assert "no-such-pip is not here" in lines[1]
    assert all(entry["missing"] for entry in found.values())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["found.json"]


def test_set_up_says_what_a_failing_tool_said(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("apt-get", "apt-cache", "dpkg-deb", "pip"):
        (programs / name).write_text(f"#!{shutil.which('sh')}\necho 'E: {name} has no network' >&2\nexit 100\n")
        (programs / name).chmod(0o755)
    said, found = fetch(tmp_path / "out", programs, "pip")
    assert "apt-get update failed: E: apt-get has no network" in said
    assert "E: pip has no network" in found["wheel"]["missing"]


@pytest.mark.skipif(not built(), reason="this package was built without the backend libfabric")
def test_without_the_library_auto_takes_another_and_says_why(tmp_path: Path) -> None:
    """The plugin is there, somebody wants it, and libfabric.so.1 is not: nothing fails, and where it was looked for is
    named."""
    library = str(tmp_path / "libfabric.so.1")
    code = "import eptransport as ept; found = ept.choose(ept.Settings(), 2); print(found.plugin.name, found.why)"
    done = run(tmp_path, "-c", code, EPT_LIBFABRIC_LIBRARY=library, EPT_LIBFABRIC_PROVIDER="tcp")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tcp "), done.stdout
    assert f"libfabric refused: libfabric: {library}: cannot open shared object file" in done.stdout
    assert "install libfabric" in done.stdout
    done = run(tmp_path, "-m", "eptransport", "doctor", "--json", EPT_LIBFABRIC_LIBRARY=library)
    assert done.returncode == 0, done.stderr
    row = next(backend for backend in json.loads(done.stdout)["backends"] if backend["name"] == "libfabric")
    assert not row["usable"]
    assert library in row["finding"]
    assert "install libfabric" in row["mend"]


def test_without_headers_its_settings_are_no_riddle(without_headers: Path) -> None:
    """What a job sets for all machines is refused on one without the backend by that reason, not as a slip."""
    code = "import eptransport as ept; ept.Settings()"
    done = run(without_headers, "-c", code, EPT_LIBFABRIC_PROVIDER="efa")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "unknown setting EPT_LIBFABRIC_PROVIDER" in last
    assert "backend libfabric: built without libfabric headers; install libfabric-dev (>= 1.17) and reinstall" in last
