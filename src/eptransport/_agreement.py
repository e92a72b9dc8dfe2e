"""What the ranks of a group must agree on before they connect: settings, and a backend that each of them can use."""

from __future__ import annotations

import os
from typing import Any, Protocol

import eptransport
from eptransport import _record as record
from eptransport._process import host_id, process
from eptransport.backends import Candidate, Choice, candidates, unavailable, why
from eptransport.errors import EptError, MismatchError
from eptransport.settings import Settings

__all__ = ["HELLO", "agree", "compare", "first_words"]

SECRET_BYTES = 32


class Teller(Protocol):
    """Who can tell the others an error: a Bootstrap, for one."""

    def say(self, stage: str, content: dict[str, Any] | None, error: EptError | None = None) -> None: ...


def first_words(bootstrap: Teller, given: Settings | None, rank: int) -> tuple[Settings, dict[str, Any]]:
    """The settings, and what this rank tells the others about itself. An error is told too, so that none waits for
    it."""
    try:
        settings = given or Settings()
        looked = candidates(settings, one_process=True)
    except EptError as error:
        bootstrap.say("hello", None, error)
        raise
    secret = settings.secret
    return settings, {
        "version": eptransport.__version__,
        "process": process.token,
        "host": host_id(),
        "backend": "auto" if settings.backend == "auto" else looked[0].name,
        "looked": [(found.name, found.plugin.version if found.plugin else "", found.why_not) for found in looked],
        "secret": None if secret is None else "given",
        "made": os.urandom(SECRET_BYTES).hex() if rank == 0 and secret is None else None,
        "group": os.urandom(8).hex(),
    }


HELLO: record.Shape = {
    "version": record.a_text,
    "process": record.a_text,
    "host": record.a_text,
    "backend": record.a_text,
    "looked": record.a_list(record.a_tuple(record.a_text, record.a_text, record.optional(record.a_text))),
    "secret": record.optional(record.a_text),
    "made": record.optional(record.hexadecimal),
    "group": record.hexadecimal,
}
"""What `first_words` says."""

_MUST_AGREE = {
    "version": "install one version of eptransport everywhere",
    "backend": "set EPT_BACKEND alike",
    "secret": "set EPT_SECRET on every rank, or on none",
}


def compare(said: list[dict[str, Any]], name: str) -> None:
    for what, mend in _MUST_AGREE.items():
        first = said[0][what]
        for rank, other in enumerate(said):
            if other[what] != first:
                raise MismatchError(
                    f"ranks of group {name!r} disagree on {what}: rank 0 has {first or 'none'}, rank {rank} has "
                    f"{other[what] or 'none'}; {mend}",
                    operation="set-up",
                    peer=rank,
                )


def agree(settings: Settings, said: list[dict[str, Any]]) -> Choice:
    """The first backend that every rank can use. All ranks see the same words, so all come to the same answer."""
    one_process = all(other["process"] == said[0]["process"] for other in said)
    refused: list[Candidate] = []
    for found in candidates(settings, one_process=True):
        if settings.backend == "auto" and found.name == "loopback" and not one_process:
            continue
        why_not = _why_not_everywhere(found.name, said)
        if why_not is None and found.plugin is not None:
            return Choice(found.plugin, why(settings, refused), tuple(refused))
        refused.append(Candidate(found.name, found.plugin, found.summary, why_not))
    raise unavailable(settings, refused)


def _why_not_everywhere(name: str, said: list[dict[str, Any]]) -> str | None:
    versions = {}
    reasons: dict[str, list[int]] = {}
    for rank, other in enumerate(said):
        for found, version, why_not in other["looked"]:
            if found == name:
                versions[rank] = version
                if why_not is not None:
                    reasons.setdefault(why_not, []).append(rank)
    if len(reasons) == 1 and len(next(iter(reasons.values()))) == len(said):
        return next(iter(reasons))
    if reasons:
        return "; ".join(f"{why_not} (rank {', '.join(map(str, ranks))})" for why_not, ranks in reasons.items())
    if len(set(versions.values())) > 1:
        return f"ranks have other versions of the plugin: {versions}"
    return None
