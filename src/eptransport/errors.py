"""One tree of errors, and the one map from the native library's codes to it."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

__all__ = [
    "AccessDenied",
    "AuthError",
    "BackendUnavailable",
    "CapacityError",
    "ClosedError",
    "Code",
    "ConfigError",
    "EptError",
    "InternalError",
    "InvalidArgument",
    "LaneFault",
    "LimitError",
    "Masked",
    "MismatchError",
    "OutOfMemory",
    "PeerLost",
    "StuckError",
    "Suspended",
    "Timeout",
    "TransportError",
    "UnsupportedError",
    "VersionError",
    "error_class",
]


class Code(IntEnum):
    """The values of `ept_code` in backend.h."""

    OK = 0
    LATER = 1
    INVALID = -1
    CONFIG = -2
    UNAVAILABLE = -3
    UNSUPPORTED = -4
    LIMIT = -5
    NOMEM = -6
    IO = -7
    TIMEOUT = -8
    PEER_LOST = -9
    ACCESS = -10
    AUTH = -11
    VERSION = -12
    MISMATCH = -13
    CLOSED = -14
    STUCK = -15
    FAULT = -16
    CAPACITY = -17
    INTERNAL = -18
    SUSPENDED = -19


class EptError(Exception):
    """Every error of eptransport. The message says what, where, what was seen and what to do; the fields say it again.

    `operation` is the call or the phase ("write", "dispatch_recv"), `peer` the rank concerned (None: no one rank),
    `provider_errno` the network's or the system's own number (0: none). An expired wait also has `expected` and `seen`,
    the counts it waited for and saw, `silent_s`, how long ago the peer last made progress, and `why_stuck`, the report
    of the whole engine at that time (empty where nothing was waited for).
    """

    default_code = Code.INTERNAL

    def __init__(
        self,
        message: str = "",
        *,
        code: int | None = None,
        operation: str = "",
        peer: int | None = None,
        provider_errno: int = 0,
        expected: int | None = None,
        seen: int | None = None,
        silent_s: float | None = None,
        why_stuck: str = "",
    ) -> None:
        super().__init__(message)
        self.code = self.default_code if code is None else code
        self.operation = operation
        self.peer = peer
        self.provider_errno = provider_errno
        self.expected = expected
        self.seen = seen
        self.silent_s = silent_s
        self.why_stuck = why_stuck

    @property
    def message(self) -> str:
        """The sentence by itself."""
        return str(self.args[0]) if self.args else ""

    def fields(self) -> dict[str, Any]:
        """What beside the sentence makes the error: keyword arguments of its class."""
        return {
            "code": int(self.code),
            "operation": self.operation,
            "peer": self.peer,
            "provider_errno": self.provider_errno,
            "expected": self.expected,
            "seen": self.seen,
            "silent_s": self.silent_s,
            "why_stuck": self.why_stuck,
        }

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.fields())


class InvalidArgument(EptError, ValueError):
    """An argument is wrong; the message names it and its value. Nothing was done."""

    default_code = Code.INVALID


class ConfigError(EptError):
    """A setting is unknown, or its value is."""

    default_code = Code.CONFIG


class BackendUnavailable(EptError):
    """The backend can't run here; the message names the missing piece and how to get it."""

    default_code = Code.UNAVAILABLE


class UnsupportedError(EptError):
    """Can't be done at all: by this backend, on this device, or for this kind of tensor."""

    default_code = Code.UNSUPPORTED


class LimitError(EptError):
    """Past a limit, which the message names."""

    default_code = Code.LIMIT


class OutOfMemory(EptError):
    """The machine refused memory, descriptors or pages to lock."""

    default_code = Code.NOMEM


class TransportError(EptError, OSError):
    """The network or the system said no; `provider_errno` has its number."""

    default_code = Code.IO

    # OSError builds its arguments in __new__ and would take two strings for an errno; only the sentence may reach it.
    def __new__(cls, message: str = "", **_: Any) -> TransportError:
        return super().__new__(cls, message)


class Timeout(EptError, TimeoutError):
    """A deadline passed: who waited for whom, for which count, and what was seen."""

    default_code = Code.TIMEOUT

    def __new__(cls, message: str = "", **_: Any) -> Timeout:
        return super().__new__(cls, message)


class PeerLost(EptError, ConnectionError):
    """The peer is dead, has closed, or was never reached."""

    default_code = Code.PEER_LOST

    def __new__(cls, message: str = "", **_: Any) -> PeerLost:
        return super().__new__(cls, message)


class Masked(PeerLost):
    """The other ranks have masked this one: they go on without it, and nothing that it sends changes anything. The
    message has who asked for it and why. `group.rejoin()` brings it back."""


class AccessDenied(EptError):
    """A key, a bound or a right was refused at the target; nothing was written there."""

    default_code = Code.ACCESS


class AuthError(EptError):
    """The peer doesn't hold the job's secret."""

    default_code = Code.AUTH


class VersionError(EptError):
    """The peer, a blob or a plugin speaks another version."""

    default_code = Code.VERSION


class MismatchError(EptError):
    """Ranks disagree on a setting; the message has both values."""

    default_code = Code.MISMATCH


class ClosedError(EptError):
    """The object was closed."""

    default_code = Code.CLOSED


class StuckError(EptError):
    """Quiesce can't be shown; the message names the smallest thing to tear down."""

    default_code = Code.STUCK


class LaneFault(EptError):
    """A lane of an AllToAll is faulted; the message has the first cause. `reset()` recovers it."""

    default_code = Code.FAULT


class CapacityError(EptError):
    """More rows or tokens than a buffer holds; nothing was dropped and nothing was written outside."""

    default_code = Code.CAPACITY


class Suspended(EptError):
    """The group gave its memory back (`suspend`); `resume` it on every rank. Nothing was done."""

    default_code = Code.SUSPENDED


class InternalError(EptError):
    """A bug of eptransport; the message says where."""

    default_code = Code.INTERNAL


def error_class(code: int) -> type[EptError]:
    """The class of errors with this code."""
    return _CLASSES.get(code, InternalError)


def _rebuild(cls: type[EptError], message: str, fields: dict[str, Any]) -> EptError:
    return cls(message, **fields)


_CLASSES: dict[int, type[EptError]] = {
    int(cls.default_code): cls
    for cls in (
        InvalidArgument,
        ConfigError,
        BackendUnavailable,
        UnsupportedError,
        LimitError,
        OutOfMemory,
        TransportError,
        Timeout,
        PeerLost,
        AccessDenied,
        AuthError,
        VersionError,
        MismatchError,
        ClosedError,
        StuckError,
        LaneFault,
        CapacityError,
        InternalError,
        Suspended,
    )
}
