"""An engine for a rank of a group, connected to all others; whoever fails tells the others why."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from eptransport import _record as record
from eptransport._bootstrap import Bootstrap
from eptransport._process import cores, host_id
from eptransport.backends import Choice
from eptransport.engine import Engine
from eptransport.errors import EptError, PeerLost, Timeout, TransportError
from eptransport.settings import Settings

if TYPE_CHECKING:
    from eptransport.group import Group

__all__ = ["ADDRESS", "addresses_of", "connect", "make_engine", "secret_of"]

ADDRESS = {"address": record.hexadecimal}

SLICE_S = 0.25
"""How often a rank that waits for connections looks whether another one has failed."""


def make_engine(group: Group, generation: int, choice: Choice, said: list[dict[str, Any]], life: int = 0) -> Engine:
    """Not connected yet. `said` is what the ranks said of themselves when the group was made."""
    local = [other["host"] for other in said].count(host_id())
    return Engine(
        choice.plugin,
        rank=group.rank,
        world_size=group.world_size,
        job=f"{group.name}/{generation}/{said[0]['group']}",
        secret=secret_of(group.settings, said),
        settings=group.settings,
        epoch=life,
        spin_s=_spin(group.settings, local),
    )


def connect(
    bootstrap: Bootstrap, choice: Choice, group: Group, said: list[dict[str, Any]]
) -> tuple[Engine, list[bytes]]:
    """The engine, and the addresses of all ranks."""
    try:
        engine = make_engine(group, bootstrap.generation, choice, said)
        address = engine.address()
    except EptError as error:
        bootstrap.say("address", None, error)
        raise
    try:
        addresses = addresses_of(bootstrap.exchange("address", {"address": address.hex()}, ADDRESS))
        _join(bootstrap, engine)
        try:
            engine.connect(addresses)
            _wait_connected(bootstrap, engine, group.settings.timeout_s)
        except EptError as error:
            # A rank that left because it failed has said why before: all raise that, whoever finds it gone.
            cause = bootstrap.cause_of_loss("connected") if isinstance(error, PeerLost) else None
            bootstrap.say("connected", None, cause or error)
            if cause is not None:
                raise cause from error
            raise
        bootstrap.exchange("connected", {}, {})
    except BaseException:
        engine.close(0)
        raise
    return engine, addresses


def addresses_of(said: list[dict[str, Any]]) -> list[bytes]:
    """Of the ranks' first lives."""
    return [bytes.fromhex(other["address"]) for other in said]


def _join(bootstrap: Bootstrap, engine: Engine) -> None:
    """The rounds of a backend that joins collectively; others are done at once."""
    blobs: list[bytes] | None = None
    round_number = 0
    while True:
        try:
            out, done = engine.join(blobs)
        except EptError as error:
            bootstrap.say(f"join{round_number}", None, error)
            raise
        if done:
            return
        said = bootstrap.exchange(f"join{round_number}", {"out": out.hex()}, {"out": record.hexadecimal})
        blobs = [bytes.fromhex(other["out"]) for other in said]
        round_number += 1


def _wait_connected(bootstrap: Bootstrap, engine: Engine, timeout_s: float) -> None:
    """Also ends when another rank gives up, which its connection alone may not tell."""
    remaining = timeout_s
    while True:
        try:
            engine.wait_connected(min(SLICE_S, remaining))
        except Timeout:
            remaining -= SLICE_S
            if remaining <= 0:
                raise
            bootstrap.errors("connected")
        else:
            return


def secret_of(settings: Settings, said: list[dict[str, Any]]) -> bytes:
    """The job's: the one given, or the one that rank 0 has made."""
    if settings.secret is None:
        made = bytes.fromhex(said[0]["made"] or "")
        if not made:
            raise TransportError("rank 0 has put no secret into the store", operation="set-up", peer=0)
        return made
    return hashlib.sha256(b"eptransport secret\0" + settings.secret.get_secret_value().encode()).digest()


def _spin(settings: Settings, local: int) -> float | None:
    """More ranks than cores: a rank that polls keeps the one it waits for from running."""
    if settings.spin_us is not None:
        return settings.spin_us / 1e6
    return 0.0 if local > cores() else None
