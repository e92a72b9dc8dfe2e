# SPDX-License-Identifier: Apache-2.0
"""What bad input gets: a typed error with the values in it on every rank concerned, and a group that can be used still.

What is wrong with the arguments of one dispatch or combine is in moe/test_misuse.py.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from test_group import LocalStore, close, hello, make, on_threads

import eptransport as ept
from eptransport.backends import Plugin, choose, registry

Build = Callable[[str, str], Path]

TABLE = """
#include "eptransport/backend.h"
#include <string.h>
static int32_t probe(const ept_host *h, const ept_value *v, size_t n, ept_probe *p) {
  strcpy(p->summary, "libmine.so.3 is missing");
  strcpy(p->mend, "install libmine3");
  return %(probe)s;
}
static int32_t open_(const ept_host *h, const ept_open_params *p, ept_instance **i) { return EPT_E_UNAVAILABLE; }
static void close_(ept_instance *i) {}
static int32_t any(void) { return EPT_E_UNSUPPORTED; }
static void last_error(ept_error *e) { strcpy(e->text, "mine can't"); e->code = EPT_E_UNAVAILABLE; }
static const ept_setting settings[] = {
  {sizeof(ept_setting), EPT_SETTING_INT, "speed", "3", 1, 9, "how fast it can't go"}};
#define ANY (void *)any
const ept_backend ept_backend_v1 = {
  .size = %(size)s, .abi = %(abi)s, .name = "%(name)s", .version = "7", .settings = settings, .setting_count = 1,
  .probe = probe, .open = open_, .close = close_, .caps = ANY, .rails = ANY, .local_address = ANY, .reach = ANY,
  .peer_open = ANY, .peer_state = ANY, .peer_close = ANY, .peer_fence = ANY, .worker_open = ANY, .worker_close = ANY,
  .mem_register = ANY, .mem_deregister = ANY, .region_export = ANY, .region_revoke = ANY, .region_import = ANY,
  .region_drop = ANY, .post = ANY, .poll = ANY, .arm = ANY, .quiesce = ANY, .counters = ANY, .last_error = last_error,
};
"""


def table(
    name: str = "mine", *, abi: str = "EPT_BACKEND_ABI", size: str = "sizeof(ept_backend)", probe: int = 0
) -> str:
    return TABLE % {"name": name, "abi": abi, "size": size, "probe": probe}


def refusal_of(library: Path) -> ept.EptError:
    (refusal,) = [each for each in registry((str(library),)).refusals if each.source == str(library)]
    assert str(library) in refusal.reason
    return refusal.error


# ---- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "meant"), [("tpc", "tcp"), ("loopbak", "loopback"), ("libfabrik", "libfabric")])
def test_an_unknown_backend(name: str, meant: str) -> None:
    with pytest.raises(ept.ConfigError, match=f"'{name}'; did you mean {meant}") as caught:
        ept.loopback_groups(2, ept.Settings(backend=name))
    assert "tcp" in str(caught.value)


def test_a_backend_that_this_build_lacks() -> None:
    with pytest.raises(ept.BackendUnavailable, match=r"mlx5.*EPT_PLUGIN_PATH"):
        choose(ept.Settings(backend="mlx5"), 2)


def test_a_backend_whose_library_is_missing_says_which_and_how_to_get_it(build_plugin: Build) -> None:
    library = build_plugin("mine", table(probe=-3))
    settings = ept.Settings(backend=str(library))
    with pytest.raises(ept.BackendUnavailable, match=r"mine: libmine\.so\.3 is missing \(install libmine3\)"):
        choose(settings, 2)
    with pytest.raises(ept.BackendUnavailable, match=r"libmine\.so\.3"):
        ept.loopback_groups(2, settings)


def test_a_plugin_that_works_is_found_in_every_way(
    build_plugin: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = build_plugin("mine", table())
    monkeypatch.setenv("EPT_MINE_SPEED", "4")
    with pytest.raises(ept.ConfigError, match="EPT_MINE_SPEED"):
        ept.Settings()
    by_path = ept.Settings(backend=library)
    monkeypatch.setenv("EPT_PLUGIN_PATH", str(tmp_path))
    by_name = ept.Settings(backend="mine")
    for settings in (by_path, by_name):
        chosen = choose(settings, 2)
        assert (chosen.name, chosen.plugin.version, chosen.why) == ("mine", "7", "asked for")
        assert settings.backend_options(chosen.plugin) == {"speed": "4"}
    monkeypatch.setenv("EPT_MINE_SPEED", "40")
    with pytest.raises(ept.ConfigError, match=r"EPT_MINE_SPEED='40': must be from 1 to 9; how fast"):
        ept.Settings()


def test_a_plugin_of_an_entry_point(build_plugin: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = build_plugin("mine", table("entered"))
    (tmp_path / "entered.py").write_text(f"def find():\n    return {str(library)!r}\n\nbroken = 1 / 0\n")
    (tmp_path / "fine.py").write_text(f"PATH = {str(library)!r}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entries = [
        EntryPoint("fine", "fine:PATH", "eptransport.backends"),
        EntryPoint("broken", "entered:find", "eptransport.backends"),
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
    found = registry((str(tmp_path / "so that nothing is cached"),))
    assert found.plugins["entered"].source == "entry point fine"
    assert any("ZeroDivisionError" in refusal.reason for refusal in found.refusals)


def test_auto_says_why_the_better_ones_were_refused() -> None:
    chosen = choose(ept.Settings(), 2, one_process=False)
    assert chosen.name == "tcp"
    assert [candidate.name for candidate in chosen.refused] == ["nvshmem", "verbs", "libfabric", "ucx"]
    assert all(candidate.why_not for candidate in chosen.refused)
    assert "verbs refused" in chosen.why


def test_auto_takes_no_backend_that_waives_clauses_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Plugin.probe
    monkeypatch.setattr(Plugin, "probe", lambda self, options=None: replace(probe(self, options), waived=(9, 11)))
    with pytest.raises(ept.BackendUnavailable, match="tcp: waives clause 9, 11; EPT_WAIVERS=1"):
        choose(ept.Settings(), 2, one_process=False)
    assert choose(ept.Settings(waivers=True), 2, one_process=False).name == "tcp"


def test_auto_asks_nvshmem_first_where_there_are_its_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cards it isn't asked; with cards it says what it lacks itself."""
    first = choose(ept.Settings(), 2, one_process=False).refused[0]
    assert (first.name, "ConnectX" in (first.why_not or "")) == ("nvshmem", True)
    monkeypatch.setattr("eptransport.connectx.refused", lambda: "")
    first = choose(ept.Settings(), 2, one_process=False).refused[0]
    assert first.why_not
    assert "nvshmem: " in first.why_not
    monkeypatch.setattr("eptransport.connectx.refused", lambda: "doorbells: none")
    assert choose(ept.Settings(), 2, one_process=False).refused[0].why_not == "doorbells: none"


