# SPDX-License-Identifier: Apache-2.0
"""What the installed package shows to plugins and to peers: layouts, symbols, headers that suffice by themselves."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eptransport as ept

sys.path.insert(0, str(Path(__file__).parent))

from abi_layout import HEADERS, layout

TESTS = Path(__file__).parent
PACKAGE = Path(ept.__file__).parent
HEADERS_AT = Path(ept.include_dir())
GOLDEN = TESTS / "native" / "abi_golden.txt"
OUT_OF_TREE = ("minimal", "group_only", "mapped")


def exported(library: Path) -> set[str]:
    """The symbols that a library defines for others."""
    nm = shutil.which("nm")
    assert nm, "nm of binutils is needed"
    done = subprocess.run([nm, "-D", "--defined-only", str(library)], check=True, capture_output=True, text=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}


def declared(header: str) -> set[str]:
    """The functions that a header declares."""
    text = re.sub(r"/\*.*?\*/", " ", (HEADERS_AT / "eptransport" / header).read_text(), flags=re.DOTALL)
    text = re.sub(r"{[^{}]*}", "{}", text)
    return set(re.findall(r"\b(ept_\w+)\([^;{]*\);", text))


def test_layouts_are_those_of_the_golden_file() -> None:
    golden = GOLDEN.read_text().splitlines()
    now = layout(HEADERS_AT).splitlines()
    difference = "\n".join(difflib.unified_diff(golden, now, GOLDEN.name, "the installed headers", lineterm="", n=2))
    assert not difference, (
        "the ABI or the wire format has changed. If that is on purpose (tests/abi_layout.py says what is allowed):\n"
        f"    python tests/abi_layout.py native/include > tests/native/{GOLDEN.name}\n{difference}"
    )


@pytest.mark.parametrize("header", HEADERS)
def test_the_golden_file_forgets_no_struct_and_no_enum(header: str) -> None:
    text = (HEADERS_AT / "eptransport" / header).read_text()
    golden = GOLDEN.read_text()
    named = re.findall(r"^typedef (struct|enum) (\w+) *{", text, flags=re.MULTILINE)
    assert len(named) > 5
    for kind, name in named:
        assert re.search(rf"^{kind} {name}\b", golden, flags=re.MULTILINE), f"{kind} {name} of {header}"
    enumerators = re.findall(r"^  (EPT_\w+) = ", text, flags=re.MULTILINE)
    for name in enumerators:
        assert re.search(rf"^ +-?\d+ {name}$", golden, flags=re.MULTILINE), name


def test_a_changed_field_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(HEADERS_AT, tmp_path / "include")
    backend = tmp_path / "include" / "eptransport" / "backend.h"
    text = backend.read_text()
    golden = layout(HEADERS_AT)
    for old, new in (
        ("uint64_t cookie; ", "uint32_t cookie; "),
        ("EPT_E_LIMIT = -5", "EPT_E_LIMIT = -55"),
        ("uint32_t rank, world;", "uint32_t world, rank;"),
        ("(*region_drop)(ept_region *region)", "(*region_drop)(const ept_region *region)"),
    ):
        assert old in text
        backend.write_text(text.replace(old, new, 1))
        assert layout(tmp_path / "include") != golden, old


@pytest.mark.parametrize("name", ["loopback", "tcp"])
def test_a_plugin_exports_its_table_and_nothing_else(name: str) -> None:
    assert exported(PACKAGE / "plugins" / f"ept_{name}.so") == {"ept_backend_v1"}


@pytest.mark.parametrize("name", ["loopback", "tcp"])
def test_a_plugin_needs_nothing_of_ours(name: str) -> None:
    readelf = shutil.which("readelf")
    assert readelf, "readelf of binutils is needed"
    library = PACKAGE / "plugins" / f"ept_{name}.so"
    done = subprocess.run([readelf, "-d", str(library)], check=True, capture_output=True, text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout)
    assert needed
    assert not [each for each in needed if "eptransport" in each], needed
    undefined = subprocess.run(["nm", "-D", "-u", str(library)], check=True, capture_output=True, text=True).stdout
    assert "ept_" not in undefined


def test_the_library_exports_what_its_header_declares() -> None:
    functions = declared("eptransport.h") | declared("gpu.h")
    assert {"ept_version", "ept_engine_create", "ept_moe_create", "ept_gpu_moe_create"} <= functions
    assert exported(PACKAGE / "libeptransport.so") == functions


@pytest.mark.parametrize("header", ["backend.h", "wire.h", "eptransport.h", "gpu.h"])
@pytest.mark.parametrize(("suffix", "compiler", "standard"), [("c", "cc", "c11"), ("cc", "c++", "c++17")])
def test_a_header_compiles_by_itself(tmp_path: Path, header: str, suffix: str, compiler: str, standard: str) -> None:
    source = tmp_path / f"alone.{suffix}"
    source.write_text(f"#include <eptransport/{header}>\nint main(void) {{ return 0; }}\n")
    flags = [f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{HEADERS_AT}"]
    subprocess.run([compiler, *flags, str(source)], check=True)


@pytest.mark.parametrize("name", OUT_OF_TREE)
def test_an_out_of_tree_plugin_works_through_its_table(out_of_tree: Path, name: str) -> None:
    plugin = out_of_tree / f"ept_{name}.so"
    assert exported(plugin) == {"ept_backend_v1"}
    command = [str(out_of_tree / f"drive_{name}"), str(plugin)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_out_of_tree_plugin_carries_a_group(out_of_tree: Path) -> None:
    """The engine takes it by its path, like any other: a transfer and its signal."""
    settings = ept.Settings(backend=str(out_of_tree / "ept_minimal.so"), timeout_s=30.0)
    groups = ept.loopback_groups(2, settings)
    try:
        assert [group.backend for group in groups] == ["minimal", "minimal"]
        source, target = bytearray(b"through a stranger's network"), bytearray(28)
        sender, receiver = groups[0].engine, groups[1].engine
        signal = receiver.signal(0, "stranger")
        memory = receiver.register(target)
        region = sender.peer(1).import_region(memory.export(0))
        raised = sender.peer(1).import_signal(signal.export())
        sender.peer(1).write(sender.register(source), region, len(source), signal=raised).wait(10.0)
        signal.wait(1, 10.0)
        assert target == source
    finally:
        for group in groups:
            group.close()
