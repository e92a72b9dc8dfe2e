# SPDX-License-Identifier: Apache-2.0
"""Why nothing goes on: the report names exactly who is missing, what was expected and what was seen; a Timeout carries
it, and SIGUSR1 asks for it, wherever the process is."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

import eptransport as ept

LIMIT_S = 90


def dispatch(moe: ept.AllToAll) -> ept.Dispatched:
    return moe.dispatch(torch.ones(2, 64, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64))


def make(group: ept.Group) -> ept.AllToAll:
    return ept.AllToAll(group, num_experts=4, top_k=1, hidden=64, max_tokens=4, threads=1)


def until(report: Callable[[], str], pattern: str) -> str:
    """The first report that has it; a wait publishes itself a moment after it began."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        text = report()
        if re.search(pattern, text):
            return text
        assert time.monotonic() < deadline, text
        time.sleep(0.01)


def waits_of(report: str) -> list[str]:
    """The lines of pending waits, each with what it is for."""
    lines = report.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("pending waits: "))
    return lines[begin + 1 : lines.index("peers:")]


@pytest.mark.parametrize("backend", ["loopback", "tcp"])
def test_the_missing_ranks_are_named_with_their_counts(ranks: Callable[..., list[ept.Group]], backend: str) -> None:
    """Of four ranks two don't come to the third dispatch: the other two wait for exactly those."""
    groups = ranks(4, backend)
    moes = ept.loopback_run(groups, make)

    def steps(group: ept.Group) -> None:
        for _ in range(2):
            moe = moes[group.rank]
            got = dispatch(moe)
            moe.combine(got.x, got)

    ept.loopback_run(groups, steps)
    threads = [threading.Thread(target=lambda moe=moe: dispatch(moe)) for moe in moes[:2]]
    for thread in threads:
        thread.start()
    for rank in (0, 1):
        # At first the other one's message may still be to come.
        report = until(groups[rank].why_stuck, r"of lane 0[^\n]*\n    for rank 2 [^\n]*\n    for rank 3 ")
        (call, *missing) = waits_of(report)
        assert re.match(r"  dispatch_wait: dispatch 2 of lane 0, thread \d+, for \d+\.\d+ s$", call)
        # The position of a slot is used every second generation: dispatch 2 is the second message there.
        form = r"    for rank (\d) in dispatch: count (\d+) expected, (\d+) seen; rank (\d) is up"
        named = [re.match(form, line) for line in missing]
        assert all(named), missing
        assert [match.groups() for match in named if match] == [("2", "2", "1", "2"), ("3", "2", "1", "3")]
        assert f"rank {rank} of 4" in report
        assert report.count(" credits, 0 writes queued") == 3
        assert re.search(r"last progress: \d+\.\d+ s ago", report)
        cells = {(cell.peer, cell.phase) for cell in groups[rank].metrics().waits() if cell.now_s}
        assert cells == {(2, "dispatch"), (3, "dispatch")}
        (seen,) = [peer.phase("dispatch") for peer in groups[rank].metrics().peers if peer.rank == 2]
        assert (seen.waiting_expected, seen.waiting_seen) == (2, 1)
    for moe in moes[2:]:
        threads.append(threading.Thread(target=lambda moe=moe: dispatch(moe)))
        threads[-1].start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    for group in groups:
        assert waits_of(group.why_stuck()) == []
        assert not any(cell.now_s for cell in group.metrics().waits())


def test_a_timeout_carries_the_report(ranks: Callable[..., list[ept.Group]]) -> None:
    groups = ranks(3, timeout_s=4.0)
    moes = ept.loopback_run(groups, make)
    with pytest.raises(ept.Timeout) as caught:
        dispatch(moes[0])
    report = caught.value.why_stuck
    assert "the wait that expired:\n  dispatch_wait: dispatch 0 of lane 0" in report
    assert "for rank 1 in dispatch: count 1 expected, 0 seen" in report
    assert "for rank 2 in dispatch: count 1 expected, 0 seen" in report
    assert "pending waits: 0" in report
    assert pickle.loads(pickle.dumps(caught.value)).why_stuck == report
    assert groups[0].metrics().expired_waits == 1
    with pytest.raises(ept.LaneFault) as faulted:
        moes[0].check()
    assert faulted.value.why_stuck == ""
    ept.loopback_run(groups, lambda group: moes[group.rank].reset())


def test_waits_of_the_point_to_point_interface(ranks: Callable[..., list[ept.Group]]) -> None:
    groups = ranks(2)
    signal_here = groups[0].engine.signal(1, "the label")
    with pytest.raises(ept.Timeout) as caught:
        signal_here.wait(3, timeout=0.2)
    assert "signal_wait: the label, thread" in caught.value.why_stuck
    assert "for rank 1 in transfer: count 3 expected, 0 seen" in caught.value.why_stuck
    with pytest.raises(ept.Timeout) as caught:
        groups[0].engine.recv(7, peer=1, timeout=0.2)
    assert "recv: a message with tag 7, thread" in caught.value.why_stuck
    with pytest.raises(ept.Timeout) as caught:
        signal_here.wait(3, timeout=0)
    assert caught.value.why_stuck == ""  # nobody waited
    (cell,) = groups[0].metrics().waits()
    assert (cell.peer, cell.phase, cell.count) == (1, "transfer", 2)
    assert cell.max_s >= 0.2