def test_of_two_plugins_of_one_name_the_first_is_taken(build_plugin: Build) -> None:
    library = build_plugin("mine", table("tcp"))
    found = registry((str(library),))
    assert found.plugins["tcp"].path == str(library)
    assert any("comes first" in refusal.reason for refusal in found.refusals)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"abi": "2"}, "ABI 2 .*serves ABI 1"),
        ({"size": "64"}, "64 bytes"),
    ],
)
def test_a_plugin_of_another_abi(build_plugin: Build, wrong: dict[str, str], words: str) -> None:
    library = build_plugin("mine", table(**wrong))
    error = refusal_of(library)
    assert isinstance(error, ept.VersionError)
    with pytest.raises(ept.VersionError, match=words):
        choose(ept.Settings(backend=library), 2)
    close(ept.loopback_groups(2, ept.Settings(plugin_path=[library])))  # it spoils nothing else


def test_a_plugin_with_an_empty_entry(build_plugin: Build) -> None:
    library = build_plugin("mine", table().replace(".poll = ANY,", ""))
    with pytest.raises(ept.InvalidArgument, match="`poll`"):
        choose(ept.Settings(backend=library), 2)


def test_a_library_that_is_no_plugin(build_plugin: Build) -> None:
    library = build_plugin("foreign", "int answer(void) { return 42; }")
    assert "ept_backend_v1" in str(refusal_of(library))
    with pytest.raises(ept.VersionError, match="ept_backend_v1"):
        choose(ept.Settings(backend=library), 2)


