"""The small model of `eptransport demo`, and greedy generation over ranks that finish at different times.

Imports torch and transformers.
"""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from eptransport.adapters.transformers import ExpertParallel, expert_parallel
from eptransport.errors import ConfigError

if TYPE_CHECKING:
    from eptransport import Group, Store

__all__ = ["Finish", "decode", "encode", "find_tiny_deepseek", "generate", "load_tiny_deepseek", "serve_tiny_deepseek"]


def serve_tiny_deepseek(
    group: Group, prompts: Sequence[str], new_tokens: int, device: torch.device | str = "cpu"
) -> list[str]:
    """This rank's prompts (none, one or several) and their continuations, experts spread over the group, on a CPU or a
    CUDA device.

    Collective: all ranks call it, each with its own prompts and its own number of new tokens.
    """
    parallel = expert_parallel(load_tiny_deepseek(device), group, max_tokens=1024)
    finish = Finish(group._store, group.rank, group.world_size)
    try:
        texts = generate(parallel, [encode(prompt) for prompt in prompts], new_tokens, finish)
    finally:
        parallel.close()
    return [decode(text) for text in texts]


def load_tiny_deepseek(device: torch.device | str = "cpu") -> Any:
    """The DeepSeek-V3 of 1.2 million parameters that `examples/tiny_deepseek/train.py` trained, in fp32, whole."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(find_tiny_deepseek(), dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    return model.train(False).to(device)


def find_tiny_deepseek() -> pathlib.Path:
    """Its folder: in the installed package, or in the source tree."""
    here = pathlib.Path(__file__).resolve().parent
    candidates = [here / "examples" / "tiny_deepseek", here.parents[1] / "examples" / "tiny_deepseek"]
    for folder in candidates:
        if (folder / "model.safetensors").is_file():
            return folder
    raise ConfigError(
        f"the demo's model is in neither {candidates[0]} nor {candidates[1]}: reinstall eptransport, or make the model "
        "with examples/tiny_deepseek/train.py"
    )


def encode(text: str) -> list[int]:
    """A byte is a token."""
    return list(text.encode())


def decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@torch.inference_mode()
def generate(
    model: ExpertParallel | torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    finish: Finish | None = None,
    *,
    stop: int | None = None,
    logits: list[torch.Tensor] | None = None,
) -> list[list[int]]:
    """Greedy continuations of a batch of prompts of any lengths, prompts included.

    Ends after `new_tokens`, or once every prompt has met the `stop` token. With `finish`, a rank that is done, or had
    no prompts, goes on calling the model with zero tokens until all ranks are done: their tokens may need its experts.
    Collective then. Each step's logits of the last position, [batch, vocabulary], are appended to `logits`.
    """
    parallel = model if isinstance(model, ExpertParallel) else None
    module: Any = parallel.model if parallel else model
    texts = [list(prompt) for prompt in prompts]
    step = 0
    if texts and new_tokens > 0:
        batch = _Batch(module, prompts)
        running = [True] * len(texts)
        while any(running) and step < new_tokens:
            scores = batch.step()
            if logits is not None:
                logits.append(scores)
            chosen = scores.argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                if running[row]:
                    texts[row].append(token)
                    running[row] = token != stop
            batch.append(chosen)
            step += 1
    if finish is not None:
        finish.announce(step)
        while not finish.everyone(step):
            module(input_ids=torch.empty(0, 1, dtype=torch.int64, device=_device_of(module)))
            step += 1
    return texts


def _device_of(module: Any) -> torch.device:
    device: torch.device = next(module.parameters()).device
    return device


class _Batch:
    """Prompts of unlike lengths side by side, padded on the left, with a key-value cache."""

    def __init__(self, module: Any, prompts: Sequence[Sequence[int]]) -> None:
        from transformers import DynamicCache

        if not all(len(prompt) for prompt in prompts):
            raise ConfigError("a prompt is empty; give it at least one token")
        longest = max(len(prompt) for prompt in prompts)
        self.module = module
        device = _device_of(module)
        self.tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache = DynamicCache(config=module.config)
        names = inspect.signature(module.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # renamed in 5.24

    def step(self) -> torch.Tensor:
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.tokens.shape[1] :]
        output = self.module(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        scores: torch.Tensor = output.logits[:, -1]
        return scores

    def append(self, chosen: torch.Tensor) -> None:
        self.tokens = chosen[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.tokens)], dim=1)


class Finish:
    """How ranks agree on the last step without a barrier. One instance for one generation; made on every rank.

    A rank writes down the number of steps that it needed, once it knows it and before its next step. A rank that has
    made s steps knows that every other one has begun its step number s (no dispatch ends without a message from
    each), so has written down by then whether it needed less than s. So "all needed less than s" is answered alike by
    all ranks that have made s steps; they stop there, one step after the last of them needed to.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store
        time = store.add(f"ept-finish/{rank}", 1)  # what earlier generations left is never read
        self._keys = [f"ept-finish/{time}/{other}" for other in range(world_size)]
        self._mine = self._keys[rank]

    def announce(self, steps: int) -> None:
        self._store.set(self._mine, str(steps))

    def everyone(self, steps: int) -> bool:
        """Whether all ranks needed less steps than this one has made."""
        return all(self._store.check([key]) and int(self._store.get(key)) < steps for key in self._keys)
