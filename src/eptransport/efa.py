"""What AWS EFA needs of a machine, and what of it is missing: device, driver, library, memory. For `doctor`.

Nothing is opened or started but one child process, which asks libfabric for what it offers (`_libfabric`). All else is
read from files under `root`, so that a test can lay out the files of a machine that it hasn't got.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eptransport._files import entries, text
from eptransport._libfabric import Offer, mapped, offer

__all__ = ["Device", "Finding", "devices", "inspect"]

AMAZON, NVIDIA = "0x1d0f", "0x10de"
EFA_DEVICE = re.compile(r"0xefa[0-9a-f]")
EFA_DMABUF_KERNEL = (5, 16)
"""The first Linux whose efa driver registers dmabuf memory."""
INSTALLER = "run AWS's EFA installer (aws-efa-installer, efa_installer.sh)"
HUGE_PAGES = 5128
"""2 MiB pages that AWS's installer reserves, for 32 NICs."""


@dataclass(frozen=True)
class Finding:
    """One thing that EFA needs."""

    what: str
    state: str
    """`ok`; `note`: works, but; `missing`."""
    seen: str
    mend: str = ""


@dataclass(frozen=True)
class Device:
    """An EFA device as the kernel shows it."""

    name: str
    pci: str
    numa: int
    firmware: str
    port: str
    """The state of its port: `4: ACTIVE`."""


def inspect(root: Path = Path("/"), library: str = "", asked: Offer | None = None) -> tuple[Finding, ...]:
    """All that EFA needs, in the order in which it goes wrong. `library`: EPT_LIBFABRIC_LIBRARY. `asked`: what
    libfabric offers, if that is known already. One finding where there is no such card: the rest would be noise."""
    cards = _cards(root, EFA_DEVICE, AMAZON)
    found = devices(root)
    if not cards and not found:
        return (_no_card(root), *_copies(root))
    asked = asked or offer(library)
    return (
        *_devices(root, cards, found),
        _driver(root),
        *_library(asked),
        *_copies(root),
        *_fabrics(asked),
        *_dmabuf(root),
        _memlock(root),
        _hugepages(root),
    )


def devices(root: Path = Path("/")) -> tuple[Device, ...]:
    """EFA devices that have a driver, by name."""
    found = []
    for folder in entries(root / "sys/class/infiniband"):
        if text(folder / "device/vendor") == AMAZON and EFA_DEVICE.fullmatch(text(folder / "device/device")):
            numa = text(folder / "device/numa_node")
            port = text(folder / "ports/1/state")
            pci = (folder / "device").resolve().name
            firmware = text(folder / "fw_ver")
            found.append(Device(folder.name, pci, int(numa) if numa.lstrip("-").isdecimal() else -1, firmware, port))
    return tuple(found)


def _no_card(root: Path) -> Finding:
    product = text(root / "sys/devices/virtual/dmi/id/product_name")
    if text(root / "sys/devices/virtual/dmi/id/sys_vendor") != "Amazon EC2":
        return Finding("device", "missing", "no EFA device (PCI vendor 1d0f, device efa*); this is no EC2 instance")
    mend = "launch it with network interfaces of the type efa or efa-only, if its type has them"
    return Finding("device", "missing", f"this {product or 'EC2 instance'} has no EFA device", mend)


def _devices(root: Path, cards: list[str], found: tuple[Device, ...]) -> Iterable[Finding]:
    unbound = sorted(set(cards) - {device.pci for device in found})
    if unbound:
        seen = f"{len(unbound)} of {len(cards)} EFA devices have no driver: {_few(unbound)}"
        yield Finding("device", "missing", seen, f"modprobe efa ib_uverbs, or {INSTALLER}")
    if not found:
        return
    listed = _few([f"{each.name} ({each.pci}, NUMA node {each.numa})" for each in found])
    yield Finding("device", "ok", f"{len(found)}: {listed}")
    down = [device.name for device in found if device.port and "ACTIVE" not in device.port]
    if down:
        yield Finding("port", "missing", f"not active: {_few(down)}", "see dmesg; attach the interface again")
    nodes = [folder.name for folder in entries(root / "dev/infiniband") if folder.name.startswith("uverbs")]
    if len(nodes) < len(found):
        seen = f"{len(nodes)} of {len(found)} device nodes /dev/infiniband/uverbs*"
        mend = (
            "give the container its devices: docker run --device=/dev/infiniband, on Kubernetes vpc.amazonaws.com/efa"
        )
        yield Finding("device nodes", "missing", seen, mend)


def _driver(root: Path) -> Finding:
    module = root / "sys/module/efa"
    if not module.is_dir():
        return Finding("driver", "missing", "the kernel module efa is not loaded", f"modprobe efa, or {INSTALLER}")
    version = text(module / "version")
    return Finding("driver", "ok", f"efa {version}" if version else f"efa of Linux {_kernel(root)}")


def _library(asked: Offer) -> Iterable[Finding]:
    if asked.problem:
        yield Finding("libfabric", "missing", asked.problem, f"{INSTALLER}, or give EPT_LIBFABRIC_LIBRARY")
        return
    yield Finding("libfabric", "ok", f"{asked.version}: {asked.path}")


