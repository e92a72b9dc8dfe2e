# SPDX-License-Identifier: Apache-2.0
"""Compiles the GPU kernels: for the build, which puts them into one C++ file that the library is linked with, and at
run time (_kernels.py). It imports nothing of the package, which isn't there yet when it is built.

    _compile.py find                                         prints which compiler it would take, or why there is none
    _compile.py embed OUT.cc INCLUDE_DIR[:INCLUDE_DIR] SOURCE.cu ...  no compiler: OUT.cc has no images, and the reason
    _compile.py none OUT.cc ...                              no images, since the build was told so
    _compile.py one SOURCE.cu ARCH OUT INCLUDE_DIR[:...]     one image into a file, for looking at it by hand

CUDA 12.9 and no other release: what it makes loads on drivers from R535 on, where 13.0's needs R580, and 12.9 is the
first and last of the twelves that knows sm_100. Looked for: libnvrtc of the wheel nvidia-cuda-nvrtc-cu12 that the
running Python can import, or at EPT_NVRTC; then nvcc at EPT_NVCC, CUDA_HOME, or on the PATH. Nothing here needs a GPU
or a driver. Kernels include only our own headers, so no toolkit has to be installed beside the wheel.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RELEASE = (12, 9)
# Machine code for A100 (and, by it, 8.x), H100/H200, B200; PTX for what comes later, which the driver compiles then.
TARGETS = ("sm_80", "sm_90", "sm_100", "compute_90")
GET = "pip install nvidia-cuda-nvrtc-cu12==12.9.86 where the library is built (no GPU is needed), and build it again"
FLAGS = ("-std=c++20", "-default-device", "--fmad=false")
# NVRTC has no system headers; of C's, ours take these types alone.
HEADERS = {
    "stdint.h": """#pragma once
typedef signed char int8_t; typedef unsigned char uint8_t;
typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t;
typedef long long int64_t; typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#define UINT32_MAX 0xffffffffu
#define UINT64_MAX 0xffffffffffffffffull
""",
    "stddef.h": "#pragma once\n",
}


class Unavailable(Exception):
    """No compiler of the right release."""


class Refused(Exception):
    """The compiler doesn't take it: a target that it doesn't know, or a fault in the source."""


class Nvrtc:
    """The compiler as a library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        if (major.value, minor.value) != RELEASE:
            raise Unavailable(f"NVRTC at {path} is of CUDA {major.value}.{minor.value}, not {RELEASE[0]}.{RELEASE[1]}")
        self.name = f"NVRTC {major.value}.{minor.value} ({path})"
        self.release = f"{major.value}.{minor.value} {path.resolve().name} {path.stat().st_size}"
        """Builds of one release differ in what they make, too."""

    def compile(self, source: Path, target: str, include: list[str], more: tuple[str, ...] = ()) -> bytes:
        call = self.library
        names = [name.encode() for name in HEADERS]
        texts = [text.encode() for text in HEADERS.values()]
        program = ctypes.c_void_p()
        made = call.nvrtcCreateProgram(
            ctypes.byref(program),
            source.read_bytes(),
            str(source).encode(),
            len(names),
            (ctypes.c_char_p * len(texts))(*texts),
            (ctypes.c_char_p * len(names))(*names),
        )
        if made:
            raise RuntimeError(f"{source}: nvrtcCreateProgram answers {made}")
        options = [*FLAGS, *more, f"-arch={target}", *(f"-I{folder}" for folder in include)]
        failed = call.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        )
        log = self._get(program, "nvrtcGetProgramLog").rstrip(b"\0").decode().strip()
        if failed:
            call.nvrtcDestroyProgram(ctypes.byref(program))
            raise Refused(f"{source} does not compile for {target} with {self.name}: {log or failed}")
        if log:
            print(log, file=sys.stderr)
        what = "nvrtcGetPTX" if target.startswith("compute_") else "nvrtcGetCUBIN"
        image = self._get(program, what)
        call.nvrtcDestroyProgram(ctypes.byref(program))
        return image

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        if getattr(self.library, what + "Size")(program, ctypes.byref(size)):
            raise RuntimeError(f"{what}Size failed")
        data = ctypes.create_string_buffer(size.value)
        if getattr(self.library, what)(program, data):
            raise RuntimeError(f"{what} failed")
        return data.raw


