# SPDX-License-Identifier: Apache-2.0
"""GPU kernels that are compiled at run time: the cache that keeps them, what is refused, and what the package brings
for it. Nothing here needs a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import eptransport as ept
from eptransport import _compile, _kernels
from eptransport._call import lib
from eptransport._moe_config import moe_config

KEY = "ab" * 32
SCRIPT = Path(_compile.__file__)


def never() -> bytes:
    raise AssertionError("it is kept already")


def test_what_is_kept_is_compiled_once(tmp_path: Path) -> None:
    assert _kernels.Cache(tmp_path).get(KEY, lambda: b"kernels") == b"kernels"
    assert _kernels.Cache(tmp_path).get(KEY, never) == b"kernels"
    assert _kernels.Cache(tmp_path).get("cd" * 32, lambda: b"others") == b"others"
    assert not list(tmp_path.glob(".new-*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:20],
        lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        lambda data: b"X" + data[1:],
        lambda data: data[:9] + bytes([data[9] ^ 128]) + data[10:],
        lambda data: data[:40],  # the hash of nothing would be right of nothing
        lambda data: b"\x7fELF" + bytes(200),
    ],
)
def test_what_is_damaged_is_compiled_again(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    cache = _kernels.Cache(tmp_path)
    cache.get(KEY, lambda: b"kernels of ours")
    (place,) = tmp_path.glob("*.cubin")
    place.write_bytes(damage(place.read_bytes()))
    assert cache.get(KEY, lambda: b"kernels, again") == b"kernels, again"
    assert "damaged" in caplog.text
    assert cache.get(KEY, never) == b"kernels, again"


def test_no_folder_keeps_nothing(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        assert _kernels.Cache(None).get(KEY, lambda: made.append(1) or b"k") == b"k"  # type: ignore[func-returns-value]
    assert len(made) == 2


RANKS = 4
PROCESS = """
import os, signal, sys, time
from pathlib import Path
from eptransport import _kernels
folder, log, dies = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "dies"
def make():
    with log.open("a") as file:
        file.write("compiles\\n")
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    while len(list(log.parent.glob("here-*"))) < int(sys.argv[4]):  # the others come meanwhile
        time.sleep(0.01)
    return b"kernels" * 1000
if not dies:
    (log.parent / f"here-{os.getpid()}").touch()
assert _kernels.Cache(folder).get("ab" * 32, make) == b"kernels" * 1000
"""


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    """Also after one has died while it held the lock."""
    folder, log = tmp_path / "cache", tmp_path / "log"
    folder.mkdir(mode=0o700)

    def start(dies: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", PROCESS, str(folder), str(log), dies, str(RANKS)])

    assert start("dies").wait(timeout=120) == -9
    assert log.read_text() == "compiles\n"
    ranks = [start("lives") for _ in range(RANKS)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * RANKS
    assert log.read_text() == "compiles\n" * 2


def test_folders_that_code_is_not_run_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tmp_path / "made" / "here"
    assert _kernels.cache_of(str(good)).folder == good
    assert good.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ept.ConfigError, match="EPT_GPU_CACHE=kernels: an absolute path"):
        _kernels.cache_of("kernels")
    others = tmp_path / "others"
    others.mkdir()
    others.chmod(0o777)
    with pytest.raises(ept.ConfigError, match="others may write into"):
        _kernels.cache_of(str(others))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ept.ConfigError, match="can't be made"):
        _kernels.cache_of(str(file))
    # Of its own choice, it goes without.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _kernels.cache_of(None).folder == tmp_path / "eptransport" / "kernels"
    (tmp_path / "eptransport" / "kernels").chmod(0o770)
    assert _kernels.cache_of(None).folder is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert _kernels.cache_of(None).folder is None
    monkeypatch.setattr(os, "geteuid", lambda: good.stat().st_uid + 1)
    with pytest.raises(ept.ConfigError, match="belongs to user"):
        _kernels.cache_of(str(good))


def test_a_key_is_of_all_that_an_image_follows_from(tmp_path: Path) -> None:
    source, folder = tmp_path / "a.cu", tmp_path / "include"
    folder.mkdir()
    source.write_text("kernels")
    (folder / "a.h").write_text("a header")

    def key(compiler: str = "12.9", target: str = "sm_90", options: tuple[str, ...] = ("-DA=1",)) -> str:
        return _kernels.key_of(compiler, target, options, [str(folder)], source)

    keys = [key(), key(compiler="12.9.1"), key(target="sm_80"), key(options=("-DA=2",)), key(options=("-D", "A=1"))]
    for change in (
        lambda: source.write_text("other kernels"),
        lambda: (folder / "a.h").write_text("another header"),
        lambda: (folder / "b.cuh").write_text(""),
        lambda: (folder / "b.cuh").rename(folder / "c.cuh"),
    ):
        assert keys[-1] == key() or len(keys) == 5
        change()
        keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == key()


def nvrtc() -> _compile.Nvrtc:
    try:
        return _kernels._nvrtc(ept.Settings())
    except _compile.Unavailable as why:
        pytest.skip(f"no NVRTC here: {why}")


def test_the_package_has_what_a_shape_is_compiled_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PTX, which takes half of the time of machine code: every header is there, and what is fixed is known."""
    compiler = nvrtc()
    source, folders = _kernels.sources()
    config, _, _ = moe_config(
        world=8,
        rank=0,
        num_experts=130,
        top_k=8,
        hidden=7168,
        max_tokens=128,
        dtype=None,
        dispatch_dtype=torch.float8_e4m3fn,
        combine_dtype=None,
        alignment=1,
        lanes=2,
        buffer_bytes=None,
        placement=None,
        scale_format="fp32",
        scale_epsilon=1e-4,
        caller_scale_bytes=0,
        threads=1,
    )
    options = _kernels.fixed(config)
    assert sorted(options) == [
        "-DEPT_FIXED_HIDDEN=7168",
        "-DEPT_FIXED_LOCAL=17",
        "-DEPT_FIXED_PAYLOAD=7168",
        "-DEPT_FIXED_TOP_K=8",
        "-DEPT_FIXED_WORLD=8",
    ]
    text = compiler.compile(source, "compute_90", folders, options).decode()
    assert ".target sm_90" in text
    assert "moe_dispatch_recv(" in text
    with pytest.raises(_compile.Refused, match="does not compile for sm_17"):
        compiler.compile(source, "sm_17", folders)


