"""Trains the small DeepSeek-V3 that `eptransport demo` serves, on English that every Python carries with it.

    python examples/tiny_deepseek/train.py --minutes 12 --threads 2        # or --device cuda --minutes 5.5

A byte is a token: there is no tokenizer to ship, and `bytes.decode` is the whole of detokenising. The text is
`pydoc_data.topics`, the language reference behind `help()`, less its grammars, tables and code: 1.2 million parameters
learn one thing well or four badly. Every twentieth paragraph is held out; the loss and the expert loads printed at the
end are measured there.

Sixteen experts on so little text collapse onto a few unless something holds them apart. What holds them apart is
DeepSeek-V3's own rule (its report, section 2.1.2): after each step an expert that got more than its share has its
selection bias lowered by a fixed amount, one that got less has it raised. The bias only selects: it never weighs an
output, so it costs no loss term. The script refuses to save a model whose least loaded expert gets 1 % or less.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re
import time
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
SEED = 20240607
CONTEXT = 512  # bytes; the model knows no position beyond
LEAST_LOAD = 0.01  # of all (token, expert) pairs of a layer; an even share of 16 experts is 0.0625


def main() -> None:
    options = parse()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    train_text, held_out = (text.to(options.device) for text in corpus())
    model = DeepseekV3ForCausalLM(config()).to(options.device)
    model.set_experts_implementation("grouped_mm")
    loads = ExpertLoads(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_text):,} bytes to learn from")

    steps = fit(model, loads, train_text, options)

    loads.clear()
    loss = evaluate(model, held_out)
    report(steps, loss, loads)
    print(sample(model, "When a function is called, "))
    model.cpu().save_pretrained(options.out)
    print(f"saved to {options.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="wall clock to spend; the learning rate ends with it")
    parser.add_argument("--steps", type=int, help="stop after so many steps instead: the same model on every run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--lr", type=float, default=5e-3, help="peak, of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak, of Muon")
    parser.add_argument("--bias-step", type=float, default=4e-3, help="how far a step moves an expert's selection bias")
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    return parser.parse_args()


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    texts = [paragraph for name in sorted(topics) for paragraph in prose(topics[name])]
    paragraphs = list(dict.fromkeys(texts))  # several topics quote the same page
    held_out = paragraphs[::20]
    learnt = [paragraph for number, paragraph in enumerate(paragraphs) if number % 20]
    return tokens(learnt), tokens(held_out)


def prose(topic: str) -> list[str]:
    """The topic's paragraphs of sentences, each on one line."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", topic)]
    return [p for p in paragraphs if len(p) > 60 and p[-1] in ".:" and plain(p) > 0.9 and ">>>" not in p]


def plain(text: str) -> float:
    return sum(c.isalpha() or c in " ,.'\"" for c in text) / len(text)


def tokens(paragraphs: list[str]) -> torch.Tensor:
    return torch.tensor(list("\n\n".join(paragraphs).encode()))


def config() -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


class ExpertLoads:
    """Counts, per MoE layer, how many (token, choice) pairs each expert got since the last `clear`."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        self.layers = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
        self.counts = [torch.zeros(model.config.n_routed_experts, device=model.device) for _ in self.layers]
        for layer, count in zip(self.layers, self.counts, strict=True):
            layer.experts.register_forward_pre_hook(counter(count))

    def clear(self) -> None:
        for count in self.counts:
            count.zero_()

    def shares(self) -> list[torch.Tensor]:
        return [count / count.sum() for count in self.counts]

    @torch.no_grad()
    def rebalance(self, step: float) -> None:
        """DeepSeek-V3's rule: by the sign of the error, never by its size."""
        for layer, count in zip(self.layers, self.counts, strict=True):
            layer.gate.e_score_correction_bias += step * torch.sign(count.mean() - count)
        self.clear()


def counter(count: torch.Tensor) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        count.add_(torch.bincount(arguments[1].reshape(-1), minlength=len(count)))

    return hook


def fit(model: DeepseekV3ForCausalLM, loads: ExpertLoads, text: torch.Tensor, options: argparse.Namespace) -> int:
    optimisers = optimisers_of(model, options)
    generator = torch.Generator().manual_seed(SEED)
    start, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        rate = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        starts = torch.randint(len(text) - options.context - 1, (options.batch, 1), generator=generator)
        window = text[(starts + torch.arange(options.context + 1)).to(text.device)]
        loss = next_byte_loss(model, window)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
            optimiser.step()
        if step % 100 == 0:
            spread = ", ".join(f"{share.min():.1%}..{share.max():.1%}" for share in loads.shares())
            seconds = time.monotonic() - start
            print(f"step {step:5}  {seconds:5.0f} s  loss {loss.item():.3f}  loads {spread}", flush=True)
        loads.rebalance(options.bias_step * rate)
        step += 1
        progress = step / options.steps if options.steps else (time.monotonic() - start) / (60 * options.minutes)
    return step


def optimisers_of(model: DeepseekV3ForCausalLM, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, router and norms."""
    inside, others = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() > 1 and "layers." in name and "gate.weight" not in name
        (inside if matrix else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
    muon = Muon(inside, lr=options.muon_lr)
    for optimiser in (adam, muon):
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return [adam, muon]


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (K. Jordan and others, 2024): on two cores it reaches in a third of the
    steps what AdamW does. torch's own takes matrices only; here the experts' stacked ones are as many matrices."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.1
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                step = orthogonal(parameter.grad.lerp(average, group["momentum"]))
                size = max(1, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(step, alpha=-group["lr"] * size)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal one, roughly: five steps of a quintic Newton-Schulz iteration."""
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if matrix.shape[-2] <= matrix.shape[-1] else x.mT


def next_byte_loss(model: DeepseekV3ForCausalLM, window: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@torch.inference_mode()
def evaluate(model: DeepseekV3ForCausalLM, text: torch.Tensor, context: int = CONTEXT) -> float:
    rows = text[: (len(text) - 1) // context * context + 1]
    windows = rows.unfold(0, context + 1, context)
    losses = [next_byte_loss(model, part).item() * len(part) for part in windows.split(16)]
    return sum(losses) / len(windows)


@torch.inference_mode()
def sample(model: DeepseekV3ForCausalLM, prompt: str, length: int = 300) -> str:
    """The greedy continuation."""
    text = torch.tensor([list(prompt.encode())], device=model.device)
    for _ in range(length):
        following = model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)
        text = torch.cat([text, following], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def report(steps: int, loss: float, loads: ExpertLoads) -> None:
    print(f"{steps} steps; held out: {loss:.3f} nats a byte = {loss / math.log(2):.3f} bits a byte")
    for number, share in enumerate(loads.shares()):
        print(f"MoE layer {number}: " + " ".join(f"{s:.1%}" for s in sorted(share.tolist())))
        least = share.min().item()
        assert least > LEAST_LOAD, f"MoE layer {number}: the least loaded expert gets {least:.2%}, collapsed"


if __name__ == "__main__":
    main()
