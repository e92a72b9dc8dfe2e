# SPDX-License-Identifier: Apache-2.0
"""A trace is JSON at any time, has a track a rank, lane and phase, and its spans lie inside one another or apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from late_rank import dispatch_with_rank_2_late

import eptransport as ept
from eptransport._trace import merge

LIMIT_S = 90
STEPS = 3


def read(path: Path) -> list[dict[str, Any]]:
    """Times as the decimal numbers that stand there: a float has not the digits for nanoseconds since the boot."""
    return json.loads(path.read_text(), parse_float=Decimal)["traceEvents"]  # type: ignore[no-any-return]


def tracks(events: list[dict[str, Any]]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Spans by rank and name of the track."""
    names = {(one["pid"], one["tid"]): one["args"]["name"] for one in events if one["name"] == "thread_name"}
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for one in events:
        if one["ph"] == "X":
            found.setdefault((one["pid"], names[one["pid"], one["tid"]]), []).append(one)
    return found


def check_nesting(spans: list[dict[str, Any]]) -> None:
    """By begin, the longer one first: each lies wholly inside the innermost one that is open, or after it."""
    open_ends: list[Decimal] = []
    for span in sorted(spans, key=lambda one: (one["ts"], -one["dur"])):
        begin, end = span["ts"], span["ts"] + span["dur"]
        while open_ends and open_ends[-1] <= begin:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], span
        open_ends.append(end)


def parents(spans: list[dict[str, Any]], child: str) -> list[str]:
    """The names of what each span `child` lies in, the innermost."""
    found = []
    for one in spans:
        if one["name"] == child:
            around = [
                other
                for other in spans
                if other is not one
                and other["ts"] <= one["ts"]
                and one["ts"] + one["dur"] <= other["ts"] + other["dur"]
            ]
            found.append(min(around, key=lambda other: other["dur"])["name"])
    return found


def serve(group: ept.Group) -> None:
    moe = ept.AllToAll(group, num_experts=4, top_k=2, hidden=64, max_tokens=8, threads=1)
    x, ids = torch.ones(8, 64, dtype=torch.bfloat16), torch.tensor([[0, 3]] * 8)
    for _ in range(STEPS):
        got = moe.dispatch(x, ids, torch.ones(8, 2))
        moe.combine(got.x, got)
    moe.dispatch_send(x, ids, torch.ones(8, 2), lane=1)
    got = moe.dispatch_recv(lane=1)
    moe.combine(got.x, got, topk_weights=torch.ones(8, 2))


@pytest.mark.parametrize("backend", ["loopback", "tcp"])
def test_spans_of_every_phase_nest_in_tracks_of_their_own(tmp_path: Path, backend: str) -> None:
    settings = ept.Settings(backend=backend, trace=str(tmp_path / "trace.json"), threads=1)
    groups = ept.loopback_groups(2, settings)
    ept.loopback_run(groups, serve)
    for group in groups:
        group.close()
    files = [tmp_path / f"trace.rank{rank}.json" for rank in range(2)]
    for rank, file in enumerate(files):
        events = read(file)
        assert {one["args"]["name"] for one in events if one["name"] == "process_name"} == {f"rank {rank}"}
        found = tracks(events)
        assert set(found) == {
            (rank, track)
            for track in (
                "lane 0 dispatch",
                "lane 0 combine",
                "lane 1 dispatch",
                "lane 1 combine",
                "lane 1 late weights",
            )
        }
        for spans in found.values():
            check_nesting(spans)
            assert all(span["dur"] >= 0 for span in spans)
        dispatch, combine = found[rank, "lane 0 dispatch"], found[rank, "lane 0 combine"]

        def count(spans: list[dict[str, Any]], name: str) -> int:
            return sum(span["name"] == name for span in spans)

        for name in ("dispatch", "dispatch_send", "dispatch_wait", "dispatch_recv"):
            assert count(dispatch, name) == STEPS
        for name in ("combine", "combine_send", "combine_recv"):
            assert count(combine, name) == STEPS
        for spans, call in ((dispatch, "dispatch_send"), (combine, "combine_send")):
            assert count(spans, "pack") == 2 * STEPS  # a message a rank, its own included
            assert count(spans, "post") >= 2 * STEPS  # again where the queue was full
            assert set(parents(spans, "pack")) == set(parents(spans, "post")) == {call}
            packed = [(span["args"]["peer"], span["args"]["generation"]) for span in spans if span["name"] == "pack"]
            assert sorted(packed) == [(peer, generation) for peer in range(2) for generation in range(STEPS)]
        assert count(dispatch, "unpack") >= STEPS
        assert set(parents(dispatch, "unpack")) == {"dispatch_recv"}
        assert count(combine, "sum") >= STEPS
        assert set(parents(combine, "sum")) == {"combine_recv"}
        assert set(parents(dispatch, "dispatch_send")) == {"dispatch"}
        late = found[rank, "lane 1 late weights"]
        assert count(late, "pack") == count(late, "post") == 2
        assert count(found[rank, "lane 1 dispatch"], "dispatch") == 0  # halves have no whole call around them
        waits = [span for spans in found.values() for span in spans if span["name"] == "wait"]
        # One that waits for no rank in particular (room in the engine) names none.
        assert all(span["args"].get("peer", 1 - rank) == 1 - rank for span in waits)
    total = merge(files, tmp_path / "both.json")
    both = read(tmp_path / "both.json")
    assert total == len(both) == sum(len(read(file)) for file in files)
    assert len(tracks(both)) == 10


