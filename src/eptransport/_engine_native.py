"""The native engine under an `Engine`: made from the settings, called, and freed when nobody is inside any more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from eptransport._call import FOREVER, call, ffi, lib, new_error, sized, text, timeout_ns
from eptransport._guard import Guard
from eptransport.backends import Plugin, native_values
from eptransport.errors import Code, Timeout

if TYPE_CHECKING:
    from eptransport.settings import Settings

__all__ = ["CLOSE_S", "NativeEngine", "create_engine"]

logger = logging.getLogger("eptransport")

CLOSE_S = 5.0
"""How long an orderly close waits for what is in flight, unless told otherwise."""
LOG_LINE_BYTES = 1200
REPORT_BYTES = 16 << 10

_PROGRESS = {"auto": lib.EPT_PROGRESS_AUTO, "thread": lib.EPT_PROGRESS_THREAD, "inline": lib.EPT_PROGRESS_INLINE}


class NativeEngine:
    """The engine's pointer, and what must outlive its use.

    Invariants. Closing goes in this order: `stopping` makes those who wait inside leave (they ask every 100 ms), the
    children (AllToAlls, the arena) close, the guard shuts, the engine is freed. What `keep` holds is touched by the
    network until then, so it is dropped after that.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.pointer: Any = ffi.NULL
        self.guard = Guard(f"the engine of rank {rank}")
        self.stopping = False
        self.abandoned = False
        """Whoever waits here waits in vain, and shall give up; the engine stays open."""
        self.on_look: Callable[[], None] | None = None
        """Called from inside waits, every 100 ms, with no lock held."""
        self.keep: dict[Any, Any] = {}
        self.children: dict[int, Callable[[], None]] = {}
        self.handle = ffi.new_handle(self)

    def call(self, function: Callable[..., int], *args: Any, allow: int = 0) -> int:
        """`function(engine, *args, error)`, as `_call.call`."""
        return self.call_arena(function, self.pointer, *args, allow=allow)

    def call_arena(self, function: Callable[..., int], arena: Any, *args: Any, allow: int = 0) -> int:
        """`function(arena, *args, error)`, for what belongs to the engine."""
        self.guard.enter()
        try:
            return call(function, arena, *args, allow=allow)
        except Timeout as error:
            self.tell_why(error)
            raise
        except Exception:
            self.drain_log()
            raise
        finally:
            self.guard.leave()

    def tell_why(self, error: Timeout) -> None:
        """Hands the report of this thread's expired wait to its error. For who is inside the guard."""
        self.drain_log()
        error.why_stuck = self.why_stuck(expired=True)

    def why_stuck(self, expired: bool = False) -> str:
        """For who is inside the guard. Empty where this thread has no wait that expired, if that is asked for."""
        room = REPORT_BYTES
        while True:
            report, length = ffi.new("char[]", room), ffi.new("size_t *", room)
            code = call(lib.ept_engine_why_stuck, self.pointer, expired, report, length, allow=Code.LIMIT)
            if code == Code.OK:
                return text(report)
            if code == Code.LATER:
                return ""
            room = 2 * length[0]

    def plain(self, function: Callable[..., int], *args: Any) -> int:
        """`function(engine, *args)`, for calls that have no error to fill."""
        self.guard.enter()
        try:
            return function(self.pointer, *args)
        finally:
            self.guard.leave()

    @property
    def closed(self) -> bool:
        return self.stopping or self.guard.is_shut

    def stop_waiting(self) -> bool:
        """What a waiting native thread asks."""
        self.drain_log()
        if self.on_look is not None and not self.stopping:
            self.on_look()
        return self.stopping or self.abandoned

    def drain_log(self) -> None:
        if self.pointer == ffi.NULL:
            return
        level, line = ffi.new("int32_t *"), ffi.new("char[]", LOG_LINE_BYTES)
        while lib.ept_engine_log(self.pointer, level, line, len(line)) == Code.OK:
            logger.log(level[0], "rank %d: %s", self.rank, text(line))

    def close(self, timeout: float) -> None:
        if self.guard.forked or self.pointer == ffi.NULL or self.closed:
            return
        self.stopping = True
        for close_child in reversed(list(self.children.values())):
            close_child()
        self.guard.shut()
        if not self.guard.wait_idle(CLOSE_S):
            logger.error("rank %d: a thread is still inside the engine, which is left open", self.rank)
            return
        self.drain_log()
        self.stopping = False  # nobody is inside any more, and the close itself waits for what is in flight
        pointer, error = self.pointer, new_error()
        code = lib.ept_engine_close(pointer, timeout_ns(timeout), error)
        self.pointer = ffi.NULL
        self.keep.clear()
        self.on_look = None
        if code < 0:
            logger.warning("rank %d: closing the engine: %s", self.rank, text(error.text))


def create_engine(
    native: NativeEngine,
    plugin: Plugin,
    rank: int,
    world_size: int,
    job: str,
    secret: bytes,
    settings: Settings,
    epoch: int,
    spin_s: float | None,
) -> Any:
    options: Mapping[str, str] = settings.backend_options(plugin)
    values, keep_values = native_values(options)
    name, key = ffi.new("char[]", job.encode()), ffi.new("uint8_t[]", secret)
    config = sized("ept_engine_config")
    config.rank, config.world, config.epoch = rank, world_size, epoch
    config.job, config.secret, config.secret_length = name, key, len(secret)
    config.plugin, config.values, config.value_count = plugin.native, values, len(options)
    config.progress = _PROGRESS[settings.progress]
    config.credits = settings.credits or 0
    config.spin_ns = FOREVER if spin_s is None else int(spin_s * 1e9)
    config.timeout_ns = int(settings.timeout_s * 1e9)
    config.warn_ns = int(settings.warn_s * 1e9)
    config.dead_ns = int(settings.dead_s * 1e9)
    config.heartbeat_ns = int((settings.heartbeat_s or 0) * 1e9)
    cpus = ffi.new("int32_t[]", list(settings.proxy_cpus or ()))
    if settings.proxy_cpus:
        config.proxy_cpus, config.proxy_cpu_count = cpus, len(settings.proxy_cpus)
    config.stripe_bytes = settings.stripe_bytes or 0
    config.interrupted, config.interrupted_context = lib.ept_python_interrupted, native.handle
    pointer = ffi.new("ept_engine **")
    call(lib.ept_engine_create, config, pointer)
    del keep_values
    return pointer[0]
