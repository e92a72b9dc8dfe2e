"""`eptransport top` and `eptransport prometheus`: what every rank of this user on this machine does, from outside."""

from __future__ import annotations

import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from eptransport.errors import InvalidArgument
from eptransport.metrics import Metrics, pages, wait_matrix
from eptransport.prometheus import CONTENT_TYPE, prometheus_text

__all__ = ["prometheus", "top"]

MOST_ROWS = 200
"""Of the table of peers and of the wait matrix; 64 ranks have 4,032 pairs."""
WIDTH = 160
"""Columns where the output is no terminal."""

Before = dict[tuple[int, str, int], Metrics]


def top(
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also each peer and phase.")] = False,
    waits: Annotated[bool, typer.Option("--waits", help="Also who waits for whom.")] = False,
    prometheus_out: Annotated[bool, typer.Option("--prometheus", help="Print Prometheus text once and end.")] = False,
    group: Annotated[str | None, typer.Option(help="Only the group of this name.")] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show live what every rank of this user on this machine sends, receives and waits for. Ctrl-C ends it."""
    if prometheus_out:
        typer.echo(prometheus_text(_of(group)), nl=False)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    if once:
        console.print(_shown(_of(group), {}, peers, waits))
        return
    before: Before = {}
    try:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                now = _of(group)
                live.update(_shown(now, before, peers, waits), refresh=True)
                before = {(one.pid, one.job, one.rank): one for one in now}
                time.sleep(interval)
    except KeyboardInterrupt:
        return


def prometheus(
    listen: Annotated[
        str | None, typer.Option(help="ADDR:PORT to serve /metrics at; an empty ADDR is 127.0.0.1, port 0 any.")
    ] = None,
) -> None:
    """Print what every rank of this user on this machine counts as Prometheus text, or serve it to a scraper."""
    if listen is None:
        typer.echo(prometheus_text(), nl=False)
        return
    server = serve(listen)
    host, port = server.server_address[:2]
    typer.echo(f"serving http://{host!s}:{port}/metrics")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def serve(listen: str) -> ThreadingHTTPServer:
    """A server of /metrics, bound and not yet serving."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"--listen {listen}: must be ADDR:PORT, as 127.0.0.1:9400")
    try:
        return ThreadingHTTPServer((host.strip("[]") or "127.0.0.1", int(port)), _Handler)
    except OSError as error:
        raise InvalidArgument(f"can't listen at {listen}: {error.strerror}") from None


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.split("?")[0] not in ("/", "/metrics"):
            self.send_error(404)
            return
        body = prometheus_text().encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A line for each scrape would only fill a log."""


def _of(group: str | None) -> list[Metrics]:
    return [one for one in pages() if group is None or one.group == group]


def _shown(now: list[Metrics], before: Before, peers: bool, waits: bool) -> RenderableType:
    if not now:
        return "no group of this user runs on this machine"
    tables: list[RenderableType] = [_ranks(now, before), _rails(now)]
    if peers:
        tables.append(_peers(now))
    if waits:
        tables.append(_waits(now))
    return Group(*tables)


def _ranks(now: list[Metrics], before: Before) -> Table:
    per = "/s" if before else ""
    table = Table(title="ranks", title_justify="left")
    for name in ("group", "rank", "pid", "backend", "up"):
        table.add_column(name)
    for name in (f"out{per}", f"in{per}", f"operations{per}", "no room", "retries", "credits", "registered", "moved"):
        table.add_column(name, justify="right")
    table.add_column("waits now for")
    for one in now:
        old = before.get((one.pid, one.job, one.rank))
        seconds = (one.read_ns - old.read_ns) / 1e9 if old else 1.0
        out, into, operations = ((new - was) / seconds for new, was in zip(_sums(one), _sums(old), strict=True))
        up = sum(peer.status == 2 for peer in one.peers)
        table.add_row(
            one.group,
            f"{one.rank} of {one.world}",
            str(one.pid),
            one.backend,
            f"{up} of {len(one.peers)}",
            _bytes(out),
            _bytes(into),
            f"{operations:,.0f}",
            f"{sum(peer.later for peer in one.peers):,}",
            f"{sum(peer.retries for peer in one.peers):,}",
            f"{min((peer.credits for peer in one.peers), default=0):,}",
            "suspended" if one.suspended else _bytes(one.registered_bytes),
            _ago(one.last_progress_ns, one.read_ns),
            _waits_now(one),
        )
    return table


def _sums(one: Metrics | None) -> tuple[int, int, int]:
    if one is None:
        return 0, 0, 0
    return (
        sum(peer.tx_bytes for peer in one.peers),
        sum(peer.rx_bytes for peer in one.peers),
        sum(peer.tx_operations + peer.rx_operations for peer in one.peers),
    )


def _waits_now(one: Metrics) -> str:
    cells = [
        f"rank {cell.peer} in {cell.phase} for {_seconds(cell.now_s)}" for cell in one.waits() if cell.now_s >= 0.001
    ]
    return "; ".join(cells[:4]) + (f" and {len(cells) - 4} more" if len(cells) > 4 else "")


def _rails(now: list[Metrics]) -> Table:
    table = Table(title="rails", title_justify="left")
    for name in ("group", "rank", "rail"):
        table.add_column(name)
    for name in ("out", "in", "operations", "messages", "no room", "errors", "made again", "sent again"):
        table.add_column(name, justify="right")
    for one in now:
        for rail in one.rails:
            table.add_row(
                one.group,
                str(one.rank),
                rail.name,
                _bytes(rail.tx_bytes),
                _bytes(rail.rx_bytes),
                f"{rail.tx_operations + rail.rx_operations:,}",
                f"{rail.tx_sends + rail.rx_sends:,}",
                *(f"{value:,}" for value in (rail.later, rail.errors, rail.reconnects, rail.replayed)),
            )
    return table


def _peers(now: list[Metrics]) -> Table:
    table = Table(title="peers and phases", title_justify="left")
    for name in ("group", "rank", "peer", "phase"):
        table.add_column(name)
    for name in (
        "bytes out",
        "in",
        "messages out",
        "in",
        "rows out",
        "in",
        "arrival p50",
        "p99",
        "completion p50",
        "p99",
    ):
        table.add_column(name, justify="right")
    rows = 0
    for one in now:
        for peer in one.peers:
            for phase in peer.phases:
                if not phase.tx_messages and not phase.rx_messages:
                    continue
                rows += 1
                if rows > MOST_ROWS:
                    continue
                table.add_row(
                    one.group,
                    str(one.rank),
                    str(peer.rank),
                    phase.phase,
                    _bytes(phase.tx_bytes),
                    _bytes(phase.rx_bytes),
                    *(f"{value:,}" for value in (phase.tx_messages, phase.rx_messages, phase.tx_rows, phase.rx_rows)),
                    *(_seconds(phase.arrivals.quantile(part)) for part in (0.5, 0.99)),
                    *(_seconds(peer.completions.quantile(part)) for part in (0.5, 0.99)),
                )
    table.caption = _more(rows)
    return table


def _waits(now: list[Metrics]) -> Table:
    table = Table(title="who waits for whom", title_justify="left")
    for name in ("group", "rank", "for", "in"):
        table.add_column(name)
    for name in ("waits", "total", "longest", "now"):
        table.add_column(name, justify="right")
    rows = 0
    for name in sorted({one.job for one in now}):
        members = [one for one in now if one.job == name]
        for cell in wait_matrix(members):
            rows += 1
            if rows <= MOST_ROWS:
                table.add_row(
                    members[0].group,
                    str(cell.rank),
                    str(cell.peer),
                    cell.phase,
                    f"{cell.count:,}",
                    _seconds(cell.total_s),
                    _seconds(cell.max_s),
                    _seconds(cell.now_s) if cell.now_s else "",
                )
    table.caption = _more(rows)
    return table


def _more(rows: int) -> str | None:
    return f"{rows - MOST_ROWS} more" if rows > MOST_ROWS else None


def _bytes(value: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 else f"{value:,.0f} s"
    return f"{value * 1e9:.0f} ns" if value else "0"


def _ago(then_ns: int, now_ns: int) -> str:
    return f"{_seconds(max(0, now_ns - then_ns) / 1e9)} ago" if then_ns else "never"
