"""An AllToAll's arguments as the native library takes them, and the plan that it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from eptransport._call import call, ffi, lib, size, sized
from eptransport._convert import code_of
from eptransport.errors import InvalidArgument
from eptransport.plan import Plan

if TYPE_CHECKING:
    import torch

__all__ = ["Types", "moe_config", "one_of", "plan_of"]

_SCALE_FORMATS = {"fp32": lib.EPT_SCALES_FP32, "ue8m0": lib.EPT_SCALES_UE8M0}


def moe_config(
    *,
    world: int,
    rank: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    max_tokens: int,
    dtype: torch.dtype | None,
    dispatch_dtype: torch.dtype | None,
    combine_dtype: torch.dtype | None,
    alignment: int,
    lanes: int,
    buffer_bytes: int | None,
    placement: Sequence[int] | None,
    scale_format: str,
    scale_epsilon: float,
    caller_scale_bytes: int,
    threads: int,
) -> tuple[Any, Any, Types]:
    """The native config, what must outlive it, and the dtypes."""
    import torch

    one_of("scale_format", scale_format, _SCALE_FORMATS)
    own = torch.bfloat16 if dtype is None else dtype
    types = Types(
        own, own if dispatch_dtype is None else dispatch_dtype, own if combine_dtype is None else combine_dtype
    )
    config = sized("ept_moe_config")
    numbers = {
        "world": world,
        "rank": rank,
        "num_experts": num_experts,
        "top_k": top_k,
        "hidden": hidden,
        "max_tokens": max_tokens,
        "lanes": lanes,
        "alignment": alignment,
        "caller_scale_bytes": caller_scale_bytes,
        "threads": threads,
    }
    for name, value in numbers.items():
        setattr(config, name, size(name, value, 2**32 - 1))
    config.dtype = code_of("dtype", types.dtype)
    config.dispatch_dtype = code_of("dispatch_dtype", types.dispatch)
    config.combine_dtype = code_of("combine_dtype", types.combine)
    config.scale_format = _SCALE_FORMATS[scale_format]
    try:
        config.scale_epsilon = scale_epsilon
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgument(f"scale_epsilon={scale_epsilon!r:.80}: must be a number") from None
    config.buffer_bytes = 0 if buffer_bytes is None else size("buffer_bytes", buffer_bytes)
    ranks = None
    if placement is not None:
        named = _ranks(placement)
        if len(named) != num_experts:
            raise InvalidArgument(f"placement names {len(named)} ranks, there are num_experts={num_experts}")
        ranks = config.placement = ffi.new("int32_t[]", named)
    return config, ranks, types


def plan_of(config: Any, device: torch.device | None = None) -> Plan:
    plan = sized("ept_moe_plan")
    call(lib.ept_moe_plan_get, config, plan)
    here = {"world", "top_k", "max_tokens", "lanes"}
    split = {"device_bytes": 0, "pinned_bytes": 0, "host_bytes": 0}
    split["host_bytes" if device is None else "device_bytes"] = plan.arena_bytes
    names = [each.name for each in fields(Plan) if each.name not in here | split.keys()]
    return Plan(
        **{name: getattr(config, name) for name in here}, **split, **{name: getattr(plan, name) for name in names}
    )


@dataclass(frozen=True)
class Types:
    """Of x and y, on the wire, and of the rows that come back."""

    dtype: torch.dtype
    dispatch: torch.dtype
    combine: torch.dtype

    def payload_columns(self, hidden: int) -> int:
        """Elements of a row on the wire: two of 4 bits are one of torch's."""
        return hidden // 2 if "x2" in str(self.dispatch) else hidden

    def accepted(self) -> tuple[torch.dtype, ...]:
        """What x may be: we quantise to one format only."""
        import torch

        if self.dispatch in (self.dtype, torch.float8_e4m3fn):
            return tuple(dict.fromkeys((self.dtype, self.dispatch)))
        return (self.dispatch,)


def _ranks(placement: Any) -> list[int]:
    try:
        items = list(placement)
    except TypeError:
        raise InvalidArgument(f"placement={placement!r:.80}: must be a rank for each expert") from None
    return [size(f"placement[{expert}]", rank, 2**31 - 1) for expert, rank in enumerate(items)]


def one_of(name: str, value: Any, known: Any) -> None:
    if not isinstance(value, str) or value not in known:
        raise InvalidArgument(f"{name}={value!r:.80}: must be one of {', '.join(known)}")
