"""torch's dtypes and tensors as the native library takes them. Imports torch when first used."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eptransport._call import ffi, lib
from eptransport.errors import InvalidArgument, UnsupportedError

if TYPE_CHECKING:
    import torch

__all__ = ["check", "code_of", "dtype_of", "fill", "refuse_grad"]

ROW_ALIGNMENT = 16
CPU = -1

_NOWHERE = ffi.new("uint8_t[]", 64)
_NOWHERE_ALIGNED = int(ffi.cast("uintptr_t", _NOWHERE)) + 15 & ~15
"""Where empty tensors are, whose own address may be 0, which would mean that they are absent."""

# Not every release of torch has all of them.
_NAMES = {
    "float32": lib.EPT_DTYPE_F32,
    "float16": lib.EPT_DTYPE_F16,
    "bfloat16": lib.EPT_DTYPE_BF16,
    "float8_e4m3fn": lib.EPT_DTYPE_E4M3,
    "float8_e5m2": lib.EPT_DTYPE_E5M2,
    "float8_e8m0fnu": lib.EPT_DTYPE_E8M0,
    "uint8": lib.EPT_DTYPE_U8,
    "int8": lib.EPT_DTYPE_I8,
    "int32": lib.EPT_DTYPE_I32,
    "int64": lib.EPT_DTYPE_I64,
    "float4_e2m1fn_x2": lib.EPT_DTYPE_F4X2,
}


def code_of(name: str, dtype: torch.dtype) -> int:
    """The `ept_dtype` of an argument's dtype."""
    import torch

    code = _codes().get(dtype) if isinstance(dtype, torch.dtype) else None
    if code is None:
        raise InvalidArgument(f"{name}: {dtype!r:.80} is none of {', '.join(_NAMES)}")
    return code


def dtype_of(code: int) -> torch.dtype:
    """The dtype of an `ept_dtype`; bytes where this release of torch has no such dtype."""
    import torch

    return _dtypes().get(code, torch.uint8)


def check(
    name: str,
    tensor: Any,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    *,
    rows_aligned: bool = False,
    device: torch.device | None = None,
) -> None:
    """That an argument is a tensor of `device` (None: the CPU) of this shape (None: any) and one of these dtypes, with
    a unit inner stride and 16-byte aligned rows where native code relies on it. The error has the values."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise InvalidArgument(f"{name} is a {type(tensor).__name__}, must be a tensor")
    if device is None and tensor.device.type != "cpu":
        raise UnsupportedError(
            f"{name} is on {tensor.device}; this AllToAll exchanges CPU tensors only: make it with device='cuda'"
        )
    if device is not None and tensor.device != device:
        raise InvalidArgument(f"{name} is on {tensor.device}; this AllToAll was made for {device}")
    if tensor.dtype not in dtypes:
        raise InvalidArgument(f"{name} is {tensor.dtype}, must be {' or '.join(map(str, dtypes))}")
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(most is not None and most != n for most, n in zip(shape, found, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise InvalidArgument(f"{name} has shape {found}, must have [{wanted}]")
    if rows_aligned and tensor.numel():
        _check_rows(name, tensor)


def fill(native: Any, tensor: torch.Tensor | None) -> None:
    """An `ept_tensor` of this tensor; None leaves it absent."""
    if tensor is None:
        return
    dims = tensor.dim()
    native.data = ffi.cast("void *", tensor.data_ptr() or _NOWHERE_ALIGNED)
    native.dtype = _codes()[tensor.dtype]
    native.ndim = dims
    native.shape = list(tensor.shape)
    native.strides = list(tensor.stride())
    native.device = tensor.device.index if tensor.is_cuda else CPU


def refuse_grad(**tensors: Any) -> None:
    """No gradient flows through native code: better an error than a wrong gradient."""
    import torch

    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if getattr(tensor, "requires_grad", False):
            raise UnsupportedError(
                f"{name} requires a gradient, which dispatch and combine don't compute: call them under "
                "torch.no_grad(), or wrap them in an autograd.Function whose backward uses got.routing"
            )


def _check_rows(name: str, tensor: torch.Tensor) -> None:
    strides, size = tensor.stride(), tensor.element_size()
    if strides[-1] != 1 and tensor.shape[-1] > 1:
        raise InvalidArgument(f"{name} has strides {strides}: the inner stride must be 1")
    if tensor.data_ptr() % ROW_ALIGNMENT:
        raise InvalidArgument(f"{name} starts at address {tensor.data_ptr():#x}, must be {ROW_ALIGNMENT}-byte aligned")
    for stride, n in zip(strides[:-1], tensor.shape[:-1], strict=True):
        if n > 1 and stride * size % ROW_ALIGNMENT:
            raise InvalidArgument(
                f"{name} has strides {strides} of {size} bytes: every row must start {ROW_ALIGNMENT}-byte aligned"
            )


@functools.cache
def _codes() -> dict[torch.dtype, int]:
    import torch

    return {getattr(torch, name): code for name, code in _NAMES.items() if hasattr(torch, name)}


@functools.cache
def _dtypes() -> dict[int, torch.dtype]:
    return {code: dtype for dtype, code in _codes().items()}
