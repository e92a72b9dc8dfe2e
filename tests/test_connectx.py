# SPDX-License-Identifier: Apache-2.0
"""What `doctor` says of a machine with ConnectX cards, on trees of files: one thing taken away at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from eptransport.connectx import devices, inspect, refused

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14"
PARAMS = 'EnableStreamMemOPs: 1\nRegistryDwords: "PeerMappingOverride=1;"'
PORT = "sys/class/infiniband/mlx5_1/ports/1"
LIBRARY = "usr/lib/x86_64-linux-gnu/libmlx5.so.1.24.44.0"


def put(root: Path, place: str, text: str = "") -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text(text + "\n")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A node on which all is as it should be, with two cards."""
    for number in range(2):
        card = f"sys/class/infiniband/mlx5_{number}"
        put(tmp_path, f"{card}/device/vendor", "0x15b3")
        put(tmp_path, f"{card}/fw_ver", "28.39.1002")
        put(tmp_path, f"{card}/ports/1/state", "4: ACTIVE")
        put(tmp_path, f"{card}/ports/1/link_layer", "InfiniBand")
    put(tmp_path, "proc/sys/kernel/osrelease", "6.8.0-60-generic")
    put(tmp_path, "proc/driver/nvidia/version", OPEN)
    put(tmp_path, "proc/driver/nvidia/params", PARAMS)
    put(tmp_path, LIBRARY)
    return tmp_path


def test_all_is_there(machine: Path) -> None:
    found = {each.what: each for each in inspect(machine)}
    assert {each.state for each in found.values()} == {"ok"}
    assert found["card"].seen == "2: mlx5_0 (InfiniBand, 28.39.1002), mlx5_1 (InfiniBand, 28.39.1002)"
    assert "dmabuf" in found["GPU memory"].seen
    assert devices(machine) == ("mlx5_0", "mlx5_1")
    assert refused(machine) == ""


def without(place: str) -> Callable[[Path], None]:
    return lambda root: (root / place).unlink()


def reads(place: str, text: str) -> Callable[[Path], None]:
    return lambda root: put(root, place, text)


def closed_module(root: Path) -> None:
    put(root, "proc/driver/nvidia/version", CLOSED)


def old_library(root: Path) -> None:
    (root / LIBRARY).rename(root / "usr/lib/x86_64-linux-gnu/libmlx5.so.1.17.33.1")


@pytest.mark.parametrize(
    ("take", "what", "state", "seen", "mend"),
    [
        (closed_module, "GPU memory", "missing", "closed kernel module", "modprobe nvidia-peermem"),
        (reads("proc/sys/kernel/osrelease", "5.4.0-1"), "GPU memory", "missing", "Linux 5.4.0-1", "5.12"),
        (without("proc/driver/nvidia/version"), "GPU memory", "missing", "no NVIDIA driver", "install"),
        (reads("proc/driver/nvidia/params", "Enable"), "doorbells", "missing", "no gdrdrv", "modprobe.d"),
        (without("proc/driver/nvidia/params"), "doorbells", "note", "can't be read", ""),
        (reads("proc/driver/nvidia/params", PARAMS.replace("OPs: 1", "OPs: 0")), "stream memory", "note", "is 0", "=1"),
        (old_library, "libmlx5", "missing", "libmlx5.so.1.17.33.1 in /usr/lib/x86_64-linux-gnu has no MLX5_1", "later"),
        (without(LIBRARY), "libmlx5", "missing", "no libmlx5.so.1", "ibverbs-providers"),
        (reads(f"{PORT}/state", "1: DOWN"), "port", "note", "mlx5_1", "NVSHMEM_HCA_LIST"),
    ],
)  # fmt: skip
def test_one_thing_is_missing(
    machine: Path, take: Callable[[Path], None], what: str, state: str, seen: str, mend: str
) -> None:
    take(machine)
    found = {each.what: each for each in inspect(machine)}
    assert found[what].state == state
    assert seen in found[what].seen
    assert mend in found[what].mend
    assert (what in refused(machine)) == (state == "missing")
    assert [each.what for each in found.values() if each.state != "ok"] == [what]


def test_other_ways(machine: Path) -> None:
    closed_module(machine)
    put(machine, "sys/module/nvidia_peermem/version", "1")
    put(machine, "proc/driver/nvidia/params", "EnableStreamMemOPs: 1")
    put(machine, "sys/module/gdrdrv/version", "2.5")
    found = {each.what: each for each in inspect(machine)}
    assert found["GPU memory"].state == "ok"
    assert "NVSHMEM_IBGDA_NIC_HANDLER=cpu" in found["doorbells"].seen
    assert refused(machine) == ""


def test_no_port_is_active(machine: Path) -> None:
    for number in range(2):
        put(machine, f"sys/class/infiniband/mlx5_{number}/ports/1/state", "1: DOWN")
    assert "port: none is active" in refused(machine)


def test_no_card(tmp_path: Path) -> None:
    (only,) = inspect(tmp_path)
    assert only.state == "missing"
    assert "no ConnectX device" in refused(tmp_path)
