"""The registry of backends: finds plugins, keeps the reason of each refusal, and chooses one."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eptransport._call import call, error_of, ffi, lib, new_error, text
from eptransport.errors import BackendUnavailable, Code, ConfigError, EptError

if TYPE_CHECKING:
    from eptransport.settings import Settings

__all__ = [
    "AUTO_ORDER",
    "Candidate",
    "Choice",
    "Plugin",
    "PluginSetting",
    "Probe",
    "Refusal",
    "Registry",
    "candidates",
    "choose",
    "include_dir",
    "registry",
]

AUTO_ORDER = ("nvshmem", "verbs", "libfabric", "ucx", "tcp")
"""What `auto` tries between processes, best first. Inside one process `auto` takes loopback."""

PLANNED = ("libfabric", "verbs", "nvshmem", "ucx", "mlx5")
"""Names that mean a backend, whether or not a plugin of that name is here."""

NOT_BUILT = {
    "libfabric": ("built without libfabric headers", "install libfabric-dev (>= 1.17) and reinstall"),
    "verbs": ("built without libibverbs headers", "install libibverbs-dev (rdma-core-devel) and reinstall"),
    "ucx": ("built without UCX headers", "pip install libucx-cu12, or install libucx-dev (>= 1.13), and reinstall"),
}
"""Backends that a build leaves out where it finds no headers: what was missing, and the mend."""

ENTRY_POINTS = "eptransport.backends"
"""Entry points name a str or a Path of a plugin, or a function without arguments that returns one."""

_TYPES = {1: "bool", 2: "int", 3: "string"}


@dataclass(frozen=True)
class PluginSetting:
    """A setting that a backend brings: `EPT_<BACKEND>_<NAME>`."""

    name: str
    type: str
    """`bool` (0 or 1), `int` (from `min` to `max`) or `string`."""
    default: str
    min: int
    max: int
    doc: str

    def refuse(self, value: str) -> str | None:
        """What is wrong with this value, None where nothing is."""
        if self.type == "bool" and value not in ("0", "1"):
            return "must be 0 or 1"
        if self.type == "int":
            try:
                number = int(value)
            except ValueError:
                return "must be a whole number"
            if not self.min <= number <= self.max:
                return f"must be from {self.min} to {self.max}"
        return None


Protection = Literal["none", "region", "key"]
_PROTECTIONS: dict[int, Protection] = {1: "region", 2: "key"}
"""By ept_protection."""


@dataclass(frozen=True)
class Probe:
    """What a backend would do here, or why it can't."""

    usable: bool
    summary: str
    """What it would use, or what is missing."""
    mend: str
    """How to get the missing piece."""
    waived: tuple[int, ...]
    """Clauses of the contract that it doesn't keep."""
    waived_why: str
    protection: Protection
    """What is checked before a byte is written: nothing, the bounds of regions, or a long key of one peer too."""
    group_only: bool

    @property
    def why_not(self) -> str:
        return self.summary + (f" ({self.mend})" if self.mend else "")


@dataclass(frozen=True)
class Plugin:
    """A plugin that was opened; it stays loaded for the life of the process."""

    name: str
    version: str
    path: str
    source: str
    """`built in`, `EPT_PLUGIN_PATH` or the entry point."""
    settings: tuple[PluginSetting, ...]
    native: Any = field(repr=False, compare=False)

    def probe(self, options: Mapping[str, str] | None = None) -> Probe:
        """What it would do here with these settings. Starts and connects nothing. ConfigError for a wrong setting."""
        values, keep = native_values(options or {})
        report = ffi.new("ept_probe *")
        report.size = ffi.sizeof("ept_probe")
        report.caps.size = ffi.sizeof("ept_caps")
        error = new_error()
        code = lib.ept_plugin_probe(self.native, values, len(keep), report, error)
        if code < 0 and code != Code.UNAVAILABLE:
            raise error_of(code, error)
        waived = tuple(clause for clause in range(1, 32) if report.caps.waived >> clause & 1)
        summary = text(report.summary) or (text(error.text) if code < 0 else "")
        return Probe(
            usable=code >= 0,
            summary=summary,
            mend=text(report.mend),
            waived=waived,
            waived_why=text(report.caps.waived_why) if waived else "",
            protection=_PROTECTIONS.get(report.caps.protection, "none"),
            group_only=bool(report.caps.group_only),
        )


@dataclass(frozen=True)
class Refusal:
    """A file that was found, and is no backend that can be used."""

    source: str
    reason: str
    error: EptError = field(compare=False)


