"""`eptransport bench moe`: dispatch and combine of one layer, beside gloo's way and beside a bare mesh of sockets.

All sides run in the same processes on the same inputs, in turn: each round runs every side for a number of
iterations. Ranks meet before each half, so that a half's time is the exchange alone; an iteration takes as long as its
slowest rank. The experts' own work is outside the clock: what they would return is made before.

    eptransport   AllToAll.dispatch and combine, outputs allocated before
    gloo          all_to_all_single of the counts, of the rows (one a token and expert), of the results; then weighed.
                  Where the layout groups rows by expert, it groups what came and ungroups what goes back
    floor         the bytes that eptransport must send (a row a token and rank), over bare sockets or as bare copies
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from eptransport.bench import native
from eptransport.bench.figures import Spread, percentile, slowest, spread
from eptransport.bench.p2p import PROBE_PERCENT, PROBE_TURNS, sent
from eptransport.bench.ranks import Mesh, Rank, run_job
from eptransport.bench.shapes import Shape, routing, tokens
from eptransport.errors import InternalError, InvalidArgument

if TYPE_CHECKING:
    import torch

    from eptransport import Group
    from eptransport.all_to_all import Layout

__all__ = ["MoeJob", "MoeResult", "SideResult", "Traffic", "measure", "run"]

SEED = 20


@dataclass(frozen=True)
class MoeJob:
    shape: Shape
    backend: str = "tcp"
    layout: Layout = "contiguous"
    skew: float = 0.0
    against: str | None = None
    """`gloo`, or None."""
    iterations: int = 20
    """A side, a round."""
    rounds: int = 5
    seed: int = SEED
    options: dict[str, Any] = field(default_factory=dict)
    """Settings, beside those of the environment."""

    @property
    def threads(self) -> bool:
        return self.backend == "loopback"

    @property
    def sides(self) -> tuple[str, ...]:
        floor = "copies" if self.threads else "bare TCP mesh"
        return (floor, "eptransport", self.against) if self.against else (floor, "eptransport")

    @property
    def units(self) -> int:
        """Of the progress bar."""
        return self.rounds * len(self.sides)

    def run(self, rank: Rank) -> RankResult:
        from eptransport import Settings

        group = rank.group(Settings(backend=self.backend, **self.options))
        with group:
            return measure(self, rank, group)


@dataclass(frozen=True)
class Traffic:
    """What one rank sends to others in one iteration."""

    bytes: int
    predicted_bytes: int
    messages: float
    """As the rails counted, grants of credits among them."""
    predicted_messages: int
    """One to every other rank in each half."""
    rows: int


@dataclass(frozen=True)
class SideResult:
    """One way to do the exchange. Times in ms, of the slowest rank of each iteration."""

    name: str
    total: Spread
    dispatch: Spread
    combine: Spread
    cores: float
    """CPU time of all ranks to wall time."""
    cpu_ms: float
    """CPU time of all ranks for one iteration: unlike the rest it changes little when others use the machine."""
    wire_bytes: float
    """A rank, an iteration: the mean over ranks."""
    messages: float
    ratio: float
    """Its time to the floor's: the median of the rounds' ratios."""
    note: str = ""
    samples: tuple[float, ...] = field(default=(), repr=False)
    """Of `total`, all rounds."""


@dataclass(frozen=True)
class MoeResult:
    job: MoeJob
    backend: str
    regime_ns: tuple[float, ...]
    """One way between two cores through shared memory: before, and after each round."""
    checked: str
    """What was compared before the clock started."""
    sides: tuple[SideResult, ...]
    traffic: tuple[Traffic, ...]
    """By rank."""
    registered_bytes: int
    """Of one rank, for two slots of one lane."""

    def side(self, name: str) -> SideResult:
        return next(side for side in self.sides if side.name == name)


def run(job: MoeJob, progress: Callable[[int], None] | None = None) -> MoeResult:
    """Starts the ranks, measures, and ends them. Not collective: they are its own."""
    check(job)
    return combine_ranks(job, run_job(job, job.shape.ranks, threads=job.threads, progress=progress))


def check(job: MoeJob) -> None:
    job.shape.check()
    if min(job.iterations, job.rounds) < 1:
        raise InvalidArgument("iterations and rounds must be at least 1")
    if job.against and job.threads:
        raise InvalidArgument("gloo needs a process a rank, and loopback's ranks are threads; bench another backend")


def combine_ranks(job: MoeJob, ranks: Sequence[RankResult]) -> MoeResult:
    """What the ranks measured, as one result."""
    floor_rounds = _totals(ranks, job.sides[0])
    sides = []
    for name in job.sides:
        runs = [rank.sides[name] for rank in ranks]
        totals = _totals(ranks, name)
        total = spread(totals)
        floor = spread(floor_rounds)
        sides.append(
            SideResult(
                name=name,
                total=total,
                dispatch=spread(_by_round([run.dispatch for run in runs])),
                combine=spread(_by_round([run.combine for run in runs])),
                cores=sum(run.cpu for run in runs) / max(run.wall for run in runs),
                cpu_ms=sum(run.cpu for run in runs) / (job.rounds * job.iterations) * 1e3,
                wire_bytes=statistics.fmean(run.wire_bytes for run in runs),
                messages=statistics.fmean(run.messages for run in runs),
                ratio=statistics.median(a / b for a, b in zip(total.rounds, floor.rounds, strict=True)),
                note=runs[0].note,
                samples=tuple(sample for samples in totals for sample in samples),
            )
        )
    return MoeResult(
        job=job,
        backend=ranks[0].backend,
        regime_ns=tuple(ranks[0].regime_ns),
        checked=ranks[0].checked,
        sides=tuple(sides),
        traffic=tuple(rank.traffic for rank in ranks),
        registered_bytes=ranks[0].registered_bytes,
    )


@dataclass
class SideRun:
    """One side as one rank saw it: ms, a list a round."""

    dispatch: list[list[float]] = field(default_factory=list)
    combine: list[list[float]] = field(default_factory=list)
    cpu: float = 0.0
    wall: float = 0.0
    wire_bytes: float = 0.0
    messages: float = 0.0
    note: str = ""


@dataclass
class RankResult:
    backend: str
    regime_ns: list[float]
    checked: str
    sides: dict[str, SideRun]
    traffic: Traffic
    registered_bytes: int


def _by_round(by_rank: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """[rank][round][iteration] to [round][iteration], the slowest rank's."""
    return [slowest(samples) for samples in zip(*by_rank, strict=True)]


