# SPDX-License-Identifier: Apache-2.0
"""`ep_implementation="eptransport"`: transformers loads and splits the model, eptransport moves the tokens."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.multiprocessing

from eptransport import demo
from eptransport.adapters.transformers import ExpertParallel, configure_ep_implementation

pytest.importorskip("transformers.distributed.expert_parallel", reason="the registry came with transformers 5.23")
pytest.importorskip("accelerate", reason="transformers places a spread model's parameters with accelerate")

PROMPTS = ["The value of an expression", "Names"]
MESHES = {
    "every rank has a batch of its own": {"tp_size": 1, "fsdp_size": 2, "ep_size": 2},
    "ranks share a batch": {"tp_size": 2, "fsdp_size": 1, "ep_size": 2},
}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_model_that_transformers_spreads(mesh: str) -> None:
    sizes = MESHES[mesh]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(serve, (folder, sizes), nprocs=2)
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]
    model = models.build("tiny")
    for rank, (logits, served, exchanges, backend) in enumerate(results):
        prompt = PROMPTS[rank if sizes["tp_size"] == 1 else 0]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([demo.encode(prompt)]), use_cache=False).logits
        # A coarse bound is enough: test_serving has the derived one. A token at a wrong expert is off by 0.1 and more.
        assert (logits - expected).abs().max() < 1e-3
        assert torch.equal(served, torch.full((2,), sizes["tp_size"] == 2 or rank == 0))
        assert exchanges == 1
        assert backend == "tcp"


def serve(rank: int, folder: str, sizes: dict[str, int]) -> None:
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    os.environ.update(EPT_BACKEND="tcp", EPT_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    configure_ep_implementation(max_tokens=64)
    plan = DistributedConfig(**sizes, ep_implementation="eptransport")
    folder_of_model = demo.find_tiny_deepseek()
    model: Any = AutoModelForCausalLM.from_pretrained(folder_of_model, dtype=torch.float32, distributed_config=plan)
    model.set_experts_implementation("grouped_mm")
    parallel = ExpertParallel.of(model.eval())
    own_batch = sizes["tp_size"] == 1

    def forward(prompt: str) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=torch.tensor([demo.encode(prompt)]), use_cache=False).logits
        return logits.full_tensor() if isinstance(logits, DTensor) else logits

    logits = forward(PROMPTS[rank if own_batch else 0])
    exchange = parallel.exchanges[0]
    # Layer by layer: rank 0 has a token for every expert, rank 1 none unless they share the batch.
    served = []
    for layer in parallel.layers:
        with torch.no_grad():
            if own_batch and rank == 1:
                layer.serve()
                served.append(False)
            else:
                x, ids = torch.ones(4, layer.shape.hidden), torch.arange(16).view(4, 4)
                output = layer.module(x, ids, torch.ones(4, 4))
                served.append(bool((output.abs().sum(1) > 0).all()))
    torch.save((logits, torch.tensor(served), len(parallel.exchanges), exchange.group.backend), f"{folder}/{rank}.pt")
    parallel.close()
    exchange.group.close()
    torch.distributed.destroy_process_group()


def test_the_name_is_entered_at_import() -> None:
    from transformers.distributed.expert_parallel import EPImplementationInterface

    assert "eptransport" in EPImplementationInterface()