@dataclass(frozen=True)
class Registry:
    """What was found: usable plugins by name, and the others with the reason."""

    plugins: Mapping[str, Plugin]
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class Candidate:
    """A backend that was looked at: its plugin and what it would do here, or why it was refused."""

    name: str
    plugin: Plugin | None
    summary: str
    why_not: str | None


@dataclass(frozen=True)
class Choice:
    """The backend that was taken, why, and why the better ones were not."""

    plugin: Plugin
    why: str
    refused: tuple[Candidate, ...]

    @property
    def name(self) -> str:
        return self.plugin.name


def include_dir() -> str:
    """The folder of the public C headers, for the compiler's -I: all that a plugin of your own needs."""
    return str(Path(__file__).parent / "include")


def registry(plugin_path: tuple[str, ...] = ()) -> Registry:
    """All plugins: `plugin_path` first, then entry points, then the built-in folder. Of two with one name the first is
    taken, the other refused. Not collective, doesn't block; cached for the life of the process."""
    with _lock:
        found = _registries.get(plugin_path)
        if found is None:
            found = _registries[plugin_path] = _find(plugin_path)
        return found


def candidates(settings: Settings, one_process: bool) -> tuple[Candidate, ...]:
    """What these settings allow here, best first, each with what it would do or why it is refused.

    `one_process`: all ranks are threads of this process. An unknown backend raises ConfigError or, where its plugin was
    found and refused, the reason of that.
    """
    plugins = registry(settings.plugins())
    if settings.backend != "auto":
        return (_look(_named(settings, plugins), settings),)
    order = ("loopback", *AUTO_ORDER) if one_process else AUTO_ORDER
    rows = []
    for name in order:
        plugin = plugins.plugins.get(name)
        if plugin is None:
            reasons = [refusal.reason for refusal in plugins.refusals if _stem(refusal.source) == name]
            rows.append(Candidate(name, None, "", reasons[0] if reasons else "; ".join(absent(name))))
            continue
        needless = _needless(name, settings)
        if needless:
            rows.append(Candidate(name, plugin, "", needless))
            continue
        found = _look(plugin, settings)
        if found.why_not is None:
            waived = plugin.probe(settings.backend_options(plugin)).waived
            if waived and not settings.waivers:
                clauses = ", ".join(map(str, waived))
                why_not = f"waives clause {clauses}; EPT_WAIVERS=1 lets auto take it, or ask for it by name"
                found = Candidate(name, plugin, found.summary, why_not)
        rows.append(found)
    return tuple(rows)


def choose(settings: Settings, world_size: int, *, one_process: bool | None = None) -> Choice:
    """The backend that these settings lead to on this machine. Not collective, doesn't block; a Group agrees on it with
    the other ranks on top. BackendUnavailable has the reason of every refusal."""
    looked = candidates(settings, world_size == 1 if one_process is None else one_process)
    refused: list[Candidate] = []
    for candidate in looked:
        if candidate.why_not is None and candidate.plugin is not None:
            return Choice(candidate.plugin, why(settings, refused), tuple(refused))
        refused.append(candidate)
    raise unavailable(settings, refused)


def why(settings: Settings, refused: list[Candidate]) -> str:
    """Why the backend was taken, for the log."""
    if settings.backend != "auto":
        return "asked for"
    if not refused:
        return "auto: the first choice"
    return "auto: " + "; ".join(f"{candidate.name} refused: {candidate.why_not}" for candidate in refused)


def unavailable(settings: Settings, refused: list[Candidate]) -> BackendUnavailable:
    reasons = "; ".join(f"{candidate.name}: {candidate.why_not}" for candidate in refused)
    if settings.backend == "auto":
        return BackendUnavailable(f"no backend can run here: {reasons}", operation="choose")
    return BackendUnavailable(f"backend {reasons}", operation="choose")


def absent(name: str) -> tuple[str, str]:
    """Why a backend that we know by name has no plugin here, and the mend."""
    return NOT_BUILT.get(name, ("this build has no such plugin", "name its folder in EPT_PLUGIN_PATH"))


def native_values(options: Mapping[str, str]) -> tuple[Any, list[Any]]:
    """Settings as the native library takes them, and what must stay alive meanwhile (one entry a setting)."""
    keep = [(ffi.new("char[]", name.encode()), ffi.new("char[]", value.encode())) for name, value in options.items()]
    values = ffi.new("ept_value[]", max(len(keep), 1))
    for index, (name, value) in enumerate(keep):
        values[index].name = name
        values[index].text = value
    return values, keep


