# SPDX-License-Identifier: Apache-2.0
"""Arguments of any kind at the Python surfaces: a typed error or a right answer, and never another exception."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import eptransport as ept
from eptransport.cli.app import app

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=30)
    | st.binary(max_size=8)
)
anything = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=5), scalars, max_size=3)
names = st.sampled_from(sorted(ept.Settings.model_fields)) | st.text(max_size=12)
shell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@settings(max_examples=200, deadline=None)
@given(fields=st.dictionaries(names, anything, max_size=3))
@example(fields={"proxy_cpus": "0-99999999999"})
@example(fields={"port_range": "9" * 5000})
@example(fields={"options": {"tcp.streams": "9" * 5000}})
@example(fields={"options": 3})
@example(fields={"timeout_s": "1e999"})
def test_settings_from_arguments(fields: dict[str, Any]) -> None:
    with suppress(ept.EptError):
        ept.Settings(**fields)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from([f"EPT_{name.upper()}" for name in ept.Settings.model_fields])
    | st.sampled_from(["EPT_TCP_STREAMS", "EPT_TCP_INTERFACE", "EPT_LOOPBACK_ADVERSARY", "EPT_", "EPT_NO_SUCH"]),
    value=shell | st.integers().map(str),
)
@example(name="EPT_PROXY_CPUS", value="0-9999999999")
@example(name="EPT_PROXY_CPUS", value="9" * 5000)
def test_settings_from_the_environment(name: str, value: str) -> None:
    with mock.patch.dict(os.environ, {name: value}), suppress(ept.EptError):
        ept.Settings()


@settings(max_examples=30, deadline=None)
@given(
    arguments=st.lists(st.sampled_from(["--clause", "--seed", "--option", "--timeout", "--junit"]) | shell, max_size=5)
)
@example(arguments=["loopback", "--clause", "99999999999999999999"])
@example(arguments=["loopback", "--option", "=x"])
@example(arguments=["/dev/null"])
@example(arguments=["/"])
@example(arguments=["loopback", "--junit", "/no/such/folder/x.xml"])
def test_conformance_arguments(arguments: list[str]) -> None:
    # Not the checks themselves, which take minutes: what stands in front of them.
    with mock.patch("eptransport.conformance.run.run", return_value=iter(())):
        result = CliRunner().invoke(app, ["conformance", *arguments])
    assert result.exception is None or isinstance(result.exception, (SystemExit, ept.EptError)), result.exception


numbers = st.integers(-3, 5) | st.integers(-(2**70), 2**70) | st.none() | st.text(max_size=3) | st.floats()
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])


@settings(max_examples=150, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "num_experts": numbers,
            "top_k": numbers,
            "hidden": numbers,
            "max_tokens": numbers,
            "lanes": numbers,
            "alignment": numbers,
            "buffer_bytes": numbers,
            "max_rows": numbers,
            "dtype": dtypes | anything,
            "dispatch_dtype": dtypes | anything,
            "combine_dtype": dtypes | anything,
            "layout": st.sampled_from(["rows", "by_rank", "contiguous", "masked"]) | anything,
            "placement": anything | st.lists(st.integers(-2, 9), max_size=9),
            "scale_format": anything,
            "scale_layout": anything,
        },
    )
)
def test_all_to_all_plan(fields: dict[str, Any]) -> None:
    right: dict[str, Any] = {"num_experts": 8, "top_k": 2, "hidden": 64, "max_tokens": 16}
    with suppress(ept.EptError):
        ept.AllToAll.plan(world=4, **{**right, **fields})


tensors = st.builds(
    lambda shape, dtype, step: (
        torch.zeros([4 * size for size in shape]).to(dtype)[..., ::step] if shape else torch.zeros(())
    ),
    st.lists(st.integers(0, 4), max_size=4),
    dtypes | st.just(torch.int32) | st.just(torch.int64),
    st.integers(1, 3),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    x=tensors | anything,
    ids=tensors | anything,
    options=st.fixed_dictionaries(
        {},
        optional={
            "topk_weights": tensors | anything,
            "scales": tensors | anything,
            "layout": anything,
            "num_tokens": numbers,
            "host_counts": anything,
            "mirror_counts": anything,
            "lane": numbers,
            "routing": anything,
            "out": anything,
        },
    ),
)
def test_dispatch(one_rank: ept.AllToAll, x: Any, ids: Any, options: dict[str, Any]) -> None:
    try:
        one_rank.dispatch(x, ids, **options)
    except ept.EptError as error:
        if isinstance(error, (ept.CapacityError, ept.LaneFault)):
            one_rank.reset()
    right = one_rank.dispatch(torch.ones(2, 64), torch.tensor([[0, 1], [1, -1]]))
    assert right.num_rows == 2
    assert torch.equal(one_rank.combine(right.x, right, weights_applied=True), torch.ones(2, 64))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    out=tensors | anything,
    got=anything,
    options=st.fixed_dictionaries({}, optional={"topk_weights": tensors | anything, "row_weights": tensors | anything}),
    right=st.booleans(),
)
def test_combine(one_rank: ept.AllToAll, out: Any, got: Any, options: dict[str, Any], right: bool) -> None:
    came = one_rank.dispatch(torch.ones(2, 64), torch.tensor([[0, 1], [1, -1]]))
    with suppress(ept.EptError):
        one_rank.combine(out, came if right else got, **options)


@pytest.fixture
def one_rank(ranks: Callable[..., list[ept.Group]]) -> ept.AllToAll:
    (group,) = ranks(1)
    return ept.AllToAll(
        group, num_experts=2, top_k=2, hidden=64, max_tokens=16, dtype=torch.float32, layout="rows", lanes=1
    )
