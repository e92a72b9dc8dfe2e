# SPDX-License-Identifier: Apache-2.0
"""What doctor finds out about EFA: absence on this machine, presence and each missing piece on one made of files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from libfabrics import FOLDER, Libfabric, releases
from machines import Machine, Nic

from eptransport._libfabric import Info, Offer, offer
from eptransport.efa import AMAZON, Finding, inspect

GOOD = Offer(
    "2.5", "/opt/amazon/efa/lib/libfabric.so.1", ("efa", "shm"), (Info("efa", "efa", "rdmap0s6-rdm", True),
    Info("efa", "efa-direct", "rdmap0s6-direct", True)),
)  # fmt: skip


def machine() -> Machine:
    return Machine(
        nics=[Nic(f"0000:{bus:02x}:00.0", bus // 0x80, f"rdmap{bus}s0") for bus in (0x50, 0x51, 0xA0, 0xA1)],
        gpus=[Nic("0000:53:00.0", 0)],
    )


def states(found: tuple[Finding, ...]) -> dict[str, str]:
    return {each.what: each.state for each in found}


def look(root: Path, changed: Machine, asked: Offer = GOOD) -> dict[str, Finding]:
    found = inspect(changed.lay_out(root), asked=asked)
    assert all(each.seen for each in found)
    assert all(each.mend for each in found if each.state == "missing")
    return {each.what: each for each in found}


def test_a_machine_where_nothing_is_missing(tmp_path: Path) -> None:
    found = look(tmp_path, machine())
    assert set(states(tuple(found.values())).values()) == {"ok"}
    assert found["device"].seen.startswith("4: rdmap160s0 (0000:a0:00.0, NUMA node 1), ")
    assert found["driver"].seen == "efa 2.10.0g"
    assert found["libfabric"].seen == "2.5: /opt/amazon/efa/lib/libfabric.so.1"
    assert found["fabrics"].seen == "efa, efa-direct"
    assert found["GPU memory"].seen.startswith("dmabuf")


TAKEN_AWAY: list[tuple[str, str, str, str, Callable[[Machine], None]]] = [
    ("device", "missing", "4 of 4 EFA devices have no driver", "modprobe efa",
     lambda it: [setattr(nic, "name", "") for nic in it.nics] and None),
    ("driver", "missing", "efa is not loaded", "modprobe efa", lambda it: setattr(it, "driver", "")),
    ("port", "missing", "not active: rdmap", "dmesg", lambda it: setattr(it, "port", "1: DOWN")),
    ("device nodes", "missing", "0 of 4 device nodes", "--device", lambda it: setattr(it, "device_nodes", False)),
    ("memlock", "missing", "8192 KiB may be locked", "ulimit -l", lambda it: setattr(it, "memlock", str(8 << 20))),
    ("huge pages", "note", "none of 2 MiB", "vm.nr_hugepages", lambda it: setattr(it, "huge_pages", 0)),
    ("GPU memory", "missing", "Linux 5.10.0", "efa_nv_peermem", lambda it: setattr(it, "kernel", "5.10.0-aws")),
    ("GPU memory", "missing", "closed kernel module", "open kernel module",
     lambda it: setattr(it, "nvidia", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.1")),
    ("GPU memory", "missing", "without a loaded nvidia driver", "install", lambda it: setattr(it, "nvidia", "")),
    ("one libfabric", "missing", "/opt/amazon/efa/lib/libfabric.so.1.30.0, /usr/lib/libfabric.so.1.20.0",
     "EPT_LIBFABRIC_LIBRARY", lambda it: setattr(
         it, "maps", ("/usr/lib/libfabric.so.1.20.0", "/opt/amazon/efa/lib/libfabric.so.1.30.0", "/lib/libc.so.6"))),
]  # fmt: skip


@pytest.mark.parametrize(("what", "state", "seen", "mend", "change"), TAKEN_AWAY)
def test_each_missing_piece_has_its_mend(
    tmp_path: Path, what: str, state: str, seen: str, mend: str, change: Callable[[Machine], None]
) -> None:
    changed = machine()
    change(changed)
    found = look(tmp_path, changed)
    assert found[what].state == state
    assert seen in found[what].seen
    assert mend in found[what].mend
    others = {each.what for each in found.values() if each.state != "ok"} - {what}
    assert not others, "one thing was taken away"


def test_peermem_does_where_dmabuf_is_not_to_be_had(tmp_path: Path) -> None:
    old = machine()
    old.kernel, old.peermem = "5.10.0", True
    assert look(tmp_path, old)["GPU memory"].state == "ok"


def test_without_a_gpu_nothing_is_said_of_its_memory(tmp_path: Path) -> None:
    plain = machine()
    plain.gpus = []
    assert "GPU memory" not in look(tmp_path, plain)


def test_our_plugin_is_no_libfabric(tmp_path: Path) -> None:
    """One of a wheel, with the digest in its name, is."""
    mapped = machine()
    mapped.maps = ("/venv/eptransport/plugins/ept_libfabric.so", "/venv/x.libs/libfabric-1c0ffee5.so.1.30.0")
    found = look(tmp_path, mapped)
    assert "one libfabric" not in found
    assert found["mapped libfabric"].seen == mapped.maps[1]


def test_an_instance_without_the_card(tmp_path: Path) -> None:
    found = look(tmp_path, Machine(product="m7i.large"))
    assert list(found) == ["device"]
    assert "m7i.large has no EFA device" in found["device"].seen
    assert "efa-only" in found["device"].mend


def test_what_libfabric_offers(tmp_path: Path) -> None:
    root = machine().lay_out(tmp_path)

    def asked(version: str, *infos: Info, problem: str = "") -> dict[str, Finding]:
        return {each.what: each for each in inspect(root, asked=Offer(version, "/x", ("efa",), infos, problem))}

    old = asked("1.17", Info("efa", "EFA-fe80::", "rdmap0s6-rdm", True))
    assert old["fabrics"].state == "note"
    assert "no efa-direct" in old["fabrics"].seen
    assert old["RDMA write"].state == "note"
    emulated = asked("2.5", Info("efa", "efa", "a", True), Info("efa", "efa-direct", "b", False))
    assert emulated["RDMA write"].state == "note"
    assert "emulates" in emulated["RDMA write"].seen
    none = asked("2.5", Info("tcp", "10.0.0.0/8", "eth0", True))
    assert none["fabrics"].state == "missing"
    absent = asked("", problem="libfabric.so.1 is not here")
    assert absent["libfabric"].state == "missing"
    assert "EPT_LIBFABRIC_LIBRARY" in absent["libfabric"].mend


def test_this_machine() -> None:
    """The real files. Where there is no card, that is the one thing that is said of it."""
    found = {each.what: each for each in inspect()}
    vendors = [file.read_text().strip() for file in Path("/sys/bus/pci/devices").glob("*/vendor")]
    if AMAZON not in vendors:
        assert found["device"].state == "missing"
        assert not {"driver", "fabrics", "memlock"} & set(found)
    else:
        assert found["device"].seen


@pytest.mark.parametrize("release", releases(), ids=lambda release: release.name)
def test_a_real_libfabric_says_what_it_offers(release: Libfabric) -> None:
    if not release.library:
        pytest.skip(release.missing)
    found = offer(release.library)
    assert not found.problem
    assert f"-{found.version}" in release.name
    assert Path(found.path) == Path(release.library)
    assert {"tcp", "shm"} <= set(found.providers)
    assert any(info.provider == "shm" and info.rma for info in found.infos)


FAKE = r"""
#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
static struct fi_fabric_attr fabrics[2] = {{0, "efa", "efa", 0, 0}, {0, "efa-direct", "efa", 0, 0}};
static struct fi_domain_attr domains[2] = {{0, "rdmap0s6-rdm"}, {0, "rdmap0s6-direct"}};
static struct fi_info infos[2] = {
  {&infos[1], FI_MSG | FI_RMA, .domain_attr = &domains[0], .fabric_attr = &fabrics[0]},
  {0, FI_MSG, .domain_attr = &domains[1], .fabric_attr = &fabrics[1]}};
