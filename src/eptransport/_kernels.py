# SPDX-License-Identifier: Apache-2.0
"""GPU kernels that are compiled at run time (`EPT_GPU_COMPILE`), by NVRTC of CUDA 12.9 (the extra
`eptransport[nvrtc]`), and the cache on disk that keeps them.

The package has machine code for sm_80, sm_90 and sm_100, and PTX that the driver compiles for what comes later. So
this is for GPUs that the package has no code for, packages that were built without a compiler, and kernels for one
shape.

The cache. A file a key, which is a hash of all that what is compiled follows from: every source and header, the
target, the options, the compiler's release. A file holds a hash of its bytes: what was cut short, or changed, is
refused and made again. It is written beside its place and moved there, so that no reader sees a part of it. Who
compiles holds a lock of the key: ranks that start together compile once, and a lock of a process that has died is
nobody's. Code is run from there, so a folder that others may write into is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eptransport import _compile
from eptransport._call import call, ffi, lib
from eptransport._convert import dtype_of
from eptransport._moe_config import plan_of
from eptransport.errors import BackendUnavailable, ConfigError

if TYPE_CHECKING:
    import torch

    from eptransport.settings import Settings

__all__ = ["Cache", "add_missing", "cache_of", "fixed", "for_shape", "key_of", "sources"]

logger = logging.getLogger("eptransport")

MAGIC = b"EPTKERN1"
HASH_BYTES = 32
MOST_BYTES = 256 << 20
"""Of an image; ours have two million. What is longer is none of ours, and isn't read."""


class Cache:
    """Images by key, in a folder that only this user writes. `folder` None: nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str, make: Callable[[], bytes]) -> bytes:
        """What is kept under the key, else what `make` gives, which is kept. Blocks while another process makes it."""
        if self.folder is None:
            return make()
        place = self.folder / f"{key}.cubin"
        kept = self._read(place)
        if kept is not None:
            return kept
        with self._locked(key):
            kept = self._read(place)  # made by who had the lock before
            if kept is None:
                kept = make()
                self._write(place, kept)
        return kept

    def _read(self, place: Path) -> bytes | None:
        try:
            with place.open("rb") as file:
                if os.fstat(file.fileno()).st_size > MOST_BYTES:
                    raise ValueError("it is too long")
                data = file.read()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as problem:
            logger.warning("kernels kept at %s can't be read and are compiled again: %s", place, problem)
            return None
        head = len(MAGIC) + HASH_BYTES
        image = data[head:]
        if data[: len(MAGIC)] == MAGIC and data[len(MAGIC) : head] == hashlib.sha256(image).digest() and image:
            return image
        logger.warning("kernels kept at %s are damaged (%d bytes) and are compiled again", place, len(data))
        return None

    def _write(self, place: Path, image: bytes) -> None:
        try:
            descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=".new-")
        except OSError as problem:
            logger.warning("compiled kernels can't be kept at %s: %s", place, problem)
            return
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(MAGIC + hashlib.sha256(image).digest() + image)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, place)
        except OSError as problem:
            logger.warning("compiled kernels can't be kept at %s: %s", place, problem)
            Path(name).unlink(missing_ok=True)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        assert self.folder is not None
        try:
            descriptor = os.open(self.folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:  # a full disk: each rank compiles for itself
            yield
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as problem:  # a file system without locks
                logger.info("no lock in %s: %s", self.folder, problem)
            yield
        finally:
            os.close(descriptor)


def cache_of(given: str | None) -> Cache:
    """The folder that the settings name, which must do; else $XDG_CACHE_HOME/eptransport/kernels or the one under
    ~/.cache, if that does."""
    if given is not None:
        folder = Path(given)
        if not folder.is_absolute():
            raise ConfigError(f"EPT_GPU_CACHE={given}: an absolute path is wanted")
        why = _unfit(folder)
        if why:
            raise ConfigError(f"EPT_GPU_CACHE={given}: {why}")
        return Cache(folder)
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # no home
        return Cache(None)
    folder = root / "eptransport" / "kernels"
    why = _unfit(folder)
    if why:
        logger.info("compiled kernels are not kept: %s", why)
        return Cache(None)
    return Cache(folder)


def _unfit(folder: Path) -> str:
    """Why nothing may be kept in a folder, which is made if it isn't there; empty: it may."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as problem:
        return f"{folder} can't be made: {problem.strerror or problem}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is no folder"
    if found.st_uid != os.geteuid():
        return (
            f"{folder} belongs to user {found.st_uid}, and this process is of {os.geteuid()}: code would be run from it"
        )
    if found.st_mode & 0o022:
        return f"others may write into {folder} (mode {stat.S_IMODE(found.st_mode):o}): code would be run from it"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} can't be written into"
    return ""


