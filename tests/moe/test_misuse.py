# SPDX-License-Identifier: Apache-2.0
"""What is wrong is refused with the values in the sentence, before anything is sent, and the group goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import harness
import moe_model as model
import numpy as np
import pytest
import torch
from harness import Scenario, all_to_alls, make_batches, on_ranks, run_all

import eptransport as ept

Make = Callable[..., list[Any]]
CONFIG = model.Config(2, 4, 2, 32)


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with harness.on_device():
        yield


def x(tokens: int = 3, hidden: int = 32, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(tokens, hidden, dtype=dtype)


def ids(tokens: int = 3, top_k: int = 2, value: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.full((tokens, top_k), value, dtype=dtype)


def there(tensor: torch.Tensor) -> torch.Tensor:
    """On the device, with the strides and the start that it has here."""
    if harness.DEVICE == "cpu":
        return tensor
    whole = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)


BAD = {
    "hidden": ((x(hidden=48), ids()), "48"),
    "one dimension": ((x()[0], ids()), "x"),
    "dtype of x": ((x(dtype=torch.float32), ids()), "float32"),
    "device of x": ((x().to("meta"), ids()), "meta"),
    "inner stride": ((x(hidden=64)[:, ::2], ids()), "stride"),
    "rows not 16-byte aligned": ((torch.ones(3, 36, dtype=torch.bfloat16)[:, :32], ids()), "16"),
    "start not 16-byte aligned": ((torch.ones(3, 40, dtype=torch.bfloat16)[:, 2:34], ids()), "16"),
    "rows of ids": ((x(), ids(tokens=4)), "4"),
    "columns of ids": ((x(), ids(top_k=3)), "3"),
    "dtype of ids": ((x(), ids(dtype=torch.int16)), "int16"),
    "id too large": ((x(), ids(value=4)), "4"),
    "id too small": ((x(), ids(value=-2)), "-2"),
    "shape of weights": ((x(), ids(), torch.ones(3, 3)), "3"),
    "dtype of weights": ((x(), ids(), torch.ones(3, 2, dtype=torch.float64)), "float64"),
    "too many tokens": ((x(33), ids(33)), "33"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_is_lost(make_groups: Make, name: str) -> None:
    """Also where one rank alone gets it wrong: it may call again, and the others never see it."""
    groups = make_groups(2)
    moes = all_to_alls(groups, CONFIG)
    scenario = Scenario(CONFIG, make_batches(CONFIG, (3, 5), 1), ["contiguous"] * 2)
    arguments, words = BAD[name]
    if name != "device of x":
        arguments = tuple(there(each) for each in arguments)

    def step(rank: int) -> None:
        if rank == 0:
            with pytest.raises(ept.EptError, match=words) as caught:
                moes[rank].dispatch(*arguments)
            assert isinstance(
                caught.value, (ept.InvalidArgument, ept.CapacityError, ept.LimitError, ept.UnsupportedError)
            )
        scenario.run(rank, moes[rank])

    on_ranks(groups, step)
    moes[0].check()


def test_other_bad_arguments(make_groups: Make) -> None:
    moe = all_to_alls(make_groups(1), model.Config(1, 4, 2, 32), lanes=2)[0]
    for arguments in (
        {"layout": "columns"},
        {"lane": 2},
        {"lane": -1},
        {"num_tokens": 4},
        {"num_tokens": -1},
        {"scales": torch.ones(3, 1)},
    ):
        with pytest.raises(ept.EptError):
            moe.dispatch(x(), ids(), **arguments)
    with pytest.raises((ept.EptError, TypeError)):
        moe.dispatch(x())
    got = moe.dispatch(x(), ids())
    shape = got.x.shape[:-1]
    for out in (torch.zeros(*shape, 48), torch.zeros(*shape, 32, dtype=torch.int32), torch.zeros(32)):
        with pytest.raises(ept.EptError):
            moe.combine(out, got)
    with pytest.raises(ept.EptError):
        moe.combine(torch.zeros(*shape, 32), got, topk_weights=torch.ones(4, 2))
    with pytest.raises(ept.EptError):
        moe.combine(torch.zeros(*shape, 32), got, row_weights=torch.ones(*shape, 2))  # contiguous has no such rows
    with pytest.raises(ept.EptError):
        moe.combine(torch.zeros(*shape, 32), got, out=torch.zeros(4, 32, dtype=torch.bfloat16))
    assert moe.combine(torch.zeros(*shape, 32, dtype=torch.bfloat16), got).shape == (3, 32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_experts": 0},
        {"top_k": 0},
        {"top_k": 33},
        {"hidden": 0},
        {"hidden": 4},
        {"max_tokens": 0},
        {"lanes": 0},
        {"dtype": torch.int32},
        {"combine_dtype": torch.float8_e4m3fn},
        {"layout": "columns"},
        {"scale_format": "fp64"},
        {"scale_layout": "diagonal"},
        {"placement": [0, 0, 0]},
        {"placement": [0, 0, 1, 2]},
        {"placement": [0, 0, 0, -1]},
    ],
    ids=str,
)
def test_bad_configuration(make_groups: Make, wrong: dict[str, Any]) -> None:
    groups = make_groups(2)
    right: dict[str, Any] = {
        "num_experts": 4, "top_k": 2, "hidden": 32, "max_tokens": 8, "dtype": torch.bfloat16
    }  # fmt: skip
    with pytest.raises(ept.EptError):
        ept.loopback_run(groups, lambda group: ept.AllToAll(group, **{**right, **wrong}))
    ept.loopback_run(groups, lambda group: ept.AllToAll(group, **right))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("hidden", (32, 64, 32)),
        ("num_experts", (4, 4, 5)),
        ("top_k", (2, 3, 2)),
        ("max_tokens", (8, 8, 9)),
        ("lanes", (1, 2, 1)),
        ("dtype", (torch.bfloat16, torch.float16, torch.bfloat16)),
        ("combine_dtype", (torch.bfloat16, torch.bfloat16, torch.float32)),
        ("placement", ([0, 0, 1, 2], [0, 0, 1, 2], [0, 1, 1, 2])),
    ],
)
def test_ranks_that_disagree_are_told_on_every_rank(make_groups: Make, field: str, values: tuple[Any, ...]) -> None:
    groups = make_groups(3)
    right: dict[str, Any] = {
        "num_experts": 4, "top_k": 2, "hidden": 32, "max_tokens": 8, "dtype": torch.bfloat16
    }  # fmt: skip

    def disagree(rank: int) -> None:
        with pytest.raises(ept.MismatchError) as caught:
            ept.AllToAll(groups[rank], **{**right, field: values[rank]})
        assert field in str(caught.value), str(caught.value)
        if isinstance(values[0], int):
            wrong, usual = sorted(set(values))
            assert str(wrong) in str(caught.value)
            assert str(usual) in str(caught.value)

    on_ranks(groups, disagree)
    config = model.Config(3, 4, 2, 32)
    moes = all_to_alls(groups, config)
    run_all(Scenario(config, make_batches(config, (3, 5, 0), 1), ["contiguous"] * 3), moes, groups)


def test_ranks_that_call_different_objects_are_told(make_groups: Make) -> None:
    """Every rank that sees another object's message says so, at once and not at its deadline; a reset mends it."""
    groups = make_groups(3, timeout_s=20)
    first = all_to_alls(groups, model.Config(3, 4, 2, 32))
    second = all_to_alls(groups, model.Config(3, 4, 2, 32))

    def out_of_step(rank: int) -> None:
        moe = second[rank] if rank == 2 else first[rank]
        with pytest.raises(ept.MismatchError, match=r"object|step"):
            moe.dispatch(x(), ids())

    on_ranks(groups, out_of_step)
    on_ranks(groups, lambda rank: first[rank].reset())
    config = model.Config(3, 4, 2, 32)
    for moes in (second, first):
        run_all(Scenario(config, make_batches(config, (3, 5, 0), 1), ["contiguous"] * 3), moes, groups)


