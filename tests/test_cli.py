"""The command: what it prints, what it writes, how it fails. An error is one line, never a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import eptransport as ept
from eptransport.backends import registry
from eptransport.cli import app


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eptransport", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def one_line(output: str) -> str:
    """The error, and nothing beside it."""
    lines = [line for line in output.splitlines() if line.strip()]
    assert len(lines) == 1, output
    assert lines[0].startswith("error: ")
    return lines[0]


def test_version_and_help() -> None:
    assert command("--version").stdout.strip() == ept.__version__
    assert "doctor" in command("--help").stdout
    assert command("bench", "moe", "--help").exit_code == 0


# ---- doctor and settings ---------------------------------------------------------------------------------------------


def test_doctor_names_every_backend_and_what_it_lacks() -> None:
    result = command("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["healthy"]
    backends = {backend["name"]: backend for backend in found["backends"]}
    assert {"loopback", "tcp", "libfabric", "verbs", "nvshmem"} <= set(backends)
    for backend in backends.values():
        assert backend["finding"]
        assert backend["usable"] or backend["mend"]
    assert backends["tcp"]["usable"]
    assert any(option.startswith("EPT_TCP_STREAMS=") for option in backends["tcp"]["options"])
    processes, threads = found["choices"]
    plugins = registry(()).plugins  # one that waives clauses is used only when it is asked for
    whole = [name for name in processes["order"] if backends[name]["usable"] and not plugins[name].probe().waived]
    assert processes["backend"] == whole[0]
    assert threads["backend"] == "loopback"
    assert {"EPT_BACKEND", "EPT_TIMEOUT_S", "EPT_SECRET"} <= {row["variable"] for row in found["settings"]}


def test_doctor_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_TIMEOUT_S", "77")
    result = command("doctor", "--verbose")
    assert result.exit_code == 0
    assert "usable" in result.stdout
    assert "EPT_TIMEOUT_S=77" in result.stdout
    assert "loopback" in result.stdout


def test_doctor_shows_a_refused_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "ept_broken.so"
    broken.write_bytes(b"\x7fELF, and then nothing")
    monkeypatch.setenv("EPT_PLUGIN_PATH", str(tmp_path))
    found = json.loads(command("doctor", "--json").stdout)
    assert list(found["refused"]) == [str(broken)]
    assert found["refused"][str(broken)]
    assert found["healthy"]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("EPT_TIMEOUT", "3", "did you mean EPT_TIMEOUT_S"),
        ("EPT_BACKEND", "tpc", "did you mean tcp"),
        ("EPT_BACKEND", "verbs", "verbs"),
    ],
)
def test_doctor_fails_where_no_job_could_start(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    plugin = ept.registry().plugins.get(value)
    if plugin is not None and plugin.probe().usable:
        pytest.skip(f"{value} can start here")
    monkeypatch.setenv(variable, value)
    result = command("doctor", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["healthy"]
    assert words in found["problem"]
    assert found["backends"]


def test_settings_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_TCP_STREAMS", "3")
    monkeypatch.setenv("EPT_SECRET", "a secret that nobody may see")
    result = command("settings", "--json")
    rows = {row["variable"]: row for row in json.loads(result.stdout)}
    assert rows["EPT_TCP_STREAMS"]["value"] == "3"
    assert rows["EPT_TCP_STREAMS"]["source"] == "EPT_TCP_STREAMS"
    assert rows["EPT_WARN_S"]["source"] == "default"
    assert "nobody may see" not in result.output
    assert "EPT_TCP_STREAMS" in command("settings").stdout


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "p2p", "--backend", "tpc"], "did you mean tcp"),
        (["bench", "p2p", "--ranks", "3"], "3 is odd"),
        (["bench", "moe", "--top-k", "300"], "top-k is 300, but there are 256 experts"),
        (["bench", "moe", "--backend", "loopback", "--against", "gloo"], "gloo needs a process a rank"),
        (["bench", "p2p", "--picture", "/no/such/folder/x.png"], "there is no folder"),
        (["bench", "moe", "--json", "/no/such/folder/x.json"], "there is no folder"),
        (["demo", "--picture", "/no/such/folder/x.png"], "there is no folder"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: list[str], words: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    assert words in one_line(result.stderr)
    assert result.stdout == ""


def test_a_wrong_option_is_told_by_name() -> None:
    result = command("bench", "moe", "--layuot", "rows")
    assert result.exit_code == 2
    assert "--layuot" in result.output
    assert "Traceback" not in result.output


def test_a_wrong_setting_is_one_line() -> None:
    result = process("bench", "p2p", EPT_TIMOUT_S="3")
    assert result.returncode == 2
    assert "did you mean EPT_TIMEOUT_S" in one_line(result.stderr)


def test_a_failure_on_a_rank_is_one_line() -> None:
    # No interface has this address: only the ranks find that out.
    result = process("bench", "p2p", "--backend", "tcp", EPT_INTERFACE="203.0.113.77")
    assert result.returncode in (1, 2)
    assert "203.0.113.77" in one_line(result.stderr)


@pytest.mark.parametrize("missing", ["torch", "matplotlib", "transformers"])
def test_a_missing_extra_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    result = command("demo")
    assert result.exit_code == 1
    line = one_line(result.stderr)
    assert missing in line
    assert "pip install 'eptransport[demo]'" in line
    if missing == "torch":
        line = one_line(command("bench", "moe").stderr)
        assert "torch" in line
        assert "pip install 'eptransport[bench]'" in line


# ---- bench -----------------------------------------------------------------------------------------------------------


def test_bench_p2p_writes_json_and_a_picture(tmp_path: Path) -> None:
    file, picture = tmp_path / "p2p.json", tmp_path / "p2p.svg"
    result = process(
        "bench", "p2p", "--backend", "tcp", "--size", "8", "--size", "100", "--bandwidth-size", "65536",
        "--iterations", "100", "--stream-mib", "2", "--rounds", "2", "--json", str(file), "--picture", str(picture),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for word in ("8 B one way", "100 B one way", "64 KiB bandwidth", "p50", "p99", "floor", "ratio", "cores"):
        assert word in result.stdout
    found = json.loads(file.read_text())
    assert found["backend"] == "tcp"
    assert found["machine"]["cpu"]
    assert [measure["bytes"] for measure in found["measures"]] == [8, 100, 65536]
    assert picture.read_text().lstrip().startswith("<?xml")


def test_bench_moe_writes_json_to_stdout() -> None:
    result = process(
        "bench", "moe", "--backend", "tcp", "--preset", "mixtral", "--ranks", "2", "--tokens", "9", "--hidden", "512",
        "--skew", "1.1", "--iterations", "2", "--rounds", "2", "--against", "gloo", "--layout", "rows", "--json", "-",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    shape = found["job"]["shape"]
    assert (shape["hidden"], shape["experts"], shape["top_k"], shape["dispatch_dtype"]) == (512, 8, 2, "bf16")
    assert found["job"]["skew"] == 1.1
    assert [side["name"] for side in found["sides"]] == ["bare TCP mesh", "eptransport", "gloo"]
    for traffic in found["traffic"]:
        assert traffic["bytes"] == traffic["predicted_bytes"]
    for word in ("p50 ms", "p99 ms", "floor: bare TCP mesh", "ratio", "MB", "msgs", "cores", "bit for bit"):
        assert word in result.stderr


# ---- demo ------------------------------------------------------------------------------------------------------------


def test_demo(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    result = process(
        "demo", "--ranks", "2", "--new-tokens", "20", "--tokens", "8", "--iterations", "2", "--rounds", "1",
        "--prompt", "The while statement ", "--picture", str(picture),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "The while statement " in result.stdout
    assert "the same text as one process" in result.stdout
    assert re.search(r"experts of each layer by rank: 0-7, 8-15", result.stdout)
    assert "bit for bit" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in result.stderr


def test_demo_shows_the_error_of_the_rank_that_failed() -> None:
    result = process("demo", "--ranks", "2", EPT_INTERFACE="203.0.113.77")
    assert result.returncode in (1, 2)
    assert "203.0.113.77" in result.stderr
    assert "Traceback" not in result.stderr