def sources() -> tuple[Path, list[str]]:
    """moe.cu as it is in the package, and the folders of what it includes."""
    package = Path(__file__).parent
    return package / "kernels" / "moe" / "cuda" / "moe.cu", [str(package / "include"), str(package / "kernels")]


def key_of(compiler: str, target: str, options: tuple[str, ...], folders: list[str], source: Path) -> str:
    """Of everything that the image follows from."""
    digest = hashlib.sha256()

    def add(*parts: str | bytes) -> None:
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)

    add(compiler, target, *_compile.FLAGS, "options", *options)
    for name, text in _compile.HEADERS.items():
        add(name, text)
    add(source.name, source.read_bytes())
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu"):
                add(str(path.relative_to(folder)), path.read_bytes())
    return digest.hexdigest()


def add_missing(settings: Settings, device: torch.device) -> None:
    """Before a GPU is first used: compiles for it where the library has no machine code for it. Without NVRTC, and
    where it doesn't know the GPU, the driver compiles PTX, as it would have."""
    if settings.gpu_compile == "off":
        return
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    if lib.ept_gpu_has_code(capability):
        return
    try:
        image = _compiled(settings, f"sm_{capability}", ())
    except _compile.Unavailable:
        logger.info(
            "no machine code for GPUs of capability %d.%d is in this package; pip install 'eptransport[nvrtc]' to have "
            "it compiled",
            major,
            minor,
        )
        return
    except _compile.Refused as problem:
        logger.warning("kernels for GPUs of capability %d.%d were not compiled: %s", major, minor, problem)
        return
    call(lib.ept_gpu_image_add, capability, ffi.from_buffer(image), len(image))


def for_shape(settings: Settings, device: torch.device, config: Any) -> bytes | None:
    """The kernels for one shape alone, where the settings ask for them."""
    if settings.gpu_compile != "shape":
        return None
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    try:
        return _compiled(settings, f"sm_{major}{minor}", fixed(config))
    except (_compile.Unavailable, _compile.Refused) as problem:
        raise BackendUnavailable(
            f"EPT_GPU_COMPILE=shape: the kernels can't be compiled here: {problem}. pip install 'eptransport[nvrtc]'"
        ) from None


def fixed(config: Any) -> tuple[str, ...]:
    """The options that fix a shape (args.h): all or none of them are given."""
    payload = dtype_of(config.dispatch_dtype)
    columns = config.hidden // 2 if "x2" in str(payload) else config.hidden
    numbers = {
        "WORLD": config.world,
        "TOP_K": config.top_k,
        "LOCAL": plan_of(config).local_experts,
        "HIDDEN": config.hidden,
        "PAYLOAD": columns * payload.itemsize,
    }
    return tuple(f"-DEPT_FIXED_{name}={value}" for name, value in numbers.items())


def _compiled(settings: Settings, target: str, options: tuple[str, ...]) -> bytes:
    compiler = _nvrtc(settings)
    source, folders = sources()
    key = key_of(compiler.release, target, options, folders, source)
    return cache_of(settings.gpu_cache).get(key, lambda: _make(compiler, source, target, folders, options))


def _make(compiler: _compile.Nvrtc, source: Path, target: str, folders: list[str], options: tuple[str, ...]) -> bytes:
    logger.info("compiles GPU kernels for %s %s by %s", target, " ".join(options), compiler.name)
    return compiler.compile(source, target, folders, options)


def _nvrtc(settings: Settings) -> _compile.Nvrtc:
    found = []
    given = settings.gpu_nvrtc
    for path in _compile.wheel_paths() if given is None else [Path(given)]:
        try:
            return _compile.Nvrtc(path)
        except (_compile.Unavailable, OSError) as problem:
            found.append(str(problem))
    raise _compile.Unavailable("; ".join(found) or "no NVRTC was found (nvidia-cuda-nvrtc-cu12)")
