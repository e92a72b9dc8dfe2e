# SPDX-License-Identifier: Apache-2.0
"""What is counted is what was sent, whoever reads it, and nothing of the dead stays."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest
import torch
from late_rank import dispatch_with_rank_2_late

import eptransport as ept
from eptransport.cli.top import serve
from eptransport.metrics import FOLDER, PHASES, Histogram, bucket_bounds_ns, pages

LIMIT_S = 90
COMMAND = (sys.executable, "-m", "eptransport")

pytestmark = pytest.mark.skipif(
    not os.access(FOLDER, os.W_OK), reason="no /dev/shm to write to: pages are private to their process here"
)

QUIET = {"dead_s": 1000.0}
"""No heartbeat in the life of a test: it is a message, which counts."""
TOKENS, HIDDEN, EXPERTS, STEPS = 24, 256, 6, 3


def ids(rank: int) -> torch.Tensor:
    """Every token goes to two experts of its own; unevenly spread over the ranks."""
    generator = torch.Generator().manual_seed(rank)
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(TOKENS)])


def rows_to(rank: int, peer: int, world: int) -> int:
    """Tokens of `rank` that have an expert on `peer`: a token goes to a rank once."""
    return int((ids(rank) // (EXPERTS // world) == peer).any(1).sum())


def serve_steps(group: ept.Group) -> ept.AllToAll:
    moe = ept.AllToAll(group, num_experts=EXPERTS, top_k=2, hidden=HIDDEN, max_tokens=TOKENS, threads=1)
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
    for _ in range(STEPS):
        got = moe.dispatch(x, ids(group.rank), torch.ones(TOKENS, 2))
        moe.combine(got.x, got)
    return moe


@pytest.mark.parametrize("backend", ["loopback", "tcp"])
def test_counts_are_those_of_what_was_sent(ranks: Callable[..., list[ept.Group]], backend: str) -> None:
    groups = ranks(3, backend, **QUIET)
    moes = ept.loopback_run(groups, serve_steps)
    seen = [group.metrics() for group in groups]
    for one, moe in zip(seen, moes, strict=True):
        for phase, plan_row, plan_header in (
            ("dispatch", moe.plan_.dispatch_row, moe.plan_.dispatch_header),
            ("combine", HIDDEN * 2, moe.plan_.combine_header),  # bf16, and no row weights beside it
        ):
            for peer in one.peers:
                # dispatch takes my tokens to the peer, combine takes the peer's back
                pair = (one.rank, peer.rank) if phase == "dispatch" else (peer.rank, one.rank)
                rows = STEPS * rows_to(*pair, 3)
                sent = peer.phase(phase)
                assert (sent.tx_messages, sent.tx_rows) == (STEPS, rows), (one.rank, peer.rank, phase)
                assert sent.tx_bytes == STEPS * plan_header + rows * plan_row
                other = seen[peer.rank].by_rank[one.rank].phase(phase)
                assert (other.rx_bytes, other.rx_messages, other.rx_rows) == (sent.tx_bytes, STEPS, rows)
                assert other.arrivals.count == STEPS == sum(other.arrivals.buckets)
        stats = moe.stats()
        for index, phase in enumerate(("dispatch", "combine")):
            assert sum(peer.phase(phase).tx_bytes for peer in one.peers) == stats.bytes[index]
            assert sum(peer.phase(phase).tx_messages for peer in one.peers) == stats.messages[index]
        assert all(peer.phase("late weights").tx_messages == 0 for peer in one.peers)
        # The phases are all the payload there was; rails count what peers count, each by itself.
        for peer in one.peers:
            assert peer.tx_bytes == sum(phase.tx_bytes for phase in peer.phases)
            assert peer.rx_bytes == seen[peer.rank].by_rank[one.rank].tx_bytes
            assert peer.status == 2
            assert peer.failed == 0
        assert sum(rail.tx_bytes for rail in one.rails) == sum(peer.tx_bytes for peer in one.peers)
        assert one.registered_bytes == groups[one.rank].engine.info().registered_bytes
        assert sum(rail.tx_operations for rail in one.rails) == sum(peer.tx_operations for peer in one.peers)


def test_operations_credits_and_completions_of_single_writes(ranks: Callable[..., list[ept.Group]]) -> None:
    groups = ranks(2, **QUIET)
    source, target = torch.ones(512, dtype=torch.uint8), torch.zeros(512, dtype=torch.uint8)
    memory, there = groups[0].engine.register(source), groups[1].engine.register(target)
    signal_here = groups[1].engine.signal(0)
    region = groups[0].engine.peer(1).import_region(there.export(0))
    remote = groups[0].engine.peer(1).import_signal(signal_here.export())
    groups[0].engine.quiesce()  # the greeting is a message, and an operation too
    before = groups[0].metrics().by_rank[1]
    for _ in range(10):
        groups[0].engine.peer(1).write(memory, region, 512, signal=remote).wait()
    signal_here.wait(10)
    after = groups[0].metrics().by_rank[1]
    assert after.tx_bytes - before.tx_bytes == 5120
    assert after.tx_operations - before.tx_operations == 10
    assert after.credits_spent - before.credits_spent == 10
    assert after.credits == after.credits_granted - after.credits_spent + groups[0].engine.info().credits
    assert after.completions.count - before.completions.count == 10
    assert sum(after.completions.buckets) == after.completions.count
    assert 0 < after.completions.max_s <= after.completions.total_s
    received = groups[1].metrics().by_rank[0]
    assert received.rx_bytes == after.tx_bytes
    assert received.rx_operations == after.tx_operations


def test_no_room_is_counted_and_tried_again(ranks: Callable[..., list[ept.Group]]) -> None:
    """The adversary says LATER; each refusal is counted, and each is followed by another try."""
    options = {"loopback.adversary": "3", "loopback.later_permille": "500"}
    groups = ranks(2, options=options, **QUIET)
    signal_here = groups[1].engine.signal(0)
    remote = groups[0].engine.peer(1).import_signal(signal_here.export())
    for _ in range(200):
        groups[0].engine.peer(1).write(None, None, 0, signal=remote)
    signal_here.wait(200)
    groups[0].engine.quiesce()
    peer = groups[0].metrics().by_rank[1]
    assert peer.later > 20
    assert peer.retries == peer.later
    assert peer.tx_operations == 200
    assert groups[0].metrics().rails[0].later >= peer.later


def test_the_wait_matrix_names_who_was_late(ranks: Callable[..., list[ept.Group]]) -> None:
    groups = ranks(3)

    dispatch_with_rank_2_late(groups)
    cells = {(cell.rank, cell.peer, cell.phase): cell for cell in groups[0].wait_matrix()}
    for rank in (0, 1):
        late = cells[rank, 2, "dispatch"]
        assert late.total_s >= late.max_s > 0.1
        assert late.count >= 1
    assert all(cell.now_s == 0 for cell in cells.values())


def test_a_histogram_has_a_bound_for_each_bucket() -> None:
    bounds = bucket_bounds_ns()
    buckets = [0] * len(bounds)
    buckets[10] = 99  # up to 1,024 ns
    buckets[20] = 1
    histogram = Histogram(100, 1e-4, 6e-4, tuple(buckets))
    assert bounds[:3] == [1, 2, 4]
    assert histogram.quantile(0.5) == pytest.approx(1.024e-6)
    assert histogram.quantile(0.99) == pytest.approx(1.024e-6)
    assert histogram.quantile(1.0) == pytest.approx(6e-4)
    assert Histogram(0, 0, 0, tuple([0] * len(bounds))).quantile(0.5) == 0


@pytest.mark.parametrize("progress", ["auto", "thread"])
def test_rails_and_gauges_follow_though_nobody_asks(progress: str) -> None:
    name = f"left alone {progress} {os.getpid()}"
    groups = ept.loopback_groups(2, ept.Settings(backend="tcp", progress=progress, threads=1), name=name)
    ept.loopback_run(groups, serve_steps)
    deadline = time.monotonic() + LIMIT_S
    while True:
        found = [one for one in pages() if one.group == name]
        assert len(found) == 2
        if all(sum(rail.tx_bytes for rail in one.rails) == one.peers[0].tx_bytes > 0 for one in found):
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    for group in groups:
        group.close()


READER = """
import json, sys
from eptransport.metrics import pages
for line in sys.stdin:
    found = [one for one in pages() if one.group == line.strip()]
    print(json.dumps([[one.rank, one.pid, [[p.tx_bytes, p.phase("dispatch").tx_messages] for p in one.peers]]
                      for one in found]), flush=True)
