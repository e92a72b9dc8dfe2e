# SPDX-License-Identifier: Apache-2.0
"""Experts modules of other make: spread by the same mechanism where their parameters are stacked, refused where not."""

from __future__ import annotations

import importlib
from typing import Any

import models
import pytest
import rounding
import torch

import eptransport as ept
from eptransport.adapters.transformers import ExpertParallel, expert_parallel

EXPERTS, TOP_K, HIDDEN = 5, 2, 32

# What sets each apart from DeepSeek-V3's layout. A release that lacks one skips it.
CLASSES = {
    "gpt_oss.GptOssExperts": "transposed, with biases, gate and up interleaved and clamped",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": "transposed, with biases",
    "aria.AriaExperts": "transposed",
    "nemotron_h.NemotronHExperts": "no gate",
    "muse_spark.MuseSparkExperts": "a norm after each expert",
    "gemma4.Gemma4TextExperts": "another name for top-k",
    "deepseek_v4.DeepseekV4Experts": "a clamped gate of its own",
    "minimax_m2.MiniMaxM2Experts": "",
    "glm4_moe.Glm4MoeExperts": "",
}


class Config:
    """Stands for any model's: sizes by the kind of name that asks."""

    def __init__(self, implementation: str) -> None:
        self._experts_implementation = implementation
        self.num_experts_per_tok = TOP_K
        self.hidden_size = self.moe_hidden_size = HIDDEN
        self.moe_latent_size = None
        self.rms_norm_eps = self.post_norm_eps = 1e-6
        self.swiglu_alpha, self.swiglu_limit = 1.702, 7.0

    def __getattr__(self, name: str) -> Any:
        if "experts" in name:
            return EXPERTS
        if "intermediate_size" in name:
            return 48
        if "act" in name:
            return "silu"
        raise AttributeError(name)


class Model(torch.nn.Module):
    """Two layers of one experts class, called as a model's MoE block calls them."""

    def __init__(self, layer: type[torch.nn.Module], implementation: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.layers = torch.nn.ModuleList([layer(Config(implementation)) for _ in range(2)])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden, ids, weights)
        return hidden


def experts_class(name: str) -> type[torch.nn.Module]:
    module, attribute = name.split(".")
    try:
        found = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), attribute)
    except (ImportError, AttributeError):
        pytest.skip(f"this release of transformers has no {name}")
    probe = found(Config("eager"))
    if not hasattr(probe, "is_transposed"):
        pytest.skip(f"{name} is not built with use_experts_implementation in this release")
    return found


def inputs(rank: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K]
    return torch.randn(tokens, HIDDEN, generator=generator), ids, torch.rand(tokens, TOP_K, generator=generator)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", CLASSES)
def test_stacked_experts_of_any_make_are_spread(name: str, implementation: str) -> None:
    layer = experts_class(name)
    tokens = [7, 0, 3]

    def serve(group: ept.Group) -> torch.Tensor:
        model = Model(layer, implementation)
        parallel = expert_parallel(model, group, max_tokens=8)
        with torch.no_grad():
            output = model(*inputs(group.rank, tokens[group.rank])) if tokens[group.rank] else parallel.idle()
        return torch.empty(0, HIDDEN) if output is None else output

    groups = ept.loopback_groups(3, ept.Settings(backend="loopback", threads=1))
    try:
        got = ept.loopback_run(groups, serve)
    finally:
        ept.loopback_run(groups, lambda group: group.close())

    whole, plain = Model(layer, implementation), Model(layer, "batched_mm")
    some = torch.arange(0, HIDDEN, 5)
    for rank in (0, 2):
        given = inputs(rank, tokens[rank])
        with torch.no_grad():
            difference = (got[rank] - whole(*given)).abs()[:, some].flatten()
        bound = rounding.apart(lambda given=given: plain(*given)[:, some].flatten())  # type: ignore[misc]
        assert (difference <= bound).all(), f"rank {rank}: {(difference / bound).max():.2f} times the bound"


@pytest.fixture
def alone() -> Any:
    groups = ept.loopback_groups(1, ept.Settings(backend="loopback", threads=1))
    yield groups[0]
    groups[0].close()


def test_generate_and_zero_tokens_work_through_the_model_itself(alone: ept.Group) -> None:
    model = models.build("tiny")
    ids = torch.tensor([list(b"The value of")])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    expert_parallel(model, alone, max_tokens=64)
    assert torch.equal(model.generate(ids, **options), expected)
    assert model(input_ids=ids[:0]).logits.shape == (0, 12, 256)
    assert model(ids[:, :0]).logits.shape == (1, 0, 256)
    assert model.model.layers  # a submodule is what it was


def test_a_gradient_is_refused(alone: ept.Group) -> None:
    model = models.build("mixtral")
    expert_parallel(model, alone, max_tokens=64)
    with pytest.raises(ept.UnsupportedError, match=r"no gradient.*no_grad"):
        model(input_ids=torch.tensor([[1, 2]]))
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2]]))


