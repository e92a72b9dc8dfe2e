"""Writes the corpus of each target: `python tests/fuzz/make_corpus.py`. Inputs are shapes of real traffic, said the way
that the targets read them (their first comment says how); what fuzzing found is kept beside them as `found-*`, by
hand."""

from __future__ import annotations

import struct
from pathlib import Path

HERE = Path(__file__).parent / "corpus"

# plugins/tcp/frame.h
MAGIC_FRAME = 0x46545045
WRITE, SIGNAL, SEND, ACK, REFUSED, FINISH = range(1, 7)
# frames.cc: Mend
MAGIC, KEY, NUMBER, CONSUMED, LENGTH, INSIDE, REVOKE, POST_FIRST = (1 << bit for bit in range(8))
RIGHT = MAGIC | KEY | NUMBER | CONSUMED | LENGTH | INSIDE


def frame(
    kind: int, *, immediate: int = 0, length: int = 0, number: int = 0, consumed: int = 0, offset: int = 0
) -> bytes:
    return struct.pack(
        "<IBBHIIQQQII16s", MAGIC_FRAME, kind, 0, 0, immediate, length, number, consumed, offset, 0, 0, b""
    )


def step(kind: int, mend: int = RIGHT, cut: int = 255, payload: bytes = b"", **fields: int) -> bytes:
    return bytes([mend, cut]) + frame(kind, **fields) + payload[: min(fields.get("length", 0), 64)]


def frames() -> dict[str, bytes]:
    write = step(WRITE, immediate=0x10000005, length=8, offset=16, payload=b"datadata")
    return {
        "write": write,
        "writes": write * 12,
        "write-cut-in-header": step(WRITE, cut=20, immediate=1, length=40, payload=b"x" * 40),
        "write-cut-in-payload": step(WRITE, cut=70, immediate=1, length=40, payload=b"x" * 40),
        "write-long": step(WRITE, immediate=1, length=4096, payload=b"y" * 64),
        "write-empty": step(WRITE, immediate=1),
        "signal": step(SIGNAL, immediate=0x10000005) + step(SIGNAL, immediate=0x10040005),
        "send": step(SEND, length=48, payload=b"m" * 48) * 3,
        "send-cut": step(SEND, cut=80, length=48, payload=b"m" * 48),
        "ack": step(WRITE, mend=RIGHT | POST_FIRST, length=8, payload=b"datadata") + step(ACK),
        "refused": step(ACK, mend=RIGHT | POST_FIRST) + step(REFUSED, mend=MAGIC | CONSUMED, immediate=9, number=2),
        "finish": write + step(FINISH),
        "after-finish": step(FINISH) + write,
        "revoked": step(WRITE, mend=RIGHT | REVOKE, cut=90, length=64, payload=b"r" * 64) + write,
        "wrong-key": step(WRITE, mend=RIGHT & ~KEY, length=8, payload=b"datadata") + write,
        "outside": step(WRITE, mend=RIGHT & ~INSIDE, offset=4090, length=8, payload=b"datadata") + write,
        "overflow": step(WRITE, mend=RIGHT & ~INSIDE, offset=2**64 - 4, length=8, payload=b"datadata"),
        "too-long": step(WRITE, mend=RIGHT & ~LENGTH, length=2**32 - 1),
        "number": step(WRITE, mend=RIGHT & ~NUMBER, number=7, length=8),
        "consumed": step(ACK, mend=MAGIC, consumed=1),
        "magic": step(WRITE, mend=RIGHT & ~MAGIC)[:2] + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 40,
        "type": step(99),
        "all": write + step(SIGNAL) + step(SEND, length=8, payload=b"messages") + step(ACK) + step(FINISH),
    }


# plugins/tcp/handshake.h; acceptor.cc: Right
MAGIC_HANDSHAKE = 0x48545045
HEAD, PLACE, JOB, PROVE, WITNESS, NOT_OPEN, BY_BYTES = (1 << bit for bit in range(7))
MEMBER = HEAD | PLACE | JOB | PROVE | WITNESS
HELLO_BYTES = 256  # at least; what is too much is said after it


