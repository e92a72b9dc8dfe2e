"""What a rank puts into the store, read back as what may have been put there by anyone.

The store is trusted (it carries the secret where none is given), but it is another process's memory: an older version,
a stray key, half a value. A record is JSON of a known shape or a TransportError that says whose it was; nothing is ever
unpickled, and nothing of a record is used before its shape is checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Garbled", "Shape", "a_list", "a_number", "a_text", "a_tuple", "check", "hexadecimal", "optional", "read"]

Check = Callable[[Any], bool]
Shape = Mapping[str, Check]
"""The fields that must be there, and what each must be."""

LONGEST_BYTES = 16 << 20
"""A rank's longest record is its address or a join's blob: kilobytes, in hexadecimal."""


class Garbled(ValueError):
    """What is wrong with a record; whoever reads one says where it lay."""


def read(raw: object) -> dict[str, Any]:
    """The record in these bytes."""
    if not isinstance(raw, (bytes, bytearray, str)):
        raise Garbled(f"it is {type(raw).__name__}, not bytes")
    if len(raw) > LONGEST_BYTES:
        raise Garbled(f"it has {len(raw)} bytes")
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as problem:
        raise Garbled(f"it is not JSON: {problem}") from None
    if not isinstance(record, dict):
        raise Garbled(f"it is {type(record).__name__}, not an object")
    return record


def check(record: object, shape: Shape) -> dict[str, Any]:
    """The record, if it has that shape."""
    if not isinstance(record, dict):
        raise Garbled(f"it is {type(record).__name__}, not an object")
    for name, right in shape.items():
        if name not in record or not right(record[name]):
            raise Garbled(f"{name} is {'missing' if name not in record else repr(record[name])[:80]}")
    return record


def a_text(value: object) -> bool:
    return isinstance(value, str)


def a_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def hexadecimal(value: object) -> bool:
    if not isinstance(value, str) or not value.isascii():
        return False
    try:
        return len(bytes.fromhex(value)) * 2 == len(value)
    except ValueError:
        return False


def optional(right: Check) -> Check:
    return lambda value: value is None or right(value)


def a_list(right: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(right, value))


def a_tuple(*rights: Check) -> Check:
    return lambda value: (
        isinstance(value, list)
        and len(value) == len(rights)
        and all(right(item) for right, item in zip(rights, value, strict=True))
    )
