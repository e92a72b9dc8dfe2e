"""libibverbs, over the NIC that our own backend chose: a reliable connection, writes with immediate, both sides
spinning. Headers of Debian's libibverbs-dev, or in a folder of `CPATH`, where C compilers look first."""

from __future__ import annotations

import ctypes.util
import os
import re
from pathlib import Path

from eptransport.bench.against.compiled import OpenCompiled, build
from eptransport.bench.against.side import Absent, Recipe

__all__ = ["find"]

HEADERS = (Path("/usr/include"), Path("/usr/local/include"))


def find(folder: Path) -> list[Recipe]:
    places = [Path(place) for place in os.environ.get("CPATH", "").split(":") if place]
    headers = next((place for place in (*places, *HEADERS) if (place / "infiniband/verbs.h").is_file()), None)
    if headers is None:
        raise Absent("there is no infiniband/verbs.h: apt-get install libibverbs-dev, or name its folder in CPATH")
    library = ctypes.util.find_library("ibverbs")
    if library is None:
        raise Absent("there is no libibverbs.so.1: apt-get install libibverbs1 ibverbs-providers")
    nic, gid = _nic()
    loop = build("verbs.c", folder, headers, "apt-get install libibverbs-dev")
    return [
        Recipe(
            "verbs",
            "RC, RDMA write with immediate, both sides spinning, over the NIC that our backend chooses",
            library,
            OpenCompiled(loop, library, option=f"{nic}:{gid}"),
            only=("latency", "bandwidth", "rate"),
        )
    ]


def _nic() -> tuple[str, str]:
    """As our backend says that it would choose, by its settings."""
    from eptransport import Settings
    from eptransport.backends import registry

    plugin = registry(()).plugins.get("verbs")
    if plugin is None:
        raise Absent("our backend verbs, which chooses the NIC, was built without libibverbs headers")
    report = plugin.probe(Settings(backend="verbs").backend_options(plugin))
    found = re.search(r": (\S+):\d+ \(\w+, GID (\d+) ", report.summary)
    if not report.usable or found is None:
        raise Absent(f"our backend finds no NIC: {report.why_not}")
    return found[1], found[2]