def hello(layout: int = 2, world: int = 3, rank: int = 0) -> bytes:
    body = struct.pack("<IHHHHIIIIIII", MAGIC_HANDSHAKE, layout, 136, 1, 1, world, rank, 0, 1, 0, 0, 1)
    limits = struct.pack("<IIIIII", 1, 1 << 20, 16384, 64, 1024, 64)
    return (body + limits).ljust(HELLO_BYTES, b"\0")


def acceptor() -> dict[str, bytes]:
    write = frame(WRITE, immediate=5, length=8) + b"datadata"
    return {
        "member": bytes([MEMBER]) + hello() + write,
        "member-early": bytes([MEMBER | NOT_OPEN]) + hello(),
        "member-by-bytes": bytes([MEMBER | BY_BYTES]) + hello() + frame(FINISH),
        "other-secret": bytes([MEMBER & ~PROVE]) + hello(),
        "other-secret-early": bytes([MEMBER & ~PROVE | NOT_OPEN]) + hello(),
        "other-address": bytes([MEMBER & ~WITNESS]) + hello(),
        "other-job": bytes([MEMBER & ~JOB]) + hello(),
        "other-place": bytes([MEMBER & ~PLACE]) + hello(world=9, rank=7),
        "other-version": bytes([MEMBER & ~PLACE]) + hello()[:8] + struct.pack("<HH", 77, 77) + hello()[12:],
        "stranger": bytes([HEAD | PLACE]) + hello() + write,
        "stranger-proof": bytes([HEAD | PLACE]) + hello() + struct.pack("<IHH", MAGIC_HANDSHAKE, 2, 88) + b"m" * 64,
        "http": bytes([0]) + b"GET / HTTP/1.1\r\nHost: rank1\r\n\r\n",
        "tls": bytes([0]) + bytes.fromhex("16030100f5010000f10303") + b"r" * 200,
        "nothing": bytes([0]),
        "frames-first": bytes([0]) + write * 3,
    }


# dialer.cc: Right
CHALLENGE, SEAL, FIELDS, NOTHING, TWICE, BYTES_ONE_BY_ONE = (1 << bit for bit in range(6))


def challenge() -> bytes:
    return struct.pack("<IHH", MAGIC_HANDSHAKE, 2, 40) + b"n" * 32


def answer(code: int = 0, text: bytes = b"") -> bytes:
    head = struct.pack("<IHHiIIIH6x", MAGIC_HANDSHAKE, 2, 264, code, 0, 1, 0, 1)
    limits = struct.pack("<IIIIII", 1, 1 << 20, 16384, 64, 1024, 64)
    return head + limits + b"\0" * 16 + text.ljust(128, b"\0") + b"\0" * 64


def dialer() -> dict[str, bytes]:
    good = challenge() + answer()
    write = frame(WRITE, immediate=5, length=8) + b"datadata"
    return {
        "member": bytes([CHALLENGE | SEAL | FIELDS]) + good + write,
        "member-later": bytes([CHALLENGE | SEAL | FIELDS | TWICE]) + good + frame(FINISH),
        "member-by-bytes": bytes([CHALLENGE | SEAL | FIELDS | BYTES_ONE_BY_ONE]) + good,
        "refused": bytes([CHALLENGE | SEAL]) + challenge() + answer(-12, b"another job"),
        "refused-unended": bytes([CHALLENGE | SEAL]) + challenge() + answer(-12, b"x" * 128),
        "other-epoch": bytes([CHALLENGE | SEAL]) + challenge() + answer(),
        "later-for-ever": bytes([CHALLENGE | SEAL | TWICE]) + challenge() + answer(1, b"not yet"),
        "stranger": bytes([CHALLENGE]) + good,
        "stranger-raw": bytes([0]) + good,
        "silence": bytes([NOTHING]),
        "ssh": bytes([NOTHING]) + b"SSH-2.0-OpenSSH_9.2p1\r\n",
        "frames-first": bytes([NOTHING]) + write * 2,
    }


