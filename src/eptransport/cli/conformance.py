"""`eptransport conformance`: the contract, clause by clause, on any backend."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from eptransport.errors import InvalidArgument, UnsupportedError

if TYPE_CHECKING:
    from eptransport.conformance.run import Outcome

__all__ = ["conformance"]

COLOURS = {"passed": "green", "failed": "red", "crashed": "red", "hung": "red", "waived": "yellow", "skipped": "dim"}


def conformance(
    backend: Annotated[str, typer.Argument(help="A backend's name, or a plugin's path.")],
    clause: Annotated[int | None, typer.Option(help="Only the checks of this clause.")] = None,
    seed: Annotated[int, typer.Option(min=1, help="Of the checks' random choices, and of a backend's adversary.")] = 1,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of the backend; may be repeated.")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds until a check is taken to hang [180].", show_default=False),
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(
            min=30,
            help="Seconds that a check waits for what must happen [30]; more on a slow or an emulated machine.",
            show_default=False,
        ),
    ] = None,
    try_waived: Annotated[
        bool,
        typer.Option("--try-waived", help="Make the checks of waived clauses too: which of them hold all the same?"),
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
) -> None:
    """Runs the shipped checks of the contract on a backend, in or out of tree, and prints a table by clause. A backend
    that can misbehave on purpose (loopback's adversary) is tried that way too. Exit code 1 if a clause is broken."""
    if importlib.util.find_spec("numpy") is None:
        raise UnsupportedError("the checks need numpy: pip install numpy")
    if junit is not None and not junit.resolve().parent.is_dir():
        raise InvalidArgument(f"the folder of {junit} does not exist")
    from eptransport.conformance.junit import write_junit
    from eptransport.conformance.registry import checks
    from eptransport.conformance.run import LIMIT_S, find, run, subjects
    from eptransport.conformance.world import PATIENCE_S

    options = dict(_split(each) for each in option or [])
    plugin = find(backend, options)
    patience_s = patience or PATIENCE_S
    total = len(subjects(plugin, seed, options)) * len(checks(clause))
    outcomes: list[Outcome] = []
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"conformance of {plugin.name}", total=total)
        for outcome in run(plugin, clause, seed, options, timeout or LIMIT_S, try_waived, patience_s):
            outcomes.append(outcome)
            bar.advance(task)
    console.print(_table(outcomes))
    for outcome in outcomes if try_waived else ():
        if outcome.verdict == "waived":
            console.print(Text(f"{outcome.check} {outcome.text}", "yellow"), soft_wrap=True)
    for outcome in outcomes:
        if outcome.broken:
            console.print(
                Text(f"{outcome.check} {outcome.verdict} on {outcome.subject}: {outcome.promise}", "bold red")
            )
            console.print(Text(f"    seen: {outcome.text}"), soft_wrap=True)
    if junit is not None:
        write_junit(junit, outcomes)
    if any(outcome.broken for outcome in outcomes):
        raise typer.Exit(1)


def _split(option: str) -> tuple[str, str]:
    name, equals, value = option.partition("=")
    if not equals or not name:
        raise InvalidArgument(f"--option is {option!r}; NAME=VALUE is meant")
    return name, value


def _table(outcomes: list[Outcome]) -> Table:
    """A row a clause, a column a subject."""
    from eptransport.conformance import TITLES

    labels = list(dict.fromkeys(outcome.subject for outcome in outcomes))
    table = Table(title="the contract", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("clause")
    for label in labels:
        table.add_column(label, overflow="fold")
    for clause in sorted({outcome.clause for outcome in outcomes}):
        cells = []
        for label in labels:
            of = [outcome for outcome in outcomes if (outcome.clause, outcome.subject) == (clause, label)]
            counts = {verdict: sum(outcome.verdict == verdict for outcome in of) for verdict in COLOURS}
            words = [(f"{count} {verdict}", COLOURS[verdict]) for verdict, count in counts.items() if count]
            cells.append(Text(", ").join(Text(*word) for word in words))
        table.add_row(str(clause), TITLES[clause], *cells)
    return table
