# SPDX-License-Identifier: Apache-2.0
"""The kernels that are linked with NVSHMEM's device library compile, where nvcc and the library are: no build makes
them unless it is told to, and fibers (tests/native/gpu_initiated.cc) are compiled by another compiler.
`make test-long`."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
WHERE = {name: os.environ[name] for name in ("EPT_NVCC", "EPT_NVSHMEM_HOME") if name in os.environ}
"""Before a fixture clears them."""


@pytest.fixture
def link() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nvshmem_link", ROOT / "plugins" / "nvshmem" / "link.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.timeout(1200)  # ten seconds of two idle cores
def test_the_kernels_compile(link: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WHERE.items():
        monkeypatch.setenv(name, value)
    try:
        tools = link.find()
    except link.Unavailable as why:
        pytest.skip(str(why))
    native = ROOT / "native"
    kernels, library = native / "moe" / "cuda" / "moe.cu", ROOT / "plugins" / "nvshmem" / "nvshmem.cu"
    made = link.compiles(tools, "90", [str(native / "include"), str(native)], kernels, library)
    given = set(re.findall(r"visible \.func .*?(ept_library_\w+)", made))
    called = set(re.findall(r"^\s*(ept_library_\w+),", made, re.M))
    assert len(called) >= 3
    assert called <= given, "kernels call what the library's side has not"
    assert "ept_library_part_warp" not in called, "what is put amid a row is put by a call"