def _totals(ranks: Sequence[RankResult], name: str) -> list[list[float]]:
    """[round][iteration]: the rank for which both halves together took longest."""
    both = []
    for rank in ranks:
        run = rank.sides[name]
        both.append(
            [
                [d + c for d, c in zip(dispatch, combine, strict=True)]
                for dispatch, combine in zip(run.dispatch, run.combine, strict=True)
            ]
        )
    return _by_round(both)


def measure(job: MoeJob, rank: Rank, group: Group) -> RankResult:
    """Collective over the job's ranks: checks, then measures. The group stays open."""
    import torch

    torch.set_num_threads(rank.cores)
    layer = _Layer.make(job, rank)
    mesh = None if job.threads else Mesh(rank)
    ours = _Ours(job, layer, rank, group)
    sides: dict[str, _Side] = {job.sides[0]: _Floor(layer, rank, mesh), "eptransport": ours}
    if job.against:
        sides[job.against] = _Gloo(job, layer, rank)
    checked = [side.check() for side in sides.values()]
    runs = {name: SideRun(note=side.note) for name, side in sides.items()}
    regime = [probe(rank)]
    done = 0
    for _ in range(job.rounds):
        for name, side in sides.items():
            _turn(job, rank, side, runs[name])
            done += 1
            rank.progress(done)
        regime.append(probe(rank))
    for side in sides.values():
        side.close()
    rank.barrier()
    if mesh is not None:
        mesh.close()
    return RankResult(
        backend=group.backend,
        regime_ns=regime,
        checked="; ".join(line for line in checked if line),
        sides=runs,
        traffic=Traffic(
            bytes=round(runs["eptransport"].wire_bytes),
            predicted_bytes=layer.cost.bytes,
            messages=runs["eptransport"].messages,
            predicted_messages=layer.cost.messages,
            rows=sum(rows for r, rows in enumerate(layer.rows[rank.rank]) if r != rank.rank),
        ),
        registered_bytes=ours.registered_bytes,
    )