int fake_getinfo(uint32_t api, const char *node, const char *service, uint64_t flags, const struct fi_info *hints,
                 struct fi_info **found) {
  (void)node; (void)service; (void)flags; (void)hints;
  if (api < FI_VERSION(2, 0)) infos[0].next = 0;  /* efa-direct is for who speaks 2.0 */
  *found = infos;
  return 0;
}
void fake_freeinfo(struct fi_info *info) { (void)info; }
uint32_t fake_version(void) { return FI_VERSION(2, 4); }
__asm__(".globl fi_getinfo\n.set fi_getinfo, fake_getinfo\n.globl fi_freeinfo\n.set fi_freeinfo, fake_freeinfo\n"
        ".globl fi_version\n.set fi_version, fake_version");
"""


def test_fields_are_read_as_libfabrics_headers_lay_them_out(tmp_path: Path) -> None:
    """A library compiled against the real headers, which offers what a card without RDMA write would."""
    compiler = shutil.which("cc")
    if compiler is None or not (FOLDER / "include" / "rdma" / "fabric.h").exists():
        pytest.skip("no C compiler, or no headers of libfabric: make libfabric")
    (tmp_path / "fake.c").write_text(FAKE)
    library = tmp_path / "libfabric.so.1"
    command = [compiler, "-shared", "-fPIC", "-w", f"-I{FOLDER / 'include'}", "-o", str(library), "fake.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = offer(str(library))
    assert found.version == "2.4"
    assert found.infos == (
        Info("efa", "efa", "rdmap0s6-rdm", True),
        Info("efa", "efa-direct", "rdmap0s6-direct", False),
    )


def test_a_library_that_is_none(tmp_path: Path) -> None:
    found = offer(str(tmp_path / "libfabric.so.1"))
    assert "libfabric.so.1 is not here" in found.problem
