"""The lanes' memory on a GPU, shared by the AllToAlls of a group, and the native object under one of them.

All ranks learn where the others compute when an AllToAll is made (`ept_gpu_lanes_join`, with `ept_moe_create` of CPU
ranks). Where all are on GPUs and map each other's memory, objects that fit share lanes; else all use the group's lanes
over the engine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eptransport._call import call, ffi, lib, new_error, sized, text, timeout_ns
from eptransport._gpu_lane import Lane
from eptransport._guard import CLOSE_S, Guard
from eptransport._kernels import add_missing, for_shape
from eptransport._members import BY_MEMBERSHIP
from eptransport._process import process
from eptransport.errors import InvalidArgument, UnsupportedError

if TYPE_CHECKING:
    import torch

    from eptransport._members import Members
    from eptransport.group import Group

__all__ = ["GpuArena", "NativeGpuMoe", "create_gpu_moe", "cuda_device"]

logger = logging.getLogger("eptransport")

LOOK_S = 0.02
"""A kernel waits and a thread that waits for it asks nobody: so late it learns that a rank was masked."""


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

    def __init__(self, pointer: Any, device: torch.device, fault: torch.Tensor, members: Members) -> None:
        self.pointer = pointer
        self.device = device
        self._fault = fault
        self.over_engine = bool(lib.ept_gpu_lanes_over_engine(pointer))
        self.shares_process = bool(lib.ept_gpu_lanes_share_process(pointer))
        """Whether other ranks are threads of this process."""
        self.objects = 0
        self._lanes: dict[int, Lane] = {}
        self._members = members
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="eptransport-gpu-watch", daemon=True)
        self._watcher.start()

    def lane(self, number: int) -> Lane:
        """What stands in it, of whichever object."""
        return self._lanes.setdefault(number, Lane())

    def maps(self, rank: int) -> bool:
        """Whether that rank's memory is in this GPU's address space."""
        return bool(lib.ept_gpu_lanes_maps(self.pointer, rank))

    def home(self) -> str:
        """Where the lanes over the engine stand, and why; empty where there are none."""
        sentence = ffi.new("char[]", 1200)
        lib.ept_gpu_lanes_home(self.pointer, sentence, 1200)
        return text(sentence)

    def way(self) -> str:
        """Of the AllToAll that joined last: what was measured of both ways to ranks that kernels could put to, and
        what was chosen by it; empty where nothing was."""
        sentence = ffi.new("char[]", 1200)
        lib.ept_gpu_lanes_way(self.pointer, sentence, 1200)
        return text(sentence)

    def initiates(self, rank: int) -> bool:
        """Whether this rank's kernels put into that rank's memory through a device library."""
        return bool(lib.ept_gpu_lanes_initiates(self.pointer, rank))

    def puts(self) -> int:
        """How often they have, since the start or the last reset; of kernels that have ended."""
        count = ffi.new("uint64_t *")
        call(lib.ept_gpu_lanes_puts, self.pointer, count)
        return int(count[0])

    def fits(self, config: Any) -> bool:
        return bool(lib.ept_gpu_lanes_fit(self.pointer, config, new_error()) == 0)

    def close(self) -> None:
        self._closing.set()
        self._watcher.join()
        lib.ept_gpu_lanes_close(self.pointer)

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_S):
            self._members.look()
            lib.ept_gpu_lanes_watch(self.pointer)


class NativeGpuMoe:
    """The `ept_gpu_moe`, closed before its arena."""

    def __init__(self, group: Group, arena: GpuArena, pointer: Any, ue8m0: bool, way: str) -> None:
        self.group = group
        self.arena = arena
        self.pointer = pointer
        self.ue8m0 = ue8m0
        self.way = way
        self.guard = Guard("this AllToAll")
        arena.objects += 1
        self._children: dict[int, Callable[[], None]] = group.engine._native.children
        self._children[id(self)] = self.close

    def close(self) -> None:
        if self.guard.forked or not self.guard.shut():
            return
        if not self.guard.wait_idle(CLOSE_S):
            logger.error("rank %d: a thread is still inside an AllToAll, which is left open", self.group.rank)
            return
        self._children.pop(id(self), None)
        lib.ept_gpu_moe_close(self.pointer)
        self.arena.objects -= 1


def create_gpu_moe(group: Group, config: Any, device: torch.device) -> NativeGpuMoe:
    """Collective. A rank that fails here tells the others why."""
    import torch

    if torch.cuda.is_current_stream_capturing():
        raise InvalidArgument("an AllToAll is made while a CUDA graph is captured: make it before")
    add_missing(group.settings, device)
    fault = _fault_of(group, device)
    native = _native_config(group, device, fault)
    arena, number = _joined(group, config, native, device, fault)
    handle = ffi.new("ept_gpu_moe **")
    image = for_shape(group.settings, device, config)
    buffer = ffi.NULL if image is None else ffi.from_buffer(image)
    call(lib.ept_gpu_moe_create, arena.pointer, config, number, buffer, len(image or b""), handle)
    way = arena.way()
    if way:
        logger.info("rank %d: messages to other nodes are %s", group.rank, way)
    return NativeGpuMoe(group, arena, handle[0], config.scale_format == lib.EPT_SCALES_UE8M0, way)


def _native_config(group: Group, device: torch.device, fault: torch.Tensor) -> Any:
    native = sized("ept_gpu_config")
    native.device = device.index
    native.blocks = group.settings.gpu_blocks or 0
    native.timeout_ns = timeout_ns(group.settings.timeout_s)
    native.process = int(process.token[:16], 16)
    native.group_fault = ffi.cast("int32_t *", fault.data_ptr()) if fault.device == device else ffi.NULL
    native.mapped = group.settings.intra != "off"
    native.memory = ("auto", "device", "pinned").index(group.settings.gpu_memory)
    native.share = ("auto", "ipc", "descriptors").index(group.settings.gpu_share)
    native.node = (group.settings.node or "").encode()
    native.path = {"auto": lib.EPT_GPU_PATH_AUTO, "gpu": lib.EPT_GPU_PATH_GPU, "proxy": lib.EPT_GPU_PATH_PROXY}[
        group.settings.gpu_path
    ]
    native.crossover_bytes = group.settings.gpu_crossover_bytes or 0
    return native


def _joined(group: Group, config: Any, native: Any, device: torch.device, fault: torch.Tensor) -> tuple[GpuArena, int]:
    """The lanes: the group's over the engine, those of an earlier AllToAll that this one fits, or new ones."""
    engine, members = group.engine._native, group._members
    here = (one for one in group._gpu_arenas if one.device == device and one.fits(config))
    known = next((one for one in group._gpu_arenas if one.over_engine), None) or next(here, None)
    if known is not None and known.device != device:
        raise UnsupportedError(f"this group's lanes are on {known.device}, and this AllToAll on {device}: make a group")
    members.learn_if_told()
    handle, number = ffi.new("ept_gpu_lanes **"), ffi.new("uint32_t *")
    before = ffi.NULL if known is None else known.pointer
    try:
        engine.call_arena(lib.ept_gpu_lanes_join, group.arena(), native, config, before, handle, number)
    except BY_MEMBERSHIP as error:
        members.after(error, group.settings.on_lost)
        raise
    if known is not None and handle[0] == known.pointer:
        return known, number[0]
    arena = GpuArena(handle[0], device, fault, members)
    if arena.over_engine:
        logger.info("rank %d: lanes over the backend are %s", group.rank, arena.home())
    group._gpu_arenas.append(arena)
    engine.children[id(arena)] = arena.close
    return arena, number[0]


def _fault_of(group: Group, device: torch.device) -> torch.Tensor:
    if group._fault is None:
        import torch

        group._fault = torch.zeros((), dtype=torch.int32, device=device)
    return group._fault
