# SPDX-License-Identifier: Apache-2.0
"""`doctor --peer` over each provider that starts here, in both releases; and over one whose firewall is one-sided."""

from __future__ import annotations

import json

import pytest
from doctors import pair
from libfabrics import Libfabric, cases

from eptransport.self_test import WRITES


@pytest.mark.parametrize("case", cases())
def test_both_directions_pass(case: tuple[Libfabric, str]) -> None:
    release, provider = case
    environment = {"EPT_BACKEND": "libfabric", **release.environment(provider)}
    for code, out, err in pair(environment, environment):
        assert code == 0, err
        found = json.loads(out)
        assert found["backend"] == "libfabric"
        assert [each["seen"] for each in found["directions"]] == [WRITES, WRITES]
