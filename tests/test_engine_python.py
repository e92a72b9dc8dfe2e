# SPDX-License-Identifier: Apache-2.0
"""The point-to-point interface from Python: what moves, what is refused, who keeps what alive, how waits end."""

from __future__ import annotations

import array
import gc
import logging
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import eptransport as ept
from eptransport.engine import PeerStatus

Ranks = Callable[..., list[ept.Group]]
LENGTH = 4096


@dataclass
class Pair:
    """Rank 0 writes, rank 1 is written to."""

    groups: list[ept.Group]
    source: torch.Tensor
    target: torch.Tensor
    source_memory: ept.Memory
    target_memory: ept.Memory
    region: ept.Region
    signal: ept.Signal
    remote: ept.RemoteSignal

    @property
    def peer(self) -> ept.Peer:
        return self.groups[0].engine.peer(1)

    @property
    def engines(self) -> tuple[ept.Engine, ept.Engine]:
        return self.groups[0].engine, self.groups[1].engine


def pair_of(groups: list[ept.Group], length: int = LENGTH) -> Pair:
    here, there = groups[0].engine, groups[1].engine
    source = torch.randint(0, 256, (length,), dtype=torch.uint8)
    target = torch.zeros(length, dtype=torch.uint8)
    source_memory, target_memory = here.register(source), there.register(target)
    arrived = there.signal(0, "test")
    region = here.peer(1).import_region(target_memory.export(0))
    remote = here.peer(1).import_signal(arrived.export())
    return Pair(groups, source, target, source_memory, target_memory, region, arrived, remote)


@pytest.fixture(params=["loopback", "tcp"])
def pair(request: pytest.FixtureRequest, ranks: Ranks) -> Pair:
    return pair_of(ranks(2, request.param))


@pytest.fixture
def quick(ranks: Ranks) -> Pair:
    return pair_of(ranks(2))


# ---- what moves ------------------------------------------------------------------------------------------------------


def test_write_lands_before_its_signal(pair: Pair) -> None:
    for count in range(1, 20):
        pair.source.random_()
        transfer = pair.peer.write(pair.source_memory, pair.region, LENGTH, signal=pair.remote)
        pair.signal.wait(count, timeout=10)
        assert torch.equal(pair.target, pair.source)
        transfer.wait(10)
        assert transfer.done
        assert pair.signal.value == count


def test_write_with_offsets_changes_nothing_else(pair: Pair) -> None:
    pair.peer.write(
        pair.source_memory, pair.region, 100, source_offset=7, destination_offset=1000, signal=pair.remote
    ).wait(10)
    pair.signal.wait(1, timeout=10)
    expected = torch.zeros_like(pair.target)
    expected[1000:1100] = pair.source[7:107]
    assert torch.equal(pair.target, expected)


def test_no_bytes_need_no_memory_and_signal_too(pair: Pair) -> None:
    pair.peer.write(None, None, 0, signal=pair.remote).wait(10)
    pair.signal.wait(1, timeout=10)


@pytest.mark.parametrize("kind", ["list", "array", "numpy", "torch"])
def test_write_paged(pair: Pair, kind: str) -> None:
    make: dict[str, Callable[[list[int]], Any]] = {
        "list": list,
        "array": lambda pages: array.array("I", pages),
        "numpy": lambda pages: np.array(pages, np.int32),
        "torch": lambda pages: torch.tensor(pages, dtype=torch.int32),
    }
    source, destination = [3, 0, 9, 9], [1, 2, 40, 7]
    pair.peer.write_paged(
        pair.source_memory, pair.region, 64, make[kind](source), make[kind](destination), signal=pair.remote
    ).wait(10)
    pair.signal.wait(1, timeout=10)
    expected = torch.zeros_like(pair.target)
    for s, d in zip(source, destination, strict=True):
        expected[64 * d : 64 * d + 64] = pair.source[64 * s : 64 * s + 64]
    assert torch.equal(pair.target, expected)
    assert pair.signal.value == 1


def test_write_paged_with_strides_and_offsets(pair: Pair) -> None:
    pair.peer.write_paged(
        pair.source_memory,
        pair.region,
        16,
        [0, 1],
        [1, 0],
        source_offset=8,
        source_stride=100,
        destination_offset=32,
        destination_stride=64,
        signal=pair.remote,
    ).wait(10)
    pair.signal.wait(1, timeout=10)
    expected = torch.zeros_like(pair.target)
    expected[96:112] = pair.source[8:24]
    expected[32:48] = pair.source[108:124]
    assert torch.equal(pair.target, expected)


