"""The point-to-point interface: peers, memory, signals, transfers and small messages.

    memory = engine.register(tensor)                       # here
    blob = memory.export(peer)                             # to be sent to the peer, by peer.send or any other way
    region = engine.peer(0).import_region(blob)            # there
    done = engine.peer(0).write(source, region, 4096, signal=remote)
    signal.wait(1)                                         # here: the bytes of one transfer are in `tensor`

Every object may be used from any thread. A wait lets Ctrl-C through.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from time import monotonic, sleep
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from eptransport._buffers import indices, view
from eptransport._call import FOREVER, call, error_of, ffi, lib, new_error, size, sized, text, timeout_ns
from eptransport._guard import Guard
from eptransport._notify import Notifier
from eptransport.backends import Plugin, native_values
from eptransport.errors import ClosedError, Code, EptError, InvalidArgument, Timeout

if TYPE_CHECKING:
    from eptransport.settings import Settings

__all__ = [
    "Engine",
    "EngineInfo",
    "Memory",
    "Peer",
    "PeerInfo",
    "PeerStatus",
    "Rail",
    "RailCounters",
    "RailInfo",
    "Region",
    "RemoteSignal",
    "Signal",
    "Transfer",
    "Write",
]

logger = logging.getLogger("eptransport")

BLOB_BYTES = 4096
ANY_PEER = 2**32 - 1
CLOSE_S = 5.0
"""How long an orderly close waits for what is in flight, unless told otherwise."""
RETRY_S = 0.0002
"""Between two tries of a transfer that found no room."""
ORPHANS_A_CALL = 16
LOG_LINE_BYTES = 1200

_PROGRESS = {"auto": lib.EPT_PROGRESS_AUTO, "thread": lib.EPT_PROGRESS_THREAD, "inline": lib.EPT_PROGRESS_INLINE}
_ROLES = {"data": lib.EPT_ROLE_DATA, "signal": lib.EPT_ROLE_SIGNAL}
_SCOPES = {"local": lib.EPT_SCOPE_LOCAL, "remote": lib.EPT_SCOPE_REMOTE}


class PeerStatus(IntEnum):
    """What is known of a peer's connection."""

    NEW = 0
    CONNECTING = 1
    UP = 2
    LEFT = 3
    LOST = 4


@dataclass(frozen=True)
class PeerInfo:
    """How a peer stands now."""

    rank: int
    status: PeerStatus
    epoch: int
    credits: int
    """Operations with a signal that may still be posted to it now."""
    queued: int
    """Operations held for want of credits or room."""
    in_flight: int
    """Operations posted, not yet locally complete."""
    silent_s: float
    """Since its last sign of life."""
    why: str
    """Why it was lost."""


@dataclass(frozen=True)
class EngineInfo:
    """What the engine really runs with."""

    rails: int
    credits: int
    proxy_threads: int
    spin_s: float
    registered_bytes: int
    regions: int
    """Exported now."""
    signals: int
    """Exported now."""
    unknown_chans: int
    """Immediates that came for a signal which nobody holds: dropped."""
    waived: tuple[int, ...]
    """Clauses of the contract that the backend doesn't keep."""
    max_message: int
    """Bytes of one operation of the backend; a longer write is cut."""


@dataclass(frozen=True)
class RailInfo:
    """One way out of this machine: a port of a card, an interface, or one of several streams over it."""

    name: str
    fabric: str
    numa: int
    """-1: unknown."""
    bits_per_s: int
    """0: unknown."""


@dataclass(frozen=True)
class RailCounters:
    """What went over a rail so far: payload bytes of writes, writes and signals, messages."""

    tx_bytes: int
    tx_operations: int
    rx_bytes: int
    rx_operations: int
    tx_sends: int
    rx_sends: int
    later: int
    """Times the backend had no room."""
    errors: int


class Rail(NamedTuple):
    """A rail and its counters."""

    rail: RailInfo
    counters: RailCounters


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


