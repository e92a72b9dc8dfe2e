"""Memory of the caller as address and length: anything with the buffer protocol, and torch's CPU tensors."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eptransport._call import ffi
from eptransport.errors import InvalidArgument, UnsupportedError

__all__ = ["Buffer", "indices", "view"]


@dataclass(frozen=True)
class Buffer:
    """Where it is; `owner` must be kept as long as the address is used."""

    address: Any
    length: int
    writable: bool
    owner: Any


def view(obj: Any) -> Buffer:
    """The bytes of `obj` in place; it must be contiguous. Never imports torch: a tensor exists only where it is
    loaded."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(obj, torch.Tensor):
        if obj.device.type != "cpu":
            raise UnsupportedError(
                f"a tensor on {obj.device}: memory of this device can't be registered yet, only CPU's"
            )
        if not obj.is_contiguous():
            raise InvalidArgument(f"a tensor of shape {tuple(obj.shape)} with strides {obj.stride()} isn't contiguous")
        return Buffer(ffi.cast("void *", obj.data_ptr()), obj.numel() * obj.element_size(), True, obj)
    try:
        described = memoryview(obj)
    except TypeError:
        raise InvalidArgument(
            f"{type(obj).__name__} has no memory to register: no buffer protocol, no CPU tensor"
        ) from None
    if not described.c_contiguous:
        raise InvalidArgument(f"a buffer of shape {described.shape} with strides {described.strides} isn't contiguous")
    pointer = ffi.from_buffer(obj)
    return Buffer(pointer, described.nbytes, not described.readonly, pointer)


def indices(name: str, values: Any) -> tuple[Any, int, Any]:
    """Page numbers as `uint32_t *`, how many, and what to keep. int32 and uint32 buffers and tensors are taken in
    place."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        if values.dtype not in (torch.int32, torch.uint32) or values.dim() != 1:
            raise InvalidArgument(f"{name}: {values.dim()}-d {values.dtype}; must be 1-d int32 or uint32")
        found = view(values)
        return ffi.cast("uint32_t *", found.address), values.numel(), values
    if not isinstance(values, (list, tuple, range)):
        try:
            described = memoryview(values)
        except TypeError:
            pass
        else:
            if described.ndim != 1 or described.format not in ("i", "I", "=i", "=I", "<i", "<I"):
                raise InvalidArgument(f"{name}: {described.ndim}-d {described.format!r}; must be 1-d int32 or uint32")
            found = view(values)
            return ffi.cast("uint32_t *", found.address), described.shape[0] if described.shape else 0, found
    return _copied(name, values)


def _copied(name: str, values: Sequence[int]) -> tuple[Any, int, Any]:
    try:
        numbers = array("I", values)
    except (TypeError, OverflowError) as problem:
        raise InvalidArgument(f"{name}: {problem}; must be page numbers from 0 to {2**32 - 1}") from None
    pointer = ffi.from_buffer("uint32_t[]", numbers, require_writable=False)
    return pointer, len(numbers), numbers
