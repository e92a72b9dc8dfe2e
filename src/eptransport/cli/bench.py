"""`eptransport bench p2p` and `eptransport bench moe`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from eptransport.errors import InvalidArgument, UnsupportedError

if TYPE_CHECKING:
    from eptransport.bench.report import Result as AnyResult
    from eptransport.bench.shapes import Shape

__all__ = ["bench", "check_outputs", "need_torch"]

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure, always beside what the machine does without eptransport, and in turn with it.",
)

Result = TypeVar("Result")


class Against(str, Enum):
    gloo = "gloo"
    nccl = "nccl"


class PresetName(str, Enum):
    deepseek_v3 = "deepseek-v3"
    kimi_k2 = "kimi-k2"
    qwen3_235b = "qwen3-235b"
    mixtral = "mixtral"


class Layout(str, Enum):
    contiguous = "contiguous"
    masked = "masked"
    rows = "rows"
    by_rank = "by_rank"


class Dtype(str, Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class LaunchName(str, Enum):
    graph = "graph"
    plain = "plain"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class DispatchDtype(str, Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    fp8 = "fp8"


Ranks = Annotated[int, typer.Option(help="Processes on this machine (loopback: threads).")]
Backend = Annotated[
    str | None, typer.Option(help="auto, a backend's name, or a plugin's path; EPT_BACKEND if not given.")
]
Rounds = Annotated[int, typer.Option(min=1, help="Each figure is the median of so many rounds.")]
AgainstOption = Annotated[
    Against | None, typer.Option(help="Compare with another library, in the same processes and rounds.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all figures here; - is stdout.")]
PictureFile = Annotated[Path | None, typer.Option(help="Draw the figures into this file (.png, .svg, .pdf).")]


@bench.command()
def p2p(
    ranks: Ranks = 2,
    backend: Backend = None,
    size: Annotated[list[int] | None, typer.Option(help="Bytes of a write for latency; may be repeated.")] = None,
    bandwidth_size: Annotated[
        list[int] | None, typer.Option(help="Bytes of a write for bandwidth; may be repeated.")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(min=1, help="Turns of a ping-pong, a round [5000; 2000 with --against].", show_default=False),
    ] = None,
    stream_mib: Annotated[int, typer.Option(min=1, help="MiB of a bandwidth run, a round.")] = 256,
    rounds: Rounds = 5,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Side by side with what one would take instead: gloo, ucx, libfabric, verbs, mooncake, nixl. One that "
            "is not there is skipped, with the reason.",
        ),
    ] = None,
    vary: Annotated[
        str | None,
        typer.Option(
            metavar="EPT_NAME=VALUE,VALUE",
            help="Ours once more under each value of a setting, all in turn in one call.",
        ),
    ] = None,
    json_file: JsonFile = None,
    picture: PictureFile = None,
) -> None:
    """A write with a signal: latency and bandwidth, and on loopback the rate of one core."""
    from eptransport.bench import report
    from eptransport.bench.p2p import P2pJob, run

    if against is None and vary is None and ranks == 2 and _backend(backend, ranks) in ("libfabric", "verbs"):
        against = _backend(backend, ranks)  # its floor is a bare loop over the same network, not one over sockets
    if against is not None or vary is not None:
        _p2p_against(
            against, vary, ranks, backend, size, bandwidth_size, iterations, stream_mib, rounds, json_file, picture
        )
        return
    job = P2pJob(
        ranks=ranks,
        backend=_backend(backend, ranks),
        latency_bytes=tuple(size or P2pJob.latency_bytes),
        bandwidth_bytes=tuple(bandwidth_size or P2pJob.bandwidth_bytes),
        iterations=iterations or P2pJob.iterations,
        stream_bytes=stream_mib << 20,
        rounds=rounds,
    )
    check_outputs(picture, json_file)
    result = _with_progress("point to point", job.units, lambda progress: run(job, progress))
    _show(result, report.p2p_table(result), json_file)
    if picture:
        report.p2p_picture(picture, result)


@bench.command()
def seeing(
    ranks: Annotated[int, typer.Option(min=2, help="Ranks, threads of this process.")] = 2,
    backend: Annotated[str, typer.Option(help="loopback, or another that works inside one process.")] = "loopback",
    tokens: Annotated[int, typer.Option(min=1, help="Of each rank in a step.")] = 128,
    hidden: Annotated[int, typer.Option(min=8, help="Elements of a token.")] = 7168,
    iterations: Annotated[int, typer.Option(min=1, help="Steps, a round.")] = 20,
    rounds: Rounds = 5,
    json_file: JsonFile = None,
) -> None:
    """What counting costs: nanoseconds a record, times the records of a step, beside the step."""
    from eptransport.bench.seeing import SeeingJob, measure, table

    need_torch("bench seeing")
    check_outputs(None, json_file)
    result = measure(SeeingJob(ranks, backend, tokens, hidden, iterations, rounds))
    to_stdout = str(json_file) == "-"
    Console(stderr=to_stdout, highlight=False).print(table(result))
    if to_stdout:
        typer.echo(json.dumps(result.as_json(), indent=2))
    elif json_file:
        json_file.write_text(json.dumps(result.as_json(), indent=2) + "\n")


def _p2p_against(
    against: str | None,
    vary: str | None,
    ranks: int,
    backend: str | None,
    size: list[int] | None,
    bandwidth_size: list[int] | None,
    iterations: int | None,
    stream_mib: int,
    rounds: int,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    from eptransport.bench.against import names
    from eptransport.bench.against.compare import AgainstJob, run
    from eptransport.bench.against.table import against_picture, against_table

    option = "--against" if against is not None else "--vary"
    wanted = names(against) if against is not None else ()
    if ranks != 2:
        raise InvalidArgument(f"{option} measures one pair: --ranks {ranks} must be 2")
    if bandwidth_size and len(bandwidth_size) > 1:
        raise InvalidArgument(f"{option} takes one --bandwidth-size")
    chosen = _backend(backend, ranks)
    options: dict[str, Any] = {}
    if chosen == "libfabric" and "libfabric" in wanted:
        options["options"] = {"libfabric.library": _same_library()}
    job = AgainstJob(
        wanted,
        backend=chosen,
        latency_bytes=tuple(size or AgainstJob.latency_bytes),
        bandwidth_bytes=bandwidth_size[0] if bandwidth_size else AgainstJob.bandwidth_bytes,
        iterations=iterations or AgainstJob.iterations,
        stream_bytes=stream_mib << 20,
        rounds=rounds,
        options=options,
        vary=_values(vary) if vary is not None else None,
    )
    check_outputs(picture, json_file)
    result = _with_progress("side by side", job.units, lambda progress: run(job, progress))
    _show(result, against_table(result), json_file)
    if picture:
        against_picture(picture, result)


def _values(vary: str) -> tuple[str, tuple[str, ...]]:
    name, _, rest = vary.partition("=")
    values = tuple(value.strip() for value in rest.split(",") if value.strip())
    if not name.startswith("EPT_") or not values:
        raise InvalidArgument(f"--vary {vary!r} is not EPT_NAME=VALUE,VALUE")
    return name, values


def _same_library() -> str:
    """For ours, that of the bare loop: two releases of libfabric differ by more than we add."""
    from eptransport.bench.against.libfabric import library
    from eptransport.bench.against.side import Absent

    try:
        return str(library()[1])
    except Absent as reason:
        raise UnsupportedError(str(reason), operation="bench p2p") from None


@bench.command()
def moe(
    ranks: Ranks = 4,
    backend: Backend = None,
    preset: Annotated[
        PresetName | None, typer.Option(help="Hidden size, experts, top-k and dispatch dtype of a published model.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each rank.")] = 128,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size [7168].", show_default=False)] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts of all ranks [256].", show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts of a token [8].", show_default=False)] = None,
    skew: Annotated[float, typer.Option(min=0, help="Zipf exponent of the experts' popularity; 0: all alike.")] = 0.0,
    dtype: Annotated[Dtype, typer.Option(help="Of the model, and of what combine brings back.")] = Dtype.bf16,
    dispatch_dtype: Annotated[
        DispatchDtype | None, typer.Option(help="On the wire of dispatch; --dtype or the preset's if not given.")
    ] = None,
    layout: Annotated[Layout, typer.Option(help="How dispatch lays out what it brought.")] = Layout.contiguous,
    device: Annotated[Device, typer.Option(help="Of the tensors; cuda: halves apart, as graphs.")] = Device.cpu,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="Of a kernel's launch, with --device cuda [a rank's share of the GPU].")
    ] = None,
    launch: Annotated[
        LaunchName, typer.Option(help="Of a half, with --device cuda: a captured graph, or a plain launch.")
    ] = LaunchName.graph,
    iterations: Annotated[int, typer.Option(min=1, help="Of each side, a round.")] = 20,
    rounds: Rounds = 5,
    against: AgainstOption = None,
    seed: Annotated[int, typer.Option(help="Of tokens and routing.")] = 20,
    json_file: JsonFile = None,
    picture: PictureFile = None,
) -> None:
    """Dispatch and combine of one layer. The result is first compared with plain torch, bit for bit."""
    need_torch("bench moe")
    from eptransport.bench import report
    from eptransport.bench.moe import MoeJob, check, run
    from eptransport.bench.shapes import PRESETS, Shape

    base = PRESETS[preset.value] if preset else None
    shape = Shape(
        ranks=ranks,
        tokens=tokens,
        hidden=hidden or (base.hidden if base else 7168),
        experts=experts or (base.experts if base else 256),
        top_k=top_k or (base.top_k if base else 8),
        dtype=dtype.value,
        dispatch_dtype=dispatch_dtype.value if dispatch_dtype else base.dispatch_dtype if base else dtype.value,
        combine_dtype=dtype.value,
    )
    if device is Device.cuda:
        _moe_on_gpu(shape, backend, layout, skew, blocks, launch, iterations, rounds, against, seed, json_file, picture)
        return
    if blocks is not None or launch is not LaunchName.graph or against is Against.nccl:
        raise InvalidArgument("--blocks, --launch and --against nccl are for --device cuda")
    job = MoeJob(
        shape=shape,
        backend=_backend(backend, ranks),
        layout=layout.value,
        skew=skew,
        against=against.value if against else None,
        iterations=iterations,
        rounds=rounds,
        seed=seed,
    )
    check(job)
    check_outputs(picture, json_file)
    result = _with_progress("dispatch and combine", job.units, lambda progress: run(job, progress))
    _show(result, report.moe_table(result), json_file)
    if picture:
        report.moe_picture(picture, result)


def _moe_on_gpu(
    shape: Shape,
    backend: str | None,
    layout: Layout,
    skew: float,
    blocks: int | None,
    launch: LaunchName,
    iterations: int,
    rounds: int,
    against: Against | None,
    seed: int,
    json_file: Path | None,
    picture: Path | None,
) -> None:

    from eptransport.bench import report
    from eptransport.bench.gpu import GpuMoeJob, check, run

    if against is Against.gloo or picture:
        raise InvalidArgument("--against gloo and --picture are for --device cpu")
    job = GpuMoeJob(
        shape=shape,
        backend=_backend(backend, shape.ranks),
        layout=layout.value,
        skew=skew,
        blocks=blocks,
        launch=launch.value,
        iterations=iterations,
        rounds=rounds,
        against=against.value if against else None,
        seed=seed,
    )
    check(job)
    check_cuda("bench")
    check_outputs(None, json_file)
    result = _with_progress("dispatch and combine", job.units, lambda progress: run(job, progress))
    _show(result, report.gpu_table(result), json_file)


def check_cuda(operation: str) -> None:
    """UnsupportedError where torch has no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device here", operation=operation
        )