def test_another_order_of_layers_is_refused(alone: ept.Group) -> None:
    model = models.build("mixtral")
    model.model.layers = model.model.layers[::-1]  # called in this order; registered in the other
    backwards = torch.nn.Module()
    backwards.first, backwards.second, backwards.model = model.model.layers[1], model.model.layers[0], model
    backwards.forward = model.forward
    expert_parallel(backwards, alone, max_tokens=64)
    with torch.no_grad(), pytest.raises(ept.UnsupportedError, match=r"second\S* was called where first\S* was to come"):
        backwards(input_ids=torch.tensor([[1, 2]]))


def test_a_layer_that_is_not_called_is_refused(alone: ept.Group) -> None:
    model = models.build("mixtral")
    expert_parallel(model, alone, max_tokens=64)
    model.config.num_hidden_layers = 1
    with torch.no_grad(), pytest.raises(ept.UnsupportedError, match=r"ended where model.layers.1\S* was to come"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_a_wrong_order_leaves_the_next_forward_alone(alone: ept.Group) -> None:
    model = models.build("mixtral")
    expert_parallel(model, alone, max_tokens=4)
    with torch.no_grad():
        with pytest.raises(ept.EptError, match="4"):
            model(input_ids=torch.ones(1, 5, dtype=torch.int64))  # more than max_tokens
        assert model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.isfinite().all()


def test_a_model_is_made_expert_parallel_once(alone: ept.Group) -> None:
    model = models.build("mixtral")
    expert_parallel(model, alone, max_tokens=4)
    with pytest.raises(ept.InvalidArgument, match="expert-parallel already"):
        expert_parallel(model, alone, max_tokens=4)


def test_a_long_batch_is_streamed_through_a_small_buffer() -> None:
    tokens = 100
    ids = torch.arange(tokens)[None] % 256
    made = [models.build("mixtral") for _ in range(2)]  # not on the threads: they would share torch's seed

    def serve(group: ept.Group) -> torch.Tensor | None:
        shape = {"num_experts": 3, "top_k": 2, "hidden": 64, "dtype": torch.float32}
        budget = ept.AllToAll.plan(world=2, max_tokens=8, **shape).lane_bytes  # type: ignore[arg-type]
        model = made[group.rank]
        parallel = expert_parallel(model, group, max_tokens=tokens, buffer_bytes=budget)
        assert parallel.exchanges[0].plan_.chunk_tokens < tokens / 4
        if group.rank == 1:
            return parallel.idle()
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    groups = ept.loopback_groups(2, ept.Settings(backend="loopback", threads=1))
    try:
        got = ept.loopback_run(groups, serve)[0]
    finally:
        ept.loopback_run(groups, lambda group: group.close())
    with torch.no_grad():
        expected = models.build("mixtral")(input_ids=ids, use_cache=False).logits
    assert got is not None
    assert (got - expected).abs().max() < 1e-3  # a wrong expert is off by 0.1 and more; test_serving has the fine bound


def test_a_model_without_stacked_experts_is_refused() -> None:
    with pytest.raises(ept.UnsupportedError, match="no experts to spread"):
        expert_parallel(torch.nn.Linear(2, 2), None)  # type: ignore[arg-type]

    class LooseExperts(torch.nn.ModuleList):
        pass

    with pytest.raises(ept.UnsupportedError, match="LooseExperts keep their experts otherwise"):
        expert_parallel(torch.nn.Sequential(LooseExperts([torch.nn.Linear(2, 2)])), None)  # type: ignore[arg-type]


def test_parameters_that_are_not_stacked_are_refused_and_nothing_is_changed() -> None:
    model = models.build("mixtral")
    odd = model.model.layers[1].mlp.experts
    odd.scale = torch.nn.Parameter(torch.ones(HIDDEN))
    with pytest.raises(ept.UnsupportedError, match=r"layers\.1\S*\.scale has shape \(32,\).*the 3 experts"):
        expert_parallel(model, None)  # type: ignore[arg-type]
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == 3


def test_packed_weights_are_refused() -> None:
    model = models.build("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[:, :, ::2].clone())
    with pytest.raises(ept.UnsupportedError, match="one hidden size"):
        expert_parallel(model, None)  # type: ignore[arg-type]


def test_a_config_that_names_no_top_k_asks_for_it(alone: ept.Group) -> None:
    model = models.build("mixtral")
    for module in models.experts_of(model).values():
        module.config = type("Bare", (), {"_experts_implementation": "grouped_mm"})()
    with pytest.raises(ept.UnsupportedError, match=r"Bare has none of .*give top_k"):
        expert_parallel(model, None)  # type: ignore[arg-type]
    assert isinstance(expert_parallel(model, alone, top_k=3, max_tokens=8), ExpertParallel)  # more than it uses
    with torch.no_grad():
        assert torch.allclose(
            model(input_ids=torch.tensor([[1, 2]])).logits,
            models.build("mixtral")(input_ids=torch.tensor([[1, 2]])).logits,
            atol=1e-4,
        )


def test_options_that_the_adapter_sets_are_refused() -> None:
    with pytest.raises(ept.InvalidArgument, match="alignment, layout"):
        expert_parallel(models.build("mixtral"), None, layout="masked", alignment=4)  # type: ignore[arg-type]
