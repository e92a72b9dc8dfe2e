# SPDX-License-Identifier: Apache-2.0
"""Counts that the host is shown when a dispatch has ended (`mirror_counts=True`)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import moe_model as model
import pytest
import torch
from harness import LAYOUTS, Scenario, all_to_alls, make_batches, on_ranks

import eptransport as ept

Make = Callable[..., list[ept.Group]]

CONFIG = model.Config(2, 7, 3, 64, alignment=4)


def test_each_epoch_is_a_dispatch(make_groups: Make) -> None:
    """Epochs count the dispatches that asked, a lane; who waits for its own gets those of no other."""
    groups = make_groups(2)
    moes = all_to_alls(groups, CONFIG, lanes=2)
    steps = [Scenario(CONFIG, make_batches(CONFIG, (6, 9), seed), [LAYOUTS[seed % 4]] * 2) for seed in range(8)]

    def run(rank: int) -> None:
        epochs = [0, 0]
        for number, scenario in enumerate(steps):
            lane, asks = number % 2, number < 6
            got = moes[rank].dispatch(**scenario.arguments(rank, lane=lane, mirror_counts=asks))
            moes[rank].combine(**scenario.combine_arguments(rank, got))
            if not asks:
                assert got.counts_host is None
                continue
            assert got.counts_host is not None
            epochs[lane] += 1
            seen = got.counts_host.wait()
            assert seen.epoch == got.counts_host.epoch == epochs[lane]
            assert seen.counts.device.type == "cpu"
            assert torch.equal(seen.counts, got.counts.cpu())
            assert seen.num_rows == int(got.num_rows)
            assert not seen.faulted
            later = got.counts_host.wait(after=epochs[lane] - 1)
            assert torch.equal(later.counts, seen.counts)
            assert later.epoch == seen.epoch

    on_ranks(groups, run)


def test_it_is_a_copy_and_says_what_it_lacks(make_groups: Make) -> None:
    groups = make_groups(2)
    moes = all_to_alls(groups, CONFIG)
    scenario = Scenario(CONFIG, make_batches(CONFIG, (6, 9), 1), ["rows"] * 2)

    def run(rank: int) -> None:
        moe = moes[rank]
        moe.dispatch_send(**scenario.arguments(rank))
        first = moe.dispatch_recv(mirror_counts=True)  # the half that receives may ask alone
        assert first.counts_host is not None
        seen = first.counts_host.wait()
        moe.dispatch_send(**scenario.arguments(rank, mirror_counts=True))
        second = moe.dispatch_recv()
        assert second.counts_host is not None
        second.counts_host.wait().counts.fill_(-1)
        assert torch.equal(seen.counts, first.counts.cpu())
        read = second.counts_host.read()
        assert read is not None
        assert torch.equal(read.counts, second.counts.cpu())
        with pytest.raises(ept.InvalidArgument, match="a later dispatch"):
            first.counts_host.wait()
        with pytest.raises(ept.Timeout, match="stands at epoch 2"):
            second.counts_host.wait(after=2, timeout_s=0)
        moe.check()

    on_ranks(groups, run)


def test_a_gpu_ranks_reader_is_the_hosts_whatever_torch_makes_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code writes counts into a tensor that must not be of torch's default device."""
    from eptransport import _gpu_steps
    from eptransport._call import ffi

    def told(_function: Any, _moe: Any, lane: int, seen: Any, per_expert: Any) -> int:
        seen.epoch, seen.ticket, seen.rows = 5, 7, 6
        for expert in range(3):
            per_expert[expert] = expert + lane
        return 0

    monkeypatch.setattr(_gpu_steps, "call", told)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    group = SimpleNamespace(settings=ept.Settings(timeout_s=60.0))
    guard = SimpleNamespace(enter=lambda: None, leave=lambda: None)
    steps = SimpleNamespace(
        _native=SimpleNamespace(pointer=ffi.NULL, guard=guard, group=group), _shapes=SimpleNamespace(local_experts=3)
    )
    mirror = _gpu_steps.GpuSteps._mirror(steps, 1, 7)  # type: ignore[arg-type]
    with torch.device("meta"):
        seen = mirror.wait()
    assert (seen.epoch, seen.num_rows, seen.faulted) == (5, 6, False)
    assert seen.counts.tolist() == [1, 2, 3]