class Engine:
    """One rank's end of a group over one backend. `Group` makes one and connects it; by itself it is for programs that
    ship addresses in their own way: make one on every rank, ship `address()` of each to all, `connect`,
    `wait_connected`.

    Making one is not collective and doesn't block. `secret` is the job's, the same on every rank, and so is `job`,
    which keeps groups apart. A context manager; an engine that is dropped is closed.
    """

    def __init__(
        self,
        plugin: Plugin,
        *,
        rank: int,
        world_size: int,
        job: str,
        secret: bytes,
        settings: Settings,
        epoch: int = 0,
        spin_s: float | None = None,
    ) -> None:
        self.rank = size("rank", rank, world_size - 1)
        self.world_size = world_size
        self.plugin = plugin
        self.settings = settings
        self._native = _Native(rank)
        self._native.pointer = _create(self._native, plugin, rank, world_size, job, secret, settings, epoch, spin_s)
        self._finalizer = weakref.finalize(self, self._native.close, 0.2)
        self._peers = tuple(Peer(self, other) for other in range(world_size))
        self._orphans: deque[int] = deque()
        self._notifier: Notifier | None = None
        self._notifier_lock = threading.Lock()
        self._received = threading.local()
        self.drain_log()

    # -- set-up --

    def address(self) -> bytes:
        """How peers find this rank: opaque, to be shipped to all. Not collective, doesn't block."""
        length = ffi.new("size_t *", 0)
        self._native.call(lib.ept_engine_address, ffi.NULL, length, allow=Code.LIMIT)
        blob = ffi.new("uint8_t[]", max(length[0], 1))
        self._native.call(lib.ept_engine_address, blob, length)
        return bytes(ffi.buffer(blob, length[0]))

    def join(self, blobs: Sequence[bytes] | None, most: int = BLOB_BYTES) -> tuple[bytes, bool]:
        """One round of a backend's collective join: takes what every rank gave in the round before (None in the first),
        returns what this rank gives and whether it is done. Collective through the caller; doesn't block."""
        out, length = ffi.new("uint8_t[]", most), ffi.new("size_t *")
        pointers, lengths, keep = _blobs(blobs) if blobs is not None else (ffi.NULL, ffi.NULL, None)
        code = self._native.call(lib.ept_engine_join, pointers, lengths, out, most, length)
        del keep
        return bytes(ffi.buffer(out, length[0])), code == Code.OK

    def connect(self, addresses: Sequence[bytes]) -> None:
        """Starts connecting to all ranks; `addresses[rank]` of this one is ignored. Doesn't block; then
        `wait_connected`."""
        if len(addresses) != self.world_size:
            raise InvalidArgument(f"{len(addresses)} addresses for {self.world_size} ranks")
        pointers, lengths, keep = _blobs(addresses)
        self._native.call(lib.ept_engine_connect, pointers, lengths)
        del keep

    def wait_connected(self, timeout: float | None = None) -> None:
        """Blocks until every peer is up. Timeout, PeerLost, AuthError (another secret), VersionError."""
        self._native.call(lib.ept_engine_wait_connected, timeout_ns(timeout))

    def close(self, timeout: float | None = CLOSE_S) -> None:
        """Says goodbye to the peers, waits at most `timeout` s for what is in flight, frees everything; waits of other
        threads end with ClosedError. Registered memory may be reused from then on. Not collective; closing twice is
        fine."""
        self._finalizer.detach()
        if self._notifier is not None:
            self._notifier.close()
        self._native.close(self.settings.timeout_s if timeout is None else timeout)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._native.closed

    @property
    def handle(self) -> Any:
        """The `ept_engine *` of the C API, for code that calls that by itself; valid until `close`."""
        return self._native.pointer

    # -- what one works with --

    def peer(self, rank: int) -> Peer:
        """The other end at `rank`, which is another rank than this one."""
        if rank == self.rank:
            raise InvalidArgument(f"rank {rank} is this engine's own: nothing goes over the network to oneself")
        return self._peers[size("rank", rank, self.world_size - 1)]

    def register(self, buffer: Any, *, role: Literal["data", "signal"] = "data") -> Memory:
        """Makes memory of the caller known to the network: a CPU tensor, a numpy array, anything with the buffer
        protocol; contiguous. It stays the caller's, and is kept alive until `Memory.close` or `Engine.close`. Read-only
        memory may only be a source. Not collective, doesn't block. InvalidArgument, UnsupportedError, LimitError,
        OutOfMemory."""
        if role not in _ROLES:
            raise InvalidArgument(f"role={role!r}: must be data or signal")
        found = view(buffer)
        if not found.length:
            raise InvalidArgument("memory of no bytes can't be registered; a transfer of length 0 needs none")
        described = _host_memory(found.address, found.length, _ROLES[role], found.writable)
        handle = ffi.new("ept_memory_id *")
        self._native.call(lib.ept_memory_register, described, handle)
        self._native.keep[("memory", handle[0])] = found.owner
        return Memory(self, handle[0], found.length)

    def signal(self, source: int, label: str = "", home: Any = None) -> Signal:
        """A 64-bit counter here which rank `source` raises by its transfers. `label` stands in errors. `home` is where
        the count lives: 8 zeroed bytes, 8-aligned, which are kept alive; by default the engine's own. Doesn't block."""
        described, owner = ffi.NULL, None
        if home is not None:
            found = view(home)
            if found.length != 8 or not found.writable:
                raise InvalidArgument(f"home of {found.length} bytes, writable: {found.writable}; must be 8, writable")
            described, owner = _host_memory(found.address, 8, lib.EPT_ROLE_SIGNAL, True), found.owner
        handle = ffi.new("ept_signal_id *")
        number = size("source", source, self.world_size - 1)
        self._native.call(lib.ept_signal_create, number, label.encode(), described, handle)
        self._native.keep[("signal", handle[0])] = owner
        return Signal(self, handle[0], number, label)

    def scatter(self, writes: Sequence[Write], *, timeout: float | None = None) -> Transfer:
        """Many writes, to any peers, as one transfer with one local completion. All are taken or none. Blocks only
        while there is no room, at most `timeout` s. Sources stay untouched until the transfer is complete."""
        array = ffi.new("ept_write[]", max(len(writes), 1))
        for index, write in enumerate(writes):
            peer = self.peer(write.peer) if isinstance(write.peer, int) else write.peer
            self._fill(array[index], peer, write)
        return self._post("scatter", timeout, lib.ept_engine_scatter, array, len(writes))

    def recv(self, tag: int = 0, peer: Peer | int | None = None, timeout: float | None = None) -> tuple[int, bytes]:
        """The next message with `tag`, from `peer` or from any: its sender's rank and a copy of its bytes. Blocks."""
        rank = ANY_PEER if peer is None else self.peer(peer).rank if isinstance(peer, int) else peer.rank
        buffer = getattr(self._received, "buffer", None)
        if buffer is None:
            buffer = self._received.buffer = ffi.new("uint8_t[]", self.max_message)
        length, sender = ffi.new("size_t *", len(buffer)), ffi.new("uint32_t *")
        wait = timeout_ns(timeout)
        self._native.call(lib.ept_engine_recv, rank, size("tag", tag), buffer, length, sender, wait)
        return sender[0], bytes(ffi.buffer(buffer, length[0]))

    @property
    def max_message(self) -> int:
        """Bytes of the longest message that `Peer.send` takes."""
        most = ffi.new("size_t *")
        self._native.plain(lib.ept_engine_max_message, most)
        return int(most[0])

    def quiesce(
        self,
        memory: Memory | None = None,
        scope: Literal["local", "remote"] = "local",
        timeout: float | None = None,
    ) -> None:
        """Blocks until no thread and no NIC will touch `memory` (None: any). `local`: for what this rank posted.
        `remote`: its exports are revoked, and the peers that hold them have answered or are fenced. Not collective.
        StuckError names the smallest thing to tear down."""
        if scope not in _SCOPES:
            raise InvalidArgument(f"scope={scope!r}: must be local or remote")
        number = 0 if memory is None else self._own(memory)._id
        self._native.call(lib.ept_engine_quiesce, number, _SCOPES[scope], timeout_ns(timeout))

    def progress(self) -> int:
        """Moves the network on once and returns how many events that brought. Doesn't block. For EPT_PROGRESS=inline;
        elsewhere waits and the proxy do it."""
        count = self._native.call(lib.ept_engine_progress)
        self._reap()
        self.drain_log()
        return count

    def failures(self) -> list[EptError]:
        """Failures of transfers that nobody waits for, each once. Doesn't block."""
        found = []
        error = new_error()
        while self._native.plain(lib.ept_engine_failure, error) == Code.OK:
            found.append(error_of(error.code, error))
        return found

    def info(self) -> EngineInfo:
        """What it runs with, now. Doesn't block."""
        info = sized("ept_engine_info")
        info.caps.size = ffi.sizeof("ept_caps")
        self._native.call(lib.ept_engine_info_get, info)
        return EngineInfo(
            rails=info.rails,
            credits=info.credits,
            proxy_threads=info.proxy_threads,
            spin_s=info.spin_ns / 1e9,
            registered_bytes=info.registered_bytes,
            regions=info.regions,
            signals=info.signals,
            unknown_chans=info.unknown_chans,
            waived=tuple(clause for clause in range(1, 32) if info.caps.waived >> clause & 1),
            max_message=info.caps.max_message,
        )

    def rails(self) -> tuple[Rail, ...]:
        """The ways out of this machine with their counters. Doesn't block."""
        found = []
        for index in range(self.info().rails):
            rail, counters = sized("ept_rail"), sized("ept_rail_counters")
            self._native.call(lib.ept_engine_rail, index, rail, counters)
            about = RailInfo(text(rail.name), text(rail.fabric), rail.numa, rail.bits_per_s)
            found.append(
                Rail(about, RailCounters(**{each.name: getattr(counters, each.name) for each in fields(RailCounters)}))
            )
        return tuple(found)

    def drain_log(self) -> None:
        """Hands what native code has to say to the logger `eptransport`. Calls that wait, or fail, do it by
        themselves."""
        self._native.drain_log()

    # -- for the other modules of the package --

    def _own(self, thing: Any) -> Any:
        """Handles are numbers of one engine: one of another would name something else here."""
        if thing._engine is not self:
            raise InvalidArgument(f"{thing!r} belongs to another engine")
        return thing

    def _fill(self, native: Any, peer: Peer, write: Write) -> None:
        native.size = ffi.sizeof("ept_write")
        native.peer = self._own(peer).rank
        native.length = size("length", write.length)
        if write.source is not None:
            native.source = self._own(write.source)._id
            native.source_offset = size("source_offset", write.source_offset)
        if write.region is not None:
            native.destination = self._own(write.region)._id
            native.destination_offset = size("destination_offset", write.destination_offset)
        if write.signal is not None:
            native.signal = self._own(write.signal)._id

    def _post(self, what: str, timeout: float | None, function: Callable[..., int], *args: Any) -> Transfer:
        handle = ffi.new("ept_transfer_id *")
        if self._orphans:
            self._reap()
        if self._native.call(function, *args, handle) == Code.LATER:
            self._post_later(what, timeout, function, *args, handle)
        return Transfer(self, handle[0], what)

    def _post_later(self, what: str, timeout: float | None, function: Callable[..., int], *args: Any) -> None:
        """Past the credits and a bounded queue: moves the network on until there is room."""
        length = self.settings.timeout_s if timeout is None else timeout
        deadline = monotonic() + length
        while self._native.call(function, *args) == Code.LATER:
            if monotonic() >= deadline:
                raise Timeout(f"{what}: no room in {length:g} s; the peer grants no credits", operation=what)
            if not self._native.call(lib.ept_engine_progress):
                sleep(RETRY_S)

    def _reap(self) -> None:
        """Ends transfers whose object was dropped before anyone waited; their failures are logged."""
        for _ in range(min(len(self._orphans), ORPHANS_A_CALL)):
            try:
                orphan = self._orphans.popleft()
            except IndexError:
                return
            try:
                if self._native.call(lib.ept_transfer_wait, orphan, 0, allow=Code.TIMEOUT) != Code.OK:
                    self._orphans.append(orphan)
            except ClosedError:
                return
            except EptError as error:
                logger.warning("rank %d: a transfer that nobody waited for failed: %s", self.rank, error)

    def _notifications(self) -> Notifier:
        with self._notifier_lock:
            if self._notifier is None:
                descriptor = ffi.new("int32_t *")
                self._native.call(lib.ept_engine_notify_fd, descriptor)
                inline = self.settings.progress == "inline"
                clear = weakref.WeakMethod(self._native.call)
                self._notifier = Notifier(descriptor[0], _Clear(clear), inline)
            return self._notifier

    def __repr__(self) -> str:
        return f"<Engine rank {self.rank} of {self.world_size} over {self.plugin.name}>"


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
        native = ffi.new("ept_write *")
        self._engine._fill(native, self, Write(self, source, region, length, source_offset, destination_offset, signal))
        return self._engine._post("write", timeout, lib.ept_engine_write, native)

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