def probe(rank: Rank) -> float:
    """The speed of the cores, by ranks 0 and 1 while the others wait."""
    rank.barrier()
    samples: Sequence[float] = (0.0,)
    if rank.rank < 2 and rank.world > 1:
        samples = native.atomics_pingpong(rank.shared, rank.rank, PROBE_TURNS)
    rank.barrier()
    return percentile(samples, PROBE_PERCENT)


def _turn(job: MoeJob, rank: Rank, side: _Side, run: SideRun) -> None:
    """One round of one side, after two iterations that nobody counts."""
    for _ in range(2):
        rank.barrier()
        side.dispatch()
        side.combine()
    dispatch, combine = [], []
    rank.barrier()
    before = side.sent()
    cpu, wall = rank.cpu_seconds(), time.monotonic()
    for _ in range(job.iterations):
        rank.barrier()
        start = time.perf_counter_ns()
        side.dispatch()
        middle = time.perf_counter_ns()
        rank.barrier()
        again = time.perf_counter_ns()
        side.combine()
        end = time.perf_counter_ns()
        dispatch.append((middle - start) / 1e6)
        combine.append((end - again) / 1e6)
    rank.barrier()
    run.cpu += rank.cpu_seconds() - cpu
    run.wall += time.monotonic() - wall
    after = side.sent()
    run.messages = (after[0] - before[0]) / job.iterations
    run.wire_bytes = (after[1] - before[1]) / job.iterations
    run.dispatch.append(dispatch)
    run.combine.append(combine)


# ---- the inputs, alike for all sides ---------------------------------------------------------------------------------


@dataclass
class _Layer:
    shape: Shape
    rank: int
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    rows: list[list[int]]
    """[source][rank]: rows that source sends there."""

    @classmethod
    def make(cls, job: MoeJob, rank: Rank) -> _Layer:
        ids, weights = routing(job.shape, rank.rank, job.skew, job.seed)
        rows = rank.gather(job.shape.rows(ids))
        return cls(job.shape, rank.rank, tokens(job.shape, rank.rank, job.seed), ids, weights, rows)

    def __post_init__(self) -> None:
        self.cost = self.shape.cost(self.rank, self.rows)


class _Side(Protocol):
    note: str

    def check(self) -> str:
        """Compares with the reference; says what it compared. InternalError where it differs."""

    def dispatch(self) -> None: ...

    def combine(self) -> None: ...

    def sent(self) -> tuple[int, int]:
        """Messages and bytes to other ranks so far."""

    def close(self) -> None: ...


# ---- eptransport -----------------------------------------------------------------------------------------------------