def test_a_library_that_lacks_another(build_plugin: Build) -> None:
    library = build_plugin("needy", table() + "extern int elsewhere(void); int (*use)(void) = elsewhere;")
    assert "elsewhere" in str(refusal_of(library))


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 1000, 4096, 0.3, 0.6, 0.9])
def test_a_truncated_library(tmp_path: Path, kept: float) -> None:
    """The process survives it, at whatever byte it broke off."""
    whole = Path(ept.registry().plugins["tcp"].path).read_bytes()
    library = tmp_path / f"cut{kept}.so"
    length = int(kept if kept >= 1 else kept * loaded_bytes(whole))
    library.write_bytes(whole[:length])
    error = refusal_of(library)
    assert isinstance(error, ept.InvalidArgument)


def loaded_bytes(elf: bytes) -> int:
    """How much of the file the loader maps: what is behind it may be missing (symbols for a debugger, say)."""
    offset, size, count = int.from_bytes(elf[32:40], "little"), elf[54], elf[56]
    ends = [0]
    for index in range(count):
        header = elf[offset + index * size :][:56]
        if int.from_bytes(header[:4], "little") == 1:
            ends.append(int.from_bytes(header[8:16], "little") + int.from_bytes(header[32:40], "little"))
    return max(ends)


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + b"\xff" * 200, bytes(5000)])
def test_a_file_that_is_no_library(tmp_path: Path, content: bytes) -> None:
    library = tmp_path / "text.so"
    library.write_bytes(content)
    assert isinstance(refusal_of(library), ept.InvalidArgument)


def test_a_plugin_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing.so"
    with pytest.raises(ept.InvalidArgument, match=r"missing\.so.*No such file"):
        choose(ept.Settings(backend=missing), 2)


def test_a_folder_with_good_and_bad(build_plugin: Build, tmp_path: Path) -> None:
    build_plugin("mine", table())
    build_plugin("foreign", "int answer(void) { return 42; }")
    shutil.copy(Path(ept.registry().plugins["loopback"].path), tmp_path / "ept_copy.so")
    found = registry((str(tmp_path),))
    assert found.plugins["mine"].source == "EPT_PLUGIN_PATH"
    assert any(refusal.source.endswith("foreign.so") for refusal in found.refusals)


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_a_busy_port_is_named_on_every_rank_and_a_free_one_mends_it() -> None:
    store = LocalStore()
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        busy = on_threads(
            [
                lambda r=r: make(store, r, 2, backend="tcp", port_range=str(port))  # type: ignore[misc]
                for r in range(2)
            ]
        )
        for answer in busy:
            assert isinstance(answer, ept.EptError), answer
            assert str(port) in str(answer)
        free = on_threads(
            [
                lambda r=r: make(store, r, 2, backend="tcp", port_range=f"{port}-{port + 100}")  # type: ignore[misc]
                for r in range(2)
            ]
        )
        assert ept.loopback_run(free, hello) == [[1], [0]]
        close(free)


def test_a_second_group_on_a_ports_range_that_the_first_holds() -> None:
    with socket.create_server(("0.0.0.0", 0)) as any_port:
        port = any_port.getsockname()[1]
    settings = ept.Settings(backend="tcp", port_range=f"{port}-{port}")
    first = ept.Group(settings, world_size=1)
    with pytest.raises(ept.EptError, match=str(port)):
        ept.Group(settings, world_size=1, name="second")
    assert first.engine.info().rails > 0
    first.close()
    ept.Group(settings, world_size=1, name="third").close()


def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(ept.EptError, match="nowhere0"):
        ept.loopback_groups(2, ept.Settings(backend="tcp", interface="nowhere0"))


# ---- dispatch and combine --------------------------------------------------------------------------------------------


def step(group: ept.Group, moe: ept.AllToAll) -> None:
    """A step whose result is known: experts that give back what they got."""
    x = torch.randn(5 + group.rank, 64, dtype=torch.float32)
    ids = torch.arange(x.shape[0] * 2).reshape(-1, 2) % moe.num_experts
    got = moe.dispatch(x, ids, torch.full((x.shape[0], 2), 0.5))
    assert torch.equal(moe.combine(got.x, got), x)


