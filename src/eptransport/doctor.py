"""What `eptransport doctor` finds out: which backends can run here, what others lack, and what `auto` would take."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import eptransport
from eptransport import connectx
from eptransport._process import cores
from eptransport.backends import AUTO_ORDER, PLANNED, Registry, absent, choose, registry
from eptransport.efa import Finding, inspect
from eptransport.errors import ConfigError, EptError
from eptransport.settings import Explained, Settings

__all__ = ["Backend", "Choice", "Diagnosis", "diagnose"]


@dataclass(frozen=True)
class Backend:
    """One backend as it stands on this machine."""

    name: str
    usable: bool
    version: str
    source: str
    """Where its plugin was found: `built in`, `EPT_PLUGIN_PATH`, an entry point; empty where there is none."""
    path: str
    finding: str
    """What it would use, or the piece that is missing."""
    mend: str
    """How to get that piece."""
    waives: str
    """Clauses of the contract that it doesn't keep, and why."""
    options: tuple[str, ...]
    """Its own settings, each with its default and what it is for."""


@dataclass(frozen=True)
class Choice:
    """What the settings lead to."""

    where: str
    order: tuple[str, ...]
    backend: str | None
    why: str


@dataclass(frozen=True)
class Diagnosis:
    version: str
    python: str
    system: str
    cores: int
    """That this process may use."""
    extras: dict[str, str | None]
    """Versions of optional packages, None where one is missing."""
    backends: tuple[Backend, ...]
    efa: tuple[Finding, ...]
    """What AWS EFA needs of this machine; one entry where there is no such card."""
    connectx: tuple[Finding, ...]
    """What kernels that post to ConnectX cards by themselves need; one entry where there is no such card."""
    refused: dict[str, str]
    """Files that were found and are no backend, with the reason."""
    choices: tuple[Choice, ...]
    settings: tuple[Explained, ...]
    problem: str | None
    """Why no job could start with this environment, None where one could."""

    @property
    def healthy(self) -> bool:
        return self.problem is None

    def as_json(self) -> dict[str, Any]:
        return {"healthy": self.healthy, **dataclasses.asdict(self)}


def diagnose() -> Diagnosis:
    """Looks, and starts nothing: opens plugins, asks each what it would do here, reads the environment."""
    problem = None
    try:
        settings = Settings()
    except ConfigError as error:
        problem = error.message
        settings = Settings.model_construct()  # the defaults, without a look at the environment
    plugins = registry(settings.plugins())
    choices, reason = _choices(settings)
    return Diagnosis(
        version=eptransport.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=cores(),
        extras={name: _version(name) for name in ("torch", "numpy", "transformers", "safetensors", "matplotlib")},
        backends=tuple(_backends(plugins, settings)),
        connectx=connectx.inspect(),
        efa=inspect(library=settings.options.get("libfabric.library", "")),
        refused={refusal.source: refusal.reason for refusal in plugins.refusals},
        choices=choices,
        settings=settings.explain(),
        problem=problem or reason,
    )


def _choices(settings: Settings) -> tuple[tuple[Choice, ...], str | None]:
    """By where the ranks are; and why there is none for ranks that are processes (loopback, if asked for: threads)."""
    choices = []
    reason = None
    for where, one_process in (("processes", False), ("threads of one process", True)):
        order = (("loopback", *AUTO_ORDER) if one_process else AUTO_ORDER) if settings.backend == "auto" else ()
        try:
            found = choose(settings, 2, one_process=one_process)
            choices.append(Choice(where, order, found.name, found.why))
        except EptError as error:
            choices.append(Choice(where, order, None, error.message))
            reason = reason or error.message
    return tuple(choices), reason


def _backends(plugins: Registry, settings: Settings) -> Sequence[Backend]:
    known = ("loopback", *AUTO_ORDER, *PLANNED)
    names = [*dict.fromkeys(name for name in known if name in plugins.plugins)]
    names += sorted(set(plugins.plugins) - set(known))
    names += [name for name in dict.fromkeys(known) if name not in plugins.plugins]
    return [_backend(name, plugins, settings) for name in names]


def _backend(name: str, plugins: Registry, settings: Settings) -> Backend:
    plugin = plugins.plugins.get(name)
    if plugin is None:
        finding, mend = absent(name)
        return Backend(name, False, "", "", "", finding, mend, "", ())
    options = tuple(
        f"EPT_{name}_{setting.name}".upper() + f"={setting.default}: {setting.doc}" for setting in plugin.settings
    )
    try:
        probe = plugin.probe(settings.backend_options(plugin))
    except EptError as error:
        usable, finding, mend, waives = False, error.message, "", ""
    else:
        usable, finding, mend = probe.usable, probe.summary, probe.mend
        waives = f"{', '.join(map(str, probe.waived))}: {probe.waived_why}" if probe.waived else ""
    return Backend(name, usable, plugin.version, plugin.source, plugin.path, finding, mend, waives, options)


def _version(package: str) -> str | None:
    """Without importing it: torch alone would take longer than all the rest."""
    from importlib.metadata import PackageNotFoundError, version

    if importlib.util.find_spec(package) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return os.path.dirname(importlib.util.find_spec(package).origin or "")  # type: ignore[union-attr]