class _Ours:
    note = ""

    def __init__(self, job: MoeJob, layer: _Layer, rank: Rank, group: Group) -> None:
        import torch

        from eptransport import AllToAll

        shape = layer.shape
        self.job, self.layer, self.rank, self.group = job, layer, rank, group
        self.moe = AllToAll(
            group,
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden=shape.hidden,
            max_tokens=shape.tokens,
            dtype=shape.torch_dtype(shape.dtype),
            dispatch_dtype=shape.torch_dtype(shape.dispatch_dtype),
            combine_dtype=shape.torch_dtype(shape.combine_dtype),
            layout=job.layout,
            lanes=1,
        )
        self.got = self.moe.dispatch(layer.x, layer.ids, layer.weights)
        self.y = torch.empty_like(layer.x)
        self.expert_out = torch.empty(0)

    @property
    def registered_bytes(self) -> int:
        return int(self.group.engine.info().registered_bytes)

    def check(self) -> str:
        import torch

        from eptransport.bench import reference

        layer, shape = self.layer, self.layer.shape
        self.expert_out = reference.serve_experts(shape, self.rank.rank, self.job.layout, self.got)
        self.moe.combine(self.expert_out, self.got, out=self.y)
        expected = reference.expected(shape, layer.x, layer.ids, layer.weights)
        wrong = (self.y != expected).any(dim=1).nonzero().flatten()
        if len(wrong):
            token = int(wrong[0])
            column = int((self.y[token] != expected[token]).nonzero()[0])
            raise InternalError(
                f"rank {self.rank.rank}: {len(wrong)} of {shape.tokens} tokens differ from the reference; token "
                f"{token} has {float(self.y[token, column])} at {column}, not {float(expected[token, column])}",
                operation="bench",
            )
        assert torch.isfinite(self.y).all()
        return f"eptransport's y of {shape.tokens} tokens a rank: bit for bit the plain torch reference"

    def dispatch(self) -> None:
        self.got = self.moe.dispatch(self.layer.x, self.layer.ids, self.layer.weights, out=self.got)

    def combine(self) -> None:
        self.moe.combine(self.expert_out, self.got, out=self.y)

    def sent(self) -> tuple[int, int]:
        return sent(self.group)

    def close(self) -> None:
        self.moe.close()


# ---- the floor -------------------------------------------------------------------------------------------------------


class _Floor:
    """The same bytes with nothing around them: no routing, no packing, no weights."""

    def __init__(self, layer: _Layer, rank: Rank, mesh: Mesh | None) -> None:
        import torch

        self.rank = rank.rank
        self.fds = None if mesh is None else mesh.fds
        self.note = ""
        costs = [layer.shape.cost(r, layer.rows) for r in range(layer.shape.ranks)]
        self.halves = [
            (costs[self.rank].dispatch_bytes, [cost.dispatch_bytes[self.rank] for cost in costs]),
            (costs[self.rank].combine_bytes, [cost.combine_bytes[self.rank] for cost in costs]),
        ]
        most = max(sum(size + 64 for size in sizes) for half in self.halves for sizes in half)
        self.source = torch.randint(1, 255, (most,), dtype=torch.uint8)
        self.destination = torch.zeros(most, dtype=torch.uint8)
        self.messages = self.bytes = 0

    def check(self) -> str:
        return ""

    def dispatch(self) -> None:
        self._half(0)

    def combine(self) -> None:
        self._half(1)

    def _half(self, half: int) -> None:
        send, recv = self.halves[half]
        if self.fds is None:
            native.copy_ranges(self.destination.data_ptr(), self.source.data_ptr(), send)
        else:
            native.mesh_exchange(self.fds, self.rank, send, recv, self.source.data_ptr(), self.destination.data_ptr())
        self.messages += len(send) - 1
        self.bytes += sum(send)

    def sent(self) -> tuple[int, int]:
        return self.messages, self.bytes

    def close(self) -> None: ...


# ---- gloo ------------------------------------------------------------------------------------------------------------


