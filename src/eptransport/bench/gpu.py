"""`eptransport bench moe --device cuda`: the four halves of a step on a GPU, apart and together, beside their bytes.

Every half is one launch: of a captured graph, or a plain one (`launch`). Before each, ranks meet on the host, and each
holds its stream for as long as all take to launch; so a half's time is the kernel's and its launch's, between two
events of the rank's stream. A half waits for nobody, since all have sent before any receives. `together` is a graph of
whole steps, in which ranks wait for one another. An iteration takes as long as its slowest rank.

Ranks that are processes have a GPU in turn, unless MPS runs there (mps.py): then they run side by side, each on an
equal share of its multiprocessors.

    floor     the longer of two: the bytes that all ranks of a GPU read and write in a half, over what a copy of 1 GiB
              by the whole GPU reads and writes in a second (with shares: what copies of all ranks at once do); and the
              bytes that they write to other GPUs, over what a copy to the next GPU writes. Caches may beat the first: a
              message is read soon after it was written
    launch    one tiny kernel, launched alike: what no half could be faster than. It is in the times of all halves
    nccl      all_to_all_single with the same rows, where each rank has a GPU (nccl.py)
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from eptransport.bench import mps
from eptransport.bench.figures import Spread, slowest, spread
from eptransport.bench.nccl import MOVES, Nccl
from eptransport.bench.ranks import Rank, run_job
from eptransport.bench.shapes import Shape, routing, tokens
from eptransport.errors import InternalError, InvalidArgument

if TYPE_CHECKING:
    import torch

    from eptransport import Group
    from eptransport.all_to_all import Layout
    from eptransport.dispatched import Dispatched

__all__ = ["HALVES", "GpuMoeJob", "GpuMoeResult", "Launch", "Phase", "half_bytes", "run"]

Launch = Literal["graph", "plain"]

HALVES = ("dispatch send", "dispatch recv", "combine send", "combine recv")
STEPS = 10
"""Of the graph of whole steps."""
HOLD_CYCLES = {"graph": 400_000, "plain": 2_000_000}
"""A fifth of a millisecond, and one: longer than the ranks of a GPU take to launch a half each."""
COPY_BYTES = 1 << 30
SEED = 20


@dataclass(frozen=True)
class GpuMoeJob:
    shape: Shape
    backend: str = "tcp"
    layout: Layout = "masked"
    skew: float = 0.0
    blocks: int | None = None
    """Of each launch; None: an equal share of what the GPU holds at once."""
    launch: Launch = "graph"
    """Of the halves."""
    iterations: int = 20
    rounds: int = 3
    against: str | None = None
    """`nccl`, or None."""
    seed: int = SEED
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def threads(self) -> bool:
        return self.backend == "loopback"

    @property
    def units(self) -> int:
        return self.rounds

    def run(self, rank: Rank) -> GpuRank:
        from eptransport import Settings

        settings = Settings(backend=self.backend, gpu_blocks=self.blocks, **self.options)
        with rank.group(settings) as group:
            return measure(self, rank, group)


@dataclass(frozen=True)
class Phase:
    """Times in us, of the slowest rank of each iteration."""

    name: str
    time: Spread
    bytes: int
    """Read and written by all ranks together."""
    link_bytes: int
    """Of these written to other GPUs."""
    floor_us: float
    ratio: float
    """Its time to the floor."""


@dataclass(frozen=True)
class GpuMoeResult:
    job: GpuMoeJob
    gpu: str
    gpus: int
    """That have ranks; rank r is on GPU r % gpus."""
    multiprocessors: int
    """Of a GPU, or of a rank's share."""
    shared: bool
    """Each rank has a share of its GPU's multiprocessors."""
    blocks: int
    """Of each rank's launches: of 512 threads, of which a multiprocessor takes two, or in a combine of 1,024."""
    copy_gb_per_s: float
    """Read and written."""
    link_gb_per_s: float
    """Written to another GPU; 0: there is one."""
    launch: Spread
    phases: tuple[Phase, ...]
    dispatch: Spread
    """Both halves, of the iterations' slowest ranks in each."""
    combine: Spread
    together: Spread
    """A whole step."""
    nccl: tuple[tuple[str, Spread], ...]
    checked: str

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


