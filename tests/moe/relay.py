# SPDX-License-Identifier: Apache-2.0
"""A machine in the middle of all connections of a group over TCP, which breaks them at random while it is told to."""

from __future__ import annotations

import json
import random
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from eptransport._bootstrap import LocalStore

ENVELOPE, HEADER, ENDPOINT = 32, 72, 20
"""Bytes of an address blob: what the engine puts in front, what the plugin does, and one endpoint behind that."""


@dataclass
class Link:
    ends: tuple[socket.socket, socket.socket]
    held: list[bytes] = field(default_factory=lambda: [b"", b""])

    def other(self, end: socket.socket) -> int:
        return 1 if end is self.ends[0] else 0


class Relay(threading.Thread):
    """Everything happens on its one thread; `doors` are made by whoever needs one."""

    def __init__(self, seed: int, every_s: float) -> None:
        super().__init__(daemon=True)
        self.breaking = threading.Event()
        self.broken = 0
        self._random = random.Random(seed)
        self._every_s = every_s
        self._doors: dict[socket.socket, int] = {}
        self._links: list[Link] = []
        self._over = threading.Event()
        self.start()

    def door(self, port: int) -> int:
        """A port that leads to `port`."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        listener.setblocking(False)
        self._doors = {**self._doors, listener: port}
        return int(listener.getsockname()[1])

    def close(self) -> None:
        self._over.set()
        self.join(10)

    def run(self) -> None:
        due = 0.0
        while not self._over.is_set():
            with selectors.DefaultSelector() as ready:
                for listener in self._doors:
                    ready.register(listener, selectors.EVENT_READ)
                for link in self._links:
                    for index, end in enumerate(link.ends):
                        wanted = selectors.EVENT_READ if not link.held[1 - index] else 0
                        wanted |= selectors.EVENT_WRITE if link.held[index] else 0
                        if wanted:
                            ready.register(end, wanted, link)
                found = ready.select(0.005)
            for key, _ in found:
                if key.data is None:
                    self._accept(key.fileobj)  # type: ignore[arg-type]
            for link in {id(key.data): key.data for key, _ in found if key.data is not None}.values():
                self._move(link)
            if self.breaking.is_set() and self._links and time.monotonic() > due:
                due = time.monotonic() + self._every_s * self._random.uniform(0.5, 1.5)
                self._break(self._random.choice(self._links))
        for link in self._links:
            self._end(link, hard=False)
        for listener in self._doors:
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self._doors[listener]))
        except OSError:
            near.close()
            return
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._links.append(Link((near, far)))

    def _move(self, link: Link) -> None:
        """Passes on what there is; a side that has ended ends the other."""
        for end in link.ends:
            other = link.other(end)
            try:
                if not link.held[other]:
                    link.held[other] = end.recv(65536)
                    if not link.held[other]:
                        self._drop(link, hard=False)
                        return
            except BlockingIOError:
                continue
            except OSError:
                self._drop(link, hard=True)
                return
        for index, end in enumerate(link.ends):
            try:
                if link.held[index]:
                    link.held[index] = link.held[index][end.send(link.held[index]) :]
            except BlockingIOError:
                continue
            except OSError:
                self._drop(link, hard=True)
                return

    def _break(self, link: Link) -> None:
        """Some of what is there gets through, perhaps a part of a frame; then both sides see an end or a reset."""
        for end in link.ends:
            index = link.other(end)
            try:
                came = link.held[index] + end.recv(65536)
                link.ends[index].send(came[: self._random.randint(0, len(came))])
            except OSError:
                pass
        self._drop(link, hard=self._random.random() < 0.5)
        self.broken += 1

    def _drop(self, link: Link, *, hard: bool) -> None:
        self._end(link, hard=hard)
        self._links.remove(link)

    @staticmethod
    def _end(link: Link, *, hard: bool) -> None:
        for end in link.ends:
            if hard:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


class Detour(LocalStore):
    """A store that puts a door of the relay into every address that a rank says."""

    def __init__(self, relay: Relay) -> None:
        super().__init__()
        self._relay = relay

    def set(self, key: str, value: str, /) -> None:
        said: dict[str, Any] = json.loads(value) if "address" in key else {}
        if said.get("said"):
            said["said"]["address"] = self._through(bytes.fromhex(said["said"]["address"])).hex()
            value = json.dumps(said)
        super().set(key, value)

    def _through(self, blob: bytes) -> bytes:
        magic, version, endpoints = struct.unpack_from("=IHH", blob, ENVELOPE)
        assert (magic, version) == (0x41545045, 1)
        assert len(blob) == ENVELOPE + HEADER + endpoints * ENDPOINT
        (port,) = struct.unpack_from("=H", blob, ENVELOPE + HEADER + 2)
        head = bytearray(blob[: ENVELOPE + HEADER])
        struct.pack_into("=H", head, ENVELOPE + 6, 1)
        only = struct.pack("=BBH16s", 4, 8, self._relay.door(port), socket.inet_aton("127.0.0.1"))
        return bytes(head) + only