class _Gloo:
    """The usual exchange with torch.distributed alone: a row for each of a token's experts, sorted by expert.

    Rows come by rank, and by expert within a rank. For the layouts in which an expert's rows lie together they are
    brought into that order, as the experts need them, and what the experts return is brought back into the other.
    Everything that can be is allocated before; the last step, weighing, is done in the way that is fastest here.
    """

    def __init__(self, job: MoeJob, layer: _Layer, rank: Rank) -> None:
        import torch
        from torch import distributed
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        shape = layer.shape
        self.layer, self.rank = layer, rank
        distributed.init_process_group(
            "gloo", store=PrefixStore("gloo", rank.store()), rank=rank.rank, world_size=rank.world
        )
        self.experts = [shape.experts_of(r) for r in range(shape.ranks)]
        self.held = [len(held) for held in self.experts]
        pairs = shape.tokens * shape.top_k
        if shape.dispatch_dtype == "fp8":
            self.wire = torch.uint8
            columns = shape.hidden + 4 * shape.scale_blocks
        else:
            self.wire = shape.torch_dtype(shape.dispatch_dtype)
            columns = shape.hidden
        combine = shape.torch_dtype(shape.combine_dtype)
        self.send = torch.empty(pairs, columns, dtype=self.wire)
        self.back = torch.empty(pairs, shape.hidden, dtype=combine)
        self.y = torch.empty_like(layer.x)
        self.counts = torch.empty(self.held[rank.rank] * shape.ranks, dtype=torch.int64)
        self.messages = self.bytes = 0
        self.weights = layer.weights.to(layer.x.dtype)
        self.groups = job.layout in ("contiguous", "masked")
        # The first exchange tells how many rows come here; then the buffers for them can be made.
        self.recv = self.grouped = torch.empty(0, columns, dtype=self.wire)
        self.dispatch()
        self.expert_out = self.returned = torch.empty(0)
        self.note = ""
        self._weigh: Callable[[], None] = self._weigh_bmm

    def check(self) -> str:
        """Against the sum in fp32. bf16 rounds a product or a sum by at most 2 ** -8 of it, fp16 by 2 ** -11; each of
        the k products is rounded twice at most (the expert's row back, the product), each of the k sums once."""
        import torch

        from eptransport.bench import reference

        layer, shape = self.layer, self.layer.shape
        dtype = shape.torch_dtype(shape.dtype)
        received = self._received(dtype)
        experts = self._expert_of_row()
        factors = reference.expert_factors(experts[self.by_expert] if self.groups else experts)
        self.expert_out = (received.float() * factors[:, None]).to(self.back.dtype)
        self.returned = torch.empty_like(self.expert_out)
        self._choose_weighing()
        self.combine()
        seen = reference.dequantise(*reference.quantise(layer.x), dtype) if shape.dispatch_dtype == "fp8" else layer.x
        each = layer.weights * reference.expert_factors(layer.ids)
        expected = seen.float() * each.sum(dim=1, keepdim=True)
        epsilon = max(torch.finfo(dtype).eps, torch.finfo(self.back.dtype).eps)
        bound = (shape.top_k + 2) * epsilon * seen.float().abs() * each.sum(dim=1, keepdim=True)
        if not ((self.y.float() - expected).abs() <= bound).all():
            raise InternalError(f"rank {self.rank.rank}: gloo's y is wrong", operation="bench")
        return "gloo's y: within rounding of the sum in fp32"

    def dispatch(self) -> None:
        import torch
        from torch.distributed import all_to_all_single

        layer, shape = self.layer, self.layer.shape
        flat = layer.ids.view(-1)
        self.order = torch.argsort(flat)
        sent_counts = torch.bincount(flat, minlength=shape.experts)
        mine = self.held[self.rank.rank]
        all_to_all_single(self.counts, sent_counts, [mine] * shape.ranks, self.held)
        self.to = [int(sent_counts[held.start : held.stop].sum()) for held in self.experts]
        self.come = self.counts.view(shape.ranks, mine).sum(dim=1).tolist()
        token = self.order.div(shape.top_k, rounding_mode="floor")
        if shape.dispatch_dtype == "fp8":
            torch.index_select(self._quantised(), 0, token, out=self.send)
        else:
            torch.index_select(layer.x, 0, token, out=self.send)
        if len(self.recv) < sum(self.come):
            self.recv = torch.empty(sum(self.come), self.send.shape[1], dtype=self.wire)
            self.grouped = torch.empty_like(self.recv)
        all_to_all_single(self.recv[: sum(self.come)], self.send, self.come, self.to)
        if self.groups:
            self.by_expert = torch.argsort(self._expert_of_row(), stable=True)
            torch.index_select(self.recv, 0, self.by_expert, out=self.grouped[: sum(self.come)])
        self._count(sent_counts.element_size() * shape.experts, self.held, shape.experts)
        self._count(self.send.nbytes, self.to, len(self.send))

    def combine(self) -> None:
        from torch.distributed import all_to_all_single

        if self.groups:
            self.returned.index_copy_(0, self.by_expert, self.expert_out)
        all_to_all_single(self.back, self.returned if self.groups else self.expert_out, self.to, self.come)
        self._weigh()
        self._count(self.expert_out.nbytes, self.come, len(self.expert_out))

    def _quantised(self) -> torch.Tensor:
        import torch

        from eptransport.bench import reference

        q, scales = reference.quantise(self.layer.x)
        return torch.cat([q.view(torch.uint8), scales.view(torch.uint8)], dim=1)

    def _received(self, dtype: torch.dtype) -> torch.Tensor:
        import torch

        from eptransport.bench import reference

        rows = (self.grouped if self.groups else self.recv)[: sum(self.come)]
        if self.layer.shape.dispatch_dtype != "fp8":
            return rows
        hidden = self.layer.shape.hidden
        q = rows[:, :hidden].contiguous().view(torch.float8_e4m3fn)
        return reference.dequantise(q, rows[:, hidden:].contiguous().view(torch.float32), dtype)

    def _expert_of_row(self) -> torch.Tensor:
        import torch

        held = self.layer.shape.experts_of(self.rank.rank)
        local = torch.arange(held.start, held.stop).repeat(self.layer.shape.ranks)
        return local.repeat_interleave(self.counts)

    def _choose_weighing(self) -> None:
        ways = {
            "embedding_bag": self._weigh_bag,
            "bmm": self._weigh_bmm,
            "index_add": self._weigh_index_add,
        }
        times = {}
        for name, way in ways.items():
            try:
                way()
            except (RuntimeError, NotImplementedError):  # this torch has no such kernel for this dtype
                continue
            start = time.perf_counter_ns()
            for _ in range(3):
                way()
            times[name] = time.perf_counter_ns() - start
        # All ranks alike: the one that is fastest on all together.
        by_rank = self.rank.gather(times)
        best = min(by_rank[0], key=lambda name: sum(times.get(name, float("inf")) for times in by_rank))
        self._weigh = ways[best]
        self.note = f"weighs by {best}"

    def _inverse(self) -> torch.Tensor:
        import torch

        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self.order))
        return place

    def _weigh_bag(self) -> None:
        import torch

        inputs = self._inverse().view(self.layer.ids.shape)
        weights = self.weights.to(self.back.dtype)
        self.y.copy_(torch.nn.functional.embedding_bag(inputs, self.back, per_sample_weights=weights, mode="sum"))

    def _weigh_bmm(self) -> None:
        import torch

        tokens, top_k = self.layer.ids.shape
        rows = self.back.index_select(0, self._inverse()).view(tokens, top_k, -1)
        self.y.copy_(torch.bmm(self.weights.to(rows.dtype).unsqueeze(1), rows).squeeze(1))

    def _weigh_index_add(self) -> None:
        token = self.order.div(self.layer.shape.top_k, rounding_mode="floor")
        weights = self.weights.view(-1).index_select(0, self.order)
        self.y.zero_().index_add_(0, token, self.back.to(self.y.dtype).mul_(weights[:, None]))

    def _count(self, nbytes: int, split: Sequence[int], rows: int) -> None:
        own = split[self.rank.rank] * nbytes // max(rows, 1)
        self.bytes += nbytes - own
        self.messages += sum(1 for r, part in enumerate(split) if part and r != self.rank.rank)

    def sent(self) -> tuple[int, int]:
        return self.messages, self.bytes

    def close(self) -> None:
        from torch import distributed

        distributed.destroy_process_group()