BAD: dict[str, tuple[Callable[[ept.AllToAll], Any], type[Exception], str]] = {
    "shape": (lambda m: m.dispatch(torch.ones(3, 32), ids()), ept.InvalidArgument, r"x has shape \(3, 32\).*any, 64"),
    "dtype": (lambda m: m.dispatch(torch.ones(3, 64).half(), ids()), ept.InvalidArgument, r"float16.*float32"),
    "device": (lambda m: m.dispatch(torch.ones(3, 64, device="meta"), ids()), ept.UnsupportedError, "meta"),
    "stride": (lambda m: m.dispatch(torch.ones(3, 128)[:, ::2], ids()), ept.InvalidArgument, r"strides \(128, 2\)"),
    "rows": (lambda m: m.dispatch(torch.ones(3, 65)[:, :64], ids()), ept.InvalidArgument, r"\(65, 1\).*16-byte"),
    "start": (lambda m: m.dispatch(torch.ones(4 * 64 + 1)[1:].view(4, 64), ids(4)), ept.InvalidArgument, "0x.*16-byte"),
    "no tensor": (lambda m: m.dispatch([[1.0] * 64], ids(1)), ept.InvalidArgument, "list"),  # type: ignore[arg-type]
    "ids": (lambda m: m.dispatch(torch.ones(3, 64), ids(4)), ept.InvalidArgument, r"topk_ids has shape \(4, 2\)"),
    "id": (lambda m: m.dispatch(torch.ones(3, 64), ids() + 8), ept.InvalidArgument, "8"),
    "negative id": (lambda m: m.dispatch(torch.ones(3, 64), ids() - 2), ept.InvalidArgument, "-2"),
    "neither": (lambda m: m.dispatch(torch.ones(3, 64)), ept.InvalidArgument, "topk_ids or routing"),
    "many": (lambda m: m.dispatch(torch.ones(9, 64), ids(9)), ept.InvalidArgument, "9 tokens.*max_tokens=8"),
    "lane": (lambda m: m.dispatch(torch.ones(3, 64), ids(), lane=2), ept.InvalidArgument, "lane=2"),
    "layout": (
        lambda m: m.dispatch(torch.ones(3, 64), ids(), layout="heap"),  # type: ignore[arg-type]
        ept.InvalidArgument,
        "'heap'.*masked",
    ),
    "gradient": (
        lambda m: m.dispatch(torch.ones(3, 64, requires_grad=True), ids()),
        ept.UnsupportedError,
        "x requires a gradient",
    ),
    "out": (
        lambda m: m.dispatch(torch.ones(3, 64), ids(), layout="rows", out=torch.ones(9, 32)),
        ept.InvalidArgument,
        r"out has shape \(9, 32\)",
    ),
}


def ids(tokens: int = 3) -> torch.Tensor:
    return torch.zeros(tokens, 2, dtype=torch.int64)


@pytest.mark.parametrize("name", BAD)
def test_a_rank_that_gets_a_dispatch_wrong_may_call_again(name: str, ranks: Callable[..., list[ept.Group]]) -> None:
    call, error, words = BAD[name]
    groups = ranks(2)

    def run(group: ept.Group) -> None:
        moe = ept.AllToAll(group, num_experts=8, top_k=2, hidden=64, max_tokens=8, dtype=torch.float32)
        step(group, moe)
        if group.rank == 0:
            with pytest.raises(error, match=words):
                call(moe)
        step(group, moe)
        moe.check()
        assert int(group.fault) == 0

    ept.loopback_run(groups, run)


def test_ranks_that_disagree_on_an_all_to_all_are_all_told_and_go_on(ranks: Callable[..., list[ept.Group]]) -> None:
    def run(group: ept.Group) -> None:
        shape = {"num_experts": 8, "top_k": 2, "max_tokens": 8, "dtype": torch.float32}
        with pytest.raises(ept.MismatchError, match=r"hidden.*(64.*128|128.*64)"):
            ept.AllToAll(group, hidden=128 if group.rank == 1 else 64, **shape)
        step(group, ept.AllToAll(group, hidden=64, **shape))

    ept.loopback_run(ranks(3), run)


def test_gradients_are_refused_in_grad_mode_alone(ranks: Callable[..., list[ept.Group]]) -> None:
    (group,) = ranks(1)
    moe = ept.AllToAll(group, num_experts=2, top_k=2, hidden=64, max_tokens=8, dtype=torch.float32)
    x = torch.ones(3, 64, requires_grad=True)
    with torch.no_grad():
        got = moe.dispatch(x, ids())
        y = moe.combine(got.x, got)
    assert torch.equal(y, 2 * x.detach())
    with pytest.raises(ept.UnsupportedError, match="expert_out requires a gradient"):
        moe.combine(got.x.requires_grad_(), got)


def test_no_trace_of_the_tests_own_environment() -> None:
    assert not [name for name in os.environ if name.startswith("EPT_")]
