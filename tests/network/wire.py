# SPDX-License-Identifier: Apache-2.0
"""A wire between network namespaces that can be made slow, lossy, short or dead, with real TCP on both of its ends.

    rank 0 (namespace)      the wire (a process)          rank 1 (namespace)
    +-----------------+     +----------------------+      +-----------------+
    | kernel's TCP/IP |     | delay, loss, reorder |      | kernel's TCP/IP |
    | ept0 (TAP)  ----+---->| rate, up or down     |----->+ ept0 (TAP)      |
    +-----------------+     +----------------------+      +-----------------+

Each rank is a process that moves into a namespace of its own (`join`), makes a TAP device there and hands its
descriptor to the wire, which is a switch that does to each frame what the rank's `Link` says, by seeded decisions, and
counts. Everything is done by system calls: nothing but /dev/net/tun and the right to make a namespace is needed, no
`ip` and no `tc`. Where the kernel has netem, `Netem` makes a device lose and delay by itself, on top.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Joined", "Link", "Netem", "join", "netem_why_not", "run_wire", "why_not"]

CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU = 0x8914, 0x8916, 0x891C, 0x8922
IFF_UP, IFF_RUNNING = 0x1, 0x40
DEVICE = "ept0"
IPV4, IPV6 = b"\x08\x00", b"\x86\xdd"
LONGEST_FRAME = 65536
QUEUE_S = 2.0
"""What a link with a rate holds back at most; a longer queue is dropped at its end, as a router's is."""


@dataclass
class Link:
    """What happens to the frames of one rank, on their way out and on their way in alike."""

    delay_s: float = 0.0
    loss: float = 0.0
    reorder: float = 0.0
    """So many of the frames overtake those that wait: they go without the delay."""
    bytes_per_s: float = 0.0
    """0: as fast as the wire's process."""
    down: bool = False
    mute: bool = False
    """A firewall: what the rank sends is dropped, but for TCP from or to `mute_but`; what it receives is not."""
    mute_but: int = 0


def why_not(sysfs: bool = False) -> str | None:
    """Why no wire can be had here; or none with a /sys that shows it."""
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _unshare()
            if sysfs:
                _show_in_sys()
            device = _make_tap()
            os.close(device)
        except OSError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as told:
        said = told.read().decode()
    return f"no network namespace with a TAP device is to be had here: {said}" if said else None


# ---- a rank's end ----------------------------------------------------------------------------------------------------


def address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


class Joined:
    """A rank in its namespace, and its word with the wire."""

    def __init__(self, talk: socket.socket) -> None:
        self._talk = talk
        self._file = talk.makefile("r")

    def change(self, rank: int, **fields: Any) -> None:
        """From its return on the link of `rank` is so."""
        self._ask({"rank": rank, "fields": fields})

    def counts(self, rank: int) -> dict[str, int]:
        """Of the frames that `rank` has sent: seen, dropped, overtook."""
        return self._ask({"rank": rank, "fields": {}})

    def mtu(self, size: int) -> None:
        """Of this rank's device."""
        _ioctl(SIOCSIFMTU, struct.pack("16sI12x", DEVICE.encode(), size))

    def _ask(self, what: dict[str, Any]) -> dict[str, int]:
        self._talk.sendall(json.dumps(what).encode() + b"\n")
        answer: dict[str, int] = json.loads(self._file.readline())
        return answer


def join(folder: Path, rank: int, limit_s: float = 60.0, sysfs: bool = False) -> Joined:
    """Moves this process (of one thread) into a namespace of its own, on the wire that runs in `folder`. With `sysfs`
    its /sys is the namespace's too: UCX reads there which devices it may use."""
    _unshare()
    if sysfs:
        _show_in_sys()
    device = _make_tap()
    _ioctl(SIOCSIFADDR, struct.pack("16sHH4s8x", DEVICE.encode(), socket.AF_INET, 0, socket.inet_aton(address(rank))))
    mask = socket.inet_aton("255.255.255.0")
    _ioctl(SIOCSIFNETMASK, struct.pack("16sHH4s8x", DEVICE.encode(), socket.AF_INET, 0, mask))
    for name in (DEVICE, "lo"):
        _ioctl(SIOCSIFFLAGS, struct.pack("16sH14x", name.encode(), IFF_UP | IFF_RUNNING))
    talk = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = time.monotonic() + limit_s
    while True:
        try:
            talk.connect(str(folder / "wire"))
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    talk.sendmsg([bytes([rank])], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [device]))])
    os.close(device)
    joined = Joined(talk)
    joined._file.readline()  # the wire holds the device
    return joined


def _unshare() -> None:
    _system("unshare", CLONE_NEWNET)


def _show_in_sys() -> None:
    _system("unshare", CLONE_NEWNS)
    _system("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    _system("mount", b"sysfs", b"/sys", b"sysfs", ctypes.c_ulong(0), None)


def _system(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _make_tap() -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TAP | IFF_NO_PI))
    except OSError:
        os.close(device)
        raise
    return device


def _ioctl(request: int, argument: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, request, argument)


# ---- the wire --------------------------------------------------------------------------------------------------------


class _Port:
    def __init__(self, device: int, talk: socket.socket, link: Link, seed: int) -> None:
        self.device = device
        self.talk = talk
        self.link = link
        self.random = random.Random(seed)
        self.free_at = 0.0  # when the link has carried what it holds
        self.counts = {"seen": 0, "dropped": 0, "overtook": 0}
        self.asked = b""


