"""`eptransport bench moe --device cuda`: the four halves of a step on a GPU, apart and together, beside their bytes.

Every half is a captured graph of one launch. Before each, ranks meet on the host, and each holds its stream for as long
as all take to launch; so a half's time is the kernel's and its launch's, between two events of the rank's stream. A
half waits for nobody, since all have sent before any receives. `together` is a graph of whole steps, in which ranks
wait for one another. An iteration takes as long as its slowest rank.

    floor     the bytes that all ranks of the GPU read and write in a half, over what a copy of 1 GiB by the whole GPU
              reads and writes in a second. Caches may beat it: a message of one rank is read by another soon after
    launch    a graph of one tiny kernel, launched alike: what no half could be faster than
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eptransport.bench.figures import Spread, slowest, spread
from eptransport.bench.ranks import Rank, run_job
from eptransport.bench.shapes import Shape, routing, tokens
from eptransport.errors import InternalError, InvalidArgument

if TYPE_CHECKING:
    import torch

    from eptransport import Group
    from eptransport.all_to_all import Layout
    from eptransport.dispatched import Dispatched

__all__ = ["HALVES", "GpuMoeJob", "GpuMoeResult", "Phase", "half_bytes", "run"]

HALVES = ("dispatch send", "dispatch recv", "combine send", "combine recv")
STEPS = 10
"""Of the graph of whole steps."""
HOLD_CYCLES = 400_000
"""A fifth of a millisecond: longer than the ranks of a GPU take to launch a half each."""
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
    iterations: int = 20
    rounds: int = 3
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
    floor_us: float
    ratio: float
    """Its time to the floor."""


@dataclass(frozen=True)
class GpuMoeResult:
    job: GpuMoeJob
    gpu: str
    multiprocessors: int
    blocks: int
    """Of each rank's launches, of 512 threads; a multiprocessor takes two."""
    copy_gb_per_s: float
    """Read and written."""
    launch: Spread
    phases: tuple[Phase, ...]
    dispatch: Spread
    """Both halves, of the iterations' slowest ranks in each."""
    combine: Spread
    together: Spread
    """A whole step."""
    checked: str

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


@dataclass
class GpuRank:
    """What one rank saw: us, [half][round][iteration]."""

    gpu: str
    multiprocessors: int
    blocks: int
    copy_gb_per_s: float
    launch: list[list[float]]
    halves: list[list[list[float]]]
    together: list[list[float]]
    bytes: tuple[int, ...]
    checked: str


def run(job: GpuMoeJob, progress: Callable[[int], None] | None = None) -> GpuMoeResult:
    """Starts the ranks, measures, and ends them. Not collective: they are its own."""
    check(job)
    return combine_ranks(job, run_job(job, job.shape.ranks, threads=job.threads, progress=progress))


def check(job: GpuMoeJob) -> None:
    shape = job.shape
    for name in ("ranks", "tokens", "hidden", "experts", "top_k"):
        if getattr(shape, name) < 1:
            raise InvalidArgument(f"{name} is {getattr(shape, name)}; at least 1 is needed")
    if min(job.iterations, job.rounds) < 1:
        raise InvalidArgument("iterations and rounds must be at least 1")
    if shape.top_k > shape.experts:
        raise InvalidArgument(f"top-k is {shape.top_k}, but there are {shape.experts} experts")


def combine_ranks(job: GpuMoeJob, ranks: Sequence[GpuRank]) -> GpuMoeResult:
    first = ranks[0]
    halves = [_slowest([rank.halves[half] for rank in ranks]) for half in range(len(HALVES))]
    phases = []
    for half, name in enumerate(HALVES):
        total = sum(rank.bytes[half] for rank in ranks)
        floor = total / first.copy_gb_per_s / 1e3
        time = spread(halves[half])
        phases.append(Phase(name, time, total, floor, time.p50 / floor))

    def both(a: int, b: int) -> Spread:
        return spread([[x + y for x, y in zip(p, q, strict=True)] for p, q in zip(halves[a], halves[b], strict=True)])

    return GpuMoeResult(
        job=job,
        gpu=first.gpu,
        multiprocessors=first.multiprocessors,
        blocks=first.blocks,
        copy_gb_per_s=first.copy_gb_per_s,
        launch=spread(_slowest([rank.launch for rank in ranks])),
        phases=tuple(phases),
        dispatch=both(0, 1),
        combine=both(2, 3),
        together=spread(_slowest([rank.together for rank in ranks])),
        checked=first.checked,
    )


