"""`bench p2p --against`: that all are asked alike, that ratios are of the same round, and that whoever is missing,
fails or crashes is named with its reason and takes nobody's figures along. Never how long something took."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import eptransport as ept
from eptransport.bench import report
from eptransport.bench.against import FINDERS, compiled, gloo, libfabric, names
from eptransport.bench.against.compare import AgainstJob, AgainstResult, SideFigures, run
from eptransport.bench.against.side import Absent, Recipe, Side
from eptransport.bench.against.table import against_picture, against_table
from eptransport.bench.processes import Processes, ProcessRank
from eptransport.cli import app

SMALL = AgainstJob(
    ("honest",),
    latency_bytes=(8, 3000),
    bandwidth_bytes=1 << 16,
    stream_bytes=2 << 20,
    rate_messages=500,
    iterations=40,
    rounds=2,
)
NATIVE, PYTHON = "eptransport", "eptransport.py"


# ---- sides that do as told -------------------------------------------------------------------------------------------


class Honest(Side):
    """Figures that are known beforehand. 2 us a turn, a GB/s and so on; each call must come after the same one of the
    other rank."""

    def __init__(self, rank: ProcessRank) -> None:
        self.rank = rank
        self.detail = f"tells {os.environ['HONEST']}"

    def latency(self, size: int, count: int) -> Sequence[float]:
        assert len(set(self.rank.gather((size, count)))) == 1
        return [2.0] * count

    def stream(self, size: int, count: int, depth: int) -> float:
        assert len(set(self.rank.gather((size, count, depth)))) == 1
        return size * count / 1e9

    def posts(self, size: int, count: int) -> Sequence[float]:
        return [4.0] * count


class Crashes(Honest):
    """In the second question, both ranks, the first of them by a signal."""

    def stream(self, size: int, count: int, depth: int) -> float:
        if self.rank.rank == 0:
            os.write(2, b"unrelated\nlibother.so: symbol lookup error\n")
            os.abort()
        time.sleep(3600)
        return 1.0


class Fails(Honest):
    def posts(self, size: int, count: int) -> Sequence[float]:
        raise ZeroDivisionError("no posts today")


class Unopened(Side):
    def __init__(self, rank: ProcessRank) -> None:
        raise OSError("libsomething.so.7: cannot open shared object file")

    def latency(self, size: int, count: int) -> Sequence[float]:
        return []

    def stream(self, size: int, count: int, depth: int) -> float:
        return 1.0


def fake(kind: type[Side], python: bool = False) -> Recipe:
    return Recipe(kind.__name__.lower(), "a test's", "1.0", kind, python=python, environment={"HONEST": "the truth"})


def absent(folder: Path) -> list[Recipe]:
    assert folder.is_dir()
    raise Absent("no such library: pip install it")


FAKES = {
    "honest": lambda folder: [fake(Honest, python=True), dataclasses.replace(fake(Honest), name="honest, native")],
    "crashes": lambda folder: [fake(Crashes)],
    "fails": lambda folder: [fake(Fails)],
    "unopened": lambda folder: [fake(Unopened)],
    "absent": absent,
}


def by_name(result: AgainstResult) -> dict[str, SideFigures]:
    return {side.name: side for side in result.sides}


def kinds(side: SideFigures) -> list[tuple[str, int]]:
    return [(figure.kind, figure.bytes) for figure in side.figures]


def printed(result: AgainstResult) -> str:
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(against_table(result))
    return console.export_text()


# ---- the rounds ------------------------------------------------------------------------------------------------------


def test_who_is_missing_fails_or_crashes_takes_nobody_along(tmp_path: Path) -> None:
    steps: list[int] = []
    job = dataclasses.replace(SMALL, against=tuple(FAKES))
    result = run(job, steps.append, FAKES)
    assert steps == list(range(1, job.units + 1))
    sides = by_name(result)
    assert list(sides) == [
        NATIVE, PYTHON, "bare sockets", "bare, 2 streams", "honest", "honest, native", "crashes", "fails",
    ]  # fmt: skip

    all_kinds = [("latency", 8), ("latency", 3000), ("bandwidth", 1 << 16), ("cpu", 1 << 16), ("rate", 8), ("post", 8)]
    assert kinds(sides[NATIVE]) == all_kinds[:-1]
    assert kinds(sides[PYTHON]) == kinds(sides["honest"]) == all_kinds
    assert kinds(sides["bare sockets"]) == all_kinds[:-2]
    assert kinds(sides["bare, 2 streams"]) == all_kinds[2:4]
    for side in sides.values():
        for figure in side.figures:
            if side.name.startswith("eptransport"):
                assert figure.ratio is None
            if figure.kind != "cpu":
                assert min(figure.value.p50, figure.value.p99) > 0
    for name in (NATIVE, PYTHON, "honest", "bare sockets"):
        assert all(len(figure.value.rounds) == job.rounds for figure in sides[name].figures), name

    # What each one is, and its ratio: ours in a round to it in that round.
    known = {"latency": 2.0, "bandwidth": 1.0, "post": 4.0, "rate": 1e3 / 8}
    for name, reference in (("honest", PYTHON), ("honest, native", NATIVE)):
        ours = {(figure.kind, figure.bytes): figure.value for figure in sides[reference].figures}
        for figure in sides[name].figures:
            if figure.kind in known and (figure.kind, figure.bytes) in ours:
                assert figure.value.p50 == pytest.approx(known[figure.kind])
                rounds = zip(ours[figure.kind, figure.bytes].rounds, figure.value.rounds, strict=True)
                assert figure.ratio == pytest.approx(statistics.median(a / b for a, b in rounds))
    assert sides["honest"].version == "1.0, tells the truth"

    assert result.skipped.keys() == {"absent", "unopened"}
    assert result.skipped["absent"] == "no such library: pip install it"
    assert "libsomething.so.7" in result.skipped["unopened"]
    assert "SIGABRT" in str(sides["crashes"].failed)
    assert str(sides["crashes"].failed).endswith("its last words: libother.so: symbol lookup error")
    assert kinds(sides["crashes"]) == all_kinds[:2]
    assert "ZeroDivisionError: no posts today" in str(sides["fails"].failed)
    assert kinds(sides["fails"]) == all_kinds[:-1]
    assert sides[NATIVE].failed is sides["honest"].failed is None

    text = printed(result)
    for words in ("absent skipped: no such library", "crashes FAILED in bandwidth", "honest 1.0, tells the truth"):
        assert words in text
    found = json.loads(json.dumps(report.as_json(result)))
    assert found["skipped"]["absent"] == "no such library: pip install it"
    assert found["machine"]["cores"] >= 1
    assert {side["name"] for side in found["sides"]} == set(sides)
    against_picture(tmp_path / "sides.png", result)
    assert (tmp_path / "sides.png").read_bytes().startswith(b"\x89PNG")


def hang(rank: ProcessRank) -> None:
    rank.answer("open")
    if rank.told() == "hang" and rank.rank == 1:
        time.sleep(3600)


def test_a_rank_that_hangs_is_ended() -> None:
    with Processes(hang, 2) as processes:
        assert processes.results(120) == ["open", "open"]
        processes.tell("hang")
        with pytest.raises(ept.Timeout, match=r"rank 1 .* gave no result in 0.5 s"):
            processes.results(0.5)  # however slow the machine is: it never comes


def test_what_our_own_side_raises_is_raised() -> None:
    with pytest.raises(ept.EptError, match=r"/no/such/plugin\.so"):
        run(dataclasses.replace(SMALL, backend="/no/such/plugin.so"), finders=FAKES)


def test_ours_runs_once_more_under_each_value_of_a_setting() -> None:
    """By the same questions, each in processes that have the setting: one that it forbids ends the run."""
    job = dataclasses.replace(SMALL, against=(), vary=("EPT_TCP_STREAMS", ("3", "0")), rounds=1)
    with pytest.raises(ept.ConfigError, match=r"(?i)streams.*0"):
        run(job)
    sides = by_name(run(dataclasses.replace(job, vary=("EPT_TCP_STREAMS", ("3",)))))
    assert kinds(sides["EPT_TCP_STREAMS=3"]) == kinds(sides[NATIVE])
    assert all(figure.ratio for figure in sides["EPT_TCP_STREAMS=3"].figures)


# ---- those one would take instead ------------------------------------------------------------------------------------


def test_side_by_side_with_what_is_here(tmp_path: Path) -> None:
    """Real libraries, as far as this machine has them; who is not here is named with the reason."""
    result = run(dataclasses.replace(SMALL, against=tuple(FINDERS)))
    sides = by_name(result)
    assert "gloo" in sides
    for side in sides.values():  # ours and gloo must; the others are as good as what is installed here
        assert side.failed is None or side.name not in (NATIVE, PYTHON, "bare sockets", "gloo"), side
        assert side.failed or all(len(figure.value.rounds) == SMALL.rounds for figure in side.figures)
    for figure in sides["gloo"].figures:
        assert figure.value.p50 > 0
        assert figure.ratio is not None
    here = {name for name in FINDERS if any(side.startswith(name) for side in sides)}
    assert here | result.skipped.keys() >= set(FINDERS)
    assert all(len(reason) > 20 for reason in result.skipped.values())
    assert f"one way over {result.backend}" in printed(result)


def test_gloo_without_torch_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Absent, match=r"no torch: pip install"):
        gloo.find(tmp_path)


def test_libfabric_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libfabric, "HEADERS", ())
    monkeypatch.setenv("CPATH", f":{tmp_path}")
    with pytest.raises(Absent, match="apt-get install libfabric-dev"):
        libfabric.find(tmp_path)
    (tmp_path / "rdma").mkdir()
    header = tmp_path / "rdma/fabric.h"
    header.write_text("#define FI_MAJOR_VERSION 1\n#define FI_MINOR_VERSION 17\n")
    monkeypatch.setattr(libfabric, "WHEELS", ())
    monkeypatch.setattr(libfabric.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(Absent, match="pip install mpich"):
        libfabric.find(tmp_path)
    monkeypatch.setattr(libfabric.ctypes.util, "find_library", lambda name: "libsurely-not-there.so.1")
    with pytest.raises(Absent, match="libsurely-not-there"):
        libfabric.find(tmp_path)
    header.write_text("nothing\n")
    with pytest.raises(Absent, match="says no version"):
        libfabric.find(tmp_path)


def test_a_loop_that_cannot_be_built_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cc"):
        (tmp_path / "rdma").mkdir()
        for name in ("fabric", "fi_cm", "fi_domain", "fi_endpoint", "fi_errno", "fi_rma"):
            (tmp_path / f"rdma/{name}.h").write_text("#error nothing in it\n")
        with pytest.raises(Absent, match=r"nothing in it.*; get better ones"):
            compiled.build("libfabric.c", tmp_path, tmp_path, "get better ones")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(Absent, match="no C compiler"):
        compiled.build("libfabric.c", tmp_path, None, "")


# ---- what is asked for -----------------------------------------------------------------------------------------------


def test_names_are_known_ones() -> None:
    assert names("libfabric, gloo,libfabric") == ("libfabric", "gloo")
    with pytest.raises(ept.InvalidArgument, match=r"'libfabrik'.*did you mean libfabric"):
        names("gloo,libfabrik")
    with pytest.raises(ept.InvalidArgument, match="names nobody"):
        names(" , ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "loopback"}, "loopback's ranks are threads"),
        ({"rounds": 0}, "at least 1"),
        ({"latency_bytes": (8, 1 << 21)}, "at most 1048576"),
        ({"against": (), "latency_bytes": (8, 1 << 25)}, "at most 16777216"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ept.InvalidArgument, match=words):
        run(dataclasses.replace(SMALL, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "glo"], "did you mean gloo"),
        (["--against", "gloo", "--ranks", "4"], "--ranks 4 must be 2"),
        (["--vary", "EPT_STRIPE_BYTES", "--backend", "tcp"], "is not EPT_NAME=VALUE,VALUE"),
    ],
)
def test_the_command_says_what_it_cannot_do(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "p2p", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
