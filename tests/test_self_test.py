# SPDX-License-Identifier: Apache-2.0
"""`eptransport doctor --listen` and `--peer`: two processes, as two users would start them."""

from __future__ import annotations

import json
from typing import Any

from doctors import pair

from eptransport.self_test import WRITES

SECRET = "a secret of the tests"


def test_both_directions_pass() -> None:
    for rank, (code, out, err) in enumerate(pair({}, {})):
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        assert found["passed"]
        assert (found["rank"], found["backend"]) == (rank, "tcp")
        assert [(each["source"], each["seen"]) for each in found["directions"]] == [(0, WRITES), (1, WRITES)]


def test_another_secret_is_refused_before_anything_is_said() -> None:
    for code, out, err in pair({"EPT_SECRET": SECRET}, {"EPT_SECRET": SECRET + "!"}):
        assert code == 1
        assert not out
        assert "error: " in err
        assert "connecting" not in err
    assert "another EPT_SECRET" in err


def test_a_secret_on_one_side_only() -> None:
    for code, _, err in pair({"EPT_SECRET": SECRET}, {}):
        assert code == 1
        assert "EPT_SECRET is set on one side only" in err


def test_two_backends() -> None:
    code, _, err = pair({}, {"EPT_BACKEND": "auto"})[1]
    assert code == 1
    assert "disagree on backend" in err