@dataclass
class GpuRank:
    """What one rank saw: us, [half][round][iteration]."""

    gpu: str
    gpus: int
    multiprocessors: int
    shared: bool
    blocks: int
    copy_gb_per_s: float
    """Rank 0's copy alone; where ranks have shares, this rank's beside all others'."""
    link_gb_per_s: float
    launch: list[list[float]]
    halves: list[list[list[float]]]
    together: list[list[float]]
    nccl: list[list[list[float]]]
    bytes: tuple[int, ...]
    link_bytes: tuple[int, ...]
    checked: str


def run(job: GpuMoeJob, progress: Callable[[int], None] | None = None) -> GpuMoeResult:
    """Starts the ranks, measures, and ends them. Not collective: they are its own."""
    check(job)
    with mps.shares(0 if job.threads else job.shape.ranks):
        return combine_ranks(job, run_job(job, job.shape.ranks, threads=job.threads, progress=progress))


def check(job: GpuMoeJob) -> None:
    job.shape.check()
    if min(job.iterations, job.rounds) < 1:
        raise InvalidArgument("iterations and rounds must be at least 1")
    if job.against and job.threads:
        raise InvalidArgument("nccl needs a process a rank, and loopback's ranks are threads; bench another backend")


def combine_ranks(job: GpuMoeJob, ranks: Sequence[GpuRank]) -> GpuMoeResult:
    first = ranks[0]
    copied = sum(rank.copy_gb_per_s for rank in ranks[:: first.gpus]) if first.shared else first.copy_gb_per_s
    halves = [_slowest([rank.halves[half] for rank in ranks]) for half in range(len(HALVES))]
    phases = []
    for half, name in enumerate(HALVES):
        total, linked = sum(rank.bytes[half] for rank in ranks), sum(rank.link_bytes[half] for rank in ranks)
        floor = max(
            max(
                sum(rank.bytes[half] for rank in there) / copied,
                sum(rank.link_bytes[half] for rank in there) / first.link_gb_per_s if first.link_gb_per_s else 0.0,
            )
            for there in (ranks[gpu :: first.gpus] for gpu in range(first.gpus))
        )
        time = spread(halves[half])
        phases.append(Phase(name, time, total, linked, floor / 1e3, time.p50 / floor * 1e3))

    def both(a: int, b: int) -> Spread:
        return spread([[x + y for x, y in zip(p, q, strict=True)] for p, q in zip(halves[a], halves[b], strict=True)])

    return GpuMoeResult(
        job=job,
        gpu=first.gpu,
        gpus=first.gpus,
        multiprocessors=first.multiprocessors,
        shared=first.shared,
        blocks=first.blocks,
        copy_gb_per_s=copied,
        link_gb_per_s=first.link_gb_per_s,
        launch=spread(_slowest([rank.launch for rank in ranks])),
        phases=tuple(phases),
        dispatch=both(0, 1),
        combine=both(2, 3),
        together=spread(_slowest([rank.together for rank in ranks])),
        nccl=tuple(
            (name, spread(_slowest([rank.nccl[move] for rank in ranks])))
            for move, name in enumerate(MOVES if job.against else ())
        ),
        checked=first.checked,
    )


