"""What a libfabric offers on this machine, asked in a child process: providers may hang, abort or leave threads.

    python -m eptransport._libfabric [FILE]      # what the child does: prints it as JSON

Fields are read by the layouts below, which are beginnings of structs that no release of libfabric has changed; all
structs come from the library itself.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Info", "Offer", "mapped", "offer"]

LIMIT_S = 60
"""32 NICs are asked in under a second; a device that hangs must not hang the doctor."""
PLACES = ("/opt/amazon/efa/lib64/libfabric.so.1", "/opt/amazon/efa/lib/libfabric.so.1", "libfabric.so.1")
"""Where the backend looks, in its order."""
A_LIBFABRIC = re.compile(r"libfabric(-[0-9a-f]+)?\.so[.\d]*")
"""With the digest that a wheel's bundler adds; our plugin ept_libfabric.so is none."""
FI_RMA, FI_PROV_ATTR_ONLY = 1 << 2, 1 << 54
API = 1 << 16 | 17
EFA_DIRECT_API = 2 << 16

_LAYOUT = """
    struct fi_fabric_attr { void *fabric; char *name; char *prov_name; uint32_t prov_version; uint32_t api_version; };
    struct fi_domain_attr { void *domain; char *name; };
    struct fi_info {
      struct fi_info *next; uint64_t caps; uint64_t mode; uint32_t addr_format; size_t src_addrlen; size_t dest_addrlen;
      void *src_addr; void *dest_addr; void *handle; void *tx_attr; void *rx_attr; void *ep_attr;
      struct fi_domain_attr *domain_attr; struct fi_fabric_attr *fabric_attr;
    };
    int fi_getinfo(uint32_t version, const char *node, const char *service, uint64_t flags, struct fi_info *hints,
                   struct fi_info **infos);
    struct fi_info *fi_dupinfo(const struct fi_info *);
    void fi_freeinfo(struct fi_info *);
    uint32_t fi_version(void);
"""


@dataclass(frozen=True)
class Info:
    """One thing that fi_getinfo offers."""

    provider: str
    fabric: str
    domain: str
    rma: bool


@dataclass(frozen=True)
class Offer:
    version: str = ""
    path: str = ""
    providers: tuple[str, ...] = ()
    """All that the library knows, whether or not they find a device."""
    infos: tuple[Info, ...] = ()
    problem: str = ""
    """Why nothing could be asked."""


def offer(library: str = "") -> Offer:
    """Blocks for at most LIMIT_S."""
    command = [sys.executable, "-m", "eptransport._libfabric", library]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Offer(problem=f"libfabric did not say in {LIMIT_S} s what it offers: see dmesg")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Offer(problem=f"asking libfabric ended with exit code {done.returncode}: {last}")
    said = json.loads(done.stdout.splitlines()[-1])
    infos = tuple(Info(**info) for info in said.pop("infos"))
    return Offer(**{**said, "providers": tuple(said["providers"]), "infos": infos})


def mapped(maps: Path = Path("/proc/self/maps")) -> tuple[str, ...]:
    """The files of all libfabrics that a process has mapped."""
    try:
        lines = maps.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    files = {line[line.index("/") :] for line in lines if "/" in line}
    return tuple(sorted(file for file in files if A_LIBFABRIC.fullmatch(file.rsplit("/", 1)[1])))


def _ask(library: str) -> Offer:
    from cffi import FFI

    ffi: Any = FFI()
    ffi.cdef(_LAYOUT)
    refused = []
    lib: Any
    for place in (library,) if library else PLACES:
        try:
            lib = ffi.dlopen(place, ffi.RTLD_NOW | ffi.RTLD_LOCAL)
            break
        except OSError as problem:
            refused.append(str(problem).split("Additionally")[0].strip())
    else:
        return Offer(problem=f"libfabric.so.1 is not here: {'; '.join(refused)}")
    number = lib.fi_version()
    # A provider may offer more to who speaks a later interface: efa-direct needs 2.0.
    api = EFA_DIRECT_API if number >= EFA_DIRECT_API else API
    found: dict[tuple[str, str, str], bool] = {}
    for provider, fabric, domain, caps in _list(ffi, lib, api, 0):
        key = (provider, fabric, domain)
        found[key] = found.get(key, False) or bool(caps & FI_RMA)
    return Offer(
        version=f"{number >> 16}.{number & 0xFFFF}",
        path=", ".join(mapped()),
        providers=tuple(dict.fromkeys(provider for provider, *_ in _list(ffi, lib, api, FI_PROV_ATTR_ONLY))),
        infos=tuple(Info(*key, rma) for key, rma in found.items()),
    )


def _list(ffi: Any, lib: Any, api: int, flags: int) -> list[tuple[str, str, str, int]]:
    head = ffi.new("struct fi_info **")
    if lib.fi_getinfo(api, ffi.NULL, ffi.NULL, flags, ffi.NULL, head) != 0:
        return []
    found: list[tuple[str, str, str, int]] = []
    info = head[0]
    while info != ffi.NULL:
        fabric, domain = info.fabric_attr, info.domain_attr
        names = [name(ffi, each) for each in (fabric.prov_name, fabric.name)]
        found.append((names[0], names[1], name(ffi, domain.name) if domain != ffi.NULL else "", info.caps))
        info = info.next
    lib.fi_freeinfo(head[0])
    return found


def name(ffi: Any, text: Any) -> str:
    return "" if text == ffi.NULL else ffi.string(text).decode(errors="replace")


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_ask(sys.argv[1]))))
