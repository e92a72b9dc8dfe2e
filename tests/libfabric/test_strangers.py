# SPDX-License-Identifier: Apache-2.0
"""Who isn't of the job, and finds a rank's port or its endpoint: nothing that it says moves or ends anything, the peers
work on, and a line in the log tells."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from libfabrics import FOLDER, Libfabric, cases

import eptransport as ept
from eptransport.backends import registry
from eptransport.conformance import subject
from eptransport.conformance.world import World, warnings
from eptransport.engine import PeerStatus

Spawn = Callable[..., list[Any]]

MAGIC, VERSION = 0x46545045, 1
"""handshake.h"""
HELLO, ACK, SEND, BYE = 1, 2, 3, 4
SLOT = 1 << 16
"""Of each of the peers' own transfers."""


def sockaddr(address: bytes) -> bytes:
    """Where the one rail of a rank listens: its address ends with a length and that."""
    length = next(n for n in (16, 28) if address[-n - 2 : -n] == struct.pack("<H", n))
    return address[-length:]


def head(kind: int = HELLO, body: int = 128, **fields: int) -> bytes:
    """A message's head as rank 0 would write it to rank 1, but for its token."""
    say = {"magic": MAGIC, "version": VERSION, "rail": 0, "sender": 0, "life": 0, "to": 1, "to_life": 0} | fields
    return struct.pack(
        "<IHBBIIIIII16s",
        *(say["magic"], say["version"], kind, say["rail"], say["sender"], say["life"], say["to"], say["to_life"]),
        *(body, 0, bytes(16)),
    )


def messages(draw: random.Random) -> list[bytes]:
    """Each thing that a message can get wrong, then any."""
    greeting = draw.randbytes(128)
    wrong = [
        b"",
        b"E",
        head()[:-1],
        head(body=0),  # a greeting that is not there
        head() + greeting[:-1],
        head() + greeting + b"more",
        head(body=127) + greeting[:127],
        head(body=2**32 - 1) + greeting,
        head(magic=MAGIC + 1) + greeting,
        head(version=VERSION + 1) + greeting,
        head(version=0) + greeting,
        head(rail=255) + greeting,
        head(sender=2) + greeting,
        head(sender=2**32 - 1) + greeting,
        head(sender=1) + greeting,
        head(life=7) + greeting,
        head(to=0) + greeting,
        head(to_life=7) + greeting,
        head() + greeting,
        head(ACK) + greeting,
        head(HELLO) + bytes(128),
        head(SEND, 100) + bytes(100),
        head(SEND, 0),
        head(BYE, 0),
        head(BYE, 128) + greeting,
        head(0) + greeting,
        head(5) + greeting,
        head(255, 0),
        head(SEND, 8144) + bytes(8144),  # as long as a receive
        head(SEND, 8145) + bytes(8145),
        head(SEND, 1 << 20) + bytes(1 << 20),
    ]
    kinds = [draw.choice((HELLO, ACK, SEND, BYE, draw.randrange(256))) for _ in range(100)]
    return wrong + [head(kind, length) + draw.randbytes(length) for kind in kinds for length in (draw.randrange(300),)]


def raw_bytes(world: World, address: bytes) -> None:
    """Connections to the provider's own port: nothing, a little, a lot, what looks like a header of some protocol."""
    draw = random.Random(5)
    family = socket.AF_INET if len(address) == 16 else socket.AF_INET6
    (port,) = struct.unpack_from(">H", address, 2)
    place = socket.inet_ntop(family, address[4:8] if family == socket.AF_INET else address[8:24])
    held = []
    for _ in range(30):
        one = socket.socket(family, socket.SOCK_STREAM)
        one.settimeout(60)
        one.connect((place, port))
        one.setblocking(False)
        words = draw.choice(
            (
                b"",
                draw.randbytes(draw.choice((1, 8, 64, 1000, 100_000))),
                bytes(draw.choice((8, 64, 4096))),
                b"\xff" * draw.choice((8, 64, 4096)),
                b"GET / HTTP/1.0\r\n\r\n",
                bytes(draw.choices(range(8), k=2)) + draw.randbytes(300),
            )
        )
        with contextlib.suppress(OSError):  # it has hung up already
            one.send(words)
        if draw.random() < 0.5:
            one.close()
        else:
            held.append(one)
        world.step(5)
    for one in held:
        one.close()


