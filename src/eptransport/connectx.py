"""What a kernel that posts to a ConnectX card by itself (NVSHMEM's IBGDA) needs of a machine, and what of it is
missing: card, GPU memory registered with it, the card's doorbells mapped for the GPU, libmlx5. For `doctor`, and for
`auto`.

Read from files under `root` alone, so that a test can lay out the files of a machine that it hasn't got. The card's own
word, whether a queue pair can be made, is NVSHMEM's to tell when it starts (NVSHMEM_DEBUG=INFO)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from eptransport._files import entries, text
from eptransport.efa import Finding

__all__ = ["devices", "inspect", "refused"]

MELLANOX, NVIDIA = "0x15b3", "0x10de"
DMABUF_KERNEL = (5, 12)
"""The first Linux whose mlx5 driver registers dmabuf memory."""
LIBMLX5 = 19
"""MLX5_1.19 has the last symbol that NVSHMEM 3.4's IBGDA transport needs, mlx5dv_devx_umem_reg_ex (rdma-core 35)."""
FOLDERS = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "lib64", "usr/local/lib")
MODPROBE = "in /etc/modprobe.d/nvidia.conf, then update-initramfs -u and reboot"


def devices(root: Path = Path("/")) -> tuple[str, ...]:
    """ConnectX devices that have a driver, by name."""
    return tuple(
        folder.name
        for folder in entries(root / "sys/class/infiniband")
        if folder.name.startswith("mlx5") or text(folder / "device/vendor") == MELLANOX
    )


def inspect(root: Path = Path("/")) -> tuple[Finding, ...]:
    """All that is needed, in the order in which it goes wrong. One finding where there is no such card."""
    found = devices(root)
    if not found:
        return (Finding("card", "missing", "no ConnectX device with a driver (mlx5) in /sys/class/infiniband"),)
    return (*_cards(root, found), _memory(root), *_doorbells(root), _library(root))


def refused(root: Path = Path("/")) -> str:
    """Why kernels can't post by themselves here; empty: nothing that files show speaks against it."""
    return "; ".join(f"{each.what}: {each.seen}" for each in inspect(root) if each.state == "missing")


def _cards(root: Path, found: tuple[str, ...]) -> Iterable[Finding]:
    listed = []
    for name in found:
        folder = root / "sys/class/infiniband" / name
        layer, firmware = text(folder / "ports/1/link_layer"), text(folder / "fw_ver")
        listed.append(f"{name} ({', '.join(each for each in (layer, firmware) if each) or 'nothing known'})")
    yield Finding("card", "ok", f"{len(found)}: {', '.join(listed)}")
    down = [name for name in found if "ACTIVE" not in text(root / "sys/class/infiniband" / name / "ports/1/state")]
    if len(down) == len(found):
        yield Finding("port", "missing", f"none is active: {', '.join(down)}", "see ibstat, dmesg and the cable")
    elif down:
        yield Finding(
            "port", "note", f"not active: {', '.join(down)}", "NVSHMEM_HCA_LIST=mlx5_0:1,... names those in use"
        )


def _memory(root: Path) -> Finding:
    """How the card reads and writes GPU memory."""
    driver, kernel = text(root / "proc/driver/nvidia/version"), text(root / "proc/sys/kernel/osrelease")
    if not driver:
        return Finding("GPU memory", "missing", "no NVIDIA driver is loaded", "install the NVIDIA driver")
    numbers = tuple(int(part) for part in re.findall(r"\d+", kernel)[:2])
    if "Open Kernel Module" in driver and numbers >= DMABUF_KERNEL:
        return Finding("GPU memory", "ok", f"dmabuf: NVIDIA's open kernel module and Linux {kernel}")
    if (root / "sys/module/nvidia_peermem").is_dir():
        return Finding("GPU memory", "ok", "nvidia-peermem is loaded; dmabuf is not to be had")
    what = f"Linux {kernel}" + ("" if "Open Kernel Module" in driver else ", NVIDIA's closed kernel module")
    mend = f"modprobe nvidia-peermem; or NVIDIA's open kernel module and Linux {'.'.join(map(str, DMABUF_KERNEL))}"
    return Finding("GPU memory", "missing", f"no dmabuf ({what}) and no nvidia-peermem", mend)


def _doorbells(root: Path) -> Iterable[Finding]:
    """A kernel rings the card's doorbell, which the driver maps for it if told so; else a CPU thread rings it."""
    params = text(root / "proc/driver/nvidia/params")
    if not params:
        yield Finding(
            "doorbells", "note", "/proc/driver/nvidia/params can't be read: not known whether they are mapped"
        )
        return
    override = re.search(r"PeerMappingOverride=([01])", params)
    if override and override[1] == "1":
        yield Finding("doorbells", "ok", "PeerMappingOverride=1: kernels ring them")
    elif _gdrcopy(root):
        mend = f'options nvidia NVreg_RegistryDwords="PeerMappingOverride=1;" {MODPROBE}, to be rid of that thread'
        seen = (
            "no PeerMappingOverride=1; gdrdrv is loaded, so a CPU thread may ring them (NVSHMEM_IBGDA_NIC_HANDLER=cpu)"
        )
        yield Finding("doorbells", "note", seen, mend)
    else:
        mend = f'options nvidia NVreg_RegistryDwords="PeerMappingOverride=1;" {MODPROBE}; or GDRCopy (gdrdrv)'
        yield Finding(
            "doorbells", "missing", "no PeerMappingOverride=1, and no gdrdrv for a CPU thread to ring them", mend
        )
    operations = re.search(r"EnableStreamMemOPs: *([01])", params)
    if operations and operations[1] == "0":
        mend = f"options nvidia NVreg_EnableStreamMemOPs=1 {MODPROBE}; some releases of NVSHMEM want it"
        yield Finding("stream memory", "note", "EnableStreamMemOPs is 0", mend)


def _library(root: Path) -> Finding:
    versions = []
    for folder in FOLDERS:
        for file in entries(root / folder, "libmlx5.so.1.*"):
            found = re.fullmatch(r"libmlx5\.so\.1\.(\d+)\.(\S+)", file.name)
            if found:
                versions.append((int(found[1]), f"{file.name} in /{folder}"))
    if not versions:
        mend = "apt-get install ibverbs-providers, dnf install rdma-core, or MLNX_OFED / DOCA-OFED"
        return Finding("libmlx5", "missing", "no libmlx5.so.1 in the system's folders", mend)
    number, name = max(versions)
    if number < LIBMLX5:
        seen = f"{name} has no MLX5_1.{LIBMLX5} (rdma-core 35), which NVSHMEM's IBGDA transport is linked with"
        return Finding("libmlx5", "missing", seen, "install a later rdma-core, MLNX_OFED or DOCA-OFED")
    return Finding("libmlx5", "ok", name)


def _gdrcopy(root: Path) -> bool:
    return (root / "sys/module/gdrdrv").is_dir() or (root / "dev/gdrdrv").exists()
