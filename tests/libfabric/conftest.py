# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the backend libfabric: `libfabric` runs a test once for each release and provider that can start here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from libfabrics import Libfabric, cases

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / folder) for folder in ("processes", "moe", "reference")]


@pytest.fixture(params=cases())
def libfabric(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Libfabric, str]:
    """A release and a provider, in the environment of the child processes (`spawn`) that the test starts. The test's
    own process must not open the backend: it would hold one release for the tests of the other."""
    release: Libfabric
    release, provider = request.param
    monkeypatch.setenv("EPT_BACKEND", "libfabric")
    for name, value in release.environment(provider).items():
        monkeypatch.setenv(name, value)
    return release, provider
