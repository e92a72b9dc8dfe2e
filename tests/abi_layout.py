# SPDX-License-Identifier: Apache-2.0
"""The layout of every struct, the value of every enumerator and number, in the headers that plugins and peers share.

    python tests/abi_layout.py native/include > tests/native/abi_golden.txt

updates the golden file on purpose: within ABI 1 a field may be added at the end of a struct and an enumerator at the
end of an enum; anything else is another ABI, with another symbol (backend.h), or another EPT_WIRE_VERSION (wire.h).

The names are read from the headers themselves, so that nothing new is forgotten; sizes, offsets and values are the
compiler's, asked in C and in C++, which must agree.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HEADERS = ("backend.h", "wire.h")


def _bare(text: str) -> str:
    """The header without comments, directives and what only C++ sees."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    text = re.sub(r"#ifdef __cplusplus.*?#endif", " ", text, flags=re.DOTALL)
    return re.sub(r"^\s*#.*$", " ", text, flags=re.MULTILINE)


def _split(text: str, at: str) -> Iterator[str]:
    """The parts between `at`, but for those inside parentheses."""
    depth, part = 0, ""
    for char in text:
        depth += (char in "({") - (char in ")}")
        if char == at and depth == 0:
            yield part
            part = ""
        else:
            part += char
    if part.strip():
        yield part


def _fields(body: str) -> Iterator[tuple[str, str]]:
    """(name, declaration) of each field."""
    for declaration in _split(body, ";"):
        declaration = " ".join(declaration.split())
        if not declaration:
            continue
        pointer = re.search(r"\(\*(\w+)\)\(", declaration)
        if pointer:
            yield pointer[1], declaration
            continue
        declarators = list(_split(declaration, ","))
        kind = re.match(r"(.*?)[\s*]*\w+(\[\w+\])*$", declarators[0])
        assert kind, declaration
        for number, declarator in enumerate(declarators):
            name = re.search(r"(\w+)((?:\[\w+\])*)$", declarator.strip())
            assert name, declaration
            yield name[1], declarator.strip() if number == 0 else f"{kind[1]} {declarator.strip()}"


def _program(include: Path) -> str:
    """A program that prints the layout."""
    lines = ["#include <stddef.h>", "#include <stdio.h>"]
    lines += [f'#include "eptransport/{header}"' for header in HEADERS]
    lines += ["int main(void) {"]

    def say(text: str, *values: str) -> None:
        arguments = "".join(f", {value}" for value in values)
        lines.append(f'  printf("{text}\\n"{arguments});')

    for header in HEADERS:
        text = (include / "eptransport" / header).read_text()
        say(f"==== {header}")
        for name, value in re.findall(r"^#define (EPT_\w+)[ \t]+(\S.*)$", text, flags=re.MULTILINE):
            if not value.startswith("__"):
                say(f"number {name} %.17g", f"(double)({name})")
        bare = _bare(text)
        for name, body in re.findall(r"typedef enum (\w+)\s*{([^}]*)}", bare):
            say(f"enum {name}")
            for enumerator in body.split(","):
                if enumerator.strip():
                    word = enumerator.split("=")[0].strip()
                    say(f"  %lld {word}", f"(long long){word}")
        for name, body in re.findall(r"typedef struct (\w+)\s*{([^}]*)}", bare):
            say(f"struct {name} %zu", f"sizeof({name})")
            for field, declaration in _fields(body):
                quoted = declaration.replace("%", "%%").replace('"', '\\"')
                say(f"  %3zu %2zu {quoted}", f"offsetof({name}, {field})", f"sizeof((({name} *)0)->{field})")
    return "\n".join([*lines, "  return 0;", "}", ""])


def layout(include: Path) -> str:
    """The layout that the headers under `include` have, in the words of the golden file."""
    program = _program(include)
    answers = {}
    for suffix, compilers, standard in (("c", ("cc", "gcc"), "c11"), ("cc", ("c++", "g++"), "c++20")):
        compiler = next(filter(None, map(shutil.which, compilers)), None)
        assert compiler, f"one of {compilers} is needed"
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder) / f"layout.{suffix}", Path(folder) / "layout"
            source.write_text(program)
            flags = [f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{include}"]
            subprocess.run([compiler, *flags, "-o", str(binary), str(source)], check=True)
            answers[suffix] = subprocess.run([str(binary)], check=True, capture_output=True, text=True).stdout
    assert answers["c"] == answers["cc"], "C and C++ disagree about the layout"
    return answers["c"]


if __name__ == "__main__":
    sys.stdout.write(layout(Path(sys.argv[1])))
