"""What the counters cost: the price of each record, the records of a step, and the step, all measured in one call.

The records of a step are those that the step itself has left on the page, so nothing is forgotten that the page has;
reading it and `eptransport top` cost the ranks nothing.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

import eptransport as ept
from eptransport.bench.native import RECORDS, record_costs
from eptransport.metrics import Metrics

__all__ = ["SeeingJob", "SeeingResult", "measure", "table"]

PRICED = 2_000_000
"""Records of each kind that are timed: some 50 ms."""
WARM_UP = 3


@dataclass(frozen=True)
class SeeingJob:
    ranks: int = 2
    backend: str = "loopback"
    tokens: int = 128
    hidden: int = 7168
    iterations: int = 20
    rounds: int = 5
    experts: int = 32
    top_k: int = 8


@dataclass(frozen=True)
class SeeingResult:
    """Medians of the rounds."""

    job: SeeingJob
    ns: dict[str, float]
    """Of one record of each kind."""
    records: dict[str, float]
    """Of one step, on the rank that makes most."""
    step_s: float

    @property
    def cost_s(self) -> float:
        return sum(self.ns[kind] * self.records[kind] for kind in RECORDS) / 1e9

    @property
    def ratio(self) -> float:
        return self.cost_s / self.step_s

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "cost_s": self.cost_s, "ratio": self.ratio}


def measure(job: SeeingJob) -> SeeingResult:
    import torch

    groups = ept.loopback_groups(job.ranks, ept.Settings(backend=job.backend))

    def run(group: ept.Group) -> list[tuple[float, dict[str, float]]]:
        generator = torch.Generator().manual_seed(group.rank)
        moe = ept.AllToAll(group, num_experts=job.experts, top_k=job.top_k, hidden=job.hidden, max_tokens=job.tokens)
        x = torch.randn(job.tokens, job.hidden, generator=generator).bfloat16()
        scores = torch.rand(job.tokens, job.experts, generator=generator)
        ids, weights = scores.topk(job.top_k).indices, torch.ones(job.tokens, job.top_k)
        found = []
        for index in range(job.rounds + 1):
            steps = WARM_UP if index == 0 else job.iterations
            before, begin = group.metrics(), time.perf_counter()
            for _ in range(steps):
                got = moe.dispatch(x, ids, weights)
                moe.combine(got.x, got)
            seconds = (time.perf_counter() - begin) / steps
            made, had = _records(group.metrics()), _records(before)
            found.append((seconds, {kind: (made[kind] - had[kind]) / steps for kind in RECORDS}))
        return found[1:]

    try:
        by_rank = ept.loopback_run(groups, run)
    finally:
        for group in groups:
            group.close()
    costs = [record_costs(PRICED) for _ in range(job.rounds)]
    rounds = [(max(one[0] for one in ranks), [one[1] for one in ranks]) for ranks in zip(*by_rank, strict=True)]
    return SeeingResult(
        job,
        {kind: statistics.median(cost[kind] for cost in costs) for kind in RECORDS},
        {kind: statistics.median(max(rank[kind] for rank in ranks) for _, ranks in rounds) for kind in RECORDS},
        statistics.median(seconds for seconds, _ in rounds),
    )


def _records(seen: Metrics) -> dict[str, int]:
    """What has been recorded so far, by kind."""
    phases = [phase for peer in seen.peers for phase in peer.phases]
    return {
        "post": sum(peer.tx_operations + peer.tx_sends for peer in seen.peers),
        "completion": sum(peer.completions.count for peer in seen.peers),
        "receive": sum(peer.rx_operations + peer.rx_sends for peer in seen.peers),
        "message": sum(phase.tx_messages + phase.rx_messages + phase.tx_grants + phase.tx_acks for phase in phases),
        "arrival": sum(phase.arrivals.count for phase in phases),
        "wait": sum(phase.waits.count for phase in phases),
    }


def table(result: SeeingResult) -> Table:
    job = result.job
    made = Table(
        title=f"seeing: {job.ranks} ranks over {job.backend}, {job.tokens} tokens of {job.hidden}", title_justify="left"
    )
    made.add_column("record")
    for name in ("ns each", "a step", "us a step"):
        made.add_column(name, justify="right")
    for kind in RECORDS:
        cost = result.ns[kind] * result.records[kind] / 1e3
        made.add_row(kind, f"{result.ns[kind]:.1f}", f"{result.records[kind]:.1f}", f"{cost:.3f}")
    made.add_section()
    made.add_row("all", "", f"{sum(result.records.values()):.1f}", f"{result.cost_s * 1e6:.3f}")
    made.add_row("step", "", "", f"{result.step_s * 1e6:,.0f}")
    made.add_row("share", "", "", f"{result.ratio:.3%}")
    return made
