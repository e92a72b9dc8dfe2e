"""What each rank of the demo does. Under torchrun: rank, world and store come from the environment."""

from __future__ import annotations

import json
import os
import traceback
from dataclasses import dataclass
from typing import Any

from eptransport.bench.moe import MoeJob, RankResult
from eptransport.bench.shapes import PRESETS, Shape
from eptransport.errors import EptError, InternalError

__all__ = ["Plan", "Shown", "show"]


@dataclass(frozen=True)
class Plan:
    prompts: tuple[str, ...]
    """One a rank."""
    backend: str
    new_tokens: int
    tokens: int
    iterations: int
    rounds: int
    device: str = "cpu"
    """Of the model, cpu or cuda; the layer that is timed is on the CPU, and left out for cuda."""

    def new_tokens_of(self, rank: int) -> int:
        """Not alike, so that ranks finish at different times: a finished rank goes on with zero tokens."""
        return max(1, self.new_tokens - 16 * rank)

    @property
    def layer(self) -> MoeJob:
        base = PRESETS["deepseek-v3"]
        shape = Shape(
            ranks=len(self.prompts),
            tokens=self.tokens,
            hidden=base.hidden,
            experts=base.experts,
            top_k=base.top_k,
            dispatch_dtype=base.dispatch_dtype,
        )
        against = "gloo" if shape.ranks > 1 else None
        return MoeJob(shape, self.backend, against=against, iterations=self.iterations, rounds=self.rounds)


@dataclass(frozen=True)
class Shown:
    """What one rank has to show."""

    prompt: str
    continuation: str
    same_as_alone: bool
    """Rank 0: one process with all experts gives the same text."""
    experts: range
    """Of each layer of the model, held by this rank."""
    layer: RankResult | None


def show(plan: Plan) -> Shown | EptError:
    """The entry point of torchrun's ranks. An error is a result, see `_launch`."""
    try:
        return _show(plan)
    except EptError as error:
        return error
    except Exception as error:
        return InternalError(f"rank {os.environ.get('RANK')}:\n{''.join(traceback.format_exception(error))}")


def _show(plan: Plan) -> Shown:
    import torch

    from eptransport import Group, Settings
    from eptransport._process import cores
    from eptransport.bench.moe import measure
    from eptransport.bench.ranks import StoreRank
    from eptransport.demo import decode, encode, find_tiny_deepseek, generate, load_tiny_deepseek, serve_tiny_deepseek

    _silence_transformers()
    with Group(Settings(backend=plan.backend), name="demo") as group:
        torch.set_num_threads(max(1, cores() // group.world_size))
        prompt, new_tokens = plan.prompts[group.rank], plan.new_tokens_of(group.rank)
        _say(group.rank, "serving the model ...")
        device = torch.device("cpu")
        if plan.device == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        text = serve_tiny_deepseek(group, [prompt], new_tokens, device)[0]
        same = True
        if group.rank == 0:
            alone = generate(load_tiny_deepseek(device), [encode(prompt)], new_tokens)[0]
            same = decode(alone) == text
        layer = None
        if plan.device == "cpu":
            _say(group.rank, "timing a DeepSeek-V3 layer ...")
            # The group's own store: the launcher's may hold keys of an attempt before.
            store: Any = group._store
            layer = measure(plan.layer, StoreRank(store, group.rank, group.world_size, group), group)
    config = json.loads((find_tiny_deepseek() / "config.json").read_text())
    held = Shape(group.world_size, 1, 1, config["n_routed_experts"], 1).experts_of(group.rank)
    return Shown(prompt, text[len(prompt) :], same, held, layer)


def _silence_transformers() -> None:
    """Its progress bars, one for each rank and load, would bury what the demo shows."""
    from transformers import utils

    logging: Any = utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _say(rank: int, what: str) -> None:
    if rank == 0:
        print(what, flush=True)
