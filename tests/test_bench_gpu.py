"""What the figures of ranks on GPUs are made of; measuring itself needs a GPU (tests/gpu/run bench)."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from eptransport.bench import gpu, mps, report
from eptransport.bench.nccl import MOVES
from eptransport.bench.shapes import Shape
from eptransport.cli import app

SHAPE = Shape(ranks=3, tokens=5, hidden=256, experts=6, top_k=2, dispatch_dtype="fp8")


def rank(
    scale: float, half_bytes: tuple[int, ...], link_bytes: tuple[int, ...], gpus: int, shared: bool = False
) -> gpu.GpuRank:
    return gpu.GpuRank(
        gpu="a card",
        gpus=gpus,
        multiprocessors=132,
        shared=shared,
        blocks=16,
        copy_gb_per_s=4000.0,
        link_gb_per_s=400.0 if gpus > 1 else 0.0,
        launch=[[scale]],
        halves=[[[10 * scale, 30 * scale]], [[20.0, 20.0]], [[1.0, 1.0]], [[2.0, 2.0]]],
        together=[[50 * scale, 50.0]],
        nccl=[[[7 * scale, 7.0]], [[8.0, 9 * scale]]],
        bytes=half_bytes,
        link_bytes=link_bytes,
        checked="yes",
    )


def test_an_iteration_takes_as_long_as_its_slowest_rank() -> None:
    job = gpu.GpuMoeJob(dataclasses.replace(SHAPE, ranks=2))
    same = (4_000_000,) * 4
    result = gpu.combine_ranks(job, [rank(1.0, same, (0,) * 4, 1), rank(0.5, same, (0,) * 4, 1)])
    assert result.phases[0].time.p50 == 20.0
    assert result.dispatch.p50 == 40.0
    assert result.combine.p50 == 3.0
    assert result.nccl == ()


def test_the_floor_is_that_of_the_gpu_with_the_most_bytes_or_of_the_link() -> None:
    """Ranks 0 and 2 are on one GPU, rank 1 on the other."""
    job = gpu.GpuMoeJob(SHAPE, against="nccl")
    link = (0, 0, 800_000, 0)
    ranks = [
        rank(1.0, (4_000_000, 0, 4_000_000, 4_000), link, 2),
        rank(1.0, (5_000_000, 8_000_000, 4_000_000, 4_000), link, 2),
        rank(1.0, (2_000_000, 4_000_000, 4_000_000, 4_000), link, 2),
    ]
    result = gpu.combine_ranks(job, ranks)
    assert [phase.floor_us for phase in result.phases] == pytest.approx([1.5, 2.0, 4.0, 0.002])
    assert [phase.bytes for phase in result.phases] == [11_000_000, 12_000_000, 12_000_000, 12_000]
    assert result.phase("combine send").link_bytes == 2_400_000
    assert [name for name, _ in result.nccl] == list(MOVES)
    assert [time.p50 for _, time in result.nccl] == [7.0, 8.5]
    assert report.as_json(result)["phases"][2]["link_bytes"] == 2_400_000
    assert report.gpu_table(result) is not None


def test_one_gpu_has_no_link() -> None:
    ranks = [rank(1.0, (4_000_000,) * 4, (0,) * 4, 1) for _ in range(3)]
    result = gpu.combine_ranks(gpu.GpuMoeJob(SHAPE), ranks)
    assert [phase.floor_us for phase in result.phases] == pytest.approx([3.0] * 4)


def test_ranks_with_shares_of_a_gpu_copy_together() -> None:
    """The floor is by what all their copies at once move: three of 4,000 GB/s."""
    ranks = [rank(1.0, (4_000_000,) * 4, (0,) * 4, 1, shared=True) for _ in range(3)]
    result = gpu.combine_ranks(gpu.GpuMoeJob(SHAPE), ranks)
    assert result.copy_gb_per_s == 12_000
    assert [phase.floor_us for phase in result.phases] == pytest.approx([1.0] * 4)
    assert report.gpu_table(result) is not None


def test_processes_get_equal_shares_where_mps_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(mps.SHARE, raising=False)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    with mps.shares(8):
        assert mps.SHARE not in os.environ, "no daemon"
    daemon = tmp_path / "nvidia-cuda-mps-control.pid"
    daemon.write_text(f"{os.getpid()}\n")
    with mps.shares(8):
        assert float(os.environ[mps.SHARE]) == 12.5
        assert mps.has_share()
    assert mps.SHARE not in os.environ
    with mps.shares(1):
        assert mps.SHARE not in os.environ, "a process alone has the GPU"
    monkeypatch.setenv(mps.SHARE, "20")
    with mps.shares(8):
        assert os.environ[mps.SHARE] == "20", "the caller's stays"
    daemon.write_text("not a number")
    assert not mps.has_share()


def test_bytes_of_the_halves() -> None:
    """fp8 rows of 256 with two scales, two ids and two weights: 304 bytes; bf16 back: 512."""
    assert (SHAPE.dispatch_row, SHAPE.combine_row) == (304, 512)
    x = 5 * 256 * 2
    assert gpu.half_bytes(SHAPE, "masked", 5, 8, 7, 9) == (
        x + 5 * 304,
        7 * 304 + 9 * (256 + 2 * 4),
        9 * 512 + 7 * 512,
        8 * 512 + x,
    )
    assert gpu.half_link_bytes(SHAPE, 4, 3) == (4 * 304, 0, 3 * 512, 0)


def test_rows_that_a_dispatch_stores() -> None:
    """Four ranks with two experts each: a token's row is stored once for all who read it where it stands."""
    shape = dataclasses.replace(SHAPE, ranks=4, experts=8, top_k=2)
    ids = torch.tensor([[0, 2], [2, 4], [4, 6], [6, 7]])
    sent = shape.rows(ids)
    assert sent == [1, 2, 2, 2]
    assert gpu._stored(shape, ids, sent, range(4)) == 4
    assert gpu._stored(shape, ids, sent, [0, 1]) == 2 + 2 + 2
    assert gpu._stored(shape, ids, sent, [0]) == 7


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--device", "cuda", "--against", "gloo"], "--against gloo"),
        (["--against", "nccl"], "--against nccl"),
        (["--blocks", "4"], "--blocks"),
        (["--launch", "plain"], "--launch"),
        (["--device", "cuda", "--backend", "loopback", "--against", "nccl"], "process a rank"),
    ],
)
def test_what_does_not_go_together_is_refused(given: list[str], says: str) -> None:
    answer = CliRunner().invoke(app, ["bench", "moe", "--ranks", "2", *given])
    said = answer.output + str(answer.exception)
    assert answer.exit_code != 0
    assert says in said, said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_so(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["bench", "moe", "--device", "cuda", "--json", str(tmp_path / "out.json")])
    assert answer.exit_code != 0
    assert "sees no CUDA device" in answer.output + str(answer.exception)
    assert not (tmp_path / "out.json").exists()
