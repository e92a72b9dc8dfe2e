# SPDX-License-Identifier: Apache-2.0
"""A step whose messages are puts over NVSHMEM beside one whose rows are stored into peers' mapped memory, on the same
inputs, in turn, in one call: processes on one GPU, under MPS. Each half is a captured graph, timed as `eptransport
bench moe --device cuda` does (bench/gpu.py), the slowest rank of each iteration. Run by hand, under MPS:

    python tests/gpu/nvshmem_against_mapped.py [ranks] [blocks] [experts] [tokens]

Prints microseconds, and for each half what the staging costs at least: the bytes that are packed and read once more."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from typing import Any

from eptransport import Settings
from eptransport.bench import gpu
from eptransport.bench.ranks import Rank, run_job
from eptransport.bench.shapes import Shape

ITERATIONS = 30


@dataclass(frozen=True)
class Pair:
    """Of each rank: [path][half or whole step][iteration] in us, what its puts were, and bytes."""

    job: gpu.GpuMoeJob

    def run(self, rank: Rank) -> Any:
        import torch

        torch.set_num_threads(2)
        blocks = self.job.blocks
        near = Settings(backend="tcp", gpu_blocks=blocks)
        puts = Settings(
            backend="nvshmem", gpu_blocks=blocks, intra="off", gpu_path="gpu", options={"nvshmem.heap_mib": "512"}
        )
        with rank.group(near) as mapped, rank.group(puts) as by_puts:
            steps = [gpu._Step(self.job, group, rank) for group in (mapped, by_puts)]
            checked = []
            for step in steps:
                with torch.cuda.stream(step.stream):
                    checked.append(step.check())
                    rank.barrier()
                    step.capture()
                rank.barrier()
            copied = steps[0].copy_speed(steps[0].device) if rank.rank == 0 else 0.0
            rank.barrier()
            times: list[list[list[float]]] = [[[] for _ in range(6)] for _ in steps]
            for turn in range(ITERATIONS + 2):
                for path, step in enumerate(steps):
                    row = [step.time(rank, graph) for graph in step.graphs]
                    row += [step.time(rank, step.steps) / gpu.STEPS, step.time(rank, step.tiny)]
                    for into, time in zip(times[path], row, strict=True):
                        if turn >= 2:
                            into.append(time)
            sent = sum(rank.gather(self.job.shape.rows(steps[0].given[1]))[rank.rank])
            received = sum(row[rank.rank] for row in rank.gather(self.job.shape.rows(steps[0].given[1])))
            native: Any = steps[1].moe._native
            counted = native.arena.puts(), sum(steps[1].moe.stats().messages)
            for step in steps:
                step.moe.check()
                step.close()
            return times, checked, counted, copied, (sent, received)


def main(ranks: int = 8, blocks: int = 16, experts: int = 128, tokens: int = 128) -> None:
    shape = Shape(ranks=ranks, tokens=tokens, hidden=7168, experts=experts, top_k=8, dtype="bf16",
                  dispatch_dtype="fp8", combine_dtype="bf16")  # fmt: skip
    job = gpu.GpuMoeJob(shape=shape, backend="tcp", layout="masked", blocks=blocks, iterations=ITERATIONS)
    answers = run_job(Pair(job), ranks)
    for said in answers[0][1]:
        print(said)
    for rank, answer in enumerate(answers):
        assert answer[2][0] == answer[2][1] > 0, (rank, answer[2])
    counted = answers[0][2]
    print(f"{ranks} ranks x {blocks} blocks, {tokens} tokens: {counted[0]} puts of {counted[1]} messages, rank 0")
    copied = answers[0][3]
    others = (ranks - 1) / ranks
    # Written into the heap's staging, then read from there: bytes that the mapped path has not.
    staged = [2 * others * sum(answer[4][0] for answer in answers) * shape.dispatch_row / copied / 1e3, 0.0,
              2 * others * sum(answer[4][1] for answer in answers) * shape.combine_row / copied / 1e3, 0.0]  # fmt: skip
    names = [*gpu.HALVES, "whole step", "launch"]

    def median(path: int, of: list[int]) -> float:
        return statistics.median(
            max(sum(answer[0][path][half][i] for half in of) for answer in answers) for i in range(ITERATIONS)
        )

    for half, name in enumerate(names):
        print(f"{name:14} mapped {median(0, [half]):7.1f}   puts {median(1, [half]):7.1f}")
    for name, of in (("dispatch", [0, 1]), ("combine", [2, 3])):
        floor, a, b = staged[of[0]], median(0, of), median(1, of)
        ratio = b / (a + floor)
        print(f"{name:14} mapped {a:7.1f}   puts {b:7.1f}   staging's floor {floor:.1f}   ratio to both {ratio:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
