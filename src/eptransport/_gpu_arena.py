"""The lanes' memory on a GPU, shared by the AllToAlls of a group, and the native object under one of them.

All ranks learn where the others compute when an AllToAll is made (`ept_gpu_lanes_join`, with `ept_moe_create` of CPU
ranks). Where all are on GPUs and map each other's memory, the lanes are made here, over the store; else they are the
group's lanes over the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eptransport import _record as record
from eptransport._call import call, ffi, lib, new_error, sized, timeout_ns
from eptransport._guard import Guard
from eptransport._process import process
from eptransport.errors import (
    EptError,
    InvalidArgument,
    LaneFault,
    MismatchError,
    PeerLost,
    Timeout,
    UnsupportedError,
)

if TYPE_CHECKING:
    import torch

    from eptransport.group import Group

__all__ = ["GpuArena", "NativeGpuMoe", "create_gpu_moe", "cuda_device"]

logger = logging.getLogger("eptransport")

BLOB_BYTES = 4096

_SAID: record.Shape = {
    "config": record.a_text,
    "blob": record.a_text,
}
_FIELDS: tuple[str, ...] = (
    "num_experts",
    "top_k",
    "hidden",
    "max_tokens",
    "lanes",
    "dtype",
    "dispatch_dtype",
    "combine_dtype",
)
_FIELDS += ("scale_format", "alignment", "caller_scale_bytes", "buffer_bytes")


def cuda_device(device: torch.device | str | None, *, look: bool = True) -> torch.device | None:
    """The CUDA device that is meant; None: the CPU. `look`: that it is there."""
    if device is None:
        return None
    import torch

    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as problem:
        raise InvalidArgument(f"device={device!r:.80}: {problem}") from None
    if found.type == "cpu":
        return None
    if found.type != "cuda":
        raise UnsupportedError(f"device={str(found)!r}: tensors of the CPU and of CUDA devices alone are exchanged")
    if not look:
        return found
    if not torch.cuda.is_available():
        raise UnsupportedError(f"device={str(found)!r}: torch {torch.__version__} sees no CUDA device here")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


class GpuArena:
    """One set of lanes: all objects that fit it and are made later use it. A larger one gets a set of its own, so that
    graphs that were captured on earlier objects keep their addresses."""

    def __init__(self, pointer: Any, device: torch.device, fault: torch.Tensor, over_engine: bool) -> None:
        self.pointer = pointer
        self.device = device
        self._fault = fault
        self.over_engine = over_engine
        self.objects = 0

    @property
    def shares_process(self) -> bool:
        """Whether other ranks are threads of this process."""
        return bool(lib.ept_gpu_lanes_share_process(self.pointer))

    def maps(self, rank: int) -> bool:
        """Whether that rank's memory is in this GPU's address space."""
        return bool(lib.ept_gpu_lanes_maps(self.pointer, rank))

    def blob(self) -> str:
        length = ffi.new("size_t *", BLOB_BYTES)
        room = ffi.new("char[]", BLOB_BYTES)
        call(lib.ept_gpu_lanes_export, self.pointer, room, length)
        return bytes(ffi.buffer(room, length[0])).hex()

    def connect(self, said: list[dict[str, Any]]) -> None:
        for rank, other in enumerate(said):
            try:
                blob = bytes.fromhex(other["blob"])
            except ValueError:
                blob = b""
            call(lib.ept_gpu_lanes_connect, self.pointer, rank, blob, len(blob))
        call(lib.ept_gpu_lanes_start, self.pointer)

    def fits(self, config: Any) -> bool:
        return bool(lib.ept_gpu_lanes_fit(self.pointer, config, new_error()) == 0)

    def close(self) -> None:
        lib.ept_gpu_lanes_close(self.pointer)


class NativeGpuMoe:
    """The `ept_gpu_moe`, closed before its arena."""

    def __init__(self, group: Group, arena: GpuArena, pointer: Any, ue8m0: bool) -> None:
        self.group = group
        self.arena = arena
        self.pointer = pointer
        self.ue8m0 = ue8m0
        self.guard = Guard("this AllToAll")
        arena.objects += 1
        self._children: dict[int, Callable[[], None]] = group.engine._native.children
        self._children[id(self)] = self.close

    def close(self) -> None:
        if self.guard.forked or not self.guard.shut():
            return
        self._children.pop(id(self), None)
        lib.ept_gpu_moe_close(self.pointer)
        self.arena.objects -= 1


def create_gpu_moe(group: Group, config: Any, device: torch.device) -> NativeGpuMoe:
    """Collective. A rank that fails here tells the others why."""
    fault = _fault_of(group, device)
    native = _native_config(group, device, fault)
    arena, number = _joined(group, config, native, device, fault)
    if arena is None:
        arena, number = _mapped(group, config, native, device, fault), group._members.made
    handle = ffi.new("ept_gpu_moe **")
    call(lib.ept_gpu_moe_create, arena.pointer, config, number, handle)
    return NativeGpuMoe(group, arena, handle[0], config.scale_format == lib.EPT_SCALES_UE8M0)


def _native_config(group: Group, device: torch.device, fault: torch.Tensor) -> Any:
    native = sized("ept_gpu_config")
    native.device = device.index
    native.blocks = group.settings.gpu_blocks or 0
    native.timeout_ns = timeout_ns(group.settings.timeout_s)
    native.process = int(process.token[:16], 16)
    native.group_fault = ffi.cast("int32_t *", fault.data_ptr()) if fault.device == device else ffi.NULL
    native.mapped = group.settings.intra != "off"
    native.node = (group.settings.node or "").encode()
    return native


def _joined(
    group: Group, config: Any, native: Any, device: torch.device, fault: torch.Tensor
) -> tuple[GpuArena | None, int]:
    """The lanes over the engine; None where all ranks map each other's memory."""
    engine, members = group.engine._native, group._members
    known = next((one for one in group._gpu_arenas if one.over_engine), None)
    if known is not None and known.device != device:
        raise UnsupportedError(f"this group's lanes are on {known.device}, and this AllToAll on {device}: make a group")
    members.learn_if_told()
    handle, number = ffi.new("ept_gpu_lanes **"), ffi.new("uint32_t *")
    before = ffi.NULL if known is None else known.pointer
    try:
        engine.call_arena(lib.ept_gpu_lanes_join, group.arena(), native, config, before, handle, number)
    except (PeerLost, LaneFault, Timeout) as error:
        members.after(error, group.settings.on_lost)
        raise
    if handle[0] == ffi.NULL or known is not None:
        return known, number[0]
    return _kept(group, GpuArena(handle[0], device, fault, True)), number[0]