def test_use_after_close(make_groups: Make) -> None:
    groups = make_groups(2)
    moes = all_to_alls(groups, CONFIG)
    on_ranks(groups, lambda rank: moes[rank].close())

    def closed(rank: int) -> None:
        with pytest.raises(ept.ClosedError):
            moes[rank].dispatch(x(), ids())

    on_ranks(groups, closed)
    again = all_to_alls(groups, CONFIG)
    run_all(Scenario(CONFIG, make_batches(CONFIG, (3, 5), 1), ["contiguous"] * 2), again, groups)


def test_recv_without_send_and_out_of_order(make_groups: Make) -> None:
    moe = all_to_alls(make_groups(1), model.Config(1, 4, 2, 32))[0]
    with pytest.raises(ept.EptError):
        moe.dispatch_recv(lane=0)
    got = moe.dispatch(x(), ids())
    with pytest.raises(ept.EptError):
        moe.combine_recv(got)
    moe.combine(torch.zeros(*got.x.shape[:-1], 32, dtype=torch.bfloat16), got)
    moe.check()


def test_quantised_input_that_does_not_fit(make_groups: Make) -> None:
    config = model.Config(1, 4, 2, 128, "bf16", "e4m3")
    moe = all_to_alls(make_groups(1), config)[0]
    q = torch.zeros(3, 128, dtype=torch.float8_e4m3fn)
    with pytest.raises(ept.EptError):  # more bytes of scales a row than the rows were made for
        moe.dispatch(q, ids(), scales=torch.ones(3, 9))
    with pytest.raises(ept.EptError):
        moe.dispatch(q, ids(), scales=torch.ones(4, 1))
    got = moe.dispatch(q, ids(), scales=torch.ones(3, 1))
    assert np.array_equal(harness.bits(got.x)[:3], np.zeros((3, 128), np.uint8))
