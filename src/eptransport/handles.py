"""What has a number in the engine: memory and signals here, and those of peers that this rank may write and raise."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from eptransport._call import ffi, lib, size, timeout_ns
from eptransport._closing import Closing
from eptransport.errors import Code

if TYPE_CHECKING:
    from eptransport.engine import Engine
    from eptransport.peer import Peer

__all__ = ["Memory", "Region", "RemoteSignal", "Signal"]

BLOB_BYTES = 4096


class _Handle(Closing):
    """What has a number in the engine, and a way to give it back. A context manager; closing twice is fine."""

    def __init__(self, engine: Engine, number: int) -> None:
        self._engine = engine
        self._id = number
        self._open = True

    def close(self) -> None:
        """Gives it back. Not collective, doesn't block. What is not closed lives as long as the engine."""
        if self._open and not self._engine.closed:
            self._free()
        self._open = False

    @abstractmethod
    def _free(self) -> None: ...

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._id:#x} of rank {self._engine.rank}{'' if self._open else ', closed'}>"


class Memory(_Handle):
    """Memory here that is known to the network. From `engine.register`."""

    def __init__(self, engine: Engine, number: int, length: int) -> None:
        super().__init__(engine, number)
        self.length = length

    def export(self, peer: Peer | int, offset: int = 0, length: int | None = None) -> bytes:
        """Lets `peer`, and nobody else, write into `[offset, offset + length)` (None: to the end). The bytes returned
        go to that peer, for its `import_region`; they hold a key and are as secret as that. Doesn't block."""
        rank = peer if isinstance(peer, int) else self._engine._own(peer).rank
        begin = size("offset", offset)
        blob, used = ffi.new("uint8_t[]", BLOB_BYTES), ffi.new("size_t *", BLOB_BYTES)
        count = max(self.length - begin, 0) if length is None else size("length", length)
        self._engine._native.call(
            lib.ept_region_export, self._id, size("rank", rank, self._engine.world_size - 1), begin, count, blob, used
        )
        return bytes(ffi.buffer(blob, used[0]))

    def revoke(self, peer: Peer | int) -> None:
        """Takes back all that was exported to `peer`: from its return on nothing of that peer changes the memory.
        Doesn't block. The peer's writes fail with AccessDenied."""
        rank = peer if isinstance(peer, int) else self._engine._own(peer).rank
        self._engine._native.call(lib.ept_region_revoke, self._id, size("rank", rank, self._engine.world_size - 1))

    def close(self) -> None:
        """Revokes all exports and unregisters; the buffer is the caller's alone again. InvalidArgument, and nothing
        done, while a transfer still reads from it. Not collective, doesn't block."""
        super().close()

    def _free(self) -> None:
        self._engine._native.call(lib.ept_memory_deregister, self._id)
        self._engine._native.keep.pop(("memory", self._id), None)


class Region(_Handle):
    """Memory of a peer that this rank may write into. From `peer.import_region`."""

    def __init__(self, engine: Engine, number: int, peer: Peer, length: int) -> None:
        super().__init__(engine, number)
        self.peer = peer
        self.length = length

    def _free(self) -> None:
        self._engine._native.call(lib.ept_region_drop, self._id)


class RemoteSignal(_Handle):
    """A signal of a peer that this rank's transfers may raise. From `peer.import_signal`."""

    def __init__(self, engine: Engine, number: int, peer: Peer) -> None:
        super().__init__(engine, number)
        self.peer = peer

    def _free(self) -> None:
        self._engine._native.call(lib.ept_signal_drop, self._id)


class Signal(_Handle):
    """A counter here that one source's transfers raise, each once, when all its bytes can be read. From
    `engine.signal`."""

    def __init__(self, engine: Engine, number: int, source: int, label: str) -> None:
        super().__init__(engine, number)
        self.source = source
        self.label = label
        self._awaited: list[int] = []

    def export(self) -> bytes:
        """Lets the source raise it: the bytes go there, for its `import_signal`. Doesn't block."""
        blob, used = ffi.new("uint8_t[]", BLOB_BYTES), ffi.new("size_t *", BLOB_BYTES)
        self._engine._native.call(lib.ept_signal_export, self._id, blob, used)
        return bytes(ffi.buffer(blob, used[0]))

    @property
    def value(self) -> int:
        """The count now. What was written by the transfers that it counts can be read. Doesn't block."""
        value = ffi.new("uint64_t *")
        self._engine._native.call(lib.ept_signal_value, self._id, value)
        return int(value[0])

    def wait(self, target: int, timeout: float | None = None) -> None:
        """Blocks until the count is at least `target`. Timeout and PeerLost say who waited for whom and what was
        seen."""
        self._engine._native.call(lib.ept_signal_wait, self._id, size("target", target), timeout_ns(timeout))

    async def reached(self, target: int, timeout: float | None = None) -> None:
        """As `wait`, without blocking the event loop. Cancelling only forgets the wait."""
        engine = self._engine
        number = size("target", target)
        self._awaited.append(number)
        try:
            await engine._notifications().until(
                f"signal {self.label!r} of rank {self.source} reaching {target}",
                lambda: engine._native.call(lib.ept_signal_wait, self._id, number, 0, allow=Code.TIMEOUT) == Code.OK,
                lambda: engine._native.call(lib.ept_signal_notify, self._id, min(self._awaited, default=number)),
                engine.settings.timeout_s if timeout is None else timeout,
            )
        finally:
            self._awaited.remove(number)

    def raise_by_one(self) -> None:
        """Adds one here, as the source's transfer would: for a source that is this rank. Doesn't block."""
        self._engine._native.call(lib.ept_signal_raise, self._id)

    def _free(self) -> None:
        self._engine._native.call(lib.ept_signal_destroy, self._id)
        self._engine._native.keep.pop(("signal", self._id), None)
