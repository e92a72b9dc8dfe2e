# SPDX-License-Identifier: Apache-2.0
"""Links the GPU kernels with NVSHMEM's device library, and puts them into one C++ file for the plugin.

    link.py find                                        prints what it would take, or why there is nothing
    link.py embed OUT.cc ARCHS INCLUDE_DIR[:...] KERNELS.cu LIBRARY.cu     ARCHS: 80,90,100
    link.py none OUT.cc                                 no kernels, since the build was told so

It takes nvcc (EPT_NVCC, CUDA_HOME, or on the PATH) of CUDA 12.x or 13.x, and NVSHMEM 3.x made for the same major
release: the wheel nvidia-nvshmem-cu12 or -cu13 that the running Python can import, or EPT_NVSHMEM_HOME (with include/
and lib/).
Machine code of nvcc 13 needs a driver of R580 or later, that of 12.x one of R525 or later. Nothing here needs a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

GET = (
    "pip install nvidia-nvshmem-cu13 (-cu12) where the library is built, with an nvcc of the same CUDA release there "
    "(no GPU is needed), and build it with -Dnvshmem=enabled (docs/backends/nvshmem.md)"
)
KERNEL_REGISTERS = "64"
"""What the library's functions may take: more than the kernels' own (simt.h) would leave no room for wide blocks."""


class Unavailable(Exception):
    """A piece is missing."""


@dataclass(frozen=True)
class Tools:
    nvcc: Path
    cuda: tuple[int, int]
    nvshmem: Path
    release: tuple[int, int, int]

    @property
    def name(self) -> str:
        release = ".".join(map(str, self.release))
        return f"nvcc {self.cuda[0]}.{self.cuda[1]} ({self.nvcc}), NVSHMEM {release} ({self.nvshmem})"


def _nvcc() -> tuple[Path, tuple[int, int]]:
    home = os.environ.get("CUDA_HOME")
    for path in (os.environ.get("EPT_NVCC"), f"{home}/bin/nvcc" if home else None, shutil.which("nvcc")):
        if not path or not Path(path).exists():
            continue
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"release (\d+)\.(\d+)", said)
        if found and int(found[1]) in (12, 13):
            return Path(path).resolve(), (int(found[1]), int(found[2]))
        raise Unavailable(f"{path} is no nvcc of CUDA 12 or 13")
    raise Unavailable("no nvcc was found")


def _nvshmem() -> Path:
    if given := os.environ.get("EPT_NVSHMEM_HOME"):
        return Path(given)
    try:
        wheel = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        wheel = None
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        return Path(folder)
    raise Unavailable("no NVSHMEM was found")


def _release(home: Path) -> tuple[int, int, int]:
    for header in home.glob("include/**/nvshmem_version.h"):
        text = header.read_text()
        parts = [re.search(rf"NVSHMEM_VENDOR_{part}_VERSION\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
        if all(parts):
            major, minor, patch = (int(part[1]) for part in parts if part)
            return major, minor, patch
    raise Unavailable(f"{home} has no header that says its release")


def find() -> Tools:
    try:
        nvcc, cuda = _nvcc()
        home = _nvshmem()
        if not (home / "lib" / "libnvshmem_device.a").exists():
            raise Unavailable(f"{home}/lib has no libnvshmem_device.a")
        release = _release(home)
        if release[0] != 3:
            raise Unavailable(f"{home} is NVSHMEM {release[0]}; 3.x is wanted")
        return Tools(nvcc, cuda, home, release)
    except Unavailable as why:
        raise Unavailable(f"built without kernels that are linked with NVSHMEM ({why}): {GET}") from None


def _run(command: list[str | Path]) -> None:
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")


def link(tools: Tools, arch: str, include: list[str], kernels: Path, library: Path) -> bytes:
    """One image. The driver loads it as it is: nothing of cudart comes with it."""
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    common = [tools.nvcc, "-rdc=true", *target, "-std=c++20", "-c"]
    with tempfile.TemporaryDirectory() as folder:
        ours, image = (Path(folder) / name for name in ("kernels.o", "image.cubin"))
        _run([*common, *_options(tools, include, library), kernels, "-o", ours])
        where = ["-L", tools.nvshmem / "lib", "-lnvshmem_device"]
        _run([tools.nvcc, "-dlink", *target, "-cubin", ours, *where, "-o", image])
        return image.read_bytes()


def _options(tools: Tools, include: list[str], library: Path) -> list[str | Path]:
    """The library's side stands before the kernels in one unit, so that what they put by becomes a part of them."""
    inner = [f"-I{folder}" for folder in _toolkit(tools.nvcc).glob("**/include/cccl") if folder.is_dir()][:1]
    ours = ["--fmad=false", "-DEPT_GPU_INITIATED", *(f"-I{folder}" for folder in include)]
    # NVSHMEM's headers warn of themselves.
    its = ["-w", f"-maxrregcount={KERNEL_REGISTERS}", f"-I{tools.nvshmem / 'include'}", *inner]
    return [*ours, *its, "-include", library.resolve()]