@pytest.mark.parametrize("backend", ["loopback", "tcp"])
def test_scatter_to_many_peers_is_one_transfer(ranks: Ranks, backend: str) -> None:
    groups = ranks(4, backend)
    here = groups[0].engine
    source = here.register(bytes(range(256)))
    targets, arrived, writes = {}, {}, []
    for rank in (1, 2, 3):
        there = groups[rank].engine
        targets[rank] = bytearray(64)
        arrived[rank] = there.signal(0)
        region = here.peer(rank).import_region(there.register(targets[rank]).export(0))
        remote = here.peer(rank).import_signal(arrived[rank].export())
        writes.append(ept.Write(rank, source, region, 64, source_offset=64 * rank, signal=remote))
    here.scatter(writes).wait(10)
    for rank in (1, 2, 3):
        arrived[rank].wait(1, timeout=10)
        assert targets[rank] == bytes(range(64 * rank, 64 * rank + 64))


def test_messages(pair: Pair) -> None:
    here, there = pair.engines
    pair.peer.send(b"first", tag=5)
    pair.peer.send(b"", tag=6)
    there.peer(0).send(np.arange(3, dtype=np.int32), tag=5)
    assert there.recv(6, timeout=10) == (0, b"")
    assert there.recv(5, peer=0, timeout=10) == (0, b"first")
    assert here.recv(5, peer=here.peer(1), timeout=10) == (1, np.arange(3, dtype=np.int32).tobytes())
    longest = bytes(here.max_message)
    pair.peer.send(longest)
    assert there.recv(timeout=10) == (0, longest)


def test_counters_say_what_went_out(quick: Pair) -> None:
    before = [rail.counters for rail in quick.engines[0].rails()]
    quick.peer.write(quick.source_memory, quick.region, 1000, signal=quick.remote).wait(10)
    after = [rail.counters for rail in quick.engines[0].rails()]
    assert sum(c.tx_bytes for c in after) - sum(c.tx_bytes for c in before) == 1000
    assert sum(c.tx_operations for c in after) - sum(c.tx_operations for c in before) == 1


def test_info_adds_up_what_is_registered(quick: Pair) -> None:
    here = quick.engines[0]
    before = here.info().registered_bytes
    memory = here.register(bytearray(12345))
    assert here.info().registered_bytes == before + 12345
    memory.close()
    assert here.info().registered_bytes == before


def test_a_signal_of_ones_own(quick: Pair) -> None:
    own = quick.engines[0].signal(0)
    own.raise_by_one()
    own.wait(1, timeout=0)
    assert own.value == 1


def test_a_signal_lives_where_it_is_told(quick: Pair) -> None:
    here, there = quick.engines
    home = torch.zeros(1, dtype=torch.int64)
    arrived = there.signal(0, "home", home=home)
    remote = here.peer(1).import_signal(arrived.export())
    here.peer(1).write(None, None, 0, signal=remote)
    arrived.wait(1, timeout=10)
    assert home.item() == 1


# ---- whose memory it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytearray(64),
        lambda: memoryview(bytearray(128))[64:],
        lambda: array.array("d", bytes(64)),
        lambda: np.zeros((2, 4), np.float64),
        lambda: np.zeros((4, 4), np.float32)[2:],
        lambda: torch.zeros(4, 8, dtype=torch.bfloat16),
        lambda: torch.zeros(8, 8, dtype=torch.float8_e4m3fn)[:8],
    ],
)
def test_what_can_be_written_to(quick: Pair, make: Callable[[], Any]) -> None:
    buffer = make()
    with quick.engines[1].register(buffer) as memory:
        assert memory.length in (32, 64)
        region = quick.peer.import_region(memory.export(0))
        quick.peer.write(quick.source_memory, region, 32, signal=quick.remote)
        quick.signal.wait(1, timeout=10)
        if isinstance(buffer, torch.Tensor):
            seen = buffer.view(torch.uint8).flatten().numpy().tobytes()
        else:
            seen = memoryview(buffer).cast("B").tobytes()
        assert seen[:32] == quick.source.numpy().tobytes()[:32]