def blobs() -> dict[str, bytes]:
    """blobs.cc: first byte 0 address, 1 region, 2 ports, 3 interfaces."""

    def address(endpoints: int = 2, version: int = 1, said: int | None = None) -> bytes:
        head = struct.pack("<IHHIIHH", 0x41545045, version, said or endpoints, 1, 0, 2, 0) + b"h" * 16 + b"n" * 32
        return head + b"".join(struct.pack("<BBH16s", 4, 24, 4000 + i, bytes([10, 0, 0, i])) for i in range(endpoints))

    region = struct.pack("<IHHIIIIQ16s", 0x52545045, 1, 0, 1, 0, 3, 0, 4096, b"k" * 16)
    return {
        "address": b"\0" + address(),
        "address-one": b"\0" + address(1),
        "address-most": b"\0" + address(32),
        "address-claims-more": b"\0" + address(2, said=40),
        "address-version": b"\0" + address(version=9),
        "address-short": b"\0" + address()[:50],
        "region": b"\1" + region,
        "region-short": b"\1" + region[:20],
        "ports": b"\00220000-20100",
        "port": b"\0024000",
        "ports-wrong": b"\2-5-",
        "interfaces": b"\3lo,127.0.0.1,10.0.0.0/8",
        "interfaces-wrong": b"\3nope0,::1/200,1.2.3/",
    }


# engine.cc: Step; native/include/eptransport/wire.h: messages
MESSAGE, IMMEDIATE, LINK, MAKE_SIGNAL, POST_WRITE, POST_SEND, RECEIVE, QUIESCE, TURN, IMPORT = range(10)
HELLO, USER, DESCRIPTOR, ASK, ASKED, GOODBYE, VOID = range(1, 8)
ALL_UP = 0x0F


def say(kind: int, body: bytes = b"", peer: int = 1, how: int = 0) -> bytes:
    return bytes([MESSAGE, (peer - 1) | how, kind, len(body)]) + body


def immediate(code: int, seq: int, chan: int, peer: int = 1, how: int = 0) -> bytes:
    return bytes([IMMEDIATE, (peer - 1) | how]) + struct.pack("<I", code << 28 | (seq & 1023) << 18 | chan)


def call(what: int, how: int = 0) -> bytes:
    return bytes([what, how])