def need_torch(what: str, extra: str = "bench") -> None:
    """UnsupportedError, with the mend, where torch is missing."""
    import importlib.util

    for package in ("torch", "numpy"):
        if importlib.util.find_spec(package) is None:
            raise UnsupportedError(f"{what} needs {package}: pip install 'eptransport[{extra}]'", operation=what)


def _backend(given: str | None, ranks: int) -> str:
    """The backend to bench, after a look at whether it can run here: better now than from each rank."""
    from eptransport import Settings, choose

    settings = Settings() if given is None else Settings(backend=given)
    if settings.backend != "loopback":
        choose(settings, ranks, one_process=False)
    return settings.backend


def check_outputs(picture: Path | None, json_file: Path | None = None) -> None:
    """Before minutes of measuring, not after."""
    for file in (picture, json_file):
        if file and not file.parent.is_dir():
            raise InvalidArgument(f"can't write {file}: there is no folder {file.parent}")
    if picture:
        from eptransport.bench.report import need_matplotlib

        need_matplotlib()


def _with_progress(what: str, units: int, work: Callable[[Callable[[int], None]], Result]) -> Result:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=units)
        return work(lambda done: progress.update(task, completed=done))


def _show(result: AnyResult, table: RenderableType, json_file: Path | None) -> None:
    from eptransport.bench import report

    to_stdout = str(json_file) == "-"
    Console(stderr=to_stdout, highlight=False, width=None if sys.stdout.isatty() else 150).print(table)
    if to_stdout:
        typer.echo(json.dumps(report.as_json(result), indent=2))
    elif json_file:
        report.write_json(json_file, result)