def test_a_wait_for_a_late_rank_is_a_span_of_it(tmp_path: Path) -> None:
    groups = ept.loopback_groups(3, ept.Settings(backend="loopback", trace=str(tmp_path / "t.json"), threads=1))

    dispatch_with_rank_2_late(groups)
    totals = [
        sum(cell.total_s for cell in group.metrics().waits() if cell.phase == "dispatch" and cell.peer == 2)
        for group in groups
    ]
    for group in groups:
        group.close()
    for rank in (0, 1):
        spans = tracks(read(tmp_path / f"t.rank{rank}.json"))[rank, "lane 0 dispatch"]
        late = sum(span["dur"] for span in spans if span["name"] == "wait" and span["args"]["peer"] == 2)
        # The same sleeps, timed from outside and from inside.
        assert float(late) / 1e6 >= totals[rank] - 1e-5
        assert totals[rank] > 0.1


SERVES = """
import sys, torch
import eptransport as ept
groups = ept.loopback_groups(2, ept.Settings(backend="loopback", trace=sys.argv[1], threads=1))
def serve(group):
    moe = ept.AllToAll(group, num_experts=4, top_k=2, hidden=64, max_tokens=8, threads=1)
    x, ids = torch.ones(8, 64, dtype=torch.bfloat16), torch.tensor([[0, 3]] * 8)
    while True:
        got = moe.dispatch(x, ids, torch.ones(8, 2))
        moe.combine(got.x, got)
ept.loopback_run(groups, serve)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_leaves_a_trace(tmp_path: Path, how: signal.Signals) -> None:
    file = tmp_path / "trace.rank1.json"
    child = subprocess.Popen([sys.executable, "-c", SERVES, str(tmp_path / "trace.json")])
    deadline = time.monotonic() + LIMIT_S
    while not file.exists() or file.stat().st_size < 100_000:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, how)
    child.wait(LIMIT_S)
    for rank in range(2):
        merge([tmp_path / f"trace.rank{rank}.json"], tmp_path / "merged.json")  # it may have died amid a flush
        spans = tracks(read(tmp_path / "merged.json"))
        assert (rank, "lane 0 dispatch") in spans or rank == 0
    assert len(spans[1, "lane 0 combine"]) > 100


def test_a_flush_that_was_cut_loses_no_event_before_it(tmp_path: Path) -> None:
    groups = ept.loopback_groups(2, ept.Settings(backend="loopback", trace=str(tmp_path / "t.json"), threads=1))
    ept.loopback_run(groups, serve)
    for group in groups:
        group.close()
    document = (tmp_path / "t.rank0.json").read_text()
    assert merge([tmp_path / "t.rank0.json"], tmp_path / "merged.json") == len(read(tmp_path / "t.rank0.json"))
    assert read(tmp_path / "merged.json") == read(tmp_path / "t.rank0.json")
    at, ends = document.index("\n") + 1, []
    for line in document.split("\n")[1:]:
        if line.startswith("{"):
            ends.append(at + len(line.removesuffix(",")))
        at += len(line) + 1
    for cut in range(len(document) - 700, len(document)):
        (tmp_path / "cut.json").write_text(document[:cut])
        assert merge([tmp_path / "cut.json"], tmp_path / "merged.json") == sum(end <= cut for end in ends)
        read(tmp_path / "merged.json")


def test_what_is_no_trace_is_not_merged(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"traceEvents": []}')
    with pytest.raises(ValueError, match="is no trace that EPT_TRACE wrote"):
        merge([tmp_path / "other.json"], tmp_path / "merged.json")
    (tmp_path / "torn.json").write_text('{"traceEvents": [\n{"name":\n]}\n')
    with pytest.raises(ValueError, match="line 2, is no event"):
        merge([tmp_path / "torn.json"], tmp_path / "merged.json")


def test_without_a_trace_there_is_none(tmp_path: Path) -> None:
    (group,) = ept.loopback_groups(1, ept.Settings(backend="loopback"))
    assert group.trace is None
    group.close()
    assert list(tmp_path.iterdir()) == []