def _slowest(by_rank: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """[rank][round][iteration] to [round][iteration]."""
    return [slowest(samples) for samples in zip(*by_rank, strict=True)]


def half_bytes(shape: Shape, layout: str, sent: int, received: int, placed: int) -> tuple[int, ...]:
    """What each half of a rank reads and writes, with so many rows sent and received, itself included, and `placed`
    rows in its layout (one for each expert of a row in `contiguous` and `masked`). Headers, ids and weights are left
    away, and so are the blanks of a layout: bytes that something else might do without."""
    row, back = shape.dispatch_row, shape.combine_row
    x = shape.tokens * shape.hidden * shape.torch_dtype(shape.dtype).itemsize
    unpacked = shape.hidden * shape.torch_dtype(shape.dispatch_dtype).itemsize + 4 * shape.scale_blocks
    experts_out = shape.hidden * shape.torch_dtype(shape.dtype).itemsize
    return (
        x + sent * row,
        received * row + placed * unpacked,
        placed * experts_out + received * back,
        sent * back + x,
    )


# ---- one rank --------------------------------------------------------------------------------------------------------


def measure(job: GpuMoeJob, rank: Rank, group: Group) -> GpuRank:
    import torch

    step = _Step(job, group, rank)
    with torch.cuda.stream(step.stream):
        checked = step.check()
        step.capture()
    rank.barrier()
    copied = step.copy_speed() if rank.rank == 0 else 0.0
    rank.barrier()
    launch: list[list[float]] = []
    halves: list[list[list[float]]] = [[] for _ in HALVES]
    together: list[list[float]] = []
    for number in range(job.rounds):
        rows: list[list[float]] = [[] for _ in HALVES]
        empty, whole = [], []
        for turn in range(job.iterations + 2):  # two that nobody counts
            times = [step.time(rank, graph) for graph in step.graphs]
            tiny = step.time(rank, step.tiny)
            steps = step.time(rank, step.steps) / STEPS
            if turn < 2:
                continue
            for row, time in zip(rows, times, strict=True):
                row.append(time)
            empty.append(tiny)
            whole.append(steps)
        for half, row in zip(halves, rows, strict=True):
            half.append(row)
        launch.append(empty)
        together.append(whole)
        rank.progress(number + 1)
    step.moe.check()
    properties = torch.cuda.get_device_properties(step.device)
    result = GpuRank(
        gpu=properties.name,
        multiprocessors=properties.multi_processor_count,
        blocks=step.blocks,
        copy_gb_per_s=copied,
        launch=launch,
        halves=halves,
        together=together,
        bytes=step.bytes,
        checked=checked,
    )
    step.close()
    rank.barrier()
    return result


class _Step:
    """This rank's part of a layer, and graphs of its halves."""

    def __init__(self, job: GpuMoeJob, group: Group, rank: Rank) -> None:
        import torch

        from eptransport import AllToAll
        from eptransport._call import lib

        shape = job.shape
        self.job, self.rank = job, rank.rank
        self.device = torch.device("cuda", rank.rank % torch.cuda.device_count() if not job.threads else 0)
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
        self.bytes = half_bytes(shape, job.layout, sum(sent[rank.rank]), received, placed)
        self.graphs: list[torch.cuda.CUDAGraph] = []
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
        return f"y of {shape.tokens} tokens a rank: bit for bit the plain torch reference on the CPU"

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
        self.tiny = graph(lambda: word.fill_(1.0))
        self.steps = graph(steps)
        self.kept.append(word)

    def time(self, rank: Rank, graph: torch.cuda.CUDAGraph) -> float:
        """us between two events around it."""
        import torch

        begin, end = _cuda().Event(enable_timing=True), _cuda().Event(enable_timing=True)
        rank.barrier()
        with torch.cuda.stream(self.stream):
            _cuda()._sleep(HOLD_CYCLES)
            begin.record()
            graph.replay()
            end.record()
        self.stream.synchronize()
        rank.barrier()
        return float(begin.elapsed_time(end)) * 1e3

    def copy_speed(self) -> float:
        """GB/s, read and written, of a copy by this process alone."""
        import torch

        source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=self.device)
        to = torch.empty_like(source)
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
        del self.tiny, self.steps
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