def _copies(root: Path) -> Iterable[Finding]:
    """Two in a process, and the second sees no devices: NCCL falls back to TCP, or we do."""
    copies = mapped(root / "proc/self/maps")
    if len(copies) > 1:
        seen = f"this process has mapped {len(copies)} libfabrics: {', '.join(copies)}"
        mend = "use one: point EPT_LIBFABRIC_LIBRARY at the one that the others use (NCCL's plugin: /opt/amazon/efa)"
        yield Finding("one libfabric", "missing", seen, mend)
    elif copies:
        yield Finding("mapped libfabric", "ok", copies[0])


def _fabrics(asked: Offer) -> Iterable[Finding]:
    if asked.problem:
        return
    fabrics = sorted({info.fabric for info in asked.infos if info.provider == "efa"})
    if not fabrics:
        seen = f"libfabric {asked.version} offers none of provider efa: it finds no device, or was built without it"
        yield Finding("fabrics", "missing", seen, INSTALLER)
        return
    if "efa-direct" in fabrics:
        yield Finding("fabrics", "ok", ", ".join(fabrics))
    else:
        mend = f"for efa-direct {INSTALLER}: it comes with libfabric 2.0"
        yield Finding("fabrics", "note", f"{', '.join(fabrics)}; no efa-direct", mend)
    direct = [info for info in asked.infos if info.provider == "efa" and info.fabric == "efa-direct"]
    if not direct:
        yield Finding("RDMA write", "note", "not known: only efa-direct tells whether the device writes by itself")
    elif any(info.rma for info in direct):
        yield Finding("RDMA write", "ok", "efa-direct offers FI_RMA: the device reads and writes by itself")
    else:
        seen = "efa-direct offers no FI_RMA: the fabric efa emulates writes by messages, and is slower"
        yield Finding("RDMA write", "note", seen, "p5, p5en and p6 have it; p4d has not")


def _dmabuf(root: Path) -> Iterable[Finding]:
    """Only where there are GPUs: how their memory is registered."""
    if not _cards(root, re.compile(".*"), NVIDIA, "0x0302"):
        return
    driver = text(root / "proc/driver/nvidia/version")
    if not driver:
        yield Finding("GPU memory", "missing", "a GPU without a loaded nvidia driver", "install the NVIDIA driver")
        return
    numbers = tuple(int(part) for part in re.findall(r"\d+", _kernel(root))[:2])
    if "Open Kernel Module" in driver and numbers >= EFA_DMABUF_KERNEL:
        yield Finding("GPU memory", "ok", f"dmabuf: NVIDIA's open kernel module and Linux {_kernel(root)}")
    elif (root / "sys/module/efa_nv_peermem").is_dir():
        yield Finding("GPU memory", "ok", "efa_nv_peermem is loaded; dmabuf is not to be had")
    else:
        what = f"Linux {_kernel(root)}" + ("" if "Open Kernel Module" in driver else ", NVIDIA's closed kernel module")
        mend = f"NVIDIA's open kernel module and Linux {'.'.join(map(str, EFA_DMABUF_KERNEL))}, or efa_nv_peermem"
        yield Finding("GPU memory", "missing", f"no dmabuf ({what}) and no efa_nv_peermem", mend)


def _memlock(root: Path) -> Finding:
    limit = re.search(r"^Max locked memory +(\S+)", text(root / "proc/self/limits"), re.MULTILINE)
    if limit is None or limit[1] == "unlimited":
        return Finding("memlock", "ok" if limit else "note", "unlimited" if limit else "the limit can't be read")
    mend = "ulimit -l unlimited; docker run --ulimit memlock=-1:-1; LimitMEMLOCK=infinity in a systemd unit"
    return Finding("memlock", "missing", f"{int(limit[1]) >> 10} KiB may be locked; registered memory is", mend)


def _hugepages(root: Path) -> Finding:
    folder = root / "sys/kernel/mm/hugepages/hugepages-2048kB"
    total, free = (text(folder / name) for name in ("nr_hugepages", "free_hugepages"))
    if total.isdecimal() and int(total) > 0:
        return Finding("huge pages", "ok", f"{free} of {total} of 2 MiB are free")
    mend = f"sysctl vm.nr_hugepages={HUGE_PAGES} (AWS's installer does it)"
    return Finding("huge pages", "note", "none of 2 MiB: libfabric's buffers take plain pages", mend)


# ---- files ----


def _cards(root: Path, device: re.Pattern[str], vendor: str, kind: str = "") -> list[str]:
    """PCI addresses of cards of that vendor, device and class, whether or not they have a driver."""
    return [
        folder.name
        for folder in entries(root / "sys/bus/pci/devices")
        if text(folder / "vendor") == vendor
        and device.fullmatch(text(folder / "device"))
        and text(folder / "class").startswith(kind)
    ]


def _kernel(root: Path) -> str:
    return text(root / "proc/sys/kernel/osrelease")


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
