# SPDX-License-Identifier: Apache-2.0
"""MoE steps over TCP while strangers flood both ranks' ports: the same bits, and the descriptors stay bounded."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Callable

import torch

import eptransport as ept

STEPS = 40
HALF_OPEN = 16


def ports_of(group: ept.Group) -> list[int]:
    """From the address blob: plugins/tcp/address.cc, behind the engine's envelope of 32 bytes."""
    blob = group.engine.address()[32:]
    count = struct.unpack_from("<H", blob, 6)[0]
    return [struct.unpack_from("<BBH", blob, len(blob) - 20 * (count - i))[2] for i in range(count)]


def flood(ports: list[int], stop: threading.Event, said: list[int]) -> None:
    draw = random.Random(5)
    held: list[socket.socket] = []
    while not stop.is_set():
        try:
            stranger = socket.create_connection(("127.0.0.1", draw.choice(ports)), timeout=5)
            stranger.setblocking(False)
            stranger.send(draw.choice([b"E", b"EPTH", b"EPTF" * 40, draw.randbytes(draw.randrange(1, 400))]))
        except OSError:
            continue
        held.append(stranger)
        said[0] += 1
        if len(held) > 100:
            held.pop(draw.randrange(len(held))).close()
    for stranger in held:
        stranger.close()


def test_steps_under_a_flood_have_the_same_bits(ranks: Callable[..., list[ept.Group]]) -> None:
    groups = ranks(2, "tcp", options={"tcp.half_open": str(HALF_OPEN), "tcp.handshake_ms": "1000"})
    draw = torch.Generator().manual_seed(3)
    x = [torch.randn(24, 128, generator=draw).bfloat16() for _ in groups]
    ids = [torch.randint(0, 8, (24, 4), generator=draw) for _ in groups]
    weights = [torch.rand(24, 4, generator=draw) for _ in groups]

    def steps(group: ept.Group) -> list[torch.Tensor]:
        moe = ept.AllToAll(group, num_experts=8, top_k=4, hidden=128, max_tokens=24)
        mine = group.rank
        sums = []
        for _ in range(STEPS):
            got = moe.dispatch(x[mine], ids[mine], weights[mine])
            sums.append(moe.combine(got.x, got))
        return sums

    quiet = ept.loopback_run(groups, steps)
    stop, said = threading.Event(), [0]
    ports = [port for group in groups for port in ports_of(group)]
    before = len(os.listdir("/proc/self/fd"))
    strangers = [threading.Thread(target=flood, args=(ports, stop, said)) for _ in range(2)]
    for thread in strangers:
        thread.start()
    try:
        while said[0] < 50:
            assert any(thread.is_alive() for thread in strangers)
        loud = ept.loopback_run(groups, steps)
        # Ours, and what the strangers of this process hold themselves.
        assert len(os.listdir("/proc/self/fd")) - before <= 2 * HALF_OPEN + 2 * 110 + 64
    finally:
        stop.set()
        for thread in strangers:
            thread.join()
    assert said[0] >= 50
    for rank in range(2):
        for y in (*quiet[rank], *loud[rank]):
            assert torch.equal(y, quiet[rank][0])