def _mapped(group: Group, config: Any, native: Any, device: torch.device, fault: torch.Tensor) -> GpuArena:
    """Lanes in memory that every rank maps: those of an earlier AllToAll, or new ones."""
    known = next((one for one in group._gpu_arenas if one.device == device and one.fits(config)), None)
    arena = known
    try:
        if arena is None:
            handle = ffi.new("ept_gpu_lanes **")
            call(lib.ept_gpu_lanes_create, native, config, handle)
            arena = GpuArena(handle[0], device, fault, False)
        said = {"config": _text_of(config), "blob": arena.blob() if known is None else ""}
    except EptError as error:
        group.say_once(error)
        raise
    heard = group.exchange_once(said, _SAID)
    for rank, other in enumerate(heard):
        if other["config"] != said["config"]:
            raise MismatchError(
                f"ranks of group {group.name!r} make different AllToAlls: rank {group.rank} has {said['config']}, "
                f"rank {rank} has {other['config']}",
                operation="moe_create",
                peer=rank,
            )
    if known is not None:
        return known
    arena.connect(heard)
    return _kept(group, arena)


def _kept(group: Group, arena: GpuArena) -> GpuArena:
    group._gpu_arenas.append(arena)
    group.engine._native.children[id(arena)] = arena.close
    return arena


def _fault_of(group: Group, device: torch.device) -> torch.Tensor:
    if group._fault is None:
        import torch

        group._fault = torch.zeros((), dtype=torch.int32, device=device)
    return group._fault


def _text_of(config: Any) -> str:
    return ", ".join(f"{name} {getattr(config, name)}" for name in _FIELDS)
