# SPDX-License-Identifier: Apache-2.0
"""Settings that are wrong: a typed error whose sentence names the setting, what it saw, and what there is instead. Each
is given as its user gives it, by the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from libfabrics import Libfabric, built, cases

import eptransport as ept
from eptransport.errors import BackendUnavailable, ConfigError, EptError

Spawn = Callable[..., list[Any]]


@dataclass(frozen=True)
class Wrong:
    given: dict[str, str]
    """EPT_LIBFABRIC_..., without that."""
    error: type[EptError]
    words: tuple[str, ...]


def wrong(error: type[EptError], *words: str, **given: str) -> Wrong:
    return Wrong(given, error, words)


ANYWHERE = {
    "a name that is none": wrong(
        ConfigError, "EPT_LIBFABRIC_PROVIDR", "did you mean EPT_LIBFABRIC_PROVIDER", PROVIDR="tcp"
    ),
    "another": wrong(ConfigError, "EPT_LIBFABRIC_RAIL in", "did you mean EPT_LIBFABRIC_RAILS", RAIL="2"),
    "too many rails": wrong(ConfigError, "EPT_LIBFABRIC_RAILS='33'", "from 0 to 32", RAILS="33"),
    "rails below none": wrong(ConfigError, "EPT_LIBFABRIC_RAILS='-1'", "from 0 to 32", RAILS="-1"),
    "rails in words": wrong(ConfigError, "EPT_LIBFABRIC_RAILS='two'", "whole number", RAILS="two"),
    "no rails at all": wrong(ConfigError, "EPT_LIBFABRIC_RAILS=''", "whole number", RAILS=""),
    "a short message": wrong(ConfigError, "EPT_LIBFABRIC_MAX_MESSAGE='4095'", "from 4096", MAX_MESSAGE="4095"),
    "no regions": wrong(ConfigError, "EPT_LIBFABRIC_MAX_REGIONS='0'", "from 1", MAX_REGIONS="0"),
    "a queue past any": wrong(ConfigError, "EPT_LIBFABRIC_CQ_DEPTH='4194305'", "to 4194304", CQ_DEPTH="4194305"),
    "too many in flight": wrong(ConfigError, "EPT_LIBFABRIC_TX_DEPTH='65537'", "to 65536", TX_DEPTH="65537"),
    "a flag that is neither": wrong(ConfigError, "EPT_LIBFABRIC_UNPROVEN='yes'", "0 or 1", UNPROVEN="yes"),
    "no such completion": wrong(ConfigError, "completion is 'maybe'", "auto, transmit or delivery", COMPLETION="maybe"),
    "no such answer": wrong(ConfigError, "gpu is 'yes'", "auto, 0 or 1", GPU="yes"),
    "a library that is not there": wrong(
        BackendUnavailable,
        "/nowhere/libfabric.so.1",
        "No such file",
        "install libfabric",
        LIBRARY="/nowhere/libfabric.so.1",
    ),
    "a library that is no library": wrong(BackendUnavailable, __file__, "install libfabric", LIBRARY=__file__),
    "a library that is another": wrong(
        BackendUnavailable, "libm.so.6", "has no fi_getinfo", "EPT_LIBFABRIC_LIBRARY", LIBRARY="libm.so.6"
    ),
}
"""What needs no libfabric."""

WITH_A_LIBRARY = {
    "a slip of the pen": wrong(
        ConfigError, "no provider 'tpc'", "did you mean tcp?", "this library has", "shm", PROVIDER="tpc"
    ),
    "no such layer": wrong(
        ConfigError, "no provider 'udp;ofi_rdx'", "did you mean udp;ofi_rxd?", PROVIDER="udp;ofi_rdx"
    ),
    "no such card": wrong(
        BackendUnavailable, "efa", "this library has", "tcp", "eptransport doctor", PROVIDER="efa", INTERFACE=""
    ),
    "no such interface": wrong(
        ConfigError, "no domain 'eth99'", "it has", "EPT_LIBFABRIC_INTERFACE", PROVIDER="tcp", INTERFACE="eth99"
    ),
    "one of two interfaces": wrong(ConfigError, "no domain 'eth99'", "it has", PROVIDER="tcp", INTERFACE="lo,eth99"),
    "not seen to hold": wrong(BackendUnavailable, "sockets", "EPT_LIBFABRIC_UNPROVEN=1", PROVIDER="sockets"),
    "no seed": wrong(ConfigError, "strict starts with a seed", "EPT_LIBFABRIC_STRICT", PROVIDER="tcp", STRICT="x"),
    "no such fault": wrong(
        ConfigError, "does not understand", "error=nonsense@1", PROVIDER="tcp", STRICT="1:error=nonsense@1"
    ),
}


def refusals(_rank: int, _n: int, _folder: Path, wanted: list[Wrong], library: str) -> list[str]:
    """What is not as it should be, a sentence each."""
    faults = []
    for each in wanted:
        given = {f"EPT_LIBFABRIC_{name}": value for name, value in each.given.items()}
        given = {"EPT_BACKEND": "libfabric", **({"EPT_LIBFABRIC_LIBRARY": library} if library else {}), **given}
        os.environ.update(given)
        try:
            chosen = ept.choose(ept.Settings(), 2)
            faults.append(f"{each.given}: nothing was refused: {chosen}")
        except EptError as error:
            if type(error) is not each.error or not all(word in str(error) for word in each.words):
                faults.append(
                    f"{each.given}: {type(error).__name__}: {error}; due was {each.error.__name__} {each.words}"
                )
        for name in given:
            del os.environ[name]
    return faults


@pytest.mark.skipif(not built(), reason="this package was built without the backend libfabric")
def test_wrong_settings_are_refused(spawn: Spawn) -> None:
    assert spawn(1, refusals, list(ANYWHERE.values()), "") == [[]]


@pytest.mark.parametrize("case", cases("tcp"))
def test_what_this_library_has_not_is_refused(case: tuple[Libfabric, str], spawn: Spawn) -> None:
    release, _ = case
    has_a_card = not release.providers["efa"]
    wanted = [each for each in WITH_A_LIBRARY.values() if not (has_a_card and each.given["PROVIDER"] == "efa")]
    assert spawn(1, refusals, wanted, release.library) == [[]]
