"""A side whose loop is C source over another library's headers, built when it is asked for (loops.h).

So eptransport needs nobody's headers to be built, and the loop is compiled against what the user has.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from eptransport.bench.against.side import MOST_BYTES, Absent, Side
from eptransport.bench.processes import ProcessRank
from eptransport.errors import TransportError

__all__ = ["OpenCompiled", "build", "in_wheel"]

BUILD_TIMEOUT_S = 120
TIMEOUT_NS = 50_000_000_000
"""Less than what the side is granted for one measure, so that the loop says what it waited for."""
BLOB_BYTES = 16384


def in_wheel(package: str, ending: str) -> tuple[Path, str] | None:
    """The file of an installed package whose path ends so, and the package's version. Imports nothing."""
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return None
    for file in found.files or ():
        if str(file).endswith(ending):
            return Path(str(file.locate())).resolve(), found.version
    return None


def build(source: str, folder: Path, headers: Path | None, hint: str) -> Path:
    """A shared object of `source`, beside this file, in `folder`. Absent without a compiler or the headers."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Absent("its loop is built when it is asked for, and there is no C compiler: apt-get install gcc")
    target = folder / f"{Path(source).stem}.so"
    with resources.as_file(resources.files("eptransport.bench.against")) as here:
        include = [] if headers is None else [f"-I{headers}"]
        command = [compiler, "-O3", "-fPIC", "-shared", "-std=gnu11", *include, str(here / source), "-o", str(target)]
        try:
            done = subprocess.run(
                [*command, "-ldl"], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise Absent(f"{compiler} did not build its loop in {BUILD_TIMEOUT_S} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise Absent(f"its loop can't be built ({lines[0].strip()}); {hint}")
    return target


@dataclass(frozen=True)
class OpenCompiled:
    loop: Path
    library: str
    """As dlopen takes it."""
    variant: int = 0
    """What `side_variant` is set to, where the source has more than one way."""
    option: str = ""
    """What `side_option` is set to, where the source takes one."""

    def __call__(self, rank: ProcessRank) -> Side:
        return _Compiled(rank, self)


class _Compiled(Side):
    def __init__(self, rank: ProcessRank, what: OpenCompiled) -> None:
        # Global, so that the loop, which is linked with nothing, finds the library's functions.
        self._library = ctypes.CDLL(what.library, mode=ctypes.RTLD_GLOBAL)
        self._loop = ctypes.CDLL(str(what.loop))
        self._loop.side_open.restype = ctypes.c_void_p
        self._loop.side_detail.restype = self._loop.side_error.restype = ctypes.c_char_p
        if what.variant:
            ctypes.c_int.in_dll(self._loop, "side_variant").value = what.variant
        if what.option:
            self._option = what.option.encode()  # the loop keeps the pointer
            ctypes.c_char_p.in_dll(self._loop, "side_option").value = self._option
        self._side = ctypes.c_void_p(self._loop.side_open(what.library.encode(), ctypes.c_uint64(MOST_BYTES)))
        if not self._side.value:
            raise self._error()
        blob, length = ctypes.create_string_buffer(BLOB_BYTES), ctypes.c_uint64(BLOB_BYTES)
        self._call("side_address", blob, ctypes.byref(length))
        other = rank.gather(blob.raw[: length.value])[1 - rank.rank]
        self._call("side_connect", other, ctypes.c_uint64(len(other)), ctypes.c_uint32(rank.rank))
        self.detail = self._loop.side_detail(self._side).decode()

    def latency(self, size: int, count: int) -> Sequence[float]:
        samples = array("d", bytes(8 * count))
        self._call(
            "side_pingpong",
            ctypes.c_uint64(size),
            ctypes.c_uint32(count),
            ctypes.c_void_p(samples.buffer_info()[0]),
            ctypes.c_uint64(TIMEOUT_NS),
        )
        return [sample / 1e3 for sample in samples]

    def stream(self, size: int, count: int, depth: int) -> float:
        seconds = ctypes.c_double()
        self._call(
            "side_stream",
            ctypes.c_uint64(size),
            ctypes.c_uint32(count),
            ctypes.c_uint32(depth),
            ctypes.byref(seconds),
            ctypes.c_uint64(TIMEOUT_NS),
        )
        return seconds.value

    def close(self) -> None:
        self._loop.side_close(self._side)
        self._side = ctypes.c_void_p()

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self._loop, name)(self._side, *arguments) != 0:
            raise self._error()

    def _error(self) -> TransportError:
        return TransportError(self._loop.side_error().decode("utf-8", "replace"), operation="bench")