def test_read_only_memory_is_a_source_and_no_target(quick: Pair) -> None:
    memory = quick.engines[0].register(b"read only" * 8)
    quick.peer.write(memory, quick.region, 9, signal=quick.remote).wait(10)
    quick.signal.wait(1, timeout=10)
    assert bytes(quick.target[:9].tolist()) == b"read only"
    with pytest.raises(ept.EptError, match=r"write|access|right"):
        memory.export(1)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: np.zeros((4, 4))[:, :2], ept.InvalidArgument, "contiguous"),
        (lambda: torch.zeros(4, 4)[:, :2], ept.InvalidArgument, "contiguous"),
        (lambda: torch.zeros(4, device="meta"), ept.UnsupportedError, "meta"),
        (lambda: bytearray(), ept.InvalidArgument, "no bytes"),
        (lambda: "text", ept.InvalidArgument, "str"),
        (lambda: None, ept.InvalidArgument, "NoneType"),
    ],
)
def test_what_can_not_be_registered(quick: Pair, make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        quick.engines[0].register(make())


class Noted(bytearray):
    """A buffer whose end can be seen."""


def test_registered_memory_is_kept_alive_until_it_is_closed(quick: Pair) -> None:
    buffer = Noted(64)
    gone = weakref.ref(buffer)
    memory = quick.engines[0].register(buffer)
    del buffer
    gc.collect()
    assert gone() is not None
    memory.close()
    gc.collect()
    assert gone() is None


def test_registered_memory_is_kept_alive_until_the_engine_is_closed(ranks: Ranks) -> None:
    groups = ranks(2)
    buffer = Noted(64)
    gone = weakref.ref(buffer)
    memory = groups[0].engine.register(buffer)
    del buffer, memory
    gc.collect()
    assert gone() is not None
    groups[0].close()
    gc.collect()
    assert gone() is None


def test_a_dropped_group_is_closed() -> None:
    groups = ept.loopback_groups(2)
    other = groups[1]
    gone = weakref.ref(groups[0])
    del groups
    gc.collect()
    assert gone() is None
    deadline = time.monotonic() + 5
    while other.engine.peer(0).info.status != PeerStatus.LEFT:
        assert time.monotonic() < deadline, other.engine.peer(0).info
        other.engine.progress()
    other.close()


def test_memory_that_is_still_read_is_not_given_back(ranks: Ranks) -> None:
    """Nobody moves the network here, so the write can't be through."""
    pair = pair_of(ranks(2, progress="inline"))
    transfer = pair.peer.write(pair.source_memory, pair.region, LENGTH, signal=pair.remote)
    if not transfer.done:
        with pytest.raises(ept.InvalidArgument, match=r"transfer|read"):
            pair.source_memory.close()
    transfer.wait(10)
    pair.source_memory.close()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_bad_arguments_say_what_was_wrong(quick: Pair) -> None:
    here, there = quick.engines
    peer, source, region = quick.peer, quick.source_memory, quick.region
    for call, words in (
        (lambda: here.peer(2), "rank=2"),
        (lambda: here.peer(-1), "rank=-1"),
        (lambda: here.peer(0), "own"),
        (lambda: peer.write(source, region, -1), "length=-1"),
        (lambda: peer.write(source, region, LENGTH + 1), str(LENGTH + 1)),
        (lambda: peer.write(source, region, 8, source_offset=LENGTH - 4), str(LENGTH)),
        (lambda: peer.write(source, region, 8, destination_offset=LENGTH - 4), str(LENGTH)),
        (lambda: peer.write(None, region, 8), "source"),
        (lambda: peer.write(source, None, 8), "destination"),
        (lambda: peer.write_paged(source, region, 64, [0], [0, 1]), "1 source pages and 2"),
        (lambda: peer.write_paged(source, region, 64, [0, LENGTH], [0, 1]), None),
        (lambda: peer.write_paged(source, region, 64, [-1], [0]), "source_pages"),
        (lambda: peer.write_paged(source, region, 64, torch.zeros(1, dtype=torch.int64), [0]), "int64"),
        (lambda: peer.write_paged(source, region, 64, np.zeros(1, np.float32), [0]), "int32"),
        (lambda: peer.write_paged(source, region, 0, [0], [0]), None),
        (lambda: here.signal(7), "source=7"),
        (lambda: here.signal(1, home=bytearray(4)), "4 bytes"),
        (lambda: here.signal(1, home=bytes(8)), "writable"),
        (lambda: here.register(bytearray(8), role="both"), "both"),  # type: ignore[arg-type]
        (lambda: here.quiesce(scope="everywhere"), "everywhere"),  # type: ignore[arg-type]
        (lambda: peer.send(b"x", tag=2**63), "tag"),
        (lambda: peer.send(bytes(here.max_message + 1)), str(here.max_message)),
        (lambda: quick.signal.wait(1, timeout=-1), "timeout=-1"),
        (lambda: source.export(1, offset=LENGTH, length=1), str(LENGTH)),
        (lambda: source.export(5), "rank=5"),
        (lambda: peer.import_region(b""), None),
        (lambda: peer.import_region(b"\0" * 100), None),
        (lambda: peer.import_region(b"nonsense" * 10), None),
        (lambda: peer.import_signal(b"nonsense"), None),
    ):
        with pytest.raises(ept.EptError, match=words):
            call()
    with pytest.raises(ept.InvalidArgument, match="another engine"):
        there.peer(0).write(source, None, 0)
    with pytest.raises(ept.InvalidArgument, match="another engine"):
        peer.write(quick.target_memory, region, 8)
    peer.write(source, region, LENGTH, signal=quick.remote)
    quick.signal.wait(1, timeout=10)


def test_a_revoked_region_changes_no_more(pair: Pair) -> None:
    pair.target_memory.revoke(0)
    transfer = pair.peer.write(pair.source_memory, pair.region, LENGTH)
    with pytest.raises(ept.AccessDenied) as caught:
        transfer.wait(10)
    assert caught.value.peer == 1
    with pytest.raises(ept.AccessDenied):
        transfer.wait(10)  # the outcome stays
    assert transfer.done
    assert not pair.target.any()
    again = pair.peer.import_region(pair.target_memory.export(0))
    pair.peer.write(pair.source_memory, again, LENGTH, signal=pair.remote).wait(10)
    pair.signal.wait(1, timeout=10)


def test_handles_can_not_be_used_once_closed(quick: Pair) -> None:
    memory = quick.engines[0].register(bytearray(8))
    memory.close()
    memory.close()
    with pytest.raises(ept.InvalidArgument):
        memory.export(1)
    with pytest.raises(ept.InvalidArgument):
        quick.peer.write(memory, quick.region, 8)


def test_a_failed_transfer_that_nobody_waits_for_is_logged(quick: Pair, caplog: pytest.LogCaptureFixture) -> None:
    quick.target_memory.revoke(0)
    quick.peer.write(quick.source_memory, quick.region, 8)
    deadline = time.monotonic() + 10
    with caplog.at_level(logging.WARNING, "eptransport"):
        while "nobody waited for" not in caplog.text:
            assert time.monotonic() < deadline, caplog.text
            quick.engines[0].progress()
            quick.engines[1].progress()


# ---- how waits end ---------------------------------------------------------------------------------------------------


def test_a_deadline_says_who_waits_for_whom_and_what_was_seen(pair: Pair) -> None:
    pair.peer.write(None, None, 0, signal=pair.remote).wait(10)
    pair.signal.wait(1, timeout=10)
    begun = time.monotonic()
    with pytest.raises(ept.Timeout, match=r"rank 1 .*rank 0 .*'test'") as caught:
        pair.signal.wait(5, timeout=0.3)
    assert 0.25 < time.monotonic() - begun < 3
    error = caught.value
    assert (error.peer, error.expected, error.seen) == (0, 5, 1)
    assert error.silent_s is not None
    assert isinstance(error, TimeoutError)


def test_a_wait_of_no_time_looks_once(quick: Pair) -> None:
    begun = time.monotonic()
    with pytest.raises(ept.Timeout):
        quick.signal.wait(1, timeout=0)
    with pytest.raises(ept.Timeout):
        quick.engines[0].recv(timeout=0)
    assert time.monotonic() - begun < 1


def test_a_long_wait_is_logged_once(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    pair = pair_of(ranks(2, warn_s=0.2))
    with caplog.at_level(logging.WARNING, "eptransport"), pytest.raises(ept.Timeout):
        pair.signal.wait(1, timeout=0.9)
    said = [record.getMessage() for record in caplog.records if "'test'" in record.getMessage()]
    assert len(said) == 1, said
    assert "rank 0" in said[0]


def test_a_peer_that_leaves_ends_the_waits_for_it(pair: Pair) -> None:
    def leave() -> None:
        time.sleep(0.2)
        pair.groups[0].close()

    thread = threading.Thread(target=leave)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(ept.PeerLost) as caught:
        pair.signal.wait(1, timeout=20)
    assert time.monotonic() - begun < 10
    assert caught.value.peer == 0
    assert isinstance(caught.value, ConnectionError)
    thread.join()


def test_closing_ends_the_waits_of_other_threads(quick: Pair) -> None:
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            quick.signal.wait(1, timeout=20)
        except ept.EptError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    begun = time.monotonic()
    quick.groups[1].close()
    thread.join(10)
    assert time.monotonic() - begun < 3
    assert [type(error) for error in errors] == [ept.ClosedError]
    quick.groups[1].close()
    for use in (lambda: quick.signal.value, lambda: quick.engines[1].info(), lambda: quick.engines[1].rails()):
        with pytest.raises(ept.ClosedError):
            use()
    quick.target_memory.close()  # was given back with its engine


CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what the shell started in the background ignores it
import eptransport as ept
groups = ept.loopback_groups(2, ept.Settings(progress=sys.argv[1]))
never = groups[1].engine.signal(0, "never")
print("waiting", flush=True)
try:
    never.wait(1, timeout=60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
groups[0].engine.peer(1).send(b"still there")
assert groups[1].engine.recv(timeout=5) == (0, b"still there")
for group in groups:
    group.close()
"""


@pytest.mark.parametrize("progress", ["auto", "thread", "inline"])
def test_ctrl_c_gets_through_a_wait_and_the_engine_goes_on(progress: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", CTRL_C, progress], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.3)
    begun = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "interrupted\n"
    assert time.monotonic() - begun < 2
    assert child.wait(20) == 0


CTRL_C_IN_DISPATCH = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch
import eptransport as ept
groups = ept.loopback_groups(2)
moes = ept.loopback_run(groups, lambda group: ept.AllToAll(group, num_experts=2, top_k=1, hidden=64, max_tokens=4))
x, ids = torch.ones(2, 64, dtype=torch.bfloat16), torch.tensor([[0], [1]])
print("waiting", flush=True)
try:
    moes[0].dispatch(x, ids)
except KeyboardInterrupt:
    print("interrupted", flush=True)
assert int(groups[0].fault) != 0
def step(group):
    moe = moes[group.rank]
    moe.reset()
    got = moe.dispatch(x, ids)
    assert torch.equal(moe.combine(got.x, got), x)
ept.loopback_run(groups, step)
for group in groups:
    group.close()
"""


def test_ctrl_c_gets_through_a_dispatch_and_reset_mends_the_lane() -> None:
    child = subprocess.Popen([sys.executable, "-c", CTRL_C_IN_DISPATCH], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.5)
    begun = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "interrupted\n"
    assert time.monotonic() - begun < 2
    assert child.wait(30) == 0


def test_quiesce(pair: Pair) -> None:
    transfers = [pair.peer.write(pair.source_memory, pair.region, LENGTH) for _ in range(50)]
    pair.engines[0].quiesce(timeout=10)
    assert all(transfer.done for transfer in transfers)
    pair.engines[1].quiesce(pair.target_memory, "remote", timeout=10)
    with pytest.raises(ept.AccessDenied):
        pair.peer.write(pair.source_memory, pair.region, 8).wait(10)


def test_back_pressure_holds_and_goes_on(ranks: Ranks) -> None:
    """Far more writes than credits: each is taken sooner or later, each signals once."""
    pair = pair_of(ranks(2, credits=128))
    count = 5000
    for _ in range(count):
        pair.peer.write(pair.source_memory, pair.region, 64, signal=pair.remote)
    pair.signal.wait(count, timeout=60)
    assert pair.signal.value == count


def test_threads_share_an_engine(pair: Pair) -> None:
    """Eight threads write, each waits for its own: none sees another's completion."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                pair.peer.write(pair.source_memory, pair.region, 64, signal=pair.remote).wait(20)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    pair.signal.wait(400, timeout=20)
    assert pair.signal.value == 400