def compiles(tools: Tools, arch: str, include: list[str], kernels: Path, library: Path) -> str:
    """As PTX, unoptimised, which takes seconds where `link` takes a minute."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.ptx"
        target = ["-rdc=true", "-gencode", f"arch=compute_{arch},code=compute_{arch}", "-std=c++20"]
        as_ptx = ["-ptx", "-Xcicc", "-O0"]
        _run([tools.nvcc, *target, *as_ptx, *_options(tools, include, library), kernels, "-o", out])
        return out.read_text()


def _toolkit(nvcc: Path) -> Path:
    """Where its headers are. From CUDA 13 on those of its C++ library are in a folder that nvcc doesn't look into."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False)
    top = re.search(r"TOP=(\S+)", said.stderr)
    return Path(top[1]).resolve() if top else nvcc.parent.parent


def known(tools: Tools, archs: list[str]) -> list[str]:
    """Those that this nvcc has code for: an older one knows no sm_100, a later one no sm_80 some day."""
    said = subprocess.run([tools.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout
    codes = set(re.findall(r"sm_(\d+)", said))
    left = [arch for arch in archs if arch not in codes]
    if left:
        print(f"nvcc {tools.cuda[0]}.{tools.cuda[1]} makes no code for {', '.join(left)}: left out", file=sys.stderr)
    return [arch for arch in archs if arch in codes]


def _literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write(out: Path, images: list[tuple[str, bytes]], release: tuple[int, int, int], reason: str) -> None:
    """The table of images.h."""
    lines = ["// Made by plugins/nvshmem/link.py.", '#include "nvshmem/images.h"', "namespace nvshmem {", "namespace {"]
    for arch, data in images:
        lines.append(f"alignas(16) constexpr unsigned char image_{arch}[] = {{")
        lines += [",".join(map(str, data[at : at + 64])) + "," for at in range(0, len(data), 64)]
        lines.append("};")
    lines += ["}  // namespace", "const Image images[] = {"]
    lines += [f"    {{{arch}, image_{arch}, {len(data)}}}," for arch, data in images]
    lines += ["    {0, nullptr, 0}};", f"const int linked[3] = {{{', '.join(map(str, release))}}};"]
    lines.append(f"const char *const no_images = {_literal(reason) if reason else 'nullptr'};")
    out.write_text("\n".join([*lines, "}  // namespace nvshmem\n"]))


def main(arguments: list[str]) -> None:
    match arguments:
        case ["find"]:
            try:
                print(find().name)
            except Unavailable as why:
                print(why)
                raise SystemExit(1) from None
        case ["embed", out, archs, include, kernels, library]:
            try:
                tools = find()
            except Unavailable as why:
                write(Path(out), [], (0, 0, 0), str(why))
                return
            each = known(tools, [arch.strip() for arch in archs.split(",")])
            images = [(arch, link(tools, arch, include.split(":"), Path(kernels), Path(library))) for arch in each]
            write(Path(out), images, tools.release, "")
        case ["none", out, *_]:
            write(
                Path(out),
                [],
                (0, 0, 0),
                f"built without kernels that are linked with NVSHMEM, as long as that is not asked for: {GET}",
            )
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
