"""What samples become: percentiles of the slowest rank, medians over rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread", "percentile", "slowest", "spread"]


@dataclass(frozen=True)
class Spread:
    """`p50`: the median over rounds of each round's median. `p99`: over the samples of all rounds."""

    p50: float
    p99: float
    rounds: tuple[float, ...]
    """Each round's median."""


def slowest(by_rank: Sequence[Sequence[float]]) -> list[float]:
    """Of each iteration the rank that took longest: what the model waits for. Samples of ranks are never pooled."""
    return [max(samples) for samples in zip(*by_rank, strict=True)]


def spread(rounds: Sequence[Sequence[float]]) -> Spread:
    medians = tuple(statistics.median(samples) for samples in rounds)
    return Spread(statistics.median(medians), percentile([s for samples in rounds for s in samples], 99), medians)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least `percent` of all are not above."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
