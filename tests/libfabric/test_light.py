# SPDX-License-Identifier: Apache-2.0
"""What a process is spared that has no use for it: libfabric where there is no EFA card, CUDA where there is no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from libfabrics import Libfabric, built, cases

Spawn = Callable[..., list[Any]]

DRIVER = """
#include <stdio.h>
#include <stdlib.h>
static void say(const char *what) {
  FILE *file = fopen(getenv("SAID"), "a");
  fprintf(file, "%s\\n", what);
  fclose(file);
}
__attribute__((constructor)) static void loaded(void) { say(NAME " loaded"); }
#define CALL(name) int name(void *a, void *b, void *c) { (void)a; (void)b; (void)c; say(#name); return ANSWER; }
CALL(cuInit)
CALL(cuCtxCreate_v2)
CALL(cuDevicePrimaryCtxRetain)
CALL(cuMemAlloc_v2)
CALL(cuDeviceGetCount)
CALL(cuDevicePrimaryCtxGetState)
CALL(cuCtxGetDevice)
CALL(cuDeviceGetPCIBusId)
CALL(cudaMalloc)
CALL(cudaFree)
CALL(cudaSetDevice)
CALL(cudaGetDeviceCount)
"""
"""A driver that says what is called of it, and that it was not initialised (CUDA_ERROR_NOT_INITIALIZED)."""

HARMLESS = {"cuDeviceGetCount", "cuDevicePrimaryCtxGetState", "cuCtxGetDevice", "cuDeviceGetPCIBusId"}
"""Calls that make no context."""


def _mapped(name: str) -> list[str]:
    with open("/proc/self/maps") as file:
        return sorted({line.split()[-1] for line in file if name in line})


def choosing(_rank: int, _n: int, _folder: Path, card: bool, options: dict[str, str]) -> tuple[str, list[str]]:
    """What `auto` says of libfabric, and which libfabrics it has mapped."""
    from eptransport import backends, efa
    from eptransport.settings import Settings

    if card:
        device = efa.Device("rdmap0s6", "0000:00:06.0", 0, "", "4: ACTIVE")
        efa.devices = lambda root=Path("/"): (device,)
    rows = backends.candidates(Settings(backend="auto", options=options), one_process=False)
    (row,) = (row for row in rows if row.name == "libfabric")
    return row.why_not or "", _mapped("/libfabric.so")


@pytest.mark.skipif(not built(), reason="built without libfabric headers")
def test_auto_loads_no_libfabric_where_no_card_is(spawn: Spawn) -> None:
    ((why_not, mapped),) = spawn(1, choosing, False, {})
    assert "no EFA card" in why_not
    assert not mapped


@pytest.mark.parametrize("case", cases("tcp")[:1])
def test_auto_asks_libfabric_where_there_is_reason_to(case: tuple[Libfabric, str], spawn: Spawn) -> None:
    """A card, or a provider that somebody named. Over tcp it is refused for what it waives, and that is told."""
    release, provider = case
    library = {"libfabric.library": release.library}
    for card, options in ((True, library), (False, {**library, "libfabric.provider": provider})):
        ((why_not, mapped),) = spawn(1, choosing, card, options)
        assert "waives clause" in why_not
        assert mapped


def _driver(folder: Path, name: str) -> Path:
    source, library = folder / "driver.c", folder / name
    source.write_text(DRIVER)
    command = ["cc", "-shared", "-fPIC", f'-DNAME="{name}"', "-DANSWER=3", "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return library


def traffic(_rank: int, _n: int, _folder: Path, options: dict[str, str]) -> int:
    """Two ranks write to one another over libfabric: opened, connected, registered, written."""
    from eptransport.backends import registry
    from eptransport.conformance import subject
    from eptransport.conformance.world import World

    with World(subject(registry(()).plugins["libfabric"], options)) as world:
        route = world.route(0, 1, 4096)
        world.settle([route.write(0, 4096)])
        route.counted(1, "after a write")
        route.look("after a write")
        return route.signal.value


@pytest.mark.parametrize("case", cases("tcp"))
def test_a_process_without_a_gpu_makes_no_context(
    case: tuple[Libfabric, str], spawn: Spawn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There is a driver where everybody looks for it. Of it no more is called than asks whether there is a context, by
    us and by libfabric; and the runtime, which only libfabric looks for, is not loaded."""
    if shutil.which("cc") is None:
        pytest.skip("no compiler for a stand-in of libcuda")
    release, provider = case
    said = tmp_path / "said"
    said.touch()
    for name in ("libcuda.so.1", "libcuda.so", "libcudart.so"):
        _driver(tmp_path, name)
    monkeypatch.setenv("SAID", str(said))
    monkeypatch.delenv("FI_HMEM", raising=False)
    # A process reads its search path when it starts, so the traffic has a process of its own.
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}")
    assert _afresh(release.options(provider)) == 1
    words = said.read_text().split("\n")[:-1]
    assert "libcuda.so.1 loaded" in words  # or the stand-in is no test
    assert set(words) - {"libcuda.so.1 loaded"} <= HARMLESS, words


def _afresh(options: dict[str, str]) -> int:
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}\n"
        "from pathlib import Path\n"
        "from test_light import traffic\n"
        f"print(traffic(0, 1, Path(), {options!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
