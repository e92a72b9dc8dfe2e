"""Tables, JSON and pictures of what was measured."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from eptransport import __version__
from eptransport._process import cores
from eptransport.bench.against.compare import AgainstResult
from eptransport.bench.gpu import GpuMoeResult
from eptransport.bench.moe import MoeResult, SideResult
from eptransport.bench.p2p import Measure, P2pResult
from eptransport.errors import InvalidArgument, UnsupportedError

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "as_json",
    "conditions",
    "counted",
    "gpu_table",
    "machine",
    "moe_picture",
    "moe_table",
    "need_matplotlib",
    "new_table",
    "p2p_picture",
    "p2p_table",
    "save",
    "size_name",
    "write_json",
]

Result = P2pResult | MoeResult | GpuMoeResult | AgainstResult

# One colour a side, in every picture; told apart also in grey and by the colour-blind.
COLOURS = {"eptransport": "#0b6e99", "gloo": "#d9822b"}
FLOOR_COLOUR = "#9aa5ab"


def machine() -> dict[str, Any]:
    """What a figure must not be read without."""
    return {
        "eptransport": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": cores(),
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
    }


def as_json(result: Result) -> dict[str, Any]:
    return {"machine": machine(), **dataclasses.asdict(result)}


def write_json(file: Path, result: Result) -> None:
    try:
        file.write_text(json.dumps(as_json(result), indent=2) + "\n")
    except OSError as problem:
        raise InvalidArgument(f"can't write {file}: {problem.strerror}") from None


# ---- tables ----------------------------------------------------------------------------------------------------------


def p2p_table(result: P2pResult) -> RenderableType:
    job = result.job
    table = new_table(f"point to point over {result.backend}, {job.ranks} ranks: a write with a signal")
    names = ["", "", "p50", "p99", "floor", "ratio", "msgs", "bytes", "cores"]
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < 2 else "right")
    for measure in result.measures:
        table.add_row(
            f"{size_name(measure.bytes)} {_KINDS[measure.kind]}",
            measure.unit,
            f"{measure.ours.p50:.2f}",
            f"{_worst(measure):.2f}",
            f"{measure.floor.p50:.2f}",
            f"{measure.ratio:.2f}",
            f"{measure.messages:.2f}",
            f"{measure.wire_bytes:,.0f}",
            f"{measure.cores:.1f}",
        )
    floors = dict.fromkeys(f"{_KINDS[measure.kind]}: {measure.floor_name}" for measure in result.measures)
    lines = [
        f"median of {counted(job.rounds, 'round')}, ours and the floor in turn; p99 of a bandwidth or rate: its worst",
        f"floor: {', '.join(floors)}; ratio: to it; messages and bytes: of one write",
        conditions(result.regime_ns),
    ]
    return Lines(table, Text("\n".join(lines)))


def moe_table(result: MoeResult) -> RenderableType:
    job, shape = result.job, result.job.shape
    routing = f"skewed (Zipf {job.skew:g})" if job.skew else "random"
    table = new_table(
        f"dispatch and combine over {result.backend}: {shape.ranks} ranks x {shape.tokens} tokens, hidden "
        f"{shape.hidden}, top-{shape.top_k} of {shape.experts}, {shape.dispatch_dtype} there and "
        f"{shape.combine_dtype} back, {job.layout}, {routing} routing"
    )
    for name in ("", "p50 ms", "p99 ms", "disp.", "comb.", "ratio", "MB", "msgs", "CPU ms", "cores"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for index, side in enumerate(result.sides):
        table.add_row(
            side.name if index else f"floor: {side.name}",
            f"{side.total.p50:.2f}",
            f"{side.total.p99:.2f}",
            f"{side.dispatch.p50:.2f}",
            f"{side.combine.p50:.2f}",
            f"{side.ratio:.2f}",
            f"{side.wire_bytes / 1e6:.2f}",
            f"{side.messages:.1f}",
            f"{side.cpu_ms:.1f}",
            f"{side.cores:.1f}",
            style="bold" if side.name == "eptransport" else None,
        )
    lines = [
        f"ms: the slowest rank of each iteration, median of {counted(job.rounds, 'round')} of {job.iterations}, sides "
        "in turn; ratio: to the floor",
        "MB and messages: of a rank, an iteration, as its rails count them (a write longer than EPT_STRIPE_BYTES is "
        "several); CPU: of all ranks",
        *(f"{side.name} {side.note}" for side in result.sides if side.note),
        *([_WEIGHED_BY_CALLER] if job.layout in ("rows", "by_rank") and job.against else []),
        conditions(result.regime_ns),
        f"checked before: {result.checked}",
        f"registered memory: {result.registered_bytes / 2**20:.1f} MiB a rank",
    ]
    return Lines(table, Text("\n".join(lines)))


def gpu_table(result: GpuMoeResult) -> RenderableType:
    job, shape = result.job, result.job.shape
    ranks = "threads of one process" if job.threads else "processes"
    table = new_table(
        f"dispatch and combine on {result.gpu}: {shape.ranks} ranks ({ranks}) x {result.blocks} blocks, {shape.tokens} "
        f"tokens, hidden {shape.hidden}, top-{shape.top_k} of {shape.experts}, {shape.dispatch_dtype} there and "
        f"{shape.combine_dtype} back, {job.layout}"
    )
    for name in ("", "p50 us", "p99 us", "floor us", "ratio", "MB"):
        table.add_column(name, justify="right" if name else "left")
    for phase in result.phases:
        table.add_row(
            phase.name,
            f"{phase.time.p50:.1f}",
            f"{phase.time.p99:.1f}",
            f"{phase.floor_us:.1f}",
            f"{phase.ratio:.2f}",
            f"{phase.bytes / 1e6:.1f}",
        )
    for name, time in result.nccl:
        table.add_row(name, f"{time.p50:.1f}", f"{time.p99:.1f}", "", "", "")
    floor = sum(phase.floor_us for phase in result.phases)
    for name, time, least in (
        ("dispatch, both halves", result.dispatch, sum(phase.floor_us for phase in result.phases[:2])),
        ("combine, both halves", result.combine, sum(phase.floor_us for phase in result.phases[2:])),
        ("a step, together", result.together, floor),
    ):
        table.add_row(name, f"{time.p50:.1f}", f"{time.p99:.1f}", f"{least:.1f}", f"{time.p50 / least:.2f}", "")
    lines = [
        f"us between two events around a {'graph' if job.launch == 'graph' else 'plain launch'}, the slowest rank of "
        f"each iteration, median of {counted(job.rounds, 'round')} of {job.iterations}; a tiny kernel so launched: "
        f"{result.launch.p50:.1f}",
        f"floor: bytes that a GPU's ranks read and write, over {'the' if result.shared else 'a'} "
        f"{'copies of all of them at once' if result.shared else 'copy'}: {result.copy_gb_per_s:.0f} GB/s on this GPU"
        + (
            f"; or those they write to another GPU ({max(phase.link_bytes for phase in result.phases) / 1e6:.1f} MB a "
            f"half at most, all ranks), over a copy's {result.link_gb_per_s:.0f}"
            if result.gpus > 1
            else ""
        ),
        f"{result.blocks} blocks a rank, on {result.multiprocessors} multiprocessors of "
        f"{counted(result.gpus, 'GPU')}" + _side_by_side(result),
        f"checked before: {result.checked}",
    ]
    return Lines(table, Text("\n".join(lines)))


def _side_by_side(result: GpuMoeResult) -> str:
    if result.shared:
        return ": each rank's share of one under MPS"
    alone = result.job.threads or result.job.shape.ranks == result.gpus
    return "" if alone else "; without MPS, processes have a GPU in turn"


def new_table(title: str) -> Table:
    """Narrow enough for a terminal of 80 columns."""
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


_WEIGHED_BY_CALLER = (
    "in this layout the caller weighs a token's rows, outside the clock; the other library's time has it"
)
_KINDS = {"latency": "one way", "bandwidth": "bandwidth", "rate": "rate, one core"}


def _worst(measure: Measure) -> float:
    return measure.ours.p99 if measure.kind == "latency" else min(measure.ours.rounds)


def conditions(regime_ns: tuple[float, ...]) -> str:
    probe = f"{min(regime_ns):.0f} to {max(regime_ns):.0f} ns" if any(regime_ns) else "one rank, not measured"
    about = machine()
    return f"{about['cpu']}, {about['cores']} cores; shared memory between two cores: {probe} one way"


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def size_name(size: int) -> str:
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale and size % scale == 0:
            return f"{size // scale} {unit}"
    return f"{size} B"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


# ---- pictures --------------------------------------------------------------------------------------------------------


def need_matplotlib() -> Any:
    """pyplot, drawing into files only. UnsupportedError, with the mend, where it is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UnsupportedError(
            "a picture needs matplotlib: pip install 'eptransport[bench]'", operation="picture"
        ) from None
    return plt


