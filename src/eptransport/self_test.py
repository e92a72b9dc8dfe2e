"""`eptransport doctor --peer`: do writes with signals get through between two machines, each way by itself?

    eptransport doctor --listen 7777            # on the one
    eptransport doctor --peer that-host:7777    # on the other

The two talk over a plain TCP connection, agree on the backend that their settings lead to, connect over it, and write
to each other. What counts is what the receiver saw, in bytes and in signals: over EFA
a rule that is missing on one side drops the packets of one direction without a word, and the sender of the other
direction, whose acknowledgements are dropped, looks as lost. So a direction is judged by its far end.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from eptransport import _record as record
from eptransport._agreement import HELLO, agree, compare, first_words
from eptransport._connect import ADDRESS, secret_of
from eptransport._talk import Talk, dial, listen
from eptransport.backends import Choice
from eptransport.engine import Engine
from eptransport.errors import EptError, InvalidArgument, UnsupportedError
from eptransport.settings import Settings
from eptransport.transfer import Transfer

__all__ = ["Direction", "SelfTest", "dialled", "listened", "run"]

WRITES = 8
WRITE_BYTES = 128
"""Each may be a packet of its own, and all must fit what TCP sends before its first acknowledgement (ten packets): the
writes of a direction that gets through arrive though the other, which brings the acknowledgements, is blocked."""
COME_S = 300.0
"""How long who listens waits for the other to be started by hand."""
PATIENCE_S = 3600.0
"""For the engine's own verdict that a peer is dead: here the deadline of each stage decides, and a peer that is deaf
must be kept, for the other direction to be tried."""

_OUTCOME: record.Shape = {
    "sent": record.a_text,
    "came": record.a_text,
    "seen": record.a_number,
    "right": lambda value: isinstance(value, bool),
}
_BLOBS: record.Shape = {"region": record.hexadecimal, "signal": record.hexadecimal}

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Direction:
    """What became of the writes of `source`."""

    source: int
    target: int
    passed: bool
    seen: int
    """Signals that the target saw, of WRITES."""
    problem: str
    """What the source and the target have to say; empty if it passed."""


@dataclass(frozen=True)
class SelfTest:
    """What both sides know in the end. Rank 0 listened, rank 1 dialled."""

    rank: int
    hosts: tuple[str, str]
    backend: str
    rails: str
    connected: bool
    problem: str
    """Why they could not connect; empty if they could."""
    directions: tuple[Direction, ...]
    mend: str

    @property
    def passed(self) -> bool:
        return self.connected and len(self.directions) == 2 and all(each.passed for each in self.directions)


def listened(where: str, settings: Settings, deadline_s: float, notice: Notice) -> SelfTest:
    """Waits for one other to dial, and tests. Blocks, for at most COME_S and some deadlines."""
    with listen(where) as waiting:
        notice(f"listening on port {waiting.getsockname()[1]}; waiting for eptransport doctor --peer")
        waiting.settimeout(COME_S)
        try:
            connection, _ = waiting.accept()
        except TimeoutError:
            raise InvalidArgument(f"nobody dialled {where} in {COME_S:g} s") from None
    return _talk(connection, 0, settings, deadline_s, notice)


def dialled(where: str, settings: Settings, deadline_s: float, notice: Notice) -> SelfTest:
    """Tests with who listens there."""
    return _talk(dial(where, deadline_s), 1, settings, deadline_s, notice)


def _talk(connection: socket.socket, rank: int, settings: Settings, deadline_s: float, notice: Notice) -> SelfTest:
    secret = None if settings.secret is None else settings.secret.get_secret_value().encode()
    with Talk(connection, rank, secret, deadline_s) as talk:
        return run(talk, settings, deadline_s, notice)


def run(talk: Talk, settings: Settings, deadline_s: float, notice: Notice) -> SelfTest:
    """The test itself; `notice` is told each stage as it begins."""
    try:
        return _Run(talk, settings, deadline_s, notice).whole()
    except EptError as error:
        talk.fail(error)
        raise


class _Run:
    def __init__(self, talk: Talk, settings: Settings, deadline_s: float, notice: Notice) -> None:
        self.talk, self.rank, self.other = talk, talk.rank, 1 - talk.rank
        self.settings = settings.model_copy(update={"dead_s": PATIENCE_S})
        self.deadline_s, self.notice = deadline_s, notice

    def whole(self) -> SelfTest:
        _, hello = first_words(_Teller(self.talk), self.settings, self.rank)
        name = self.talk.swap("name", {"host": socket.gethostname()}, {"host": record.a_text})
        heard = self.talk.swap("words", hello, HELLO)
        said = [hello, heard] if self.rank == 0 else [heard, hello]
        compare(said, "doctor")
        choice = agree(self.settings, said)
        names = (socket.gethostname(), name["host"])
        self.notice(f"backend {choice.name} ({choice.why}); connecting")
        with self._engine(choice, said) as engine:
            rails = ", ".join(rail.rail.name for rail in engine.rails())
            found = SelfTest(self.rank, names if self.rank == 0 else names[::-1], choice.name, rails, False, "", (), "")
            problem = self._connect(engine)
            if problem:
                return replace(found, problem=problem, mend=_mend(choice.name, rails, None))
            self.notice("connected")
            directions = self._both_ways(engine)
            # Neither closes before both have what they came for: a goodbye would end what is under way.
            self.talk.swap("end", {}, {}, self.deadline_s)
        lost = [each for each in directions if not each.passed]
        mend = _mend(choice.name, rails, lost) if lost else ""
        return replace(found, connected=True, directions=directions, mend=mend)

    def _engine(self, choice: Choice, said: list[dict[str, Any]]) -> Engine:
        return Engine(
            choice.plugin,
            rank=self.rank,
            world_size=2,
            job=f"doctor/{said[0]['group']}",
            secret=secret_of(self.settings, said),
            settings=self.settings,
        )

    def _connect(self, engine: Engine) -> str:
        """Why not, as both sides see it; empty where it worked."""
        if not engine.join(None)[1]:
            raise UnsupportedError("a backend that joins collectively has no self-test of two ranks")
        theirs = self.talk.swap("address", {"address": engine.address().hex()}, ADDRESS)
        addresses = [b"", b""]
        addresses[self.other] = bytes.fromhex(theirs["address"])
        error = ""
        try:
            engine.connect(addresses)
            engine.wait_connected(self.deadline_s)
        except EptError as problem:
            error = problem.message
        outcome = self.talk.swap("connected", {"why": error}, {"why": record.a_text}, self.deadline_s)
        return "; ".join(filter(None, (error, outcome["why"] and f"the other side: {outcome['why']}")))

    def _both_ways(self, engine: Engine) -> tuple[Direction, Direction]:
        """Each writes and looks at what came of the other: at once, for a connection of which one direction is blocked
        soon breaks as a whole."""
        landing = bytearray(WRITES * WRITE_BYTES)
        memory = engine.register(landing)
        signal = engine.signal(self.other, f"self-test of rank {self.other}")
        mine = {"region": memory.export(self.other).hex(), "signal": signal.export().hex()}
        theirs = self.talk.swap("blobs", mine, _BLOBS, self.deadline_s)
        end = time.monotonic() + self.deadline_s
        sent, came = "", ""
        transfers: list[Transfer] = []
        try:
            transfers = self._send(engine, theirs, end)
        except EptError as problem:
            sent = problem.message
        try:
            signal.wait(WRITES, max(0.0, end - time.monotonic()))
        except EptError as problem:
            came = problem.message
        seen = signal.value
        right = seen == WRITES and landing == _pattern(self.other)
        try:
            for transfer in transfers:
                transfer.wait(max(0.0, end - time.monotonic()))
        except EptError as problem:
            sent = problem.message
        own = {"sent": sent, "came": came, "seen": seen, "right": right}
        heard = self.talk.swap("outcome", own, _OUTCOME, self.deadline_s)
        words = (own, heard) if self.rank == 0 else (heard, own)
        return _direction(0, words), _direction(1, words)

    def _send(self, engine: Engine, blobs: dict[str, Any], end: float) -> list[Transfer]:
        peer = engine.peer(self.other)
        source = engine.register(_pattern(self.rank))
        region = peer.import_region(bytes.fromhex(blobs["region"]))
        signal = peer.import_signal(bytes.fromhex(blobs["signal"]))
        transfers = []
        for at in range(0, WRITES * WRITE_BYTES, WRITE_BYTES):
            left = max(0.0, end - time.monotonic())
            where = {"source_offset": at, "destination_offset": at}
            transfers.append(peer.write(source, region, WRITE_BYTES, **where, signal=signal, timeout=left))
        return transfers


def _direction(source: int, words: tuple[dict[str, Any], dict[str, Any]]) -> Direction:
    """Of what the two ranks said: its far end decides."""
    target = 1 - source
    seen, passed = words[target]["seen"], words[target]["right"]
    if passed:
        return Direction(source, target, True, seen, "")
    problem = [f"{seen} of {WRITES} signals came" + (", with wrong bytes" if seen == WRITES else "")]
    problem += [f"rank {target}: {words[target]['came']}"] if words[target]["came"] else []
    problem += [f"rank {source}: {words[source]['sent']}"] if words[source]["sent"] else []
    return Direction(source, target, False, seen, "; ".join(problem))


class _Teller:
    """For `first_words`, which tells its error to those who wait."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk

    def say(self, stage: str, content: dict[str, Any] | None, error: EptError | None = None) -> None:
        if error is not None:
            self._talk.fail(error)


def _pattern(rank: int) -> bytearray:
    """No two writes alike, nor the same of both ranks."""
    whole = bytearray()
    for number in range(WRITES):
        whole += (rank * 1000003 + number * 7919 + 1).to_bytes(8, "little") * (WRITE_BYTES // 8)
    return whole


def _mend(backend: str, rails: str, lost: list[Direction] | None) -> str:
    """`lost`: the directions that don't pass; None: not even the connection."""
    if lost is None:
        which = "packets between the two are dropped"
    elif len(lost) == 2:
        which = "packets are dropped in both directions"
    else:
        which = f"packets from rank {lost[0].source} to rank {lost[0].target} are dropped"
    if backend != "libfabric":
        return f"{which}: let the backend's ports through in every firewall and security group between the two machines"
    where = ""
    if lost is not None and len(lost) == 1:
        where = (
            f" (here: the outbound rule of rank {lost[0].source}'s group, or the inbound rule of rank "
            f"{lost[0].target}'s)"
        )
    return (
        f"{which}: over EFA both machines' interfaces need one security group with two rules that name the group "
        "itself: inbound, all traffic, source the group; outbound, all traffic, destination the group"
        f"{where}. Over other providers: let their ports through in the firewall"
    )