def _slowest(by_rank: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """[rank][round][iteration] to [round][iteration]."""
    return [slowest(samples) for samples in zip(*by_rank, strict=True)]


def half_bytes(shape: Shape, layout: str, stored: int, sent: int, received: int, placed: int) -> tuple[int, ...]:
    """What each half of a rank reads and writes, with so many rows sent and received, itself included, and `placed`
    rows in its layout (one for each expert of a row in `contiguous` and `masked`). Of those sent, dispatch stores only
    `stored`: a row that several ranks read where it stands is one. Headers, ids and weights are left away, and so are
    the blanks of a layout: bytes that something else might do without."""
    row, back = shape.dispatch_row, shape.combine_row
    x = shape.tokens * shape.hidden * shape.torch_dtype(shape.dtype).itemsize
    unpacked = shape.hidden * shape.torch_dtype(shape.dispatch_dtype).itemsize + 4 * shape.scale_blocks
    experts_out = shape.hidden * shape.torch_dtype(shape.dtype).itemsize
    return (
        x + stored * row,
        received * row + placed * unpacked,
        placed * experts_out + received * back,
        sent * back + x,
    )


def half_link_bytes(shape: Shape, sent_away: int, received_from_away: int) -> tuple[int, ...]:
    """What each half of a rank writes to other GPUs: rows go where they are needed, and are read there."""
    return sent_away * shape.dispatch_row, 0, received_from_away * shape.combine_row, 0


def _stored(shape: Shape, ids: torch.Tensor, sent: Sequence[int], near: Sequence[int]) -> int:
    """Rows that a rank's dispatch stores, of those that it sends: a token's once for all ranks that read it from this
    rank's memory, those that are near, and for each of the others one."""
    return shape.tokens_to(ids, near) + sum(sent[rank] for rank in range(shape.ranks) if rank not in near)


# ---- one rank --------------------------------------------------------------------------------------------------------


def measure(job: GpuMoeJob, rank: Rank, group: Group) -> GpuRank:
    import torch

    if not job.threads:
        torch.set_num_threads(rank.cores)
    step = _Step(job, group, rank)
    with torch.cuda.stream(step.stream):
        checked = step.check()
        for turn in range(job.shape.ranks if job.threads else 1):
            # Threads one after another: a capture is ended by what another thread may do at its own's beginning.
            rank.barrier()
            if not job.threads or turn == rank.rank:
                step.capture()
    rank.barrier()
    shared = mps.has_share()
    copied = step.copy_speed(step.device) if shared or rank.rank == 0 else 0.0
    rank.barrier()
    linked = step.copy_speed(torch.device("cuda", 1)) / 2 if rank.rank == 0 and step.gpus > 1 else 0.0
    rank.barrier()
    launch: list[list[float]] = []
    halves: list[list[list[float]]] = [[] for _ in HALVES]
    together: list[list[float]] = []
    nccl: list[list[list[float]]] = [[] for _ in step.nccl_graphs]
    for number in range(job.rounds):
        rows: list[list[float]] = [[] for _ in HALVES]
        moved: list[list[float]] = [[] for _ in nccl]
        empty, whole = [], []
        for turn in range(job.iterations + 2):  # two that nobody counts
            times = [step.time(rank, graph) for graph in step.graphs]
            tiny = step.time(rank, step.tiny)
            steps = step.time(rank, step.steps) / STEPS
            theirs = [step.time(rank, graph) for graph in step.nccl_graphs]
            if turn < 2:
                continue
            for row, time in zip(rows, times, strict=True):
                row.append(time)
            for row, time in zip(moved, theirs, strict=True):
                row.append(time)
            empty.append(tiny)
            whole.append(steps)
        for half, row in zip(halves, rows, strict=True):
            half.append(row)
        for move, row in zip(nccl, moved, strict=True):
            move.append(row)
        launch.append(empty)
        together.append(whole)
        rank.progress(number + 1)
    step.moe.check()
    properties = torch.cuda.get_device_properties(step.device)
    result = GpuRank(
        gpu=properties.name,
        gpus=step.gpus,
        multiprocessors=properties.multi_processor_count,
        shared=shared,
        blocks=step.blocks,
        copy_gb_per_s=copied,
        link_gb_per_s=linked,
        launch=launch,
        halves=halves,
        together=together,
        nccl=nccl,
        bytes=step.bytes,
        link_bytes=step.link_bytes,
        checked=checked,
    )
    step.close()
    rank.barrier()
    return result


class Launched(Protocol):
    """A captured graph, or what is like one."""

    def replay(self) -> None: ...


@dataclass(frozen=True)
class _Plain:
    """A plain launch. Python makes it, while the stream is held."""

    body: Callable[[], Any]

    def replay(self) -> None:
        self.body()


class _Step:
    """This rank's part of a layer, and launches of its halves."""

    def __init__(self, job: GpuMoeJob, group: Group, rank: Rank) -> None:
        import torch

        from eptransport import AllToAll
        from eptransport._call import lib

        shape = job.shape
        self.job, self.rank = job, rank.rank
        self.gpus = 1 if job.threads else min(torch.cuda.device_count(), shape.ranks)
        if job.against and self.gpus < shape.ranks:
            raise InvalidArgument(f"nccl needs a GPU a rank: there are {self.gpus} for {shape.ranks}")
        self.device = torch.device("cuda", rank.rank % self.gpus)
        torch.cuda.set_device(self.device)
        self.stream = _cuda().Stream(self.device)
        ids, weights = routing(shape, rank.rank, job.skew, job.seed)
        x = tokens(shape, rank.rank, job.seed)
        self.given = (x, ids, weights)
        self.x, self.ids, self.weights = (t.to(self.device) for t in self.given)
        sent = rank.gather(shape.rows(ids))
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
            device=self.device,
        )
        native: Any = self.moe._native
        self.blocks = int(lib.ept_gpu_lanes_blocks(native.arena.pointer))
        pairs = sum(row[rank.rank] for row in rank.gather(_pairs(shape, ids)))
        received = sum(row[rank.rank] for row in sent)
        placed = pairs if job.layout in ("contiguous", "masked") else received
        own = sent[rank.rank]
        away = [other for other in range(shape.ranks) if (other - rank.rank) % self.gpus]
        near = [r for r, path in enumerate(self.moe.paths) if r not in away and path in ("own", "mapped")]
        self.bytes = half_bytes(shape, job.layout, _stored(shape, ids, own, near), sum(own), received, placed)
        self.link_bytes = half_link_bytes(
            shape, sum(own[other] for other in away), sum(sent[other][rank.rank] for other in away)
        )
        with _cuda().stream(self.stream):
            self.nccl = Nccl(shape, rank, self.device, sent) if job.against else None
        self.graphs: list[Launched] = []
        self.kept: list[Any] = []

    def check(self) -> str:
        """Against plain torch on the CPU, bit for bit; what combine gives back is kept for the graphs."""
        import torch

        from eptransport.bench import reference

        shape = self.job.shape
        got = self.moe.dispatch(self.x, self.ids, self.weights)
        there: Dispatched = dataclasses.replace(
            got, **{f.name: _on_cpu(getattr(got, f.name)) for f in dataclasses.fields(got)}
        )
        out = reference.serve_experts(shape, self.rank, self.job.layout, there)
        self.expert_out = out.to(self.device)
        y = self.moe.combine(self.expert_out, got).cpu()
        self.moe.check()
        expected = reference.expected(shape, *self.given)
        wrong = int((y != expected).any(dim=1).sum())
        if wrong or not torch.isfinite(y).all():
            raise InternalError(f"rank {self.rank}: {wrong} tokens differ from the reference", operation="bench")
        said = f"y of {shape.tokens} tokens a rank: bit for bit the plain torch reference on the CPU"
        native: Any = self.moe._native
        ways = sorted({path for path in self.moe.paths if path != "own"})
        puts = f", {native.arena.puts()} puts by rank {self.rank}'s kernels" if "gpu" in ways else ""
        return f"{said}; peers reached by: {', '.join(ways) or 'none'}{puts}"

    def capture(self) -> None:
        import torch

        def graph(body: Callable[[], Any]) -> torch.cuda.CUDAGraph:
            made = torch.cuda.CUDAGraph()
            with torch.cuda.graph(made, stream=self.stream, capture_error_mode="thread_local"):
                self.kept.append(body())
            return made

        def steps() -> list[Any]:
            kept = []
            for _ in range(STEPS):
                again = self.moe.dispatch(self.x, self.ids, self.weights)
                kept += [again, self.moe.combine(self.expert_out, again)]
            return kept

        torch.cuda.synchronize(self.device)
        word = torch.zeros(1, device=self.device)
        self.graphs.append(graph(lambda: self.moe.dispatch_send(self.x, self.ids, self.weights)))
        self.graphs.append(graph(self.moe.dispatch_recv))
        got = self.kept[-1]
        self.graphs.append(graph(lambda: self.moe.combine_send(self.expert_out, got)))
        self.graphs.append(graph(lambda: self.moe.combine_recv(got)))
        self.tiny: Launched = graph(lambda: word.fill_(1.0))
        self.steps = graph(steps)
        self.nccl_graphs = [graph(move) for move in self.nccl.moves()] if self.nccl else []
        self.kept.append(word)
        if self.job.launch == "plain":
            self.graphs = [_Plain(half) for half in self.plain()]
            self.tiny = _Plain(lambda: word.fill_(1.0))

    def plain(self) -> list[Callable[[], Any]]:
        """The four halves, called in this order again and again. Outputs are torch's memory of the time before."""
        came: list[Dispatched] = []

        def receive() -> None:
            came[:] = [self.moe.dispatch_recv()]

        return [
            lambda: self.moe.dispatch_send(self.x, self.ids, self.weights),
            receive,
            lambda: self.moe.combine_send(self.expert_out, came[0]),
            lambda: self.moe.combine_recv(came[0]),
        ]

    def time(self, rank: Rank, graph: Launched) -> float:
        """us between two events around it."""
        import torch

        begin, end = _cuda().Event(enable_timing=True), _cuda().Event(enable_timing=True)
        rank.barrier()
        with torch.cuda.stream(self.stream):
            _cuda()._sleep(HOLD_CYCLES[self.job.launch])
            begin.record()
            graph.replay()
            end.record()
        self.stream.synchronize()
        rank.barrier()
        return float(begin.elapsed_time(end)) * 1e3

    def copy_speed(self, target: torch.device) -> float:
        """GB/s, read and written, of a copy by this process to that GPU; others may copy at the same time."""
        import torch

        source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=self.device)
        to = torch.empty_like(source, device=target)
        samples = []
        with torch.cuda.stream(self.stream):
            for _ in range(7):
                begin, end = _cuda().Event(enable_timing=True), _cuda().Event(enable_timing=True)
                begin.record()
                to.copy_(source)
                end.record()
                end.synchronize()
                samples.append(begin.elapsed_time(end))
        return float(2 * COPY_BYTES / statistics.median(samples) / 1e6)

    def close(self) -> None:
        import torch

        torch.cuda.synchronize(self.device)
        self.graphs.clear()
        self.kept.clear()
        self.nccl_graphs.clear()
        del self.tiny, self.steps
        if self.nccl:
            self.nccl.close()
        self.moe.close()


def _cuda() -> Any:
    """torch.cuda, whose own types leave much away."""
    import torch

    return torch.cuda


def _pairs(shape: Shape, ids: torch.Tensor) -> list[int]:
    """Of these tokens, how many experts they have at each rank."""
    held = [shape.experts_of(rank) for rank in range(shape.ranks)]
    return [int(((ids >= own.start) & (ids < own.stop)).sum()) for own in held]


def _on_cpu(value: Any) -> Any:
    import torch

    return value.cpu() if isinstance(value, torch.Tensor) else value