def words(world: World, address: bytes, folder: Path, command: list[str]) -> list[str]:
    """Messages of a stranger's endpoint, then its writes with keys that it guessed. What it was answered."""
    draw = random.Random(6)
    requests = [(b"m", text) for text in messages(draw)]
    for _ in range(5):
        requests.append((b"w", struct.pack("<QQQ", draw.getrandbits(32), draw.getrandbits(48), draw.getrandbits(64))))
    (folder / "requests").write_bytes(b"".join(struct.pack("<cI", kind, len(text)) + text for kind, text in requests))
    with (
        open(folder / "requests", "rb") as said,
        open(folder / "answers", "wb") as heard,
        subprocess.Popen([*command, address.hex()], stdin=said, stdout=heard) as stranger,
    ):
        try:
            world.until(lambda: stranger.poll() is not None, "the stranger has said all", 100.0)
        finally:
            stranger.kill()
    assert stranger.returncode == 0
    answers = (folder / "answers").read_text().split()
    assert len(answers) == len(requests)
    return answers


def visited(_rank: int, _n: int, folder: Path, options: dict[str, str], command: list[str]) -> list[str]:
    """Two ranks that work before, while and after rank 1 is visited. What was warned of."""
    lines: list[str] = []
    under = replace(subject(registry(()).plugins["libfabric"], options), patience_s=60.0)
    with warnings(lines), World(under, dead_s=60.0) as world:
        routes = [world.route(0, 1, 3 * SLOT), world.route(1, 0, 3 * SLOT)]
        address = sockaddr(world.engines[1].address())
        world.settle([route.write(0, SLOT) for route in routes])
        under_way = [route.write(SLOT, SLOT) for route in routes]
        if command:
            answers = words(world, address, folder, command)
            assert answers[0] == "ok", answers  # it was there, and was heard
            assert "ok" not in answers[-5:], f"a write with a guessed key was let through: {answers}"
        else:
            raw_bytes(world, address)
        world.settle(under_way)
        world.settle([route.write(2 * SLOT, SLOT) for route in routes])
        for route in routes:
            route.counted(3, "after a visit")
            route.look("after a visit")
        assert [engine.peer(1 - engine.rank).info.status for engine in world.engines] == [PeerStatus.UP] * 2
        assert not any(engine.failures() for engine in world.engines)
        assert not any(engine.info().unknown_chans for engine in world.engines)
        for engine in world.engines:
            with pytest.raises(ept.Timeout):
                engine.recv(timeout=0)  # no message of the stranger's was taken for a peer's
    return lines


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None or not (FOLDER / "include" / "rdma" / "fabric.h").exists():
        pytest.skip("no C compiler, or no headers of libfabric: make libfabric")
    program = tmp_path_factory.mktemp("stranger") / "stranger"
    source = Path(__file__).parent / "stranger.c"
    subprocess.run([compiler, "-w", f"-I{FOLDER / 'include'}", "-o", str(program), str(source), "-ldl"], check=True)
    return str(program)


@pytest.mark.parametrize("case", cases("tcp"))
def test_bytes_of_a_stranger(case: tuple[Libfabric, str], spawn: Spawn) -> None:
    release, provider = case
    assert spawn(1, visited, release.options(provider), []) == [[]]


@pytest.mark.parametrize("case", cases("tcp"))
def test_messages_of_a_stranger(case: tuple[Libfabric, str], spawn: Spawn, stranger: str) -> None:
    release, provider = case
    layered = "tcp;ofi_rxm" if release.name.startswith("debian") else provider
    (lines,) = spawn(1, visited, release.options(provider), [stranger, release.library, layered])
    assert not isinstance(lines, Exception), lines
    assert any("rank 1: a message from a stranger" in line for line in lines), lines
    assert not any("lost" in line for line in lines), lines
