"""Calls into the native library: loads it, turns what it answers into Python errors, and lets Ctrl-C through."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any, Protocol

from eptransport._native import ffi, lib
from eptransport.errors import Code, EptError, InvalidArgument, error_class

__all__ = ["FOREVER", "call", "error_of", "ffi", "lib", "new_error", "size", "sized", "text", "timeout_ns", "whole"]

FOREVER = 2**64 - 1
"""As a timeout: the engine's own."""

_NO_PEER = -1


class Waits(Protocol):
    """Whom a waiting native call asks every 100 ms whether it shall go on."""

    def stop_waiting(self) -> bool: ...


def call(function: Callable[..., int], *args: Any, allow: int = 0) -> int:
    """`function(*args, error)`: raises what it reports but the code `allow`; returns OK, LATER, a count or `allow`."""
    try:
        error = _local.error
    except AttributeError:
        error = _local.error = new_error()
    code = function(*args, error)
    if code >= 0 or code == allow:
        return code
    interrupt = _local.__dict__.pop("interrupt", None)
    if interrupt is not None:
        raise interrupt
    raise error_of(code, error)


def new_error() -> Any:
    """An `ept_error` for a native call to fill."""
    return sized("ept_error")


def sized(struct: str) -> Any:
    """A zeroed struct of the C API which says its own size, as each of them must."""
    value = ffi.new(struct + " *")
    value.size = ffi.sizeof(struct)
    return value


def error_of(code: int, error: Any) -> EptError:
    """The native error as an exception of its class."""
    sentence = text(error.text) or f"{text(lib.ept_code_name(code)) or code}, without a sentence"
    waited = code == Code.TIMEOUT
    return error_class(code)(
        sentence,
        code=Code(code) if code in Code._value2member_map_ else code,
        operation=text(error.operation),
        peer=None if error.peer == _NO_PEER else error.peer,
        provider_errno=error.provider_errno,
        expected=error.expected if waited else None,
        seen=error.seen if waited else None,
        silent_s=error.silent_ns / 1e9 if waited else None,
    )


def text(chars: Any) -> str:
    """A C string; NULL is the empty one."""
    if chars == ffi.NULL:
        return ""
    return bytes(ffi.string(chars)).decode("utf-8", "replace")


def timeout_ns(seconds: float | None) -> int:
    """A timeout as the native library takes it: None is the engine's own, 0 looks once."""
    if seconds is None:
        return FOREVER
    if not seconds >= 0:
        raise InvalidArgument(f"timeout={seconds!r}: must be 0 or more seconds, or None for the engine's own")
    return min(int(seconds * 1e9), FOREVER - 1)


def whole(name: str, value: Any) -> int:
    """An argument that counts something: an int, or what says that it is one (numpy's, a tensor of one element)."""
    try:
        return operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        raise InvalidArgument(f"{name}={value!r:.80}: must be a whole number") from None


def size(name: str, value: Any, most: int = 2**64 - 1) -> int:
    """An argument that C takes as an unsigned number."""
    number = whole(name, value)
    if not 0 <= number <= most:
        raise InvalidArgument(f"{name}={number}: must be from 0 to {most}")
    return number


# A native wait runs without the GIL, and Python's signal handlers run only in Python code of the main thread: so each
# wait calls back now and then. What a handler raises there ends the wait and is raised again by `call`.
def _remember(kind: Any, value: BaseException, traceback: Any) -> int:
    _local.interrupt = value
    return 1


@ffi.def_extern(name="ept_python_interrupted", error=1, onerror=_remember)  # type: ignore[untyped-decorator]
def _interrupted(context: Any) -> int:
    waits: Waits = ffi.from_handle(context)
    return int(waits.stop_waiting())


_local = threading.local()
