"""The numbered list of checks. A check is a function of a Subject (a backend with its settings) that returns, raises
Violation, or raises Skip with the reason why it can't say anything here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eptransport.conformance.world import Subject

WAIVABLE = (9, 10, 11, 12)


class Violation(AssertionError):
    """A backend, or the engine over it, broke its contract: the sentence says what was seen."""


class Skip(Exception):
    """This check says nothing about this subject, and why."""


class Waived(Skip):
    """The backend says that it does not keep this clause, and why; only some may be waived."""


@dataclass(frozen=True)
class Check:
    clause: int
    letter: str
    name: str
    """In words, with dashes."""
    promise: str
    """The sentence that is checked."""
    body: Callable[[Subject], None]
    only_hostile: bool
    limit_s: float | None = None
    """Of this check, where it isn't that of the run."""

    @property
    def number(self) -> str:
        return f"{self.clause:02d}{self.letter}"

    def run(self, subject: Subject, try_waived: bool = False) -> None:
        """`try_waived`: whether a check of a waived clause is made all the same. If it holds, it holds; if not, what
        was seen is the reason of the waiver."""
        probe = subject.plugin.probe(subject.options)
        waived = self.clause in probe.waived and self.clause in WAIVABLE
        if waived and not try_waived:
            raise Waived(f"WAIVED by {subject.plugin.name}: {probe.waived_why}")
        if self.only_hostile and not subject.hostile:
            raise Skip("needs a backend that shows reordering when asked to (an adversary)")
        try:
            self.body(subject)
        except Skip:
            raise
        except Exception as seen:
            if not waived:
                raise
            raise Waived(f"WAIVED by {subject.plugin.name}, and seen: {seen}") from seen


_checks: list[Check] = []


def check(
    clause: int, *, only_hostile: bool = False
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Registers a function as the next check of `clause`. Its name is the check's, its docstring the promise."""

    def register(body: Callable[[Subject], None]) -> Callable[[Subject], None]:
        letter = "abcdefghijklmnopqrstuvwxyz"[sum(other.clause == clause for other in _checks)]
        promise = " ".join((body.__doc__ or "").split())
        name = body.__name__.replace("_", "-")
        _checks.append(Check(clause, letter, name, promise, body, only_hostile))
        return body

    return register


def checks(clause: int | None = None) -> tuple[Check, ...]:
    """All checks in order, or those of one clause."""
    return tuple(sorted((found for found in _checks if clause in (None, found.clause)), key=lambda found: found.number))


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise Violation(sentence)
