# SPDX-License-Identifier: Apache-2.0
"""The reference itself: against torch's own conversions, against fractions, and against examples worked out by hand."""

from __future__ import annotations

import struct

import moe_model as model
import numpy as np
import pytest
import torch


def floats(count: int, seed: int) -> np.ndarray:
    """Random bit patterns: all exponents, subnormals, both zeros; no NaN, no infinity."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    value = bits.view(np.float32)
    return np.where(np.isfinite(value), value, np.float32(0)).astype(np.float32)


def near(count: int, seed: int) -> np.ndarray:
    """Numbers of like size, so that sums cancel and tie."""
    generator = np.random.default_rng(seed)
    return (generator.integers(-(2**24), 2**24, count) * 2.0 ** generator.integers(-30, -20, count)).astype(np.float32)


def test_fma_rounds_once() -> None:
    for make in (floats, near):
        a, b, c = make(4000, 1), make(4000, 2), make(4000, 3)
        with np.errstate(over="ignore", invalid="ignore"):
            c[::4] = -(a * b)[::4]  # what is left is the product's own rounding error
        c = np.where(np.isfinite(c), c, np.float32(1))
        got = model.fma(a, b, c)
        expected = np.array([model.fma_exact(*abc) for abc in zip(a, b, c, strict=True)], np.float32)
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_fma_differs_from_multiply_then_add_and_from_fp64() -> None:
    a, b, c = near(4000, 1), near(4000, 2), near(4000, 3)
    fused = model.fma(a, b, c)
    assert (fused != a * b + c).sum() > 100
    # A double rounding: the fp64 sum is rounded onto a tie of fp32, which then goes the wrong way.
    one, small, tie = np.float32(1 + 2**-23), np.float32(2**-24), np.float32(2**-80)
    a3, b3, c3 = np.array([one, tie]), np.array([np.float32(1), np.float32(1)]), np.array([small, one + small])
    assert model.fma(a3, b3, c3).view(np.uint32).tolist() == [
        model.fma_exact(*abc).view(np.uint32) for abc in zip(a3, b3, c3, strict=True)
    ]
    x, y, z = np.float32(2**-30 + 2**-53), np.float32(2**-30), np.float32(1 + 2**-23)  # below half a place, just so
    assert model.fma(np.array([x]), np.array([y]), np.array([z]))[0] == model.fma_exact(x, y, z)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_formats_agree_with_torch(name: str, dtype: torch.dtype) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    ours = model.decode(every, name)
    theirs = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(ours, theirs)
    for values in (floats(100000, 4), near(100000, 5)):
        back = model.encode(values, name)
        expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(back, expected)


def test_e4m3_agrees_with_torch() -> None:
    every = np.arange(256, dtype=np.uint8)
    theirs = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(model.decode(every, "e4m3"), theirs)
    generator = np.random.default_rng(6)
    values = np.concatenate(
        [
            np.clip(generator.normal(0, 100, 50000), -448, 448),
            generator.uniform(-0.05, 0.05, 50000),
            (model.decode(every[:126], "e4m3") + model.decode(every[1:127], "e4m3")) / 2,  # ties
        ]
    ).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(model.encode(values, "e4m3"), expected)


def test_e4m3_saturates_and_keeps_nan_and_the_sign_of_zero() -> None:
    values = np.array([449, 1e30, np.inf, -480, np.nan, -0.0, 0.0, 464, 2.0**-10, 3 * 2.0**-11], np.float32)
    assert model.encode(values, "e4m3").tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x80, 0x00, 0x7E, 0x00, 0x01]


def test_quantiser_by_hand() -> None:
    row = np.zeros(272, np.float32)
    row[0], row[1], row[127] = 896.0, -1.0, 448.0  # block 0: amax 896, scale 2
    row[128] = 100.0  # block 1
    # block 2, of 16 elements: all zero, so the floor gives its scale
    q, scales = model.quantise(row, "fp32", 1e-4)
    assert scales.tolist() == [2.0, np.float32(100) / np.float32(448), np.float32(1e-4) / np.float32(448)]
    assert model.decode(q, "e4m3")[[0, 1, 127, 128, 256]].tolist() == [448.0, -0.5, 224.0, 448.0, 0.0]
    q, scales = model.quantise(row, "ue8m0", 1e-4)
    # 896/448 = 2 = 2^1 exactly; 100/448 = 0.22 -> 2^-2; 1e-4/448 = 2.2e-7 -> 2^-22 = 2.4e-7
    assert scales.tolist() == [128, 125, 105]
    assert model.decode(q, "e4m3")[[0, 1, 127, 128]].tolist() == [448.0, -0.5, 224.0, 384.0]  # 400 is a tie


def small() -> tuple[model.Config, list[model.Batch]]:
    config = model.Config(world=2, num_experts=3, top_k=2, hidden=2, dtype="f32")
    x = [np.array([[1, 2], [3, 4]], np.float32).view(np.uint32), np.array([[5, 6]], np.float32).view(np.uint32)]
    ids = [np.array([[0, 1], [2, -1]]), np.array([[2, 2]])]
    weights = [np.array([[0.5, 0.25], [2, 9]], np.float32), np.array([[1, 3]], np.float32)]
    return config, [model.Batch(a, b, c) for a, b, c in zip(x, ids, weights, strict=True)]


def test_a_group_by_hand() -> None:
    config, batches = small()
    assert [config.local_experts(r) for r in range(2)] == [[0, 1], [2]]
    arrived = model.dispatch(config, batches)
    # Token 0 goes once to rank 0 for both its experts; token 1 and rank 1's only token go to rank 1.
    assert [(r.source, r.token, r.experts) for r in arrived[0].rows] == [(0, 0, (0, 1))]
    assert [(r.source, r.token, r.experts) for r in arrived[1].rows] == [(0, 1, (0, -1)), (1, 0, (0, 0))]
    assert arrived[1].counts == [3]
    assert arrived[1].rows[0].payload == struct.pack("<2f", 3, 4)
    grouped = [model.unpack(a, "contiguous", world=2, alignment=4) for a in arrived]
    assert grouped[0].offsets == [0, 4, 8]
    assert grouped[0].place == {0: (0, 0), 4: (0, 1)}
    assert grouped[1].place == {0: (0, 0), 1: (1, 0), 2: (1, 1)}
    outs = []
    for rank in range(2):
        out = np.zeros((grouped[rank].slots, 2), np.float32)
        for slot, (j, k) in grouped[rank].place.items():
            row = arrived[rank].rows[j]
            expert = config.local_experts(rank)[row.experts[k]]
            out[slot] = np.frombuffer(row.payload, np.float32) * (10 ** (expert + 1))
        outs.append(out.view(np.uint32))
    y, _ = model.combine(config, batches, arrived, grouped, outs)
    # 1 * (0.5 * 10 + 0.25 * 100) = 30; 3 * 2 * 1000; 5 * (1 + 3) * 1000
    assert y[0].view(np.float32).tolist() == [[30, 60], [6000, 8000]]
    assert y[1].view(np.float32).tolist() == [[20000, 24000]]


def test_layouts_place_the_same_rows() -> None:
    config, batches = small()
    arrived = model.dispatch(config, batches)[1]
    rows = model.unpack(arrived, "rows", world=2)
    by_rank = model.unpack(arrived, "by_rank", world=2, capacity=2)
    masked = model.unpack(arrived, "masked", world=2, capacity=5)
    assert rows.place == {0: (0, -1), 1: (1, -1)}
    assert (by_rank.shape, by_rank.place) == ((2, 2), {0: (0, -1), 2: (1, -1)})
    assert (masked.shape, masked.place) == ((1, 5), {0: (0, 0), 1: (1, 0), 2: (1, 1)})


def test_traffic_by_hand() -> None:
    config, batches = small()
    arrived = model.dispatch(config, batches)
    # row: payload 8 -> 16, no scales, token and flags 8, two experts 8, two weights 8 = 40 -> 48
    assert model.dispatch_traffic(config, arrived, 0, 8, 0) == model.Traffic(1, 128 + 64 + 48)
    assert model.dispatch_traffic(config, arrived, 1, 8, 0) == model.Traffic(1, 128 + 64)
    assert model.combine_traffic(config, arrived, 1) == model.Traffic(1, 128 + 16)
    assert model.combine_traffic(config, arrived, 0) == model.Traffic(1, 128)
