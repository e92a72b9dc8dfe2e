"""Settings, and the only place that reads the environment."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from eptransport.backends import NOT_BUILT, Plugin, PluginSetting, Registry, registry
from eptransport.errors import ConfigError

__all__ = ["Explained", "Launch", "Settings", "known_names", "launch_from_environment"]

PREFIX = "EPT_"
SECRET_BYTES = 16
MOST_CPUS = 8192
"""What Linux can be built for; a typing error must not become a list of billions."""
GENERAL = ("interface", "devices", "port_range", "intra")
"""Settings that the engine doesn't know: they go to a plugin that has one of that name."""


class Settings(BaseSettings):
    """What a group is set up with: `EPT_*` in the environment, or keyword arguments, which win.

    Each field `name` is `EPT_NAME` in the environment; a backend's own settings are `EPT_<BACKEND>_<NAME>`, or
    `options={"tcp.streams": "2"}`. An unknown `EPT_*` name, an unknown field and a value out of bounds raise
    ConfigError. Reading is not collective and doesn't block. Immutable.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    backend: str = Field("auto", min_length=1, description="auto, the name of a backend, or the path of a plugin")
    plugin_path: tuple[str, ...] = Field(
        (), description="more plugins: .so files, or folders of them, separated as in PATH; they win over built-in ones"
    )
    timeout_s: float = Field(300.0, gt=0, le=86400, description="a wait for a peer that is alive fails after it, s")
    warn_s: float = Field(10.0, gt=0, le=86400, description="a wait that lasts so long is logged, once, s")
    dead_s: float = Field(
        5.0, gt=0, le=86400, description="a peer silent so long though it owes an answer or a heartbeat is dead, s"
    )
    heartbeat_s: float | None = Field(
        None, gt=0, le=4000, description="a peer that was sent nothing for so long is sent a heartbeat; dead_s / 5, s"
    )
    on_lost: Literal["raise", "mask"] = Field(
        "raise",
        description="what a call does that finds a rank lost: raise PeerLost (raise), or mask it first (mask), so that "
        "reset goes on without it",
    )
    progress: Literal["auto", "thread", "inline"] = Field(
        "auto",
        description="who moves the network: a waiting thread, and a proxy while nobody waits (auto), always a proxy "
        "(thread), or only the calls that the application makes (inline)",
    )
    secret: SecretStr | None = Field(
        None, description="the job's secret, the same on every rank; made by rank 0 if not given"
    )
    interface: str | None = Field(None, description="network interface or address that the backend listens on")
    devices: str | None = Field(None, description="network devices that the backend may use: names, comma between them")
    port_range: str | None = Field(None, description="ports that the backend may listen on, as 20000-20100")
    intra: str | None = Field(None, description="how pairs inside one machine talk; the backend chooses if not given")
    node: str | None = Field(
        None,
        pattern=r"^[\w.:-]{1,31}$",
        description="the node that this rank counts as part of: GPU ranks of different nodes share no memory, also "
        "inside one machine, and talk through the backend; the machine if not given",
    )
    log: Literal["debug", "info", "warning", "error"] | None = Field(
        None, description="level of the Python logger eptransport; as the application set it if not given"
    )
    trace: str | None = Field(
        None, description="file of a Chrome trace of the AllToAll calls; .rankN comes before its extension"
    )
    stuck_signal: bool = Field(
        True, description="SIGUSR1 logs why nothing goes on, where the program has no handler for it"
    )
    credits: int | None = Field(
        None, ge=128, le=1024, description="operations with a signal that one peer may have in flight to this rank"
    )
    spin_us: float | None = Field(
        None, ge=0, le=1e9, description="how long a wait polls before it sleeps, us; chosen from the cores if not given"
    )
    proxy_cpus: tuple[int, ...] | None = Field(
        None, description="cores where the proxy thread may run, as 0-3,8; near the cards if not given"
    )
    threads: int | None = Field(
        None, ge=1, le=4096, description="threads of dispatch and combine; the cores of this rank if not given"
    )
    gpu_blocks: int | None = Field(
        None, ge=1, le=4096, description="blocks of a GPU kernel of dispatch or combine; this rank's share if not given"
    )
    gpu_memory: Literal["auto", "device", "pinned"] = Field(
        "auto",
        description="where a GPU rank's lanes stand that the backend reads and writes: on the GPU where backend and "
        "GPU can, else pinned on the host (auto); on the GPU, or an error (device); pinned (pinned)",
    )
    gpu_share: Literal["auto", "ipc", "descriptors"] = Field(
        "auto",
        description="how processes of a node map each other's GPU memory: by CUDA IPC where this process has it, else "
        "by descriptors (auto), or by one of them: ipc, descriptors (over a Unix socket)",
    )
    gpu_compile: Literal["auto", "off", "shape"] = Field(
        "auto",
        description="GPU kernels that are compiled at run time, by eptransport[nvrtc]: for a GPU that the package has "
        "no machine code for (auto), none (off), or for the shape of each AllToAll (shape)",
    )
    gpu_cache: str | None = Field(
        None,
        min_length=1,
        description="folder of such kernels, absolute; $XDG_CACHE_HOME/eptransport/kernels if not given",
    )
    gpu_nvrtc: str | None = Field(
        None, min_length=1, description="their compiler, libnvrtc of CUDA 12.9; that of eptransport[nvrtc] if not given"
    )
    waivers: bool = Field(
        False, description="auto may take a backend that waives some of clauses 9 to 12 of the contract (1), or not (0)"
    )
    gpu_path: Literal["auto", "gpu", "proxy"] = Field(
        "auto",
        description="how messages leave for GPU ranks whose memory isn't mapped, where kernels can post by themselves: "
        "posted by the kernel (gpu), by the proxy thread (proxy), or as is faster (auto): both are measured, at the "
        "lengths of its messages, when an AllToAll is made",
    )
    gpu_crossover_bytes: int | None = Field(
        None,
        ge=1,
        description="with gpu_path=auto, nothing is measured, and AllToAlls whose messages may be longer use the proxy "
        "thread, bytes",
    )
    stripe_bytes: int | None = Field(
        None, ge=4096, description="a longer write is cut over the rails, bytes; 896 KiB if not given"
    )
    options: dict[str, str] = Field(
        default_factory=dict, description="settings of backends, as backend.name: EPT_<BACKEND>_<NAME>"
    )

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, **overrides: Any) -> None:
        fields = type(self).model_fields
        for name in overrides:
            if name not in fields:
                raise ConfigError(f"unknown setting {name!r}{_did_you_mean(name, fields)}")
        values, origins = _read_environment(os.environ, overrides)
        options_given = overrides.pop("options", None) or {}
        if not isinstance(options_given, Mapping):
            raise ConfigError(f"options={options_given!r:.80}: must be a dict of names, as tcp.streams, and values")
        given = dict(options_given)
        options = values.pop("options", {})
        origins.update(dict.fromkeys([*overrides, *given], "argument"))
        options.update({str(name): _option_text(value) for name, value in given.items()})
        values.update(overrides)
        try:
            super().__init__(**values, options=options)
        except ValidationError as error:
            raise ConfigError(_sentence(error, origins)) from None
        self._origins = origins
        if options:
            _check_options(options, origins, registry(self.plugins()))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment is read by `_read_environment`, which refuses names that pydantic would pass over."""
        return (init_settings,)

    @field_validator("plugin_path", mode="before")
    @classmethod
    def _split_path(cls, value: Any) -> Any:
        return _split(value) if isinstance(value, (str, os.PathLike, list, tuple)) else value

    @field_validator("backend", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        length = SECRET_BYTES if value is None else len(value.get_secret_value().encode())
        if length < SECRET_BYTES:
            raise ValueError(f"a secret of {length} bytes; at least {SECRET_BYTES} are needed")
        return value

    @field_validator("port_range")
    @classmethod
    def _two_ports(cls, value: str | None) -> str | None:
        if value is None:
            return None
        first, last = _range(value, "a range of ports, as 20000-20100")
        if not 1 <= first <= last <= 65535:
            raise ValueError("not a range of ports between 1 and 65535, lowest first")
        return f"{first}-{last}"

    @field_validator("proxy_cpus", mode="before")
    @classmethod
    def _expand_ranges(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        cpus: list[int] = []
        for part in value.split(","):
            first, last = _range(part.strip(), "a list of cores, as 0-3,8")
            if last >= MOST_CPUS:
                raise ValueError(f"not a list of cores below {MOST_CPUS}")
            cpus.extend(range(first, last + 1))
        return tuple(cpus)

    def plugins(self) -> tuple[str, ...]:
        """Where plugins are looked for beside the built-in folder and the entry points."""
        return _places(self.backend, self.plugin_path)

    def backend_options(self, plugin: Plugin) -> dict[str, str]:
        """What this plugin is handed: the general settings that it has by name, and its own."""
        names = {setting.name for setting in plugin.settings}
        general = {name: getattr(self, name) for name in GENERAL if name in names}
        own = self._options_of(plugin.name)
        if "control_options" in names and "control_options" not in own:
            # A backend that runs over another one hands on what that one is set to.
            control = own.get("control", next(each.default for each in plugin.settings if each.name == "control"))
            if control == "auto":
                own["control"] = control = _control(registry(self.plugins()))
            handed = ";".join(f"{name}={value}" for name, value in self._options_of(control).items())
            own = {**own, **({"control_options": handed} if handed else {})}
        return {**{name: str(value) for name, value in general.items() if value is not None}, **own}

    def _options_of(self, backend: str) -> dict[str, str]:
        start = backend + "."
        return {name[len(start) :]: value for name, value in self.options.items() if name.startswith(start)}

    def unused_by(self, plugin: Plugin) -> list[str]:
        """General settings that were given and that this plugin has no use for, nor anybody else: intra=off is heard by
        ranks on GPUs over any backend."""
        names = {setting.name for setting in plugin.settings} | ({"intra"} if self.intra == "off" else set())
        return [name for name in GENERAL if getattr(self, name) is not None and name not in names]

    def explain(self) -> tuple[Explained, ...]:
        """Where each value came from: an entry a setting, then one a backend's setting that was given."""
        rows = []
        for name, field in type(self).model_fields.items():
            if name == "options":
                continue
            source = self._origins.get(name, "default")
            rows.append(Explained(name, _variable(name), _shown(getattr(self, name)), source, field.description or ""))
        known = _option_settings(registry(self.plugins())) if self.options else {}
        for name, value in sorted(self.options.items()):
            source = self._origins.get(name, "default")
            rows.append(Explained(name, _variable(name), value, source, known[name].doc))
        return tuple(rows)


@dataclass(frozen=True)
class Explained:
    """One setting: its name, its name in the environment, its value, and where that came from."""

    name: str
    variable: str
    value: str
    source: str
    """`default`, `argument`, or the variable."""
    doc: str

    def __str__(self) -> str:
        return f"{self.variable}={self.value} ({self.source}): {self.doc}"


@dataclass(frozen=True)
class Launch:
    """What torchrun tells its processes."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int
    agent_store: bool
    """The launcher serves the store; else rank 0 must."""
    attempt: int


def launch_from_environment() -> Launch | None:
    """What torchrun, or whoever set the same variables, says of this process; None where nobody did."""
    env = os.environ
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not set, though RANK or WORLD_SIZE is: start with torchrun")
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not env[name].isdecimal():
            raise ConfigError(f"{name}={env[name]!r} is no number")
        numbers[name] = int(env[name])
    return Launch(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        master_addr=env["MASTER_ADDR"],
        master_port=numbers["MASTER_PORT"],
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True",
        attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def _control(plugins: Registry) -> str:
    """The backend beneath one that needs another: verbs on a node with ConnectX cards."""
    from eptransport import connectx

    return "verbs" if "verbs" in plugins.plugins and connectx.devices() else "tcp"


def known_names(plugin_path: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Every name in the environment that means something, those of all plugins included."""
    fields = [_variable(name) for name in Settings.model_fields if name != "options"]
    return tuple(fields + [_variable(name) for name in _option_settings(registry(plugin_path))])


def _read_environment(
    environ: Mapping[str, str], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by field, backends' settings under `options`, and the variable that each came from."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    strange: dict[str, str] = {}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable[len(PREFIX) :].lower()
        if name in Settings.model_fields and name != "options" and variable == _variable(name):
            if value:
                values[name] = value
                origins[name] = variable
        else:
            strange[variable] = value
    if strange:
        place = {**values, **overrides}
        plugins = registry(_places(place.get("backend", ""), _split(place.get("plugin_path", ()))))
        options = {_variable(name): name for name in _option_settings(plugins)}
        for variable, value in strange.items():
            if variable not in options:
                raise ConfigError(_unknown_variable(variable, plugins))
            values.setdefault("options", {})[options[variable]] = value
            origins[options[variable]] = variable
    return values, origins


def _places(backend: str | os.PathLike[str], plugin_path: tuple[str, ...]) -> tuple[str, ...]:
    """Where plugins are looked for: a backend that is named by its path comes first."""
    name = os.fspath(backend)
    return ((name,) if os.sep in name or name.endswith(".so") else ()) + plugin_path


def _split(path: Any) -> tuple[str, ...]:
    if isinstance(path, (str, os.PathLike)):
        return tuple(part for part in os.fspath(path).split(os.pathsep) if part)
    return tuple(os.fspath(part) for part in path)


def _unknown_variable(variable: str, plugins: Registry) -> str:
    known = [_variable(name) for name in Settings.model_fields if name != "options"]
    known += [_variable(name) for name in _option_settings(plugins)]
    sentence = f"unknown setting {variable} in the environment{_did_you_mean(variable, known)}"
    for name, (why, mend) in NOT_BUILT.items():
        if name not in plugins.plugins and variable.startswith(f"{_variable(name)}_"):
            return f"{sentence}: backend {name}: {why}; {mend}"
    refused = [f"{refusal.source}: {refusal.reason}" for refusal in plugins.refusals]
    return sentence + (f" (plugins that were refused: {'; '.join(refused)})" if refused else "")


def _check_options(options: Mapping[str, str], origins: Mapping[str, str], plugins: Registry) -> None:
    known = _option_settings(plugins)
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"unknown setting of a backend: {name!r}{_did_you_mean(name, known)}")
        why = known[name].refuse(value)
        if why:
            source = origins.get(name, "argument")
            raise ConfigError(f"{name if source == 'argument' else source}={value!r}: {why}; {known[name].doc}")


def _option_settings(plugins: Registry) -> dict[str, PluginSetting]:
    return {
        f"{plugin.name}.{setting.name}": setting for plugin in plugins.plugins.values() for setting in plugin.settings
    }


def _variable(name: str) -> str:
    return PREFIX + name.replace(".", "_").replace("-", "_").upper()


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    bare = {other.removeprefix(PREFIX): other for other in known}
    close = [bare[other] for other in difflib.get_close_matches(name.removeprefix(PREFIX), bare, n=2, cutoff=0.7)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _option_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, SecretStr):
        return "(hidden)"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _range(text: str, what: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ValueError(f"not {what}")
    return int(first), int(last or first)


def _sentence(error: ValidationError, origins: Mapping[str, str]) -> str:
    """What pydantic found, in our words: where the value came from, the value, what is wrong with it."""
    found = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0])
        source = origins.get(name, "argument")
        value = "" if name == "secret" else f"={problem['input']!r}"
        message = problem["msg"].removeprefix("Value error, ")
        found.append(f"{name if source == 'argument' else source}{value}: {message[:1].lower()}{message[1:]}")
    return "; ".join(found)
