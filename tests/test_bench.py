"""The measuring itself: that figures are of the slowest rank, that what is counted equals what is predicted, that a
wrong result is noticed. Never how long something took."""

from __future__ import annotations

import dataclasses
import json
import mmap
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "reference"))

import moe_model as model

import eptransport as ept
from eptransport.bench import figures, moe, native, p2p, reference, report
from eptransport.bench.ranks import Mesh, Rank, run_job
from eptransport.bench.shapes import PRESETS, Shape, routing, tokens

SMALL = Shape(ranks=3, tokens=13, hidden=256, experts=10, top_k=3)


def on_threads(*bodies: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(bodies)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = bodies[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = socket.create_connection(server.getsockname())
        b, _ = server.accept()
    return a, b


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_an_iteration_takes_as_long_as_its_slowest_rank() -> None:
    assert figures.slowest([[1.0, 9.0, 2.0], [3.0, 1.0, 2.5]]) == [3.0, 9.0, 2.5]
    with pytest.raises(ValueError, match="shorter"):
        figures.slowest([[1.0, 2.0], [3.0]])


def test_spread_is_a_median_of_medians_and_a_percentile_of_all() -> None:
    found = figures.spread([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [4.0, 5.0, 6.0]])
    assert found.rounds == (2.0, 20.0, 5.0)
    assert found.p50 == 5.0
    assert found.p99 == 30.0
    assert figures.percentile(list(range(1, 101)), 99) == 99
    assert figures.percentile([7.0], 99) == 7.0


# ---- shapes and routing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_predicted_sizes_are_those_of_the_plan(preset: str, ranks: int) -> None:
    base = PRESETS[preset]
    shape = Shape(ranks, 64, base.hidden, base.experts, base.top_k, dispatch_dtype=base.dispatch_dtype)
    plan = ept.AllToAll.plan(
        world=ranks,
        num_experts=shape.experts,
        top_k=shape.top_k,
        hidden=shape.hidden,
        max_tokens=shape.tokens,
        dtype=torch.bfloat16,
        dispatch_dtype=shape.torch_dtype(shape.dispatch_dtype),
    )
    # The plan has room for row weights, which no exchange here carries.
    row_weights = model.align(4 * shape.top_k, 16)
    assert (plan.dispatch_row, plan.combine_row) == (shape.dispatch_row, shape.combine_row + row_weights)


def test_every_expert_lives_once() -> None:
    for ranks in (1, 3, 4, 7):
        shape = dataclasses.replace(SMALL, ranks=ranks)
        assert [e for r in range(ranks) for e in shape.experts_of(r)] == list(range(shape.experts))


def test_routing_is_valid_repeatable_and_as_skewed_as_asked() -> None:
    shape = dataclasses.replace(SMALL, tokens=2000, experts=64, top_k=4)
    loads = {}
    for skew in (0.0, 1.2):
        ids, weights = routing(shape, 1, skew, 5)
        again, _ = routing(shape, 1, skew, 5)
        other, _ = routing(shape, 2, skew, 5)
        assert torch.equal(ids, again)
        assert not torch.equal(ids, other)
        assert ids.min() >= 0
        assert ids.max() < shape.experts
        assert all(len(set(row)) == shape.top_k for row in ids.tolist())
        assert torch.equal((weights * 256).round() / 256, weights)
        assert (weights > 0).all()
        counts = torch.bincount(ids.flatten(), minlength=shape.experts)
        loads[skew] = int(counts.max()) / (shape.tokens * shape.top_k / shape.experts)
    assert loads[0.0] < 1.5
    assert loads[1.2] > 4
    assert (tokens(shape, 0, 5).float().abs() > 0).float().mean() > 0.99


@pytest.mark.parametrize("dispatch_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("combine_dtype", ["bf16", "fp32"])
def test_the_torch_reference_is_the_plain_model(dispatch_dtype: str, combine_dtype: str) -> None:
    """Two references that know nothing of each other, bit for bit."""
    shape = dataclasses.replace(SMALL, dispatch_dtype=dispatch_dtype, combine_dtype=combine_dtype)
    names = {"bf16": "bf16", "fp32": "f32", "fp8": "e4m3"}
    config = model.Config(
        world=shape.ranks,
        num_experts=shape.experts,
        top_k=shape.top_k,
        hidden=shape.hidden,
        dispatch_dtype=names[dispatch_dtype],
        combine_dtype=names[combine_dtype],
    )
    inputs = [(tokens(shape, r, 3), *routing(shape, r, 0.5, 3)) for r in range(shape.ranks)]
    batches = [model.Batch(x.view(torch.uint16).numpy(), ids.numpy(), weights.numpy()) for x, ids, weights in inputs]
    arrived = model.dispatch(config, batches)
    unpacked = [model.unpack(one, "contiguous", world=shape.ranks) for one in arrived]
    outs = []
    for rank, one in enumerate(unpacked):
        out = np.zeros((one.slots, shape.hidden), np.uint16)
        for slot, (j, k) in one.place.items():
            row = arrived[rank].rows[j]
            x = torch.frombuffer(bytearray(row.payload), dtype=shape.torch_dtype(dispatch_dtype))[None]
            if dispatch_dtype == "fp8":
                scales = torch.frombuffer(bytearray(row.scales), dtype=torch.float32)[None]
                x = reference.dequantise(x, scales, torch.bfloat16)
            expert = shape.experts_of(rank)[row.experts[k]]
            out[slot] = (x.float() * 2.0 ** (expert % 7 - 3)).bfloat16().view(torch.uint16).numpy()[0]
        outs.append(out)
    y, _ = model.combine(config, batches, arrived, unpacked, outs)
    for rank, (x, ids, weights) in enumerate(inputs):
        found = reference.expected(shape, x, ids, weights).view(torch.uint16).numpy()
        assert np.array_equal(found, y[rank])
        rows = [[model.row_count(arrived, s, t) for t in range(shape.ranks)] for s in range(shape.ranks)]
        assert shape.rows(ids) == rows[rank]
        payload = shape.hidden * (1 if dispatch_dtype == "fp8" else 2)
        there = model.dispatch_traffic(config, arrived, rank, payload, 4 * shape.scale_blocks)
        back = model.combine_traffic(config, arrived, rank)
        cost = shape.cost(rank, rows)
        assert (cost.bytes, cost.messages) == (there.bytes + back.bytes, there.messages + back.messages)


# ---- the native loops ------------------------------------------------------------------------------------------------


def test_barrier_holds_everyone_back() -> None:
    shared = native.Shared(mmap.mmap(-1, native.Shared.BYTES))
    parties, rounds = 3, 200
    arrived = [0] * rounds
    lock = threading.Lock()

    def body() -> None:
        for turn in range(rounds):
            with lock:
                arrived[turn] += 1
            native.barrier(shared, parties)
            assert arrived[turn] == parties

    on_threads(*[body] * parties)


def test_barrier_says_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TIMEOUT_NS", 20_000_000)
    shared = native.Shared(mmap.mmap(-1, native.Shared.BYTES))
    with pytest.raises(ept.Timeout, match="1 of 2 ranks came"):
        native.barrier(shared, 2)


def test_bare_loops_give_a_sample_a_turn() -> None:
    a, b = tcp_pair()
    with a, b:
        samples, _ = on_threads(
            lambda: native.tcp_pingpong(a.fileno(), 0, 8, 50), lambda: native.tcp_pingpong(b.fileno(), 1, 8, 50)
        )
        assert len(samples) == 50
        assert min(samples) > 0
        seconds, _ = on_threads(
            lambda: native.tcp_stream(a.fileno(), 0, native.Buffer(1 << 18), 1 << 16, 20, 4),
            lambda: native.tcp_stream(b.fileno(), 1, native.Buffer(1 << 18), 1 << 16, 20, 4),
        )
        assert seconds > 0
    shared = native.Shared(mmap.mmap(-1, native.Shared.BYTES))
    for _ in range(2):  # twice: the words are not zeroed between
        samples, _ = on_threads(
            lambda: native.atomics_pingpong(shared, 0, 50), lambda: native.atomics_pingpong(shared, 1, 50)
        )
        assert min(samples) > 0
    assert native.copy_rate(64, 1000, 8) > 0


def test_bare_loops_name_a_side_that_left() -> None:
    a, b = tcp_pair()
    with a:
        b.close()
        with pytest.raises((ept.PeerLost, ept.TransportError)):
            native.tcp_pingpong(a.fileno(), 0, 8, 5)


@dataclasses.dataclass(frozen=True)
class MeshJob:
    """Every rank sends each other one a number of bytes that only that pair has, and says what came."""

    def run(self, rank: Rank) -> bool:
        mesh = Mesh(rank)
        try:
            for turn in range(3):
                send = [0 if r == rank.rank else 70_001 * r + 1000 * rank.rank + turn for r in range(rank.world)]
                recv = [0 if r == rank.rank else 70_001 * rank.rank + 1000 * r + turn for r in range(rank.world)]
                out, into = _ranges(send), _ranges(recv)
                for peer, part in enumerate(_parts(out, send)):
                    part[:] = 16 * rank.rank + peer + 1
                native.mesh_exchange(mesh.fds, rank.rank, send, recv, out.ctypes.data, into.ctypes.data)
                for peer, part in enumerate(_parts(into, recv)):
                    assert (part == 16 * peer + rank.rank + 1).all()
            return True
        finally:
            mesh.close()


def _ranges(sizes: list[int]) -> np.ndarray[Any, Any]:
    return np.zeros(sum(model.align(size, 64) for size in sizes) + 64, np.uint8)


def _parts(buffer: np.ndarray[Any, Any], sizes: list[int]) -> list[np.ndarray[Any, Any]]:
    offsets = np.cumsum([0] + [model.align(size, 64) for size in sizes])
    return [buffer[offset : offset + size] for offset, size in zip(offsets, sizes, strict=False)]


def test_mesh_moves_the_right_bytes() -> None:
    assert run_job(MeshJob(), 4, threads=True) == [True] * 4


# ---- ranks -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FailingJob:
    how: str

    def run(self, rank: Rank) -> int:
        rank.gather(rank.rank)
        if rank.rank != 1 and self.how == "barrier":
            rank.barrier()
        if rank.rank == 1:
            if self.how in ("ours", "barrier"):
                raise ept.InvalidArgument("a wrong argument of rank 1")
            if self.how == "exit":
                import os

                os._exit(7)
            raise ZeroDivisionError("by rank 1")
        return len(rank.gather(None))  # the others wait for rank 1


@pytest.mark.parametrize("threads", [False, True])
def test_ranks_that_wait_at_a_barrier_hear_of_it(threads: bool) -> None:
    with pytest.raises(ept.InvalidArgument, match="rank 1"):
        run_job(FailingJob("barrier"), 3, threads=threads)


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("ours", ept.InvalidArgument, "a wrong argument of rank 1"),
        ("other", ept.InternalError, "by rank 1"),
        ("exit", ept.PeerLost, "rank 1 .* exit code 7"),
    ],
)
def test_a_rank_that_fails_ends_the_job(how: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run_job(FailingJob(how), 2)


# ---- point to point --------------------------------------------------------------------------------------------------


def check_p2p(result: p2p.P2pResult, kinds: list[str]) -> None:
    assert [measure.kind for measure in result.measures] == kinds
    for measure in result.measures:
        assert len(measure.ours.rounds) == len(measure.floor.rounds) == result.job.rounds
        assert min(measure.ours.p50, measure.ours.p99, measure.floor.p50, measure.ratio) > 0
        assert measure.wire_bytes == measure.bytes
        # One message a write, and a grant of credits for 64 that came; one may be left over from the turns before.
        writes = {
            "latency": result.job.iterations,
            "bandwidth": result.job.stream_bytes // measure.bytes,
            "rate": result.job.rate_writes * result.job.rounds,
        }[measure.kind]
        assert writes <= round(measure.messages * writes) <= writes + writes // 64 + 1
    assert len(result.regime_ns) == result.job.rounds + 1
    assert min(result.regime_ns) > 0
    assert json.loads(json.dumps(report.as_json(result)))["machine"]["cores"] >= 1


def test_p2p_over_tcp_counts_what_it_writes() -> None:
    job = p2p.P2pJob(
        latency_bytes=(8, 3000), bandwidth_bytes=(1 << 16,), iterations=200, stream_bytes=4 << 20, rounds=2
    )
    steps: list[int] = []
    result = p2p.run(job, steps.append)
    assert result.backend == "tcp"
    check_p2p(result, ["latency", "latency", "bandwidth"])
    assert steps == list(range(1, job.units + 1))


def test_p2p_over_loopback_has_a_rate_too() -> None:
    job = p2p.P2pJob(
        backend="loopback", latency_bytes=(8,), iterations=200, stream_bytes=8 << 20, rate_writes=5000, rounds=2
    )
    check_p2p(p2p.run(job), ["latency", "bandwidth", "rate"])


def test_p2p_has_a_picture(tmp_path: Path) -> None:
    job = p2p.P2pJob(latency_bytes=(8,), iterations=50, stream_bytes=4 << 20, rounds=1)
    report.p2p_picture(tmp_path / "p2p.png", p2p.run(job))
    assert (tmp_path / "p2p.png").read_bytes().startswith(b"\x89PNG")


def test_p2p_refuses_what_makes_no_pairs() -> None:
    with pytest.raises(ept.InvalidArgument, match="3 is odd"):
        p2p.run(p2p.P2pJob(ranks=3))


# ---- dispatch and combine --------------------------------------------------------------------------------------------


def check_moe(result: moe.MoeResult) -> None:
    job = result.job
    assert [side.name for side in result.sides] == list(job.sides)
    for side in result.sides:
        assert len(side.total.rounds) == job.rounds
        assert len(side.samples) == job.rounds * job.iterations
        assert min(side.samples) > 0
    floor, ours = result.sides[0], result.side("eptransport")
    assert floor.ratio == 1
    assert len(result.traffic) == job.shape.ranks
    for traffic in result.traffic:
        assert traffic.bytes == traffic.predicted_bytes
        # Grants of credits, one for 64 messages that came, are counted by the rails too.
        assert traffic.predicted_messages <= traffic.messages <= traffic.predicted_messages * 1.1
    # The floor moves the same bytes, no more and no less.
    assert floor.wire_bytes == ours.wire_bytes
    assert "bit for bit" in result.checked
    assert result.registered_bytes > 0
    assert json.loads(json.dumps(report.as_json(result)))["traffic"][0]["rows"] >= 0


@pytest.mark.parametrize("layout", ["contiguous", "masked", "rows", "by_rank"])
@pytest.mark.parametrize("dispatch_dtype", ["bf16", "fp8"])
def test_moe_over_loopback(layout: Any, dispatch_dtype: str) -> None:
    shape = dataclasses.replace(SMALL, dispatch_dtype=dispatch_dtype)
    check_moe(moe.run(moe.MoeJob(shape, backend="loopback", layout=layout, iterations=3, rounds=2)))


@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_moe_over_tcp_beside_gloo(skew: float, tmp_path: Path) -> None:
    shape = dataclasses.replace(SMALL, dispatch_dtype="fp8")
    job = moe.MoeJob(shape, skew=skew, against="gloo", iterations=3, rounds=2)
    steps: list[int] = []
    result = moe.run(job, steps.append)
    check_moe(result)
    assert "gloo's y" in result.checked
    assert steps == list(range(1, job.units + 1))
    # gloo sends a row for each expert, we one for each rank.
    assert result.side("gloo").wire_bytes > 0
    report.moe_picture(tmp_path / "moe.png", result)
    assert (tmp_path / "moe.png").read_bytes().startswith(b"\x89PNG")


def test_moe_on_one_rank() -> None:
    result = moe.run(moe.MoeJob(dataclasses.replace(SMALL, ranks=1), backend="loopback", iterations=2, rounds=1))
    assert result.traffic[0].bytes == result.traffic[0].predicted_bytes == 0


def test_a_wrong_bit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ept.AllToAll.combine

    def flips(self: ept.AllToAll, *arguments: Any, **named: Any) -> torch.Tensor:
        y = honest(self, *arguments, **named)
        y.view(torch.int16)[5, 7] ^= 1
        return y

    monkeypatch.setattr(ept.AllToAll, "combine", flips)
    with pytest.raises(ept.InternalError, match=r"1 of 13 tokens differ from the reference; token 5 .* at 7"):
        moe.run(moe.MoeJob(SMALL, backend="loopback", iterations=1, rounds=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 11}, "top-k is 11, but there are 10 experts"),
        ({"tokens": 0}, "tokens is 0"),
    ],
)
def test_moe_refuses_what_is_no_layer(change: dict[str, int], words: str) -> None:
    with pytest.raises(ept.InvalidArgument, match=words):
        moe.run(moe.MoeJob(dataclasses.replace(SMALL, **change), backend="loopback"))  # type: ignore[arg-type]


def test_gloo_needs_processes() -> None:
    with pytest.raises(ept.InvalidArgument, match="gloo needs a process a rank"):
        moe.run(moe.MoeJob(SMALL, backend="loopback", against="gloo"))
