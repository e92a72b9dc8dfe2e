# SPDX-License-Identifier: Apache-2.0
"""The libfabrics that tests run with: the releases that tests/libfabric/fetch.py brought, and what each can do here.

A process holds one libfabric: two copies in it see each other's providers and no devices. So a test of several releases
works in child processes, to which EPT_LIBFABRIC_LIBRARY says which; `releases()` is the list, `cases()` the parameters.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eptransport.backends import absent, registry

FOLDER = Path(__file__).parent.parent / "build" / "libfabric"

PROVIDERS = ("tcp", "shm", "tcp;ofi_rxm", "udp;ofi_rxd", "verbs", "efa", "efa-direct")
"""Asked for in each release; which of them can start depends on the release and on the machine."""

GIVEN = {"unproven": os.environ["EPT_LIBFABRIC_UNPROVEN"]} if "EPT_LIBFABRIC_UNPROVEN" in os.environ else {}
"""What whoever starts the tests says for all of them: that providers may be tried over which nothing is proven."""


@dataclass(frozen=True)
class Libfabric:
    """A release: where it is, or why it is not here."""

    name: str
    """`debian-1.17`, `wheel-2.5`."""
    library: str
    missing: str

    def environment(self, provider: str = "") -> dict[str, str]:
        """What makes a child process use it."""
        chosen = {"EPT_LIBFABRIC_LIBRARY": self.library}
        return {**chosen, "EPT_LIBFABRIC_PROVIDER": provider} if provider else chosen

    def options(self, provider: str) -> dict[str, str]:
        """The same as settings of the backend."""
        return {"library": self.library, "provider": provider, **GIVEN}

    @property
    def providers(self) -> dict[str, str]:
        """Those of PROVIDERS, each with why it can't start here, empty where it can."""
        found = _providers(self.library)
        short = _short_of_shared_memory()
        return {**found, "shm": found.get("shm") or short} if short else found


def releases() -> list[Libfabric]:
    """Two, whether or not they are here."""
    file = FOLDER / "found.json"
    found: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.exists() else {}
    missing = {"missing": "not fetched: make libfabric"}
    listed = []
    for name in ("debian", "wheel"):
        entry = found.get(name, missing)
        library = entry.get("library", "")
        reason = entry.get("missing", "") if not library or os.path.exists(library) else f"{library} is gone"
        if not built():
            reason = "; ".join(absent("libfabric"))
        listed.append(Libfabric(f"{name}-{entry['version']}" if "version" in entry else name, library, reason))
    return listed


def built() -> bool:
    """Whether this package has the plugin."""
    return "libfabric" in registry(()).plugins


def cases(*providers: str) -> list[Any]:
    """A pytest parameter (release, provider) for each release and each of these providers (of all that can start, if
    none are named). One that is not here is a skip with the reason."""
    params = []
    for release in releases():
        skip = pytest.mark.skip(reason=f"libfabric {release.name}: {release.missing}")
        can = release.providers if not release.missing else {}
        wanted = providers or [provider for provider, why_not in can.items() if not why_not] or [""]
        for provider in wanted:
            name = "-".join(filter(None, (release.name, provider)))
            if not release.missing and can.get(provider):
                skip = pytest.mark.skip(reason=f"libfabric {name}: {can[provider]}")
            marks = [skip] if release.missing or can.get(provider) else []
            params.append(pytest.param((release, provider), id=name, marks=marks))
    return params


SHARED_MEMORY = 512 << 20
"""An endpoint of provider shm takes 16 MiB of /dev/shm, and tests open up to twenty at a time. A container has 64 MiB
of it if it isn't given more; and when it is full, who writes there is ended."""


def _short_of_shared_memory() -> str:
    try:
        found = os.statvfs("/dev/shm")
    except OSError as error:
        return f"/dev/shm: {error}"
    free = found.f_bavail * found.f_frsize
    return "" if free >= SHARED_MEMORY else f"/dev/shm has {free >> 20} MiB free, tests want {SHARED_MEMORY >> 20}"


@functools.cache
def _providers(library: str) -> dict[str, str]:
    code = (
        "import json, sys\n"
        "from eptransport.backends import registry\n"
        "plugin = registry(()).plugins['libfabric']\n"
        "given = json.loads(sys.argv[1])\n"
        "probes = {name: plugin.probe({**given, 'provider': name}) for name in sys.argv[2:]}\n"
        "print(json.dumps({name: '' if probe.usable else probe.why_not for name, probe in probes.items()}))\n"
    )
    command = [sys.executable, "-c", code, json.dumps({**GIVEN, "library": library}), *PROVIDERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        return dict.fromkeys(PROVIDERS, f"the probe ended with {done.returncode}: {done.stderr[-500:]}")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found
