# SPDX-License-Identifier: Apache-2.0
"""The demo's model on GPU ranks: the text of one process with all experts, on the same GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_harness import DEVICE, World

Make = Callable[..., World]

PROMPTS = ("The for statement is used to ", "A class definition ", "If an exception ", "The import statement ")


@pytest.mark.parametrize("n", [2, 4])
def test_the_text_is_that_of_one_process(make_world: Make, n: int) -> None:
    pytest.importorskip("transformers")
    from eptransport.demo import decode, encode, generate, load_tiny_deepseek, serve_tiny_deepseek

    world = make_world(n, timeout_s=60.0)
    alone = [generate(load_tiny_deepseek(DEVICE), [encode(p)], 24 - 4 * r)[0] for r, p in enumerate(PROMPTS[:n])]
    torch.cuda.synchronize()  # what torch loads at its first use is there

    def serve(rank: int) -> str:
        return serve_tiny_deepseek(world.groups[rank], [PROMPTS[rank]], 24 - 4 * rank, DEVICE)[0]

    for rank, text in enumerate(world.on_ranks(serve)):
        assert text == decode(alone[rank]), f"rank {rank}"