def test_a_gpu_that_the_package_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of capability 99.0: PTX at most, until what is compiled here is added."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (99, 0))
    asked = []

    def compiled(settings: ept.Settings, target: str, options: tuple[str, ...]) -> bytes:
        asked.append((target, options))
        if len(asked) == 1:
            raise _compile.Refused("it doesn't know sm_990")
        if len(asked) == 2:
            raise _compile.Unavailable("none here")
        return b"machine code"

    monkeypatch.setattr(_kernels, "_compiled", compiled)
    device = torch.device("cuda", 0)
    _kernels.add_missing(ept.Settings(gpu_compile="off"), device)
    assert not asked
    for _ in range(2):
        _kernels.add_missing(ept.Settings(), device)
        assert not lib.ept_gpu_has_code(990)
    _kernels.add_missing(ept.Settings(), device)
    assert lib.ept_gpu_has_code(990)
    _kernels.add_missing(ept.Settings(), device)
    assert asked == [("sm_990", ())] * 3


def test_a_shape_without_a_compiler_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_kernels, "fixed", lambda config: ())
    monkeypatch.setenv("EPT_GPU_NVRTC", "/nonexistent/libnvrtc.so.12")
    assert _kernels.for_shape(ept.Settings(), torch.device("cuda", 0), None) is None
    with pytest.raises(ept.BackendUnavailable, match=r"pip install 'eptransport\[nvrtc\]'"):
        _kernels.for_shape(ept.Settings(gpu_compile="shape"), torch.device("cuda", 0), None)


def test_a_build_without_a_compiler_says_how_to_get_it(tmp_path: Path) -> None:
    """What the build calls, where there is none, and where there is another release's."""
    tools = tmp_path / "tools"
    tools.mkdir()
    environment = {"PATH": str(tools), "EPT_NVRTC": "/nonexistent/libnvrtc.so.12"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    how = "pip install nvidia-cuda-nvrtc-cu12==12.9.86"
    found = run("find")
    assert found.returncode == 1
    assert how in found.stdout
    out = tmp_path / "images.cc"
    assert run("embed", str(out), "none", "none.cu").returncode == 0
    text = out.read_text()
    assert 'no_images = "built without GPU kernels, for want of a compiler of CUDA 12.9' in text
    assert how in text
    shell = shutil.which("sh")
    if shell is None:
        pytest.skip("no sh for a stand-in of nvcc")
    nvcc = tools / "nvcc"
    nvcc.write_text(f'#!{shell}\necho "Cuda compilation tools, release 13.0, V13.0.88"\n')
    nvcc.chmod(0o755)
    found = run("find")
    assert found.returncode == 1
    assert f"{nvcc} is of CUDA 13.0, not 12.9" in found.stdout
