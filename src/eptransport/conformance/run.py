"""Runs the checks on one backend, each in a process that it may end or hang without taking the rest with it.

    for outcome in run(find("tcp"), clause=3, seed=7):
        print(outcome.check, outcome.verdict, outcome.text)

A worker process makes one check after another and tells each result. When it dies or doesn't answer in time, that is
the verdict of the check it was at, and another worker goes on behind it.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Literal

from eptransport.backends import Plugin, candidates, registry
from eptransport.conformance.registry import Check, Skip, Violation, Waived, checks
from eptransport.conformance.world import PATIENCE_S, Spec, Subject, spec_of, subject, subject_of
from eptransport.errors import BackendUnavailable, InvalidArgument
from eptransport.settings import Settings

__all__ = ["LIMIT_S", "Outcome", "Verdict", "Worker", "find", "run", "run_subject", "subjects"]

LIMIT_S = 180.0
"""Of one check. The longest takes 20 s on two busy cores."""

Verdict = Literal["passed", "failed", "crashed", "hung", "skipped", "waived"]


@dataclass(frozen=True)
class Outcome:
    check: str
    """Its number: 03a."""
    clause: int
    name: str
    promise: str
    subject: str
    """The backend with the settings it was given."""
    verdict: Verdict
    text: str
    """What was seen, or why it says nothing."""
    seconds: float

    @property
    def broken(self) -> bool:
        return self.verdict in ("failed", "crashed", "hung")


def find(backend: str, options: Mapping[str, str] | None = None) -> Plugin:
    """The plugin of a name, or of a file. ConfigError, AbiError or BackendUnavailable where there is none that can run
    here with these settings of its own."""
    # Asked with these from the first: a process that has opened one libfabric gets nothing right of another.
    named = registry(()).plugins.get(backend)
    given = {} if named is None else {f"{named.name}.{name}": value for name, value in _checked(named, options).items()}
    found = candidates(Settings(backend=backend, options=given), one_process=True)[0]
    if found.plugin is None:
        raise BackendUnavailable(f"backend {backend}: {found.why_not}", operation="choose")
    report = found.plugin.probe(_complete(found.plugin, options))
    if not report.usable:
        raise BackendUnavailable(f"backend {backend}: {report.why_not}", operation="choose")
    return found.plugin


def _checked(plugin: Plugin, options: Mapping[str, str] | None) -> dict[str, str]:
    known = {setting.name: setting for setting in plugin.settings}
    for name, value in (options or {}).items():
        if name not in known:
            raise InvalidArgument(f"backend {plugin.name} has no setting {name}; it has {', '.join(known) or 'none'}")
        refusal = known[name].refuse(value)
        if refusal is not None:
            raise InvalidArgument(f"setting {name} of backend {plugin.name}: {refusal}")
    return dict(options or {})


def _complete(plugin: Plugin, options: Mapping[str, str] | None) -> dict[str, str]:
    """With those of the environment beneath. Else the checks would run over what it names (EPT_LIBFABRIC_PROVIDER) by
    the waivers of something else."""
    given = {f"{plugin.name}.{name}": value for name, value in _checked(plugin, options).items()}
    backend = plugin.name if plugin.source == "built in" else plugin.path
    return Settings(backend=backend, options=given).backend_options(plugin)


def subjects(
    plugin: Plugin, seed: int, options: Mapping[str, str] | None = None, patience_s: float = PATIENCE_S
) -> tuple[Subject, ...]:
    """The backend as it is and, where it can misbehave on purpose, with that on. `options` are on top of those that the
    environment has for it (EPT_<BACKEND>_...)."""
    chosen = _complete(plugin, options)
    found = [subject(plugin, chosen, seed)]
    if "adversary" not in chosen and any(setting.name == "adversary" for setting in plugin.settings):
        found.append(subject(plugin, {**chosen, "adversary": str(seed)}, seed))
    return tuple(replace(each, patience_s=patience_s) for each in found)


def run(
    plugin: Plugin,
    clause: int | None = None,
    seed: int = 1,
    options: Mapping[str, str] | None = None,
    limit_s: float = LIMIT_S,
    try_waived: bool = False,
    patience_s: float = PATIENCE_S,
) -> Iterator[Outcome]:
    """The outcome of each check as it comes. Blocks; a check that doesn't end within `limit_s` is `hung`. `try_waived`
    makes the checks of waived clauses too: `passed` where they hold, else `waived` with what was seen. `patience_s`:
    how long a check waits for what must happen, and half of what its processes may take to start."""
    wanted = checks(clause)
    if not wanted:
        known = sorted({check.clause for check in checks()})
        raise InvalidArgument(f"clause {clause} has no check; there are clauses {', '.join(map(str, known))}")
    for under in subjects(plugin, seed, options, patience_s):
        yield from run_subject(under, wanted, limit_s, try_waived)


def run_subject(
    under: Subject, wanted: Sequence[Check], limit_s: float = LIMIT_S, try_waived: bool = False
) -> Iterator[Outcome]:
    """These checks on one subject, in this order."""
    worker: Worker | None = None
    try:
        for check in wanted:
            worker = worker or Worker(under)
            begun = time.monotonic()
            verdict, text = worker.ask(check, limit_s if check.limit_s is None else check.limit_s, try_waived)
            yield Outcome(
                check.number,
                check.clause,
                check.name,
                check.promise,
                under.label,
                verdict,
                text,
                time.monotonic() - begun,
            )
            if verdict in ("crashed", "hung"):
                worker.end()
                worker = None
    finally:
        if worker is not None:
            worker.end()


class Worker:
    """A process that makes checks on one subject. Started afresh, so that nothing of the caller's is in it."""

    def __init__(self, under: Subject) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_work, args=(theirs, spec_of(under)))
        self._process.start()
        theirs.close()
        self._hung = False

    def ask(self, check: Check, limit_s: float, try_waived: bool) -> tuple[Verdict, str]:
        try:
            self._pipe.send((check.number, try_waived))
            if not self._pipe.poll(limit_s):
                self._hung = True
                return "hung", f"it did not end within {limit_s:g} s"
            verdict, text = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return "crashed", f"the process ended: {_how(self._process.exitcode)}"
        return verdict, text

    def end(self) -> None:
        self._pipe.close()
        self._process.join(0 if self._hung else 5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def _work(pipe: Connection, spec: Spec) -> None:
    logging.getLogger("eptransport").addHandler(logging.NullHandler())  # what a check provokes is not the user's news
    under = subject_of(spec)
    by_number = {check.number: check for check in checks()}
    while True:
        try:
            number, try_waived = pipe.recv()
        except EOFError:
            return
        pipe.send(_make(by_number[number], under, try_waived))


def _make(check: Check, under: Subject, try_waived: bool) -> tuple[Verdict, str]:
    try:
        check.run(under, try_waived)
    except Waived as reason:
        return "waived", str(reason)
    except Skip as reason:
        return "skipped", str(reason)
    except Violation as violation:
        return "failed", str(violation)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
    return "passed", ""