class Nvcc:
    """The compiler as a program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release (\d+)\.(\d+)", said)
        found = (int(release[1]), int(release[2])) if release else (0, 0)
        if found != RELEASE:
            raise Unavailable(f"{path} is of CUDA {found[0]}.{found[1]}, not {RELEASE[0]}.{RELEASE[1]}")
        self.name = f"nvcc {found[0]}.{found[1]} ({path})"

    def compile(self, source: Path, target: str, include: list[str]) -> bytes:
        kind = "-ptx" if target.startswith("compute_") else "-cubin"
        flags = [flag for flag in FLAGS if flag != "-default-device"]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "image"
            command: list[str | Path] = [
                self.path,
                kind,
                f"-arch={target}",
                *flags,
                *(f"-I{i}" for i in include),
                source,
                "-o",
                out,
            ]
            if subprocess.run(command, check=False).returncode:
                raise Refused(f"{source} does not compile for {target} with {self.name}")
            return out.read_bytes()


Compiler = Nvrtc | Nvcc


def _nvrtc_paths() -> list[Path]:
    given = os.environ.get("EPT_NVRTC")
    return [Path(given)] if given else wheel_paths()


def wheel_paths() -> list[Path]:
    """Where the wheel nvidia-cuda-nvrtc-cu12 has it."""
    try:
        wheel = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        return []
    folders = list(wheel.submodule_search_locations or []) if wheel else []
    return [Path(folder) / "lib" / "libnvrtc.so.12" for folder in folders]


def _nvcc_paths() -> list[Path]:
    named = [os.environ.get("EPT_NVCC"), shutil.which("nvcc")]
    if home := os.environ.get("CUDA_HOME"):
        named.insert(1, f"{home}/bin/nvcc")
    return [Path(path) for path in named if path and Path(path).exists()]


def find() -> Compiler:
    """The first compiler of the right release, or Unavailable with what was found instead."""
    unfit = []
    for make, paths in ((Nvrtc, _nvrtc_paths()), (Nvcc, _nvcc_paths())):
        for path in paths:
            try:
                return make(path)
            except (Unavailable, OSError) as why:
                unfit.append(str(why))
    found = "; ".join(unfit) if unfit else "no NVRTC and no nvcc was found"
    raise Unavailable(f"built without GPU kernels, for want of a compiler of CUDA 12.9 ({found}): {GET}")


def _octal(data: bytes) -> str:
    return "".join(f"\\{byte:03o}" for byte in data)


def _literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def embed(out: Path, include: list[str], sources: list[Path], reason: str = "") -> None:
    """Writes the table of cuda/image.h; without images where there is a reason, or no compiler."""
    images = []
    try:
        if not reason:
            compiler = find()
            for source in sources:
                images += [(source.stem, target, compiler.compile(source, target, include)) for target in TARGETS]
    except Unavailable as why:
        reason = str(why)
    lines = [
        "// Made by src/eptransport/_compile.py.",
        '#include "cuda/image.h"',
        "namespace ept::cuda {",
        "namespace {",
    ]
    for i, (_, _, data) in enumerate(images):
        # As strings, which have one more 0: 8 MiB compile in half a second, and as numbers in 14 (gcc 12.2).
        lines.append(f"alignas(16) constexpr unsigned char image_{i}[] =")
        lines += [f'"{_octal(data[at : at + 64])}"' for at in range(0, len(data), 64)]
        lines.append(";")
    lines.append("}  // namespace")
    lines.append("const Image images[] = {")
    for i, (name, target, data) in enumerate(images):
        kind, arch = target.split("_")
        lines.append(f'    {{"{name}", {arch}, {"true" if kind == "compute" else "false"}, image_{i}, {len(data)}}},')
    lines.append("    {nullptr, 0, false, nullptr, 0}};")
    lines.append(f"const char *const no_images = {_literal(reason) if reason else 'nullptr'};")
    lines.append("}  // namespace ept::cuda\n")
    out.write_text("\n".join(lines))


def main(arguments: list[str]) -> None:
    match arguments:
        case ["find"]:
            try:
                print(find().name)
            except Unavailable as why:
                print(why)
                raise SystemExit(1) from None
        case ["embed", out, include, *sources]:
            embed(Path(out), include.split(":"), [Path(source) for source in sources])
        case ["none", out, *_]:
            embed(Path(out), [], [], f"built without GPU kernels (-Dcuda=disabled): {GET}")
        case ["one", source, target, out, include]:
            Path(out).write_bytes(find().compile(Path(source), target, include.split(":")))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as problem:
        raise SystemExit(str(problem)) from None