def test_set_up_that_one_rank_does_not_come_to(ranks: Callable[..., list[ept.Group]]) -> None:
    groups = ranks(3, timeout_s=4.0)

    def run(group: ept.Group) -> str:
        if group.rank == 1:
            return ""
        with pytest.raises(ept.Timeout) as caught:
            make(group)
        return caught.value.why_stuck

    for report in ept.loopback_run(groups, run)[::2]:
        assert "set-up: to create an AllToAll" in report
        assert "for rank 1 in transfer: count 1 expected, 0 seen" in report


# ---- SIGUSR1 ---------------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, threading, time
import torch
import eptransport as ept

handled = []
if sys.argv[2] == "own":
    signal.signal(signal.SIGUSR1, lambda *_: handled.append(1))
if sys.argv[2] == "ignored":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
settings = ept.Settings(backend="loopback", threads=1, stuck_signal=sys.argv[2] != "off")
groups = ept.loopback_groups(2, settings)
moes = ept.loopback_run(groups, lambda g: ept.AllToAll(g, num_experts=2, top_k=1, hidden=64, max_tokens=4))
x, ids = torch.ones(2, 64, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64)

def let_go():
    sys.stdin.readline()
    moes[1].dispatch(x, ids)

threading.Thread(target=let_go).start()
print("waiting", flush=True)
moes[0].dispatch(x, ids)          # the main thread, inside a native wait
print("handled", len(handled), flush=True)
for group in groups:
    group.close()
print("closed", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.2)
print("alive", flush=True)
"""


@pytest.fixture
def child() -> Callable[[str, str], subprocess.Popen[str]]:
    made = []

    def start(script: str, how: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(os.getpid()), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        made.append(process)
        return process

    yield start  # type: ignore[misc]
    for process in made:
        process.kill()
        process.communicate()


def say(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_sigusr1_reports_from_inside_a_native_wait(child: Callable[[str, str], subprocess.Popen[str]]) -> None:
    process = child(CHILD, "default")
    assert line(process) == "waiting"
    process.send_signal(signal.SIGUSR1)
    assert process.stderr
    report = ""
    while "for rank 1 in dispatch: count 1 expected, 0 seen" not in report:
        got = process.stderr.readline()
        assert got, report
        report += got
        if got.startswith("last progress") and report.count("last progress") % 2 == 0:
            process.send_signal(signal.SIGUSR1)  # it had not begun to wait
    assert "why_stuck: rank 0 of 2" in report
    say(process)
    assert line(process) == "handled 0"
    assert line(process) == "closed"
    say(process)  # the default is back: the signal ends the process
    assert process.wait(LIMIT_S) == -signal.SIGUSR1


def test_a_handler_of_the_program_stays(child: Callable[[str, str], subprocess.Popen[str]]) -> None:
    process = child(CHILD, "own")
    assert line(process) == "waiting"
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    say(process)
    assert line(process) == "handled 1"
    assert line(process) == "closed"
    say(process)
    assert line(process) == "alive"
    process.wait(LIMIT_S)
    assert process.stderr
    assert "why_stuck" not in process.stderr.read()


@pytest.mark.parametrize("how", ["ignored", "off"])
def test_a_program_that_does_not_want_it(child: Callable[[str, str], subprocess.Popen[str]], how: str) -> None:
    process = child(CHILD, how)
    assert line(process) == "waiting"
    if how == "ignored":
        process.send_signal(signal.SIGUSR1)
        say(process)
        assert line(process) == "handled 0"
        assert line(process) == "closed"
        say(process)
        assert line(process) == "alive"
        assert process.wait(LIMIT_S) == 0
        assert process.stderr
        assert "why_stuck" not in process.stderr.read()
    else:
        process.send_signal(signal.SIGUSR1)
        assert process.wait(LIMIT_S) == -signal.SIGUSR1  # nobody touched the default


FORKED = """
import os, signal, sys
import eptransport as ept
groups = ept.loopback_groups(2, ept.Settings(backend="loopback"))
pid = os.fork()
if pid == 0:
    os.kill(os.getpid(), signal.SIGUSR1)
    os._exit(7)
_, status = os.waitpid(pid, 0)
print(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGUSR1, flush=True)
pid = os.fork()
if pid == 0:
    mine = ept.loopback_groups(1, ept.Settings(backend="loopback"))
    os.kill(os.getpid(), signal.SIGUSR1)
    mine[0].close()
    os._exit(7)
_, status = os.waitpid(pid, 0)
print(os.WIFEXITED(status) and os.WEXITSTATUS(status) == 7, flush=True)
for group in groups:
    group.close()
"""


def test_a_forked_child_has_the_default_and_may_ask_for_its_own(
    child: Callable[[str, str], subprocess.Popen[str]],
) -> None:
    process = child(FORKED, "")
    assert line(process) == "True"
    assert line(process) == "True"
    assert process.wait(LIMIT_S) == 0