class _Switch:
    """INVARIANT: a frame that is not dropped leaves no sooner than `delay_s` of both links after it came, in the order
    of its time, but for those that overtake; what a decision is drawn for depends on the seed and the frame's number
    alone."""

    def __init__(self, links: dict[int, Link], seed: int) -> None:
        self.links = links
        self.seed = seed
        self.ports: dict[int, _Port] = {}
        self.homes: dict[bytes, int] = {}
        self.waiting: list[tuple[float, int, int, bytes]] = []
        self.number = 0

    def take(self, rank: int, frame: bytes, now: float) -> None:
        port = self.ports[rank]
        if frame[12:14] == IPV6:
            return  # namespaces chat by it when they please, and the tests don't
        port.counts["seen"] += frame[12:14] == IPV4
        self.homes[frame[6:12]] = rank
        known = self.homes.get(frame[:6])
        if port.link.mute and not _of_port(frame, port.link.mute_but):
            port.counts["dropped"] += 1
            return
        due = self._pass(port, frame, now)
        if due is None:
            return
        targets = [known] if known is not None else [other for other in self.ports if other != rank]
        for target in targets:
            through = self._pass(self.ports[target], frame, due, count=port)
            if through is not None:
                self.number += 1
                heapq.heappush(self.waiting, (through, self.number, target, frame))

    @staticmethod
    def _pass(port: _Port, frame: bytes, now: float, count: _Port | None = None) -> float | None:
        """When the frame is through this port's link; None: never."""
        link, counts = port.link, (count or port).counts
        # Questions for hardware addresses come when they please too: nothing is drawn for them.
        drawn = frame[12:14] == IPV4
        lost = drawn and link.loss > 0 and port.random.random() < link.loss
        overtakes = drawn and link.reorder > 0 and port.random.random() < link.reorder
        if link.down or lost:
            counts["dropped"] += 1
            return None
        due = now + link.delay_s
        if overtakes:
            counts["overtook"] += 1
            due = now
        if link.bytes_per_s:
            begin = max(port.free_at, now)
            if begin - now > QUEUE_S:
                counts["dropped"] += 1
                return None
            port.free_at = begin + len(frame) / link.bytes_per_s
            due += port.free_at - now
        return due

    def give(self, now: float) -> None:
        while self.waiting and self.waiting[0][0] <= now:
            _, _, target, frame = heapq.heappop(self.waiting)
            with contextlib.suppress(OSError):  # its queue is full, or its rank has gone: a lost frame
                os.write(self.ports[target].device, frame)


def _of_port(frame: bytes, number: int) -> bool:
    """Whether it is TCP from or to this port, or no IPv4: a firewall doesn't stop questions for hardware addresses."""
    if frame[12:14] != IPV4:
        return True
    ports = 14 + 4 * (frame[14] & 15)
    return frame[23] == socket.IPPROTO_TCP and number in struct.unpack_from("!HH", frame, ports)


def run_wire(folder: Path, links: dict[int, Link], ready: Any = None, seed: int = 1) -> None:
    """A wire in this process, until it is killed."""
    switch = _Switch(links, seed)
    poller = select.epoll()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(folder / "wire"))
    listener.listen(64)
    poller.register(listener, select.EPOLLIN)
    if ready is not None:
        ready.set()
    what: dict[int, tuple[str, int]] = {listener.fileno(): ("listener", 0)}
    while True:
        timeout = -1.0
        if switch.waiting:
            timeout = max(0.0, switch.waiting[0][0] - time.monotonic())
        for descriptor, _ in poller.poll(timeout):
            kind, rank = what[descriptor]
            if kind == "listener":
                talk, _address = listener.accept()
                said, ancillary, _flags, _from = talk.recvmsg(1, socket.CMSG_SPACE(4))
                device = array.array("i", ancillary[0][2][:4])[0]
                rank = said[0]
                switch.ports[rank] = _Port(device, talk, switch.links.setdefault(rank, Link()), switch.seed + rank)
                what[device], what[talk.fileno()] = ("device", rank), ("talk", rank)
                poller.register(device, select.EPOLLIN)
                poller.register(talk, select.EPOLLIN)
                talk.sendall(b"{}\n")
            elif kind == "device":
                _read_frames(switch, rank)
            elif not _answer(switch, rank):
                poller.unregister(descriptor)
        switch.give(time.monotonic())


def _read_frames(switch: _Switch, rank: int) -> None:
    for _ in range(64):
        try:
            frame = os.read(switch.ports[rank].device, LONGEST_FRAME)
        except OSError:
            return
        switch.take(rank, frame, time.monotonic())


def _answer(switch: _Switch, rank: int) -> bool:
    port = switch.ports[rank]
    said = port.talk.recv(4096)
    port.asked += said
    while b"\n" in port.asked:
        line, port.asked = port.asked.split(b"\n", 1)
        asked = json.loads(line)
        link = switch.links.setdefault(asked["rank"], Link())
        for name, value in asked["fields"].items():
            assert name in asdict(link)
            setattr(link, name, value)
        other = switch.ports.get(asked["rank"])
        port.talk.sendall(json.dumps(other.counts if other else {}).encode() + b"\n")
    return bool(said)


# ---- netem -----------------------------------------------------------------------------------------------------------


def netem_why_not() -> str | None:
    """Why the kernel's own netem can't be had here, asked in a namespace that is thrown away."""
    if shutil.which("tc") is None or shutil.which("unshare") is None:
        return "there is no tc or no unshare"
    command = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    tried = subprocess.run(command, capture_output=True, text=True)
    return None if tried.returncode == 0 else f"tc: {tried.stderr.strip()}"


class Netem:
    """The kernel's netem on this rank's device: for what it sends."""

    @staticmethod
    def set(*what: str) -> None:
        subprocess.run(["tc", "qdisc", "replace", "dev", DEVICE, "root", "netem", *what], check=True)
