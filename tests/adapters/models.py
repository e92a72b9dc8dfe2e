# SPDX-License-Identifier: Apache-2.0
"""The models that the adapter's tests serve, and what is written down of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from eptransport import demo
from eptransport.adapters.transformers import ExpertParallel

transformers = pytest.importorskip("transformers", reason="the adapter's tests need transformers")
NAMES = ("tiny", "deepseek_v3", "qwen3_moe", "mixtral")


def build(name: str) -> Any:
    """`tiny` is the demo's trained model; the others have random weights, the same in every process. All in fp32."""
    torch.manual_seed(17)
    # Eager attention, because the error analysis follows its operations one by one.
    if name == "tiny":
        model = demo.load_tiny_deepseek()
        model.set_attn_implementation("eager")
        return model
    small: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    if name == "deepseek_v3":  # expert groups, compressed queries, every layer a MoE
        attention: dict[str, Any] = {"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16}
        heads = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
        experts = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2}
        layers = {"first_k_dense_replace": 0, "moe_intermediate_size": 48, "n_shared_experts": 1}
        config = transformers.DeepseekV3Config(**{**small, **attention, **heads, **experts, **layers})
        model = transformers.DeepseekV3ForCausalLM(config)
    elif name == "qwen3_moe":  # 7 experts: uneven over 2 and over 4 ranks
        experts = {"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
        config = transformers.Qwen3MoeConfig(**small, **experts, head_dim=16, mlp_only_layers=[])
        model = transformers.Qwen3MoeForCausalLM(config)
    else:  # 3 experts: over 4 ranks one rank has none
        config = transformers.MixtralConfig(**small, num_local_experts=3, num_experts_per_tok=2)
        model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model.float().eval()


def experts_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "is_transposed")}


class Choices:
    """Which experts the routers chose, a layer and a forward at a time: sorted ids, [tokens, top_k]."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: list[torch.Tensor] = []
        for module in experts_of(model).values():
            module.register_forward_pre_hook(self._record)

    def _record(self, _module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if len(arguments[1]):
            self.seen.append(arguments[1].sort(-1).values.clone())


def run(
    model: ExpertParallel | Any, prompts: Sequence[str], new_tokens: int, finish: demo.Finish | None = None
) -> dict[str, Any]:
    """Greedy texts of a batch of prompts, each step's logits, and the choices."""
    choices = Choices(model.model if isinstance(model, ExpertParallel) else model)
    logits: list[torch.Tensor] = []
    texts = demo.generate(model, [demo.encode(prompt) for prompt in prompts], new_tokens, finish, logits=logits)
    return {"texts": texts, "logits": logits, "choices": choices.seen}


def real_choices(seen: Sequence[torch.Tensor], prompts: Sequence[str], steps: int) -> list[torch.Tensor]:
    """Less those of the padding before shorter prompts: nothing that is compared depends on them."""
    if not prompts:
        return list(seen)
    lengths = torch.tensor([len(demo.encode(prompt)) for prompt in prompts])
    longest = int(lengths.max())
    real = (torch.arange(longest) >= (longest - lengths)[:, None]).flatten()
    layers = len(seen) // steps
    return [ids[real] if number < layers else ids for number, ids in enumerate(seen)]