class _Handle:
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

    def _free(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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


class Transfer:
    """Something that was posted. Complete means locally: the source may be reused; it says nothing about the target.

    Dropped unwaited it goes on all the same, and a failure is logged. One wait at a time; the outcome stays.
    """

    def __init__(self, engine: Engine, number: int, what: str) -> None:
        self._engine = engine
        self._id = number
        self._what = what
        self._ended = False
        self._error: EptError | None = None
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> None:
        """Blocks until it is complete, and raises its error if it failed. Timeout leaves it under way."""
        with self._lock:
            self._look(timeout_ns(timeout), allow=0)
        if self._error is not None:
            raise self._error

    @property
    def done(self) -> bool:
        """Complete or failed. Doesn't block."""
        if not self._ended and self._lock.acquire(blocking=False):
            try:
                self._look(0, allow=Code.TIMEOUT)
            finally:
                self._lock.release()
        return self._ended

    def __await__(self) -> Generator[Any, None, None]:
        """As `wait` with the engine's own timeout, without blocking the event loop. Cancelling only forgets the
        wait."""
        engine = self._engine
        yield from (
            engine._notifications()
            .until(
                f"local completion of {self._what}",
                lambda: self.done,
                lambda: None if self._ended else engine._native.call(lib.ept_transfer_notify, self._id),
                engine.settings.timeout_s,
            )
            .__await__()
        )
        if self._error is not None:
            raise self._error

    def _look(self, timeout: int, allow: int) -> None:
        if self._ended:
            return
        try:
            if self._engine._native.call(lib.ept_transfer_wait, self._id, timeout, allow=allow) == Code.OK:
                self._ended = True
        except (Timeout, ClosedError):
            raise
        except EptError as error:
            self._ended, self._error = True, error

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self._engine._orphans.append(self._id)

    def __repr__(self) -> str:
        return f"<Transfer {self._what} of rank {self._engine.rank}{', ended' if self._ended else ''}>"


class _Native:
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
        self.keep: dict[Any, Any] = {}
        self.children: dict[int, Callable[[], None]] = {}
        self.handle = ffi.new_handle(self)

    def call(self, function: Callable[..., int], *args: Any, allow: int = 0) -> int:
        """`function(engine, *args, error)`, as `_call.call`."""
        self.guard.enter()
        try:
            return call(function, self.pointer, *args, allow=allow)
        except Exception:
            self.drain_log()
            raise
        finally:
            self.guard.leave()

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
        if code < 0:
            logger.warning("rank %d: closing the engine: %s", self.rank, text(error.text))


class _Clear:
    """Clears the descriptor of an engine without keeping that engine alive."""

    def __init__(self, call: weakref.WeakMethod[Callable[..., int]]) -> None:
        self._call = call

    def __call__(self) -> None:
        call = self._call()
        if call is None:
            raise ClosedError("the engine is gone")
        call(lib.ept_engine_notified)


def _create(
    native: _Native,
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
    cpus = ffi.new("int32_t[]", list(settings.proxy_cpus or ()))
    if settings.proxy_cpus:
        config.proxy_cpus, config.proxy_cpu_count = cpus, len(settings.proxy_cpus)
    config.stripe_bytes = settings.stripe_bytes or 0
    config.interrupted, config.interrupted_context = lib.ept_python_interrupted, native.handle
    pointer = ffi.new("ept_engine **")
    call(lib.ept_engine_create, config, pointer)
    del keep_values
    return pointer[0]


def _host_memory(address: Any, length: int, role: int, writable: bool) -> Any:
    memory = sized("ept_memory")
    memory.kind, memory.address, memory.length = lib.EPT_MEMORY_HOST, ffi.cast("void *", address), length
    memory.cuda_device, memory.fd = -1, -1
    memory.role = role
    memory.access = lib.EPT_ACCESS_LOCAL | (lib.EPT_ACCESS_REMOTE_WRITE if writable else 0)
    return memory


def _blobs(blobs: Sequence[bytes]) -> tuple[Any, Any, Any]:
    keep = [ffi.from_buffer(blob) for blob in blobs]
    pointers = ffi.new("void const *[]", [ffi.cast("void *", pointer) for pointer in keep])
    return pointers, ffi.new("size_t[]", [len(blob) for blob in blobs]), keep
