# SPDX-License-Identifier: Apache-2.0
"""Importing is quick and loads nothing that it doesn't need; the installed package has what it must and no more."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys

import pytest

import eptransport as ept

BUDGET_S = 0.2


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_under_a_fifth_of_a_second() -> None:
    code = "import time; begin = time.perf_counter(); import eptransport; print(time.perf_counter() - begin)"
    fresh(code)
    best = min(float(fresh(code)) for _ in range(5))
    assert best < BUDGET_S, f"{best:.3f} s"


def test_import_loads_no_torch_and_no_network_library() -> None:
    code = (
        "import json, sys, eptransport\n"
        "loaded = open('/proc/self/maps').read()\n"
        "print(json.dumps([sorted(sys.modules), loaded]))"
    )
    modules, maps = json.loads(fresh(code))
    assert not {"torch", "numpy", "pydantic", "typer", "rich"} & set(modules)
    assert not [name for name in ("fabric", "ibverbs", "mlx5", "cuda", "nvshmem", "ucp") if f"lib{name}" in maps]


def test_settings_and_the_registry_need_no_torch_either() -> None:
    code = (
        "import json, sys, eptransport as ept\n"
        "ept.registry(); ept.Settings(options={'tcp.streams': 2}); ept.choose(ept.Settings(backend='tcp'), 2)\n"
        "ept.Group(ept.Settings(backend='tcp'), world_size=1).close()\n"
        "print(json.dumps([sorted(sys.modules), open('/proc/self/maps').read()]))"
    )
    modules, maps = json.loads(fresh(code))
    assert not {"torch", "numpy"} & set(modules)
    # With the slash: ept_libfabric.so is ours.
    assert not [name for name in ("fabric", "ibverbs", "mlx5", "cuda", "nvshmem", "ucp") if f"/lib{name}" in maps]


@pytest.mark.parametrize("name", ept.__all__)
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(ept, name)
    assert value.__doc__
    assert name in dir(ept)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Grup"):
        ept.Grup  # noqa: B018


def test_public_methods_say_what_they_do() -> None:
    for name in ("AllToAll", "Engine", "Group", "Memory", "Peer", "RemoteSignal", "Region", "Signal", "Transfer"):
        for method, value in vars(getattr(ept, name)).items():
            if callable(value) and not method.startswith("_"):
                assert value.__doc__, f"{name}.{method}"


LOOPS = {f"bench/against/{name}" for name in ("loops.h", "writes.h", "libfabric.c", "ucx.c", "verbs.c")}
"""Sources that are built where they are run, against the headers of that machine."""


def test_the_installed_package_is_whole_and_has_no_junk() -> None:
    files = {str(file) for file in importlib.metadata.files("eptransport") or []}
    ours = {name.removeprefix("eptransport/") for name in files if name.startswith("eptransport/")}
    for needed in (
        "libeptransport.so",
        "plugins/ept_loopback.so",
        "plugins/ept_tcp.so",
        "include/eptransport/backend.h",
        "include/eptransport/eptransport.h",
        "include/eptransport/wire.h",
        "kernels/moe/cuda/moe.cu",
        "kernels/moe/layout.h",
        "_native.pyi",
        "py.typed",
        "adapters/transformers.py",
        "examples/tiny_deepseek/train.py",
        *LOOPS,
    ):
        assert needed in ours, needed
    assert any(name.startswith("_native.abi3") for name in ours)
    junk = [name for name in ours if name.endswith(("meson.build", ".cc", ".c", "_cffi_build.py", ".orig", ".swp"))]
    assert not set(junk) - LOOPS
    assert not [name for name in files if name.startswith(("tests/", "src/", "native/"))]


def test_the_wheel_is_of_the_stable_abi() -> None:
    wheel = importlib.metadata.distribution("eptransport").read_text("WHEEL") or ""
    assert re.search(r"^Tag: cp3\d+-abi3-\w*linux", wheel, re.M), wheel


FORK = """
import os, sys
import eptransport as ept

def greet(groups):
    groups[0].engine.peer(1).send(b"hello", 7)
    assert groups[1].engine.recv(7, timeout=5) == (0, b"hello")

groups = ept.loopback_groups(2)
engine = groups[0].engine
memory = engine.register(bytearray(64))
child = os.fork()
if child == 0:
    try:
        for use in (lambda: engine.info(), lambda: memory.export(1), lambda: engine.peer(1).send(b"x")):
            try:
                use()
            except ept.ClosedError as error:
                assert "forked" in str(error), error
            else:
                os._exit(3)
        groups[0].close()
        own = ept.loopback_groups(2)
        greet(own)
        own[0].close()
        own[1].close()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(4)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
greet(groups)
for group in groups:
    group.close()
print("fine")
"""


def test_a_forked_child_is_told_to_make_its_own_group_and_the_parent_goes_on() -> None:
    assert fresh(FORK).strip() == "fine"
