"""`eptransport doctor` and `eptransport settings`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from eptransport.errors import InvalidArgument

if TYPE_CHECKING:
    from eptransport.efa import Finding

__all__ = ["doctor", "settings"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def doctor(
    as_json: Json = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also where plugins are and their settings.")
    ] = False,
    listen: Annotated[
        str | None,
        typer.Option(metavar="[HOST:]PORT", help="Test the network with a doctor that dials here."),
    ] = None,
    peer: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Test the network with the doctor that listens there.")
    ] = None,
    deadline: Annotated[float, typer.Option(min=1, help="Of each stage of the test with another, s.")] = 20.0,
) -> None:
    """Which backends can run here, what the others lack and how to get it; which one would be taken; all settings that
    are not at their default. Exit code 1 if no job could start.

    With --listen on one machine and --peer on another: real writes with signals both ways over the backend that both
    choose, and which direction doesn't get through. Exit code 1 if one doesn't."""
    if listen is not None or peer is not None:
        _self_test(listen, peer, deadline, as_json)
        return
    from eptransport.doctor import diagnose

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
        raise typer.Exit(0 if found.healthy else 1)

    console = Console(highlight=False)
    extras = ", ".join(f"{name} {version or '(missing)'}" for name, version in found.extras.items())
    console.print(f"eptransport {found.version}, Python {found.python}, {found.system}, {found.cores} cores")
    console.print(f"beside it: {extras}", markup=False)

    table = Table(title="backends", title_justify="left", show_lines=verbose)
    for name in ("backend", "here", "what it would use, or what is missing", "mend"):
        table.add_column(name, overflow="fold")
    for backend in found.backends:
        if not backend.path:
            continue
        finding = [backend.finding]
        if backend.waives:
            finding.append(f"waives clause {backend.waives}")
        if verbose:
            finding += [f"{backend.version}, {backend.source}: {backend.path}", *backend.options]
        state = "[green]usable[/]" if backend.usable else "[yellow]no[/]"
        table.add_row(backend.name, state, "\n".join(map(_plain, finding)), _plain(backend.mend))
    absent: dict[tuple[str, str], list[str]] = {}
    for backend in found.backends:
        if not backend.path:
            absent.setdefault((backend.finding, backend.mend), []).append(backend.name)
    for (why, mend), names in absent.items():
        table.add_row(", ".join(names), "[yellow]no[/]", _plain(why), _plain(mend))
    console.print(table)
    _show_card(console, "AWS EFA", found.efa, verbose)
    _show_card(console, "ConnectX, for kernels that post by themselves", found.connectx, verbose)
    for source, reason in found.refused.items():
        console.print(f"[yellow]refused[/] {_plain(source)}: {_plain(reason)}", soft_wrap=True)

    for choice in found.choices:
        order = f" (order: {', '.join(choice.order)})" if choice.order else ""
        taken = f"[green]{choice.backend}[/]" if choice.backend else "[red]none[/]"
        console.print(f"ranks that are {choice.where}: {taken}, {_plain(choice.why)}{order}", soft_wrap=True)

    changed = [row for row in found.settings if row.source != "default"]
    console.print(f"settings not at their default: {'none' if not changed else ''}")
    for row in changed:
        console.print(f"  {row}", markup=False, soft_wrap=True)
    if found.problem:
        console.print(f"[bold red]no job can start:[/] {_plain(found.problem)}", soft_wrap=True)
        raise typer.Exit(1)


def _show_card(console: Console, title: str, findings: Sequence[Finding], verbose: bool) -> None:
    """Nothing of a card that the machine hasn't got, unless asked, or something else is wrong."""
    if not verbose and not findings[0].mend and all(each.state == "ok" for each in findings[1:]):
        return
    table = Table(title=title, title_justify="left")
    for name in ("what", "", "seen", "mend"):
        table.add_column(name, overflow="fold")
    colours = {"ok": "green", "note": "yellow", "missing": "red"}
    for each in findings:
        state = f"[{colours[each.state]}]{each.state}[/]"
        table.add_row(each.what, state, _plain(each.seen), _plain(each.mend))
    console.print(table)


def _self_test(listen: str | None, peer: str | None, deadline: float, as_json: bool) -> None:
    from eptransport import Settings
    from eptransport.self_test import WRITES, dialled, listened

    if listen is not None and peer is not None:
        raise InvalidArgument("--listen and --peer: one side listens, the other dials")
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)

    def notice(stage: str) -> None:
        console.print(_plain(stage))

    if listen is not None:
        found = listened(listen, Settings(), deadline, notice)
    else:
        found = dialled(str(peer), Settings(), deadline, notice)
    if as_json:
        typer.echo(json.dumps({"passed": found.passed, **dataclasses.asdict(found)}, indent=2))
        raise typer.Exit(0 if found.passed else 1)
    if not found.connected:
        console.print(f"[red]not connected[/] over {found.backend}: {_plain(found.problem)}")
    for each in found.directions:
        way = f"rank {each.source} ({found.hosts[each.source]}) to rank {each.target} ({found.hosts[each.target]})"
        outcome = f"[green]{WRITES} writes came[/]" if each.passed else f"[red]blocked:[/] {_plain(each.problem)}"
        console.print(f"{_plain(way)} over {found.backend}: {outcome}")
    if not found.passed:
        console.print(f"[yellow]mend:[/] {_plain(found.mend)}")
        raise typer.Exit(1)


def settings(as_json: Json = False) -> None:
    """Every setting: its value, where that came from, and what it is for."""
    from eptransport import Settings

    rows = Settings().explain()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    table = Table(title="settings", title_justify="left")
    for name in ("environment", "value", "from", "what it is for"):
        table.add_column(name, overflow="fold")
    for row in rows:
        style = None if row.source == "default" else "bold"
        table.add_row(row.variable, _plain(row.value), row.source, _plain(row.doc), style=style)
    Console(highlight=False).print(table)


def _plain(text: str) -> str:
    """So that a bracket in a value is no markup."""
    from rich.markup import escape

    return escape(text)
