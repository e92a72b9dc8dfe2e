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
from collections.abc import Callable, Sequence
from dataclasses import fields
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Literal

from eptransport._buffers import view
from eptransport._call import call, error_of, ffi, lib, new_error, size, sized, text, timeout_ns
from eptransport._closing import Closing
from eptransport._engine_native import CLOSE_S, NativeEngine, create_engine
from eptransport._notify import Notifier
from eptransport.backends import Plugin
from eptransport.errors import ClosedError, Code, EptError, InvalidArgument, Timeout
from eptransport.handles import BLOB_BYTES, Memory, Region, RemoteSignal, Signal
from eptransport.info import EngineInfo, PeerInfo, PeerStatus, Rail, RailCounters, RailInfo
from eptransport.metrics import Metrics, read_page
from eptransport.peer import Peer, Write
from eptransport.transfer import Transfer

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

ANY_PEER = 2**32 - 1
RETRY_S = 0.0002
"""Between two tries of a transfer that found no room."""
ORPHANS_A_CALL = 16
TRANSFER_POINTER = ffi.typeof("ept_transfer_id *")
"""Looked up once: a name would be parsed for every write."""

_ROLES = {"data": lib.EPT_ROLE_DATA, "signal": lib.EPT_ROLE_SIGNAL}
_SCOPES = {"local": lib.EPT_SCOPE_LOCAL, "remote": lib.EPT_SCOPE_REMOTE}


class Engine(Closing):
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
        self._native = NativeEngine(rank)
        self._native.pointer = create_engine(
            self._native, plugin, rank, world_size, job, secret, settings, epoch, spin_s
        )
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

    def rejoin(self, epoch: int) -> None:
        """Begins another life of this rank: all links end, and `address()` is another one. Memory and signals stay;
        regions, remote signals and exports are stale. InvalidArgument: `epoch` isn't above the present one. Not
        collective; blocks for the backend's threads alone."""
        self._native.call(lib.ept_engine_rejoin, size("epoch", epoch, 2**32 - 1))

    def close(self, timeout: float | None = CLOSE_S) -> None:
        """Says goodbye to the peers, waits at most `timeout` s for what is in flight, frees everything; waits of other
        threads end with ClosedError. Registered memory may be reused from then on. Not collective; closing twice is
        fine."""
        self._finalizer.detach()
        if self._notifier is not None:
            self._notifier.close()
        self._native.close(self.settings.timeout_s if timeout is None else timeout)

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

    def metrics(self) -> Metrics:
        """What it has counted so far. Doesn't block."""
        page = ffi.new("ept_metrics_page const **")
        self._native.guard.enter()
        try:
            call(lib.ept_engine_metrics, self._native.pointer, page)
            found = read_page(page[0])
        finally:
            self._native.guard.leave()
        assert found is not None
        return found

    def why_stuck(self) -> str:
        """See `Group.why_stuck`."""
        self._native.guard.enter()
        try:
            return self._native.why_stuck()
        finally:
            self._native.guard.leave()

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
        handle = ffi.new(TRANSFER_POINTER)
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


class _Clear:
    """Clears the descriptor of an engine without keeping that engine alive."""

    def __init__(self, call: weakref.WeakMethod[Callable[..., int]]) -> None:
        self._call = call

    def __call__(self) -> None:
        call = self._call()
        if call is None:
            raise ClosedError("the engine is gone")
        call(lib.ept_engine_notified)


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