"""


def test_another_process_sees_ranks_while_they_run() -> None:
    """Every reading is between what was there before it and after it."""
    name = f"watched {os.getpid()}"
    groups = ept.loopback_groups(2, ept.Settings(backend="loopback", threads=1), name=name)
    reader = subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdin
    assert reader.stdout

    def read() -> list[Any]:
        assert reader.stdin
        assert reader.stdout
        reader.stdin.write(name + "\n")
        reader.stdin.flush()
        return json.loads(reader.stdout.readline())  # type: ignore[no-any-return]

    moes = ept.loopback_run(groups, serve_steps)
    stop = False

    def go_on(group: ept.Group) -> int:
        moe = moes[group.rank]
        steps = 0
        x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
        while not stop or steps < agreed[0]:
            agreed[0] = max(agreed[0], steps + 1)
            got = moe.dispatch(x, ids(group.rank), torch.ones(TOKENS, 2))
            moe.combine(got.x, got)
            steps += 1
        return steps

    agreed = [0]
    worker_result: list[list[int]] = []
    worker = Thread(target=lambda: worker_result.append(ept.loopback_run(groups, go_on)))
    worker.start()
    readings = []
    for _ in range(5):
        before = [group.metrics().peers[0].phase("dispatch").tx_messages for group in groups]
        reading = read()
        after = [group.metrics().peers[0].phase("dispatch").tx_messages for group in groups]
        assert [entry[:2] for entry in reading] == [[0, os.getpid()], [1, os.getpid()]]
        for rank, entry in enumerate(reading):
            assert before[rank] <= entry[2][0][1] <= after[rank]
        readings.append(reading[0][2][0][0])
    stop = True
    worker.join(LIMIT_S)
    assert worker_result
    assert readings == sorted(readings)
    assert read()[0][2][0] == [
        groups[0].metrics().peers[0].tx_bytes,
        groups[0].metrics().peers[0].phase("dispatch").tx_messages,
    ]
    for group in groups:
        group.close()
    assert read() == []
    reader.stdin.close()
    reader.wait(LIMIT_S)


KILLED = """
import sys, time
import eptransport as ept
groups = ept.loopback_groups(2, ept.Settings(backend="loopback"), name=sys.argv[1])
print("ready", flush=True)
time.sleep(600)
"""


def test_the_page_of_a_killed_process_is_swept() -> None:
    name = f"killed {os.getpid()}"
    child = subprocess.Popen([sys.executable, "-c", KILLED, name], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    mine = f"eptransport-{os.getuid()}-{child.pid}-"
    assert sum(file.startswith(mine) for file in os.listdir(FOLDER)) == 2
    assert len([one for one in pages() if one.group == name]) == 2
    child.send_signal(signal.SIGKILL)
    child.wait(LIMIT_S)
    assert sum(file.startswith(mine) for file in os.listdir(FOLDER)) == 2
    assert not [one for one in pages() if one.group == name]
    assert not [file for file in os.listdir(FOLDER) if file.startswith(mine)]


def test_a_reader_believes_no_file_that_is_no_page(tmp_path: Path) -> None:
    import fcntl

    files = {
        "empty": b"",
        "short": b"x" * 100,
        "zeros": bytes(1 << 16),
        "cut": b"",
    }
    groups = ept.loopback_groups(2, ept.Settings(backend="loopback"), name="to be copied")
    (page,) = [
        file
        for file in Path(FOLDER).glob(f"eptransport-{os.getuid()}-{os.getpid()}-*")
        if b"to be copied" in file.read_bytes() and file.read_bytes()[32:36] == bytes(4)
    ]
    files["cut"] = page.read_bytes()[:-8]
    held = []
    for name, content in files.items():
        file = tmp_path / f"eptransport-{os.getuid()}-1-{name}"
        file.write_bytes(content)
        held.append(file.open("rb"))
        fcntl.flock(held[-1], fcntl.LOCK_EX)  # as if its owner lived
    assert pages(str(tmp_path)) == []
    whole = tmp_path / f"eptransport-{os.getuid()}-1-whole"
    whole.write_bytes(page.read_bytes())
    held.append(whole.open("rb"))
    fcntl.flock(held[-1], fcntl.LOCK_EX)
    assert [one.group for one in pages(str(tmp_path))] == ["to be copied"]
    for file in held:
        file.close()
    assert pages(str(tmp_path)) == []  # nobody holds them now
    assert not whole.exists()
    for group in groups:
        group.close()


# ---- prometheus and top ----------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    name: str
    labels: dict[str, str]
    value: float


LINE = re.compile(r"([a-z_]+)\{(.*)\} (\S+)")
LABEL = re.compile(r'([a-z]+)="((?:[^"\\\n]|\\["\\n])*)"(,|$)')


def parse(text: str) -> list[Sample]:
    """Strict: each line is a HELP, its TYPE, or a sample of the family that the TYPE named."""
    samples = []
    family = kind = ""
    seen = set()
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert family not in seen, f"{family} comes twice"
            seen.add(family)
        elif line.startswith("# TYPE "):
            assert line.split()[2] == family
            kind = line.split()[3]
            assert kind in ("counter", "gauge", "histogram")
        else:
            match = LINE.fullmatch(line)
            assert match, line
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            assert match[1] in {family + suffix for suffix in suffixes}, line
            labels, at = {}, 0
            while at < len(match[2]):
                label = LABEL.match(match[2], at)
                assert label, line
                labels[label[1]] = re.sub(r"\\(.)", lambda escape: {"n": "\n"}.get(escape[1], escape[1]), label[2])
                at = label.end()
            samples.append(Sample(match[1], labels, float(match[3])))
    assert len({(one.name, *sorted(one.labels.items())) for one in samples}) == len(samples)
    return samples


def test_prometheus_text_is_well_formed_and_says_what_was_counted() -> None:
    name = 'a "group"\\of two'
    groups = ept.loopback_groups(2, ept.Settings(backend="loopback", threads=1), name=name)
    ept.loopback_run(groups, serve_steps)
    seen = [group.metrics() for group in groups]  # and brings gauges and rails up to date
    samples = [one for one in parse(ept.prometheus_text()) if one.labels["group"] == name]

    def value(family: str, **labels: str) -> float:
        (sample,) = [
            one for one in samples if one.name == f"eptransport_{family}" and {**one.labels, **labels} == one.labels
        ]
        return sample.value

    for one in seen:
        (peer,) = one.peers
        labels = {"rank": str(one.rank), "peer": str(peer.rank)}
        assert value("peer_tx_bytes_total", **labels) == peer.tx_bytes
        assert value("rail_tx_bytes_total", rank=str(one.rank)) == one.rails[0].tx_bytes
        assert value("peer_credits", **labels) == peer.credits
        for phase in ("dispatch", "combine"):
            found = peer.phase(phase)
            assert value("phase_tx_rows_total", **labels, phase=phase) == found.tx_rows
            assert value("phase_arrival_seconds_count", **labels, phase=phase) == STEPS
            assert value("phase_arrival_seconds_sum", **labels, phase=phase) == pytest.approx(found.arrivals.total_s)
            buckets = [
                (float(each.labels["le"]), each.value)
                for each in samples
                if each.name == "eptransport_phase_arrival_seconds_bucket"
                and {**each.labels, **labels, "phase": phase} == each.labels
            ]
            assert buckets == sorted(buckets)
            assert [bound for bound, _ in buckets[:3]] == [1e-9, 2e-9, 4e-9]
            assert buckets[-1] == (float("inf"), STEPS)
            assert {count for bound, count in buckets if bound >= found.arrivals.max_s} == {STEPS}
    for group in groups:
        group.close()


def test_prometheus_own_parser_reads_it(ranks: Callable[..., list[ept.Group]]) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    ept.loopback_run(ranks(2), serve_steps)
    text = ept.prometheus_text()
    families = list(parser.text_string_to_metric_families(text))
    assert sum(len(family.samples) for family in families) == len(parse(text))


def test_prometheus_is_served_over_http(ranks: Callable[..., list[ept.Group]]) -> None:
    ranks(2)
    server = serve("127.0.0.1:0")
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=LIMIT_S) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = answer.read().decode()
        assert f'pid="{os.getpid()}"' in text
        assert parse(text)
    finally:
        server.shutdown()
        thread.join(LIMIT_S)
        server.server_close()


@pytest.mark.parametrize("bad", ["", "9400", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000"])
def test_where_to_listen_is_checked(bad: str) -> None:
    with pytest.raises(ept.InvalidArgument, match="ADDR:PORT"):
        serve(bad)


def run_command(*arguments: str) -> str:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_top_shows_every_rank_from_another_process() -> None:
    name = f"top{os.getpid()}"
    groups = ept.loopback_groups(2, ept.Settings(backend="loopback", threads=1, **QUIET), name=name)
    ept.loopback_run(groups, serve_steps)
    output = run_command("top", "--once", "--waits", "--peers", "--group", name)
    for row in (f"{name} │ 0 of 2", f"{name} │ 1 of 2"):
        assert row in output
    assert "loopback/0" in output
    assert "who waits for whom" in output
    dispatch = groups[0].metrics().peers[0].phase("dispatch")
    row = next(line for line in output.splitlines() if "dispatch" in line and f"{name} │ 0    │ 1" in line)
    assert f"{dispatch.tx_rows}" in row
    text = run_command("top", "--prometheus", "--group", name)
    assert f'eptransport_phase_tx_rows_total{{job="{groups[0].metrics().job}"' in text
    assert text == ept.prometheus_text([one for one in pages() if one.group == name])
    assert f'group="{name}"' in run_command("prometheus")
    for group in groups:
        group.close()
    assert "no group" in run_command("top", "--once", "--group", name)


def test_phases_have_the_names_of_the_header() -> None:
    header = (Path(ept.include_dir()) / "eptransport" / "metrics.h").read_text()
    assert [header.index(f"EPT_METRICS_{name}") for name in ("DISPATCH", "COMBINE", "WEIGHTS", "TRANSFER")] == sorted(
        header.index(f"EPT_METRICS_{name}") for name in ("DISPATCH", "COMBINE", "WEIGHTS", "TRANSFER")
    )
    assert PHASES == ("dispatch", "combine", "late weights", "transfer")


def test_the_cost_of_counting_is_measured(tmp_path: Path) -> None:
    """The figures are the machine's; that each kind has a price and the records are those of the step is ours."""
    file = tmp_path / "cost.json"
    table = run_command(
        "bench",
        "seeing",
        "--tokens",
        "16",
        "--hidden",
        "256",
        "--iterations",
        "4",
        "--rounds",
        "2",
        "--json",
        str(file),
    )
    assert "share" in table
    result = json.loads(file.read_text())
    assert set(result["ns"]) == set(result["records"])
    assert all(ns > 0 for ns in result["ns"].values())
    # Two ranks: a message out and one in, in each of two phases.
    assert result["records"]["message"] == 4
    assert result["records"]["arrival"] == 2
    assert result["cost_s"] == pytest.approx(sum(result["ns"][k] * result["records"][k] for k in result["ns"]) / 1e9)
    assert result["ratio"] == pytest.approx(result["cost_s"] / result["step_s"])
