"""Ranks as processes of their own, that meet over pipes of their parent."""

from __future__ import annotations

import importlib
import multiprocessing
import traceback
from typing import Any

from eptransport.conformance.registry import Skip, Violation
from eptransport.conformance.world import Spec, Subject, spec_of, subject_of
from eptransport.engine import Engine


def run(subject: Subject, body: str, ranks: int = 2, **settings: Any) -> list[Any]:
    """Runs the function `module:name` in `ranks` processes; each gets its connected engine. Returns what they
    return."""
    if not subject.across_processes:
        raise Skip(f"backend {subject.plugin.name} lives in one process")
    context = multiprocessing.get_context("spawn")
    limit_s = 2 * subject.ample_s
    pipes, children = [], []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            args = (theirs, rank, ranks, spec_of(subject), settings, body)
            child = context.Process(target=_child, args=args, daemon=True)
            child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
        addresses = [_receive(pipe, rank, "its address", limit_s) for rank, pipe in enumerate(pipes)]
        for pipe in pipes:
            pipe.send(addresses)
        results = [_receive(pipe, rank, "the end of its part", limit_s) for rank, pipe in enumerate(pipes)]
        for pipe in pipes:
            pipe.send("close")
        for rank, child in enumerate(children):
            child.join(limit_s)
            if child.exitcode != 0:
                raise Violation(f"the process of rank {rank} ended with {child.exitcode}")
        return results
    finally:
        for child in children:
            if child.is_alive():
                child.kill()


def _receive(pipe: Any, rank: int, what: str, limit_s: float) -> Any:
    if not pipe.poll(limit_s):
        raise Violation(f"rank {rank} did not send {what} in {limit_s:g} s")
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise Violation(f"the process of rank {rank} died before it sent {what}") from None
    if kind == "error":
        raise Violation(f"rank {rank}: {value}")
    return value


def _child(pipe: Any, rank: int, ranks: int, spec: Spec, settings: Any, body: str) -> None:
    subject = subject_of(spec)
    try:
        module, function = body.split(":")
        settings.setdefault("timeout_s", subject.ample_s)
        engine = Engine(
            subject.plugin,
            rank=rank,
            world_size=ranks,
            job="conformance",
            secret=b"the secret of a conformance run.",
            settings=subject.settings(**settings),
        )
        with engine:
            pipe.send(("ok", engine.address()))
            engine.connect(pipe.recv())
            engine.wait_connected(subject.ample_s)
            pipe.send(("ok", getattr(importlib.import_module(module), function)(engine)))
            pipe.recv()
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        raise
