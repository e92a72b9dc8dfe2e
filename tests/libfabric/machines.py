# SPDX-License-Identifier: Apache-2.0
"""The files of machines that we haven't got: what Linux shows of an EC2 instance with EFA, under a folder of a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Machine", "Nic"]


@dataclass
class Nic:
    pci: str
    numa: int
    name: str = ""
    """Empty: it has no driver."""
    path: str = ""
    """The bridges above it, as in /sys/devices: `pci0000:10/0000:10:01.0`."""


@dataclass
class Machine:
    """An instance on which all is as it should be; a test takes something away."""

    product: str = "p5.48xlarge"
    nics: list[Nic] = field(default_factory=list)
    gpus: list[Nic] = field(default_factory=list)
    driver: str = "2.10.0g"
    kernel: str = "6.8.0-1021-aws"
    nvidia: str = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20"
    peermem: bool = False
    memlock: str = "unlimited"
    huge_pages: int = 5128
    device_nodes: bool = True
    port: str = "4: ACTIVE"
    maps: tuple[str, ...] = ()
    cpus: dict[int, str] = field(default_factory=dict)
    """The cores of each NUMA node."""

    def lay_out(self, root: Path) -> Path:
        def put(place: str, text: str) -> None:
            file = root / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

        put("sys/devices/virtual/dmi/id/sys_vendor", "Amazon EC2")
        put("sys/devices/virtual/dmi/id/product_name", self.product)
        put("proc/sys/kernel/osrelease", self.kernel)
        limits = "Limit                     Soft Limit           Hard Limit           Units"
        put("proc/self/limits", f"{limits}\nMax locked memory         {self.memlock:<20} {self.memlock:<20} bytes")
        put(
            "proc/self/maps", "\n".join(f"7f0000000000-7f0000001000 r-xp 00000000 08:01 1 {file}" for file in self.maps)
        )
        huge = "sys/kernel/mm/hugepages/hugepages-2048kB"
        put(f"{huge}/nr_hugepages", str(self.huge_pages))
        put(f"{huge}/free_hugepages", str(self.huge_pages))
        for node, cpus in self.cpus.items():
            put(f"sys/devices/system/node/node{node}/cpulist", cpus)
        if self.driver:
            put("sys/module/efa/version", self.driver)
        if self.nvidia and self.gpus:
            put("proc/driver/nvidia/version", self.nvidia)
        if self.peermem:
            put("sys/module/efa_nv_peermem/refcnt", "0")
        for vendor, device, kind, cards in (
            ("0x1d0f", "0xefa2", "0x020000", self.nics),
            ("0x10de", "0x2330", "0x030200", self.gpus),
        ):
            for index, card in enumerate(cards):
                at = f"sys/devices/{card.path or 'pci0000:00'}/{card.pci}"
                for name, text in (("vendor", vendor), ("device", device), ("class", kind)):
                    put(f"{at}/{name}", text)
                put(f"{at}/numa_node", str(card.numa))
                self._link(root, f"sys/bus/pci/devices/{card.pci}", at)
                if card.name:
                    put(f"{at}/infiniband/{card.name}/fw_ver", "0.0.0.0")
                    put(f"{at}/infiniband/{card.name}/ports/1/state", self.port)
                    self._link(root, f"{at}/infiniband/{card.name}/device", at)
                    self._link(root, f"sys/class/infiniband/{card.name}", f"{at}/infiniband/{card.name}")
                    if self.device_nodes:
                        put(f"dev/infiniband/uverbs{index}", "")
        return root

    @staticmethod
    def _link(root: Path, place: str, target: str) -> None:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).symlink_to(root / target)
