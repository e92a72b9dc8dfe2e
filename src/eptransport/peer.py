"""Another rank: what one writes and sends to it, and imports of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eptransport._buffers import indices, view
from eptransport._call import ffi, lib, size, sized, text, timeout_ns
from eptransport.errors import InvalidArgument
from eptransport.handles import Region, RemoteSignal
from eptransport.info import PeerInfo, PeerStatus

if TYPE_CHECKING:
    from eptransport.engine import Engine
    from eptransport.handles import Memory
    from eptransport.transfer import Transfer

__all__ = ["Peer", "Write"]


class Peer:
    """Another rank, as this one reaches it. From `engine.peer(rank)`."""

    def __init__(self, engine: Engine, rank: int) -> None:
        self._engine = engine
        self.rank = rank

    def import_region(self, blob: bytes) -> Region:
        """The peer's memory that its `Memory.export` let this rank write into. Doesn't block. VersionError,
        AccessDenied, InvalidArgument for a blob that isn't one."""
        native = self._engine._native
        handle, length = ffi.new("ept_region_id *"), ffi.new("uint64_t *")
        native.call(lib.ept_region_import, self.rank, blob, len(blob), handle)
        native.call(lib.ept_region_length, handle[0], length)
        return Region(self._engine, handle[0], self, length[0])

    def import_signal(self, blob: bytes) -> RemoteSignal:
        """The peer's signal that its `Signal.export` let this rank raise. Doesn't block."""
        handle = ffi.new("ept_remote_signal_id *")
        self._engine._native.call(lib.ept_signal_import, self.rank, blob, len(blob), handle)
        return RemoteSignal(self._engine, handle[0], self)

    def write(
        self,
        source: Memory | None,
        region: Region | None,
        length: int,
        *,
        source_offset: int = 0,
        destination_offset: int = 0,
        signal: RemoteSignal | None = None,
        timeout: float | None = None,
    ) -> Transfer:
        """Starts moving `length` bytes of `source` into `region`, then raises `signal` by one at the peer. The peer
        takes no part. Blocks only while there is no room (back-pressure), at most `timeout` s. The source must stay
        untouched until the transfer is complete. With length 0 source and region may be None. Errors of the arguments
        are raised here, those of the network by the transfer: AccessDenied, PeerLost, TransportError."""
        own = self._engine._own
        try:
            return self._engine._post(
                "write",
                timeout,
                lib.ept_python_write,
                self.rank,
                0 if source is None else own(source)._id,
                source_offset,
                0 if region is None else own(region)._id,
                destination_offset,
                length,
                0 if signal is None else own(signal)._id,
            )
        except OverflowError:
            size("length", length)
            size("source_offset", source_offset)
            size("destination_offset", destination_offset)
            raise

    def write_paged(
        self,
        source: Memory,
        region: Region,
        page_bytes: int,
        source_pages: Any,
        destination_pages: Any,
        *,
        signal: RemoteSignal | None = None,
        source_offset: int = 0,
        destination_offset: int = 0,
        source_stride: int = 0,
        destination_stride: int = 0,
        timeout: float | None = None,
    ) -> Transfer:
        """Starts moving equal pages: page `source_pages[i]` of the source into page `destination_pages[i]` of the
        region. Lists of numbers, or int32 arrays and tensors, copied. Offsets are of page 0, strides between pages (0:
        `page_bytes`), in bytes. The signal rises once, when all pages have landed. Otherwise as `write`."""
        engine = self._engine
        sources, count, keep_sources = indices("source_pages", source_pages)
        destinations, other, keep_destinations = indices("destination_pages", destination_pages)
        if count != other:
            raise InvalidArgument(f"{count} source pages and {other} destination pages; there must be as many")
        native = sized("ept_paged_write")
        native.peer = self.rank
        native.source, native.destination = engine._own(source)._id, engine._own(region)._id
        native.page_bytes = size("page_bytes", page_bytes)
        native.source_offset = size("source_offset", source_offset)
        native.destination_offset = size("destination_offset", destination_offset)
        native.source_stride = size("source_stride", source_stride)
        native.destination_stride = size("destination_stride", destination_stride)
        native.source_pages, native.destination_pages, native.pages = sources, destinations, count
        if signal is not None:
            native.signal = engine._own(signal)._id
        transfer = engine._post("write_paged", timeout, lib.ept_engine_write_paged, native)
        del keep_sources, keep_destinations
        return transfer

    def send(self, data: Any, tag: int = 0, timeout: float | None = None) -> None:
        """A small message, at most `engine.max_message` bytes, copied before this returns. Order isn't promised. Blocks
        only while the peer grants no room. `tag` selects at the receiver; its top bit is eptransport's own."""
        found = view(data)
        native = self._engine._native
        native.call(
            lib.ept_engine_send,
            self.rank,
            size("tag", tag, 2**63 - 1),
            found.address,
            found.length,
            timeout_ns(timeout),
        )

    def mask(self, membership: int, why: str = "") -> None:
        """Stops all traffic with it, here and at once: its keys are revoked, what is under way with it fails with
        PeerLost, and whatever it goes on to send changes nothing. `membership`: the epoch under which that was agreed,
        for the errors to name. Not collective; doesn't block. A group's own `mask` is the one that all ranks agree on.
        """
        self._engine._native.call(
            lib.ept_engine_mask, self.rank, size("membership", membership, 2**32 - 1), why.encode()
        )

    def readmit(self, epoch: int, address: bytes) -> None:
        """Opens it again in its life `epoch`, at that life's address, after it was masked, left or lost. Not
        collective, but it has to do the same; doesn't block: see `wait_up`. InvalidArgument: that life is over."""
        native = self._engine._native
        native.call(lib.ept_engine_readmit, self.rank, size("epoch", epoch, 2**32 - 1), address, len(address))

    def wait_up(self, timeout: float | None = None) -> None:
        """Blocks until it is connected. PeerLost with the reason, Timeout."""
        self._engine._native.call(lib.ept_engine_wait_peer, self.rank, timeout_ns(timeout))

    @property
    def info(self) -> PeerInfo:
        """How it stands now. Doesn't block."""
        info = sized("ept_peer_info")
        self._engine._native.call(lib.ept_engine_peer, self.rank, info)
        return PeerInfo(
            rank=info.rank,
            status=PeerStatus(info.status),
            epoch=info.epoch,
            credits=info.credits,
            queued=info.queued,
            in_flight=info.in_flight,
            silent_s=info.silent_ns / 1e9,
            why=text(info.why),
        )

    def __repr__(self) -> str:
        return f"<Peer {self.rank} of rank {self._engine.rank}>"


@dataclass(frozen=True)
class Write:
    """One write of `Engine.scatter`; fields as the arguments of `Peer.write`. `source` and `region` None: no bytes."""

    peer: Peer | int
    source: Memory | None
    region: Region | None
    length: int
    source_offset: int = 0
    destination_offset: int = 0
    signal: RemoteSignal | None = None
