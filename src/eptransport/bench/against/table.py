"""The tables and the picture of `bench p2p --against`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group as Lines
from rich.text import Text

from eptransport.bench.against.compare import AgainstResult, Figure, SideFigures
from eptransport.bench.report import (
    COLOURS,
    FLOOR_COLOUR,
    conditions,
    counted,
    need_matplotlib,
    new_table,
    save,
    size_name,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["against_picture", "against_table"]


def against_table(result: AgainstResult) -> RenderableType:
    job = result.job
    latency = [("latency", size) for size in job.latency_bytes]
    rest = [
        ("bandwidth", job.bandwidth_bytes),
        ("cpu", job.bandwidth_bytes),
        ("rate", job.rate_bytes),
        ("post", job.post_bytes),
    ]
    others = [side for side in result.sides if any(figure.ratio is not None for figure in side.figures)]
    lines = [
        f"medians of {counted(job.rounds, 'round')}, all sides in turn in each; p99 over all rounds",
        f"bandwidth: {size_name(job.bandwidth_bytes)} at depth {job.depth}; CPU s/GB: of both ranks in it; "
        f"rate: {size_name(job.rate_bytes)} at depth {job.rate_depth}; post: {size_name(job.post_bytes)}, from before "
        "the call to done, from Python",
        "ratios: ours to theirs, of the same round: us and CPU below 1, GB/s and M/s above 1, where ours is better; "
        "for what is driven from Python (*) ours is eptransport.py",
        *(f"{side.name} {side.version}: {side.how}" for side in result.sides),
        *(f"{side.name} FAILED {side.failed}" for side in result.sides if side.failed),
        *(f"{name} skipped: {reason}" for name, reason in result.skipped.items()),
        conditions(result.regime_ns),
    ]
    return Lines(
        _figures(f"one way over {result.backend}, us: p50 / p99", result.sides, latency, _p50_p99),
        _figures("throughput, CPU and posts", result.sides, rest, lambda figure: f"{figure.value.p50:.3g}"),
        _figures(
            "eptransport to each", others, latency + rest, lambda figure: f"{figure.ratio:.2f}" if figure.ratio else "-"
        ),
        Text("\n".join(lines)),
    )


_HEADS = {"bandwidth": "GB/s", "cpu": "CPU s/GB", "rate": "M/s", "post": "post us"}


def _figures(
    title: str,
    sides: list[SideFigures] | tuple[SideFigures, ...],
    columns: list[tuple[str, int]],
    cell: Callable[[Figure], str],
) -> RenderableType:
    table = new_table(title)
    table.add_column("", no_wrap=True)
    for kind, size in columns:
        table.add_column(_HEADS.get(kind, size_name(size)), justify="right", no_wrap=True)
    for side in sides:
        found = {(figure.kind, figure.bytes): figure for figure in side.figures}
        table.add_row(
            side.name + (" *" if side.python else ""),
            *(cell(found[column]) if column in found else "-" for column in columns),
            style="bold" if side.name.startswith("eptransport") else None,
        )
    return table


def _p50_p99(figure: Figure) -> str:
    return f"{_short(figure.value.p50)} / {_short(figure.value.p99)}"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def against_picture(file: Path, result: AgainstResult) -> None:
    """A panel a measure, a bar a side; the range over the rounds is marked."""
    plt = need_matplotlib()
    columns = dict.fromkeys((figure.kind, figure.bytes) for side in result.sides for figure in side.figures)
    across = 4
    down = -(-len(columns) // across)
    figure, panels = plt.subplots(down, across, figsize=(13, 3.2 * down), layout="constrained", squeeze=False)
    for panel in panels.flat[len(columns) :]:
        panel.axis("off")
    for panel, column in zip(panels.flat, columns, strict=False):
        found = [(side, each) for side in result.sides for each in side.figures if (each.kind, each.bytes) == column]
        for place, (side, each) in enumerate(found):
            colour = COLOURS["eptransport"] if side.name.startswith("eptransport") else FLOOR_COLOUR
            panel.barh(place, each.value.p50, color=colour)
            panel.plot([min(each.value.rounds), max(each.value.rounds)], [place, place], color="black", linewidth=1)
        panel.set_yticks(range(len(found)), [side.name for side, _ in found])
        panel.invert_yaxis()
        kind, size = column
        panel.set_title(f"{size_name(size)} {'one way' if kind == 'latency' else kind}, {found[0][1].unit}")
    figure.suptitle(f"side by side over {result.backend}")
    save(plt, figure, file)
