"""UCX over tcp, or over what `UCX_TLS` says: the library and headers of the wheel `libucx-cu12` (or -cu13), else the
system's with libucx-dev."""

from __future__ import annotations

import ctypes.util
import os
from pathlib import Path

from eptransport.bench.against.compiled import OpenCompiled, build, in_wheel
from eptransport.bench.against.side import Absent, Recipe

__all__ = ["ENVIRONMENT", "find"]

WHEELS = ("libucx-cu12", "libucx-cu13")
HEADERS = Path("/usr/include")
TRANSPORTS = os.environ.get("UCX_TLS", "tcp")
ENVIRONMENT = {"UCX_TLS": TRANSPORTS, "UCX_WARN_UNUSED_ENV_VARS": "n"}
TAG, PUT = 1, 2


def find(folder: Path) -> list[Recipe]:
    wheels = [(package, found[0]) for package in WHEELS if (found := in_wheel(package, "lib/libucp.so.0"))]
    if wheels:
        owner, library = wheels[0]
        loop = build("ucx.c", folder, library.parent.parent / "include", f"reinstall {owner}")
        where = str(library)
    else:
        system = ctypes.util.find_library("ucp")
        if system is None:
            raise Absent("there is no libucp.so.0: pip install libucx-cu12, or apt-get install libucx-dev")
        if not (HEADERS / "ucp/api/ucp.h").is_file():
            raise Absent("there is no ucp/api/ucp.h for the system's UCX: apt-get install libucx-dev")
        owner, where = "the system's", system
        loop = build("ucx.c", folder, HEADERS, "apt-get install libucx-dev")
    only = ("latency", "bandwidth", "rate")
    return [
        Recipe(
            name,
            how,
            f"({owner})",
            OpenCompiled(loop, where, variant),
            environment=ENVIRONMENT,
            only=only,
        )
        for name, how, variant in (
            ("ucx tag", f"{TRANSPORTS}, tagged send and receive, both sides spinning", TAG),
            ("ucx put", f"{TRANSPORTS}, put, the target looks at the last byte, a stream ends with a flush", PUT),
        )
    ]
