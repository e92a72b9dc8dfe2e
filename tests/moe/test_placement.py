# SPDX-License-Identifier: Apache-2.0
"""Every row where it belongs, weight and scale with it, in every layout and dtype; and the sum back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import moe_model as model
import numpy as np
import pytest
import torch
from harness import LAYOUTS, Scenario, all_to_alls, make_batches, on_ranks, run_all

Make = Callable[..., list[Any]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "sent", "returned", "scales"),
    [
        ("bf16", "bf16", "bf16", "fp32"),
        ("f16", "f16", "f16", "fp32"),
        ("f32", "f32", "f32", "fp32"),
        ("bf16", "bf16", "f32", "fp32"),
        ("f32", "f32", "bf16", "fp32"),
        ("bf16", "e4m3", "bf16", "fp32"),
        ("bf16", "e4m3", "f16", "ue8m0"),
        ("f16", "e4m3", "f16", "fp32"),
        ("f32", "e4m3", "f32", "ue8m0"),
    ],
)
def test_layouts_and_dtypes(make_groups: Make, layout: str, dtype: str, sent: str, returned: str, scales: str) -> None:
    config = model.Config(
        3, 8, 4, 272, dtype, sent, returned, alignment=4 if layout == "contiguous" else 1, scale_format=scales
    )
    groups = make_groups(3)
    moes = all_to_alls(groups, config)
    for step, tokens in enumerate([(5, 9, 1), (0, 32, 3)]):
        run_all(Scenario(config, make_batches(config, tokens, step), [layout] * 3), moes, groups)


def test_ranks_choose_their_layouts_apart(make_groups: Make) -> None:
    """The wire knows no layout: four ranks unpack one dispatch in four ways."""
    config = model.Config(4, 10, 3, 64, alignment=8)
    groups = make_groups(4)
    moes = all_to_alls(groups, config)
    for step in range(4):
        layouts = [LAYOUTS[(rank + step) % 4] for rank in range(4)]
        run_all(Scenario(config, make_batches(config, (7, 12, 0, 3), step), layouts), moes, groups)


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("scales", ["fp32", "ue8m0"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_by_row_and_by_column(make_groups: Make, layout: str, scales: str, order: str) -> None:
    """A column layout is the same numbers with the blocks' stride outermost."""
    config = model.Config(2, 4, 2, 528, "bf16", "e4m3", scale_format=scales)
    groups = make_groups(2)
    moes = all_to_alls(groups, config, scale_layout=order)
    scenario = Scenario(config, make_batches(config, (6, 11), 5), [layout] * 2)

    def step(rank: int) -> None:
        got = moes[rank].dispatch(**scenario.arguments(rank))
        scenario.check(rank, got)
        assert got.scales.shape == (*got.x.shape[:-1], 5)
        if order == "row":
            assert got.scales.stride(-1) == 1
        else:
            assert got.scales.stride(-2) == 1
            assert got.scales.stride(-1) >= got.x.shape[-2]
        y = moes[rank].combine(**scenario.combine_arguments(rank, got))
        scenario.check_y(rank, y)

    on_ranks(groups, step)


@pytest.mark.parametrize("kind", ["i8", "u8", "e4m3"])
@pytest.mark.parametrize("layout", ["rows", "contiguous"])
def test_quantised_by_the_caller(make_groups: Make, layout: str, kind: str) -> None:
    """The payload and the scales are bytes to us: NaN codes, odd scale sizes, whatever the caller has."""
    config = model.Config(3, 6, 2, 64, "bf16", kind)
    scale_bytes = 6 if kind == "i8" else 4
    groups = make_groups(3)
    moes = all_to_alls(groups, config, caller_scale_bytes=8)
    rng = np.random.default_rng(11)
    batches = make_batches(config, (4, 0, 9), 3)
    for batch in batches:
        batch.x = rng.integers(0, 256, batch.x.shape).astype(np.uint8)
        if kind == "e4m3":  # the oracle computes with it, so no NaN here
            batch.x = np.where(batch.x & 0x7F == 0x7F, 0, batch.x).astype(np.uint8)
            batch.scales = rng.random((batch.tokens, 1)).astype(np.float32).view(np.uint8)
        else:
            batch.scales = rng.integers(0, 256, (batch.tokens, scale_bytes)).astype(np.uint8)
        batch.quantised = True
    run_all(Scenario(config, batches, [layout] * 3), moes, groups)


def test_integers_are_exact_whatever_the_order(make_groups: Make) -> None:
    """Small integers and weights that are powers of two: no rounding anywhere, so the answer is the plain sum."""
    config = model.Config(3, 7, 5, 32, "f32")
    groups = make_groups(3)
    moes = all_to_alls(groups, config)
    rng = np.random.default_rng(2)
    batches = make_batches(config, (8, 3, 5), 0)
    for batch in batches:
        batch.x = rng.integers(-8, 9, batch.x.shape).astype(np.float32).view(np.uint32)
        batch.weights = (2.0 ** rng.integers(-2, 3, batch.weights.shape)).astype(np.float32)
    scenario = Scenario(config, batches, ["contiguous", "rows", "masked"])
    got = run_all(scenario, moes, groups)
    for rank, batch in enumerate(batches):
        x = batch.x.view(np.float32)
        for token in range(batch.tokens):
            plain = np.zeros(32)
            for k, e in enumerate(batch.ids[token]):
                if e >= 0:
                    plain += float(batch.weights[token, k]) * harness.expert(int(e), x[token])
            np.testing.assert_array_equal(got[rank][token].cpu().numpy(), plain)


def test_extreme_values_quantise_by_the_formula(make_groups: Make) -> None:
    """Zeros, subnormals, huge values, both signs of zero, a block with one outlier, infinities and NaN in a block."""
    for scales in ("fp32", "ue8m0"):
        config = model.Config(2, 2, 1, 512, "f32", "e4m3", scale_format=scales)
        groups = make_groups(2)
        moes = all_to_alls(groups, config)
        rows = np.zeros((6, 512), np.float32)
        rows[0, :128] = np.float32(1e-45)
        rows[0, 128:256] = np.float32(3e38)
        rows[0, 256:] = -0.0
        rows[1] = np.random.default_rng(1).normal(0, 1e-6, 512)
        rows[2] = np.random.default_rng(2).normal(0, 1e30, 512)
        rows[3, 5] = 448.0
        rows[3, 6] = 449.0
        rows[4] = np.linspace(-448, 448, 512)
        rows[5] = 2.0 ** np.arange(-256, 256).clip(-140, 120)
        batches = [model.Batch(rows.view(np.uint32), np.full((6, 1), r)) for r in range(2)]
        scenario = Scenario(config, batches, ["rows", "contiguous"])
        run_all(scenario, moes, groups)


def test_nan_stays_nan(make_groups: Make) -> None:
    config = model.Config(1, 1, 1, 128, "f32", "e4m3")
    groups = make_groups(1)
    moe = all_to_alls(groups, config)[0]
    with harness.on_device():
        x = torch.ones(2, 128)
        x[0, 7] = torch.nan
        x[0, 9] = -torch.nan
        got = moe.dispatch(x, torch.zeros(2, 1, dtype=torch.int32), layout="rows")
    value = got.x.float()
    assert value[0, [7, 9]].isnan().all()
    assert not value[1].isnan().any()