def engine() -> dict[str, bytes]:
    up = bytes([ALL_UP])
    signals = call(TURN) + call(MAKE_SIGNAL, 0) + call(MAKE_SIGNAL, 1)  # chans 7 and 8: three a peer go with its HELLO
    hello_body = struct.pack("<IIIIIIIIQQ", 1, 1, 256, 64, 1, 2, 3, 24, 0, 0) + b"a" * 24
    return {
        "signals": up + signals + b"".join(immediate(1, n, 7) for n in range(4)) + call(TURN),
        "signals-of-another": up + signals + immediate(1, 0, 8) + immediate(1, 0, 7, peer=2) + call(TURN),
        "out-of-order": up + signals + b"".join(immediate(1, n, 7) for n in (3, 1, 0, 2, 0, 1)) + call(TURN),
        "pieces": up + signals + immediate(3, 0, 7) * 3 + immediate(14, 1, 7) * 14 + call(TURN),
        "pieces-too-many": up + signals + immediate(2, 0, 7) * 9 + call(TURN),
        "descriptor": up
        + signals
        + say(DESCRIPTOR, struct.pack("<IIQ", 7, 0, 2))
        + immediate(15, 0, 7) * 2
        + call(TURN),
        "descriptor-huge": up + signals + say(DESCRIPTOR, struct.pack("<IIQ", 7, 0, 2**63)) + immediate(15, 0, 7),
        "descriptor-of-another": up + signals + say(DESCRIPTOR, struct.pack("<IIQ", 8, 0, 2)) + call(TURN),
        "void": up + signals + say(VOID, struct.pack("<IIII", 7, 0, 3, 0)) + immediate(3, 0, 7) * 2 + call(TURN),
        "unknown-chan": up + immediate(1, 0, 262143) + immediate(0, 0, 1) + call(TURN),
        "grants": up + signals + immediate(1, 0, 1, how=8) + immediate(1, 0, 2, how=8) + call(TURN),
        "user": up + call(TURN) + say(USER, b"hello", how=0x10) + call(TURN) + call(RECEIVE, 0x10),
        "user-flood": up + call(TURN) + say(USER, b"x", how=8) * 4 + call(TURN),
        "quiesce": up + call(POST_WRITE, 40) + say(ASK, struct.pack("<QQ", 7, 1)) + call(TURN) * 2,
        "quiesce-flood": up
        + call(POST_WRITE, 40)
        + (say(ASK, struct.pack("<QQ", 2**64 - 1, 1), how=8) + call(TURN)) * 30,
        "quiesced": up + call(QUIESCE, 4) + say(ASKED, struct.pack("<QQ", 1, 1)) + call(TURN),
        "hello-twice": up + call(TURN) + say(HELLO, hello_body) + call(TURN),
        "hello-late": bytes([3]) + call(TURN) + say(HELLO, hello_body) + call(TURN),
        "hello-first": bytes([0]) + say(HELLO, hello_body) + call(TURN) + call(LINK, 0) + call(TURN),
        "hello-short": bytes([3]) + say(HELLO, hello_body[:40]) + call(TURN),
        "goodbye": up + call(TURN) + say(GOODBYE) + call(LINK, 3 << 3) + call(TURN),
        "lost": up
        + signals
        + call(POST_WRITE, 9)
        + call(LINK, 2 << 3)
        + immediate(1, 0, 7)
        + say(USER, b"late")
        + call(TURN),
        "send": up + call(TURN) + call(POST_SEND, 200) * 3 + call(TURN),
        "write": up + call(TURN) + call(POST_WRITE, 200) * 3 + call(TURN),
        "unknown-type": up + say(40, b"later") + call(TURN),
        "raw": up + bytes([MESSAGE, 4, 0, 9]) + b"not a one" + call(TURN),
        "import": up + call(TURN) + bytes([IMPORT, 24]) + struct.pack("<IIIIII", 0x53545045, 1, 1, 0, 0, 9),
    }


def moe() -> dict[str, bytes]:
    """moe.cc: layout, what goes along, tokens; then alterations {write, how, offset, value}."""

    def alter(offset: int, value: int, write: int = 0, how: int = 2) -> bytes:
        return struct.pack("<BBHI", write, how, offset, value)

    def shape(layout: int, extra: int = 4, tokens: int = 0x46) -> bytes:
        return bytes([layout | extra, tokens])

    same = {f"right-{layout}": shape(layout) for layout in range(4)}
    fields = {
        "magic": 0, "source": 8, "lane": 12, "generation": 16, "chunk": 24, "flags": 28, "rows": 32, "total": 36,
        "row-bytes": 40, "scale-bytes": 48, "top-k": 52, "offset": 72, "capacity": 80, "format": 92, "count": 128,
    }  # fmt: skip
    lies = {
        f"{name}-{value:x}": shape(n % 4) + alter(at, value)
        for n, (name, at) in enumerate(fields.items())
        for value in (0, 0x10, 0xFFFFFFF0)
    }
    return {
        **same,
        **lies,
        "quantised": shape(0, 4 | 16),
        "beside": shape(1, 4 | 8),
        "no-weights": shape(2, 0),
        "no-tokens": shape(3, 4, 0x00),
        "counts-wrap": shape(3) + alter(128, 0xFFFFFFF0) + alter(132, 0x20),
        "row-token": shape(0) + alter(192 + 256, 0xFFFF, how=0x82),
        "row-expert": shape(2) + alter(192 + 264, 0x7FFFFFFF, how=0x82),
        "combine-rows": shape(0) + alter(32, 9, write=1) + alter(36, 9, write=1),
        "combine-beside": shape(0) + alter(28, 4, write=1, how=4),
    }


def main() -> None:
    for target in (frames, acceptor, dialer, blobs, engine, moe):
        folder = HERE / target.__name__
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*"):
            if not stale.name.startswith("found-"):
                stale.unlink()
        for name, content in target().items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
