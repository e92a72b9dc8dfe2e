# SPDX-License-Identifier: Apache-2.0
"""Over TCP on one machine, GPU tensors: a dispatch of 4 GPU ranks (EPT_INTRA=off) against gloo's all_to_all_single of
the same rows between 4 processes, with the copies to and from the host that gloo needs. In turn, in one call; the
slowest rank of each exchange, the median of them. Run by hand:

    python tests/gpu/against_gloo.py [--threads 0,2,4] [--cpu] [rows a peer ...]

`--threads`: EPT_TCP_THREADS, each of them in turn; `--cpu`: tensors of the host on both sides.

Ours are threads of one process: without MPS a GPU takes processes in turn, and a kernel of ours that waits for a peer
would keep that peer's from running."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import FileStore

import eptransport as ept

RANKS, HIDDEN, ROUNDS, TURNS = 4, 7168, 8, 3


def rows_of(rank: int, each: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(RANKS * each, HIDDEN, generator=generator).to(torch.bfloat16).to(device)


def gloo_rank(rank: int, folder: str, sizes: list[int], device: str, turns: Any, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=RANKS)
    for each in sizes:
        x = rows_of(rank, each, device)
        pinned = device == "cuda"
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True) if pinned else x
        back = torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned)
        for turn in range(TURNS):
            turns[rank].get()
            times = []
            for round_ in range(ROUNDS + 2):
                dist.barrier()
                if pinned:
                    torch.cuda.synchronize()
                began = time.perf_counter()
                if pinned:
                    host.copy_(x, non_blocking=True)
                    torch.cuda.synchronize()
                dist.all_to_all_single(back, host)
                y = back
                if pinned:
                    y = back.to("cuda", non_blocking=True)
                    torch.cuda.synchronize()
                if round_ >= 2:
                    times.append(time.perf_counter() - began)
            answers.put((each, turn, rank, times, float(y.float().sum())))
    dist.destroy_process_group()


class Ours:
    def __init__(self, folder: str, each: int, device: str, threads: str) -> None:
        self.each, self.device, self.tcp_threads = each, device, threads
        self.barrier = threading.Barrier(RANKS)
        self.groups: list[Any] = [None] * RANKS
        self.moes: list[Any] = [None] * RANKS
        self.streams: list[Any] = [torch.cuda.Stream("cuda") if device == "cuda" else None for _ in range(RANKS)]
        self.x = [rows_of(rank, each, device) for rank in range(RANKS)]
        # Row i goes to rank i // each, as all_to_all_single's do.
        self.ids = torch.arange(RANKS).repeat_interleave(each)[:, None].to(device)
        if device == "cuda":
            torch.cuda.synchronize()
        self.on_ranks(lambda rank: self.make(rank, folder))

    def on_ranks(self, run: Any) -> list[Any]:
        answers: list[Any] = [None] * RANKS

        def one(rank: int) -> None:
            with torch.cuda.stream(self.streams[rank]):  # None: nothing is done
                answers[rank] = run(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def make(self, rank: int, folder: str) -> None:
        store = FileStore(str(Path(folder) / f"ours{self.each}-{self.tcp_threads}"), RANKS)
        settings = ept.Settings(
            backend="tcp", intra="off", timeout_s=30.0, threads=1, options={"tcp.threads": self.tcp_threads}
        )
        self.groups[rank] = group = ept.Group(settings, store=store, rank=rank, world_size=RANKS)
        self.moes[rank] = ept.AllToAll(
            group,
            num_experts=RANKS,
            top_k=1,
            hidden=HIDDEN,
            max_tokens=RANKS * self.each,
            lanes=1,
            device=self.device,
        )

    def turn(self) -> list[tuple[list[float], float]]:
        def run(rank: int) -> tuple[list[float], float]:
            moe, stream, times = self.moes[rank], self.streams[rank], []
            for round_ in range(ROUNDS + 2):
                self.barrier.wait()
                began = time.perf_counter()
                got = moe.dispatch(self.x[rank], self.ids, layout="by_rank", max_rows=self.each)
                if stream:
                    stream.synchronize()
                if round_ >= 2:
                    times.append(time.perf_counter() - began)
                moe.combine(got.x, got)  # the step's other half, not timed
                if stream:
                    stream.synchronize()
            moe.check()
            return times, float(got.x.float().sum())

        return self.on_ranks(run)


def main(sizes: list[int], device: str, threads: list[str]) -> None:
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        turns = [context.Queue() for _ in range(RANKS)]
        answers = context.Queue()
        children = [
            context.Process(target=gloo_rank, args=(rank, folder, sizes, device, turns, answers), daemon=True)
            for rank in range(RANKS)
        ]
        for child in children:
            child.start()
        for each in sizes:
            ours = [Ours(folder, each, device, of_each) for of_each in threads]
            for turn in range(TURNS):
                mine = [some.turn() for some in ours]
                for queue in turns:
                    queue.put(turn)
                theirs = sorted((answers.get(timeout=120) for _ in range(RANKS)), key=lambda answer: answer[2])
                gloo = 1e3 * statistics.median(max(times) for times in zip(*(a[3] for a in theirs), strict=True))
                mib = each * HIDDEN * 2 / (1 << 20)
                line = []
                for some, answer in zip(ours, mine, strict=True):
                    assert [round(sum_, 1) for _, sum_ in answer] == [round(other[4], 1) for other in theirs]
                    ms = 1e3 * statistics.median(max(times) for times in zip(*(t for t, _ in answer), strict=True))
                    line.append(f"threads {some.tcp_threads}: {ms:.2f} ms, {gloo / ms:.2f} times")
                print(f"{mib:.1f} MiB a pair: gloo {gloo:.2f} ms; {'; '.join(line)}", flush=True)
            for some in ours:
                some.on_ranks(lambda rank, some=some: some.groups[rank].close())
        for child in children:
            child.join(20)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", default="0,4")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("rows", nargs="*", type=int, default=[16, 128, 1024])
    given = parser.parse_args()
    main(given.rows, "cpu" if given.cpu else "cuda", given.threads.split(","))
