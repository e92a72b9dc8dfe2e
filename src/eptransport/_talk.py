"""A plain TCP connection between two processes that test their network: who is there, and what each has to say.

One side listens, the other dials. A word is one line of JSON, at most LONGEST_BYTES, and both say theirs at each stage.
With `EPT_SECRET` each proves that it holds it, over both sides' nonces, before anything else is said; without, whoever
reaches the port is believed, and the secret of the test goes over the connection.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import socket
import time
from typing import Any

from eptransport import _record as record
from eptransport._closing import Closing
from eptransport.errors import AuthError, InvalidArgument, MismatchError, TransportError

__all__ = ["Talk", "dial", "listen", "place"]

PROTOCOL = "eptransport doctor 1"
LONGEST_BYTES = 1 << 20
"""An address of 32 rails is some kilobytes."""
RETRY_S = 0.1
_FIRST: record.Shape = {
    "protocol": record.a_text,
    "nonce": record.hexadecimal,
    "secret": lambda value: isinstance(value, bool),
}


class Talk(Closing):
    """The connection. `rank` is 0 for who listened, 1 for who dialled."""

    def __init__(self, connection: socket.socket, rank: int, secret: bytes | None, limit_s: float) -> None:
        connection.settimeout(limit_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rank = rank
        self._socket = connection
        self._unread = b""
        self._limit_s = limit_s
        try:
            self._prove(secret)
        except BaseException:
            self.close()
            raise

    def swap(self, stage: str, word: dict[str, Any], shape: record.Shape, wait_s: float = 0.0) -> dict[str, Any]:
        """Says `word` and returns the other's of the same stage. `wait_s`: what the other may be busy with by itself.
        An error that the other has said instead is raised."""
        self._say({"stage": stage, **word})
        heard = self._hear(stage, wait_s)
        if isinstance(heard.get("error"), str):
            raise TransportError(f"the other side failed: {heard['error']}", operation=stage, peer=1 - self.rank)
        if heard.get("stage") != stage:
            raise self._garbled(stage, f"it is of stage {heard.get('stage')!r:.40}")
        try:
            return record.check(heard, shape)
        except record.Garbled as problem:
            raise self._garbled(stage, str(problem)) from None

    def fail(self, error: Exception) -> None:
        """Tells the other side, which may wait, that there is nothing to wait for."""
        with contextlib.suppress(TransportError):
            self._say({"stage": "failed", "error": str(error)})

    def close(self) -> None:
        self._socket.close()

    def _prove(self, secret: bytes | None) -> None:
        nonces = {self.rank: os.urandom(16)}
        word = {"protocol": PROTOCOL, "nonce": nonces[self.rank].hex(), "secret": secret is not None}
        heard = self.swap("hello", word, _FIRST)
        if heard["protocol"] != PROTOCOL:
            raise self._garbled("hello", f"its protocol is {heard['protocol']!r:.40}")
        if heard["secret"] != (secret is not None):
            raise MismatchError("EPT_SECRET is set on one side only; set it on both, or on none", operation="hello")
        if secret is None:
            return
        nonces[1 - self.rank] = bytes.fromhex(heard["nonce"])

        def proof(rank: int) -> str:
            said = b"|".join((PROTOCOL.encode(), bytes([rank]), nonces[0], nonces[1]))
            return hmac.new(secret, said, hashlib.sha256).hexdigest()

        theirs = self.swap("proof", {"mac": proof(self.rank)}, {"mac": record.hexadecimal})
        if not hmac.compare_digest(theirs["mac"], proof(1 - self.rank)):
            raise AuthError("the other side has another EPT_SECRET", operation="hello", peer=1 - self.rank)

    def _say(self, word: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(word).encode() + b"\n")
        except OSError as problem:
            raise self._gone(problem) from None

    def _hear(self, stage: str, wait_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + self._limit_s + wait_s
        while b"\n" not in self._unread:
            if len(self._unread) > LONGEST_BYTES:
                raise self._garbled(stage, "it has no end")
            try:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                more = self._socket.recv(65536)
            except OSError as problem:
                raise self._gone(problem) from None
            if not more:
                raise self._gone(None)
            self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        try:
            return record.read(line)
        except record.Garbled as problem:
            raise self._garbled(stage, str(problem)) from None

    def _gone(self, problem: OSError | None) -> TransportError:
        why = "it was closed" if problem is None else str(problem)
        return TransportError(f"the connection to the other doctor failed: {why}", peer=1 - self.rank)

    def _garbled(self, stage: str, problem: str) -> TransportError:
        return TransportError(
            f"what the other side said at stage {stage} is no word of {PROTOCOL}: {problem}; is it another version, or "
            "another program?",
            operation=stage,
            peer=1 - self.rank,
        )


def place(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[IPV6]:PORT` or `PORT` (any address)."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"{text!r} is no HOST:PORT")
    return host.strip("[]"), int(port)


def listen(where: str) -> socket.socket:
    """A socket that one peer can dial. Port 0: any that is free."""
    host, port = place(where)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        waiting = socket.socket(found[0], found[1])
        waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        waiting.bind(found[4])
        waiting.listen(1)
    except OSError as problem:
        raise TransportError(f"can't listen on {where}: {problem}", operation="listen") from None
    return waiting


def dial(where: str, limit_s: float) -> socket.socket:
    """A connection to who listens there, or will soon."""
    host, port = place(where)
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return socket.create_connection((host or "localhost", port), max(0.1, deadline - time.monotonic()))
        except OSError as problem:
            if time.monotonic() > deadline:
                raise TransportError(
                    f"no doctor listens on {where}, or a firewall lies between: {problem}; run `eptransport doctor "
                    f"--listen {port}` there, and let TCP port {port} through",
                    operation="dial",
                ) from None
            time.sleep(RETRY_S)
