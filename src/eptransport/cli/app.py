"""The command's tree, and what an error looks like."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import eptransport
from eptransport.cli.bench import bench
from eptransport.cli.conformance import conformance
from eptransport.cli.demo import demo
from eptransport.cli.doctor import doctor, settings
from eptransport.cli.top import prometheus, top
from eptransport.errors import ConfigError, EptError, InvalidArgument


class _OneLineErrors(TyperGroup):
    """Our errors say what to do in their sentence; a traceback would hide it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EptError as error:
            Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]error:[/]", end=" ")
            Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(error.message)
            raise typer.Exit(2 if isinstance(error, (ConfigError, InvalidArgument)) else 1) from None


app = typer.Typer(
    name="eptransport",
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Expert-parallel dispatch and combine over any network.",
)
app.add_typer(bench, name="bench")
app.command()(demo)
app.command()(conformance)
app.command()(doctor)
app.command()(settings)
app.command()(top)
app.command()(prometheus)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(eptransport.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


def main() -> None:
    app()
