"""`eptransport demo`: four ranks, started by torchrun's own API, serve a model together; then a big layer is timed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from eptransport.cli.bench import Device, check_cuda, check_outputs
from eptransport.errors import EptError, InternalError, PeerLost, Timeout, UnsupportedError

if TYPE_CHECKING:
    from eptransport.cli.demo_rank import Shown

__all__ = ["demo"]

PROMPTS = (
    "The for statement is used to ",
    "A class definition ",
    "If an exception ",
    "The import statement ",
    "Operators ",
    "A function call ",
    "Strings ",
    "The value of ",
)
NEEDS = ("torch", "numpy", "transformers", "safetensors", "matplotlib")


def demo(
    prompt: Annotated[str, typer.Option(help="What rank 0 continues; the other ranks have prompts of their own.")] = "",
    ranks: Annotated[int, typer.Option(min=1, max=len(PROMPTS), help="Processes on this machine.")] = 4,
    backend: Annotated[str, typer.Option(help="auto, a backend's name, or a plugin's path.")] = "tcp",
    device: Annotated[
        Device,
        typer.Option(help="Of the model; cuda: a GPU a rank, or shared, and no layer is timed."),
    ] = Device.cpu,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Bytes that rank 0 generates; each further rank 16 less.")
    ] = 160,
    tokens: Annotated[int, typer.Option(min=1, help="Of each rank, in the layer that is timed.")] = 128,
    iterations: Annotated[int, typer.Option(min=1, help="Of each side, a round.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Each figure is the median of so many rounds.")] = 3,
    picture: Annotated[Path, typer.Option(help="The picture to write.")] = Path("eptransport-demo.png"),
) -> None:
    """Serve a small DeepSeek-V3 over 4 ranks, then time one full-size DeepSeek-V3 layer and check it to the bit."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"the demo needs {', '.join(missing)}: pip install 'eptransport[demo]'", operation="demo"
        )
    check_outputs(picture)
    if device is Device.cuda:
        check_cuda("demo")
    from eptransport import Settings, choose
    from eptransport.bench import report
    from eptransport.bench.moe import combine_ranks
    from eptransport.cli.demo_rank import Plan

    choose(Settings(backend=backend), ranks, one_process=False)
    prompts = (prompt or PROMPTS[0], *PROMPTS[1:ranks])
    plan = Plan(
        prompts=prompts,
        backend=backend,
        new_tokens=new_tokens,
        tokens=tokens,
        iterations=iterations,
        rounds=rounds,
        device=device.value,
    )
    console = Console(highlight=False)
    console.print(f"starting {ranks} ranks over {backend}, each with a share of the experts ...")
    shown = _launch(plan)

    for rank, one in enumerate(shown):
        text = Text.assemble((one.prompt, "bold"), one.continuation)
        console.print(Panel(text, title=f"rank {rank}", title_align="left"))
    whole = "the same text as" if shown[0].same_as_alone else "NOT the text of"
    console.print(f"rank 0: {whole} one process with all experts; {_routed(shown)}\n", soft_wrap=True)
    timed = [one.layer for one in shown if one.layer is not None]
    if timed:
        result = combine_ranks(plan.layer, timed)
        console.print(report.moe_table(result))
        report.moe_picture(picture, result)
        console.print(f"picture: {picture}")
    else:
        console.print("a layer of GPU ranks is timed by: eptransport bench moe --device cuda")
    if not shown[0].same_as_alone:
        raise InternalError("the ranks together generated another text than one process alone", operation="demo")


def _routed(shown: list[Shown]) -> str:
    parts = ", ".join(f"{one.experts.start}-{one.experts.stop - 1}" for one in shown)
    return f"experts of each layer by rank: {parts}"


def _launch(plan: Any) -> list[Shown]:
    """Runs the ranks as torchrun would. A rank that fails hands its error back, so that ours is shown and not torch's
    report of a child that exited."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from eptransport.cli.demo_rank import show

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(plan.prompts),
        run_id="eptransport-demo",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        by_rank = elastic_launch(config, show)(plan)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise PeerLost(
            f"rank {rank} of the demo ended with exit code {failure.exitcode}: {failure.message}", peer=rank
        ) from None
    results = [by_rank[rank] for rank in range(len(plan.prompts))]
    errors = [result for result in results if isinstance(result, EptError)]
    if errors:
        # A rank that failed by itself, rather than one that lost it.
        raise next((error for error in errors if not isinstance(error, (PeerLost, Timeout))), errors[0])
    return results