def moe_picture(file: Path, result: MoeResult) -> None:
    """Left: where the time goes; right: how it spreads over iterations."""
    plt = need_matplotlib()
    shape = result.job.shape
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = [side.name for side in result.sides]
    dispatch = [side.dispatch.p50 for side in result.sides]
    combine = [side.combine.p50 for side in result.sides]
    colours = [_colour(side) for side in result.sides]
    bars.bar(names, dispatch, color=colours, label="dispatch")
    bars.bar(names, combine, bottom=dispatch, color=colours, alpha=0.55, label="combine")
    for place, side in enumerate(result.sides):
        bars.annotate(
            f"{side.total.p50:.1f} ms\n{side.ratio:.1f} x floor",
            (place, dispatch[place] + combine[place]),
            ha="center",
            va="bottom",
        )
    bars.set_ylabel("ms, slowest rank (dark: dispatch, light: combine)")
    bars.margins(y=0.2)
    for side in result.sides:
        ordered = sorted(side.samples)
        share = [(index + 1) / len(ordered) * 100 for index in range(len(ordered))]
        curves.step(ordered, share, where="post", color=_colour(side), label=side.name)
    curves.set_xlabel("ms, dispatch and combine")
    curves.set_ylabel("% of iterations")
    curves.set_xlim(left=0)
    curves.legend(loc="lower right")
    figure.suptitle(
        f"{shape.ranks} ranks x {shape.tokens} tokens, hidden {shape.hidden}, top-{shape.top_k} of {shape.experts}, "
        f"{shape.dispatch_dtype} there, {shape.combine_dtype} back, over {result.backend}"
    )
    save(plt, figure, file)


