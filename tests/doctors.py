# SPDX-License-Identifier: Apache-2.0
"""Two doctors that test their network, as two users would start them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

__all__ = ["pair"]

LIMIT_S = 240


def pair(listener: dict[str, str], dialler: dict[str, str]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of who listened and of who dialled; what stands in their environments, over tcp if
    they don't say."""
    first = _start("--listen", "127.0.0.1:0", **listener)
    try:
        assert first.stderr is not None
        said = first.stderr.readline()
        port = re.search(r"listening on port (\d+)", said)
        assert port, said + first.stderr.read()
        second = _start("--peer", f"127.0.0.1:{port[1]}", **dialler)
        try:
            outputs = [each.communicate(timeout=LIMIT_S) for each in (first, second)]
            codes = (first.returncode, second.returncode)
            return [(code, *output) for code, output in zip(codes, outputs, strict=True)]
        finally:
            second.kill()
    finally:
        first.kill()


def _start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "eptransport", "doctor", "--json", "--deadline", "60", *arguments]
    env = {**os.environ, "EPT_BACKEND": "tcp", **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
