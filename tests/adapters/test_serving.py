# SPDX-License-Identifier: Apache-2.0
"""Models served over ranks on TCP give the text of a single process, and its logits but for rounding.

The bound on the logits is derived, in rounding.py: two fp32 evaluations of one function that choose the same experts
differ by at most L sqrt(2 sum (d logit / d s)^2 e_s^2), summed over the outputs s of every operation, whose rounding
errors e_s follow from their operands. Expert parallelism changes nothing else: rows travel unrounded, each expert's
products run over the same lengths in batches of other sizes, and a token's weighted outputs are added within a rank,
then over ranks, in fp32. So a weight in the wrong place, a token at the wrong expert or one rounding to bf16 is
outside (test_the_bound_sees_one_rounding_to_bf16), and what is inside is rounding.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import models
import pytest
import ranks
import rounding
import torch

from eptransport import demo
from eptransport.adapters.transformers import expert_parallel

# Each rank's prompts and how many tokens follow: one, several of unlike lengths, none, one that is done at once.
PROMPTS: dict[int, list[list[str]]] = {
    2: [["When a function is called, the "], ["A class", "The import statement may"]],
    4: [["When a function is called, the "], ["A class", "The import statement may"], [], ["Names refer to"]],
}
NEW_TOKENS: dict[int, list[int]] = {2: [3, 8], 4: [8, 5, 0, 1]}
LOGITS_A_STEP = 24
CASES = [(world, name) for world in PROMPTS for name in models.NAMES]


def serve_all(group: Any, store: Any) -> dict[str, Any]:
    """On one rank: every model in turn, and the trained one again with results sent back in bf16."""
    served = {name: serve(group, store, models.build(name)) for name in models.NAMES}
    served["tiny, bf16"] = serve(group, store, models.build("tiny"), combine_dtype=torch.bfloat16)
    return served


def serve(group: Any, store: Any, model: Any, **options: Any) -> dict[str, Any]:
    parallel = expert_parallel(model, group, max_tokens=96, **options)
    forwards: list[tuple[int, ...]] = []
    forward = model.forward

    @wraps(forward)
    def counted(**inputs: Any) -> Any:
        output = forward(**inputs)
        forwards.append(tuple(output.logits.shape))
        return output

    model.forward = counted
    world, rank = group.world_size, group.rank
    finish = demo.Finish(store, rank, world)
    served = models.run(parallel, PROMPTS[world][rank], NEW_TOKENS[world][rank], finish)
    held = {key: module.down_proj.shape[0] for key, module in models.experts_of(model).items()}
    exchanges = len(parallel.exchanges)
    local = list(parallel.exchanges[0].local_experts)
    parallel.close()
    return {**served, "forwards": forwards, "held": held, "exchanges": exchanges, "local": local}


@cache
def served(world: int) -> list[dict[str, Any]]:
    return ranks.run(world, serve_all)


@cache
def alone(name: str, world: int, rank: int) -> dict[str, Any]:
    """The same batch in this process, by the model as transformers built it."""
    return models.run(models.build(name), PROMPTS[world][rank], NEW_TOKENS[world][rank])


@pytest.mark.parametrize(("world", "name"), CASES)
def test_the_text_is_that_of_one_process(world: int, name: str) -> None:
    for rank, result in enumerate(served(world)):
        assert result[name]["texts"] == alone(name, world, rank)["texts"], f"rank {rank}"


@pytest.mark.parametrize(("world", "name"), CASES)
def test_the_routers_choose_the_same_experts(world: int, name: str) -> None:
    for rank, result in enumerate(served(world)):
        prompts, steps = PROMPTS[world][rank], NEW_TOKENS[world][rank]
        got = models.real_choices(result[name]["choices"], prompts, steps)
        expected = models.real_choices(alone(name, world, rank)["choices"], prompts, steps)
        assert len(got) == len(expected) == steps * len(models.experts_of(models.build(name)))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), f"rank {rank}"


@pytest.mark.parametrize(("world", "name"), CASES)
def test_logits_differ_by_rounding_only(world: int, name: str) -> None:
    for rank, result in enumerate(served(world)):
        for difference, bound in compared(name, world, rank, result[name]):
            assert (difference <= bound).all(), f"rank {rank}: {(difference / bound).max():.2f} times the bound"


def test_the_bound_sees_one_rounding_to_bf16() -> None:
    worst = max(
        float((difference / bound).max())
        for rank, result in enumerate(served(2))
        for difference, bound in compared("tiny", 2, rank, result["tiny, bf16"])
    )
    assert worst > 2, f"results rounded to bf16 reach {worst:.2f} times the bound"


@pytest.mark.parametrize(("world", "name"), CASES)
def test_a_rank_that_is_done_passes_zero_tokens_until_all_are(world: int, name: str) -> None:
    longest = max(NEW_TOKENS[world])
    for result, needed in zip(served(world), NEW_TOKENS[world], strict=True):
        forwards = result[name]["forwards"]
        assert len(forwards) == longest + 1  # one more: how Finish tells
        assert all(shape[0] > 0 for shape in forwards[:needed])
        assert all(shape == (0, 1, 256) for shape in forwards[needed:])


@pytest.mark.parametrize(("world", "name"), CASES)
def test_a_rank_keeps_its_own_experts_only(world: int, name: str) -> None:
    whole = {key: module.down_proj.shape[0] for key, module in models.experts_of(models.build(name)).items()}
    for layer, experts in whole.items():
        held = [result[name]["held"][layer] for result in served(world)]
        assert held == [experts // world + (rank < experts % world) for rank in range(world)]
    ids = [expert for result in served(world) for expert in result[name]["local"]]
    assert ids == list(range(next(iter(whole.values()))))


@pytest.mark.parametrize(("world", "name"), CASES)
def test_layers_of_one_shape_share_an_exchange(world: int, name: str) -> None:
    assert [result[name]["exchanges"] for result in served(world)] == [1] * world


def compared(name: str, world: int, rank: int, result: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """|difference| and bound of some logits, the largest ones among them, of each prompt's first and last step."""
    pairs = []
    expected = alone(name, world, rank)
    assert len(result["logits"]) == len(expected["logits"])
    for number, prompt in enumerate(PROMPTS[world][rank]):
        steps = len(expected["logits"])
        for step in sorted({0, steps - 1}):
            scores = expected["logits"][step][number]
            some = torch.cat([scores.topk(LOGITS_A_STEP // 2).indices, torch.arange(0, 256, 512 // LOGITS_A_STEP)])
            text = expected["texts"][number][: len(demo.encode(prompt)) + step]
            difference = (result["logits"][step][number] - scores).abs()[some]
            pairs.append((difference, bound(name, tuple(text), tuple(some.tolist()))))
    return pairs


@cache
def bound(name: str, text: tuple[int, ...], logits: tuple[int, ...]) -> torch.Tensor:
    model = models.build(name)
    model.set_experts_implementation("batched_mm")  # its products are plain ones: an operation each
    inputs = torch.tensor([text])
    return rounding.apart(lambda: model(input_ids=inputs, use_cache=False).logits[0, -1][list(logits)])
