"""Calls into the native library: loads it, and turns what it answers into Python errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from eptransport._native import ffi, lib
from eptransport.errors import Code, EptError, error_class

__all__ = ["FOREVER", "call", "error_of", "ffi", "lib", "new_error", "text", "timeout_ns"]

NO_PEER = -1
FOREVER = 2**64 - 1
"""As a timeout: the engine's own."""


def call(function: Callable[..., int], *args: Any) -> int:
    """`function(*args, error)`; raises what it reports, returns OK, LATER or a count."""
    try:
        error = _local.error
    except AttributeError:
        error = _local.error = new_error()
    code = function(*args, error)
    if code < 0:
        raise error_of(code, error)
    return code


def new_error() -> Any:
    """An `ept_error` for a native call to fill."""
    error = ffi.new("ept_error *")
    error.size = ffi.sizeof("ept_error")
    return error


def error_of(code: int, error: Any) -> EptError:
    """The native error as an exception of its class."""
    sentence = text(error.text) or f"{text(lib.ept_code_name(code))}, without a sentence"
    waited = code == Code.TIMEOUT
    return error_class(code)(
        sentence,
        code=Code(code) if code in Code._value2member_map_ else code,
        operation=text(error.operation),
        peer=None if error.peer == NO_PEER else error.peer,
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
    return min(max(int(seconds * 1e9), 0), FOREVER - 1)


_local = threading.local()