def p2p_picture(file: Path, result: P2pResult) -> None:
    """A panel a measure: each round of ours beside the floor's."""
    plt = need_matplotlib()
    count = len(result.measures)
    figure, panels = plt.subplots(1, count, figsize=(3.2 * count, 3.8), layout="constrained", squeeze=False)
    for panel, measure in zip(panels[0], result.measures, strict=True):
        rounds = range(1, len(measure.ours.rounds) + 1)
        panel.plot(rounds, measure.ours.rounds, "o-", color=COLOURS["eptransport"], label="eptransport")
        panel.plot(rounds, measure.floor.rounds, "s--", color=FLOOR_COLOUR, label=measure.floor_name)
        panel.set_title(f"{size_name(measure.bytes)} {_KINDS[measure.kind]}")
        panel.set_ylabel(measure.unit)
        panel.set_xlabel("round")
        panel.set_ylim(bottom=0)
        panel.legend()
    figure.suptitle(f"write with signal over {result.backend}")
    save(plt, figure, file)


def _colour(side: SideResult) -> str:
    return COLOURS.get(side.name, FLOOR_COLOUR)


def save(plt: Any, figure: Any, file: Path) -> None:
    try:
        figure.savefig(file, dpi=130)
    except (OSError, ValueError) as problem:  # no such folder; a suffix that names no format
        raise InvalidArgument(f"can't write {file}: {problem}") from None
    finally:
        plt.close(figure)
