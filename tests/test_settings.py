# SPDX-License-Identifier: Apache-2.0
"""Where settings come from, which are refused, and what is said about each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import eptransport as ept
from eptransport.settings import known_names, launch_from_environment

SECRET = "a secret of sixteen bytes"


def test_defaults() -> None:
    settings = ept.Settings()
    assert (settings.backend, settings.progress) == ("auto", "auto")
    assert (settings.timeout_s, settings.warn_s, settings.dead_s) == (300.0, 10.0, 5.0)
    assert settings.options == {}
    assert {each.source for each in settings.explain()} == {"default"}


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("EPT_BACKEND", "tcp", "backend", "tcp"),
        ("EPT_PLUGIN_PATH", "/a:/b/c.so", "plugin_path", ("/a", "/b/c.so")),
        ("EPT_TIMEOUT_S", "2.5", "timeout_s", 2.5),
        ("EPT_WARN_S", "1", "warn_s", 1.0),
        ("EPT_DEAD_S", "0.5", "dead_s", 0.5),
        ("EPT_HEARTBEAT_S", "0.25", "heartbeat_s", 0.25),
        ("EPT_ON_LOST", "mask", "on_lost", "mask"),
        ("EPT_PROGRESS", "inline", "progress", "inline"),
        ("EPT_INTERFACE", "eth0", "interface", "eth0"),
        ("EPT_DEVICES", "mlx5_0,mlx5_1", "devices", "mlx5_0,mlx5_1"),
        ("EPT_PORT_RANGE", "20000-20100", "port_range", "20000-20100"),
        ("EPT_PORT_RANGE", "20000", "port_range", "20000-20000"),
        ("EPT_LOG", "info", "log", "info"),
        ("EPT_TRACE", "/tmp/trace.json", "trace", "/tmp/trace.json"),
        ("EPT_CREDITS", "256", "credits", 256),
        ("EPT_SPIN_US", "20", "spin_us", 20.0),
        ("EPT_PROXY_CPUS", "0-2,5", "proxy_cpus", (0, 1, 2, 5)),
        ("EPT_THREADS", "3", "threads", 3),
        ("EPT_STRIPE_BYTES", "65536", "stripe_bytes", 65536),
        ("EPT_INTRA", "tcp", "intra", "tcp"),
        ("EPT_NODE", "rack-7", "node", "rack-7"),
    ],
)
def test_every_field_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, field: str, value: Any
) -> None:
    monkeypatch.setenv(variable, text)
    settings = ept.Settings()
    assert getattr(settings, field) == value
    (mine,) = [each for each in settings.explain() if each.name == field]
    assert (mine.variable, mine.source) == (variable, variable)
    assert variable in known_names()


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "tcp")
    monkeypatch.setenv("EPT_TCP_STREAMS", "3")
    settings = ept.Settings(backend="loopback", options={"tcp.streams": 4})
    assert settings.backend == "loopback"
    assert settings.options == {"tcp.streams": "4"}
    assert {each.name: each.source for each in settings.explain() if each.source != "default"} == {
        "backend": "argument",
        "tcp.streams": "argument",
    }


def test_an_empty_variable_is_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "")
    assert ept.Settings().backend == "auto"


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("EPT_BACKENT", "EPT_BACKEND"),
        ("EPT_TIMEOUT", "EPT_TIMEOUT_S"),
        ("EPT_TCP_STREAM", "EPT_TCP_STREAMS"),
        ("EPT_LOOPBACK_ADVERSERY", "EPT_LOOPBACK_ADVERSARY"),
        ("EPT_PLUGINPATH", "EPT_PLUGIN_PATH"),
    ],
)
def test_an_unknown_variable_is_refused_with_what_was_meant(
    monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ept.ConfigError, match=f"{variable} in the environment; did you mean .*{meant}"):
        ept.Settings()


@pytest.mark.parametrize("variable", ["EPT_ZZZZZZ", "EPT_OPTIONS", "EPT_backend"])
def test_an_unknown_variable_like_no_other_is_refused_too(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ept.ConfigError, match=variable):
        ept.Settings()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bakend": "tcp"}, "bakend.*did you mean backend"),
        ({"options": {"tcp.stream": 2}}, "tcp.stream.*did you mean tcp.streams"),
        ({"options": {"tcp.streams": "many"}}, "'many'.*whole number"),
        ({"options": {"tcp.streams": 0}}, "'0'.*from 1 to"),
        ({"options": {"loopback.mapped": "yes"}}, "'yes'.*0 or 1"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"timeout_s": "soon"}, "timeout_s='soon'"),
        ({"progress": "fast"}, "progress='fast'"),
        ({"credits": 64}, "credits=64"),
        ({"credits": 2048}, "credits=2048"),
        ({"spin_us": -1}, "spin_us=-1"),
        ({"port_range": "9-3"}, "9-3"),
        ({"port_range": "0-70000"}, "65535"),
        ({"port_range": "low-high"}, "low-high"),
        ({"proxy_cpus": "0-x"}, "0-x"),
        ({"log": "loud"}, "loud"),
        ({"backend": ""}, "backend"),
    ],
)
def test_a_wrong_value_is_refused_with_the_value(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ept.ConfigError, match=words):
        ept.Settings(**fields)


def test_a_wrong_value_of_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_TIMEOUT_S", "-1")
    with pytest.raises(ept.ConfigError, match="EPT_TIMEOUT_S='-1'"):
        ept.Settings()
    monkeypatch.delenv("EPT_TIMEOUT_S")
    monkeypatch.setenv("EPT_TCP_STREAMS", "99")
    with pytest.raises(ept.ConfigError, match="EPT_TCP_STREAMS='99'"):
        ept.Settings()


def test_the_secret_is_never_shown() -> None:
    settings = ept.Settings(secret=SECRET)
    shown = repr(settings) + "".join(map(str, settings.explain()))
    assert SECRET not in shown
    with pytest.raises(ept.ConfigError, match="5 bytes; at least 16") as caught:
        ept.Settings(secret="short")
    assert "short" not in str(caught.value)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ept.Settings().backend = "tcp"  # type: ignore[misc]


def test_general_settings_go_to_the_backend_that_has_them() -> None:
    settings = ept.Settings(interface="lo", port_range="20000-20010", devices="mlx5_0", options={"tcp.streams": 3})
    plugins = ept.registry().plugins
    expected = {"interface": "lo", "port_range": "20000-20010", "streams": "3"}
    assert settings.backend_options(plugins["tcp"]) == expected
    assert settings.backend_options(plugins["loopback"]) == {}
    assert settings.unused_by(plugins["tcp"]) == ["devices"]
    assert settings.unused_by(plugins["loopback"]) == ["interface", "devices", "port_range"]


def test_a_backends_own_setting_wins_over_a_general_one() -> None:
    settings = ept.Settings(interface="lo", options={"tcp.interface": "eth0"})
    assert settings.backend_options(ept.registry().plugins["tcp"]) == {"interface": "eth0"}


def test_settings_of_a_plugin_from_the_path_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EPT_PLUGIN_PATH", str(tmp_path))
    assert ept.Settings().plugin_path == (str(tmp_path),)
    monkeypatch.setenv("EPT_MINE_SPEED", "1")
    with pytest.raises(ept.ConfigError, match="EPT_MINE_SPEED"):
        ept.Settings()


TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_from_environment() is None
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    launch = launch_from_environment()
    assert launch is not None
    assert (launch.rank, launch.world_size, launch.master_port, launch.agent_store) == (2, 4, 29500, False)


@pytest.mark.parametrize("missing", TORCHRUN)
def test_half_of_what_torchrun_says_is_refused(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name, value in TORCHRUN.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(ept.ConfigError, match=missing):
        launch_from_environment()
    monkeypatch.setenv(missing, "")
    with pytest.raises(ept.ConfigError, match=missing):
        launch_from_environment()


def test_a_rank_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "RANK": "two"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ept.ConfigError, match="RANK='two'"):
        launch_from_environment()