def _needless(name: str, settings: Settings) -> str:
    """Why `auto` needn't even ask this backend. Asking libfabric, libibverbs or UCX loads whatever the system has of
    them, with all their transports, into every process; and without a card of theirs there is none that `auto` would
    take."""
    from eptransport import connectx, efa

    if name == "nvshmem":
        return connectx.refused()
    if name == "verbs":
        devices = Path("/sys/class/infiniband")
        return "" if devices.is_dir() and any(devices.iterdir()) else "no RDMA device here (/sys/class/infiniband)"
    if name == "ucx" and not any(option.startswith("ucx.") for option in settings.options):
        return "UCX is taken when asked for: EPT_BACKEND=ucx, or any EPT_UCX_ setting"
    if name != "libfabric" or "libfabric.provider" in settings.options or efa.devices():
        return ""
    return "no EFA card here; EPT_BACKEND=libfabric asks for its other providers"


def _named(settings: Settings, plugins: Registry) -> Plugin:
    name = settings.backend
    if settings.plugins()[:1] == (name,):
        for plugin in plugins.plugins.values():
            if plugin.path == os.path.realpath(name):
                return plugin
    elif name in plugins.plugins:
        return plugins.plugins[name]
    for refusal in plugins.refusals:
        if refusal.source == name or _stem(refusal.source) == name:
            raise type(refusal.error)(f"backend {name}: {refusal.reason}", **refusal.error.fields())
    if name in PLANNED:
        raise BackendUnavailable(f"backend {name}: {'; '.join(absent(name))}", operation="choose")
    known = ", ".join(sorted(plugins.plugins))
    close = difflib.get_close_matches(name, [*plugins.plugins, *PLANNED, "auto"], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"unknown backend {name!r}{hint} There are {known}, and auto.", operation="choose")


def _look(plugin: Plugin, settings: Settings) -> Candidate:
    report = plugin.probe(settings.backend_options(plugin))
    return Candidate(plugin.name, plugin, report.summary, None if report.usable else report.why_not)


def _find(plugin_path: tuple[str, ...]) -> Registry:
    plugins: dict[str, Plugin] = {}
    refusals: list[Refusal] = []

    def take(path: str, source: str) -> None:
        try:
            plugin = _open(path, source)
        except EptError as error:
            refusals.append(Refusal(path, error.message, error))
            return
        other = plugins.get(plugin.name)
        if other is None:
            plugins[plugin.name] = plugin
        elif other.path != plugin.path:
            reason = f"another plugin of the name {plugin.name} comes first: {other.path} ({other.source})"
            refusals.append(Refusal(path, reason, ConfigError(reason)))

    for place in plugin_path:
        if os.path.isdir(place):
            for file in sorted(Path(place).glob("*.so")):
                take(str(file), "EPT_PLUGIN_PATH")
        else:
            take(place, "EPT_PLUGIN_PATH")
    _from_entry_points(take, refusals)
    for file in sorted((Path(__file__).parent / "plugins").glob("*.so")):
        take(str(file), "built in")
    return Registry(plugins, tuple(refusals))


def _from_entry_points(take: Any, refusals: list[Refusal]) -> None:
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS):
        source = f"entry point {entry.name}"
        try:
            target = entry.load()
            path = os.fspath(target() if callable(target) else target)
        except Exception as problem:  # another project's code: whatever it raises is the reason of the refusal
            reason = f"{entry.value} of {source} can't be loaded: {type(problem).__name__}: {problem}"
            refusals.append(Refusal(source, reason, ConfigError(reason)))
            continue
        take(path, source)


def _open(path: str, source: str) -> Plugin:
    real = os.path.realpath(path)
    native = ffi.new("const ept_plugin **")
    call(lib.ept_plugin_open, os.fsencode(real), native)
    settings = []
    for index in range(lib.ept_plugin_setting_count(native[0])):
        setting = lib.ept_plugin_setting(native[0], index)
        settings.append(
            PluginSetting(
                name=text(setting.name),
                type=_TYPES.get(setting.type, "string"),
                default=text(setting.value),
                min=setting.min,
                max=setting.max,
                doc=text(setting.doc),
            )
        )
    name, version = text(lib.ept_plugin_name(native[0])), text(lib.ept_plugin_version(native[0]))
    return Plugin(name, version, real, source, tuple(settings), native[0])


def _stem(source: str) -> str:
    """The backend that a file is meant to be, by its name: ept_tcp.so is tcp."""
    return Path(source).stem.removeprefix("ept_")


_lock = threading.Lock()
_registries: dict[tuple[str, ...], Registry] = {}
