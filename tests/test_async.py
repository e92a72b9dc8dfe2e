# SPDX-License-Identifier: Apache-2.0
"""Transfers and signals in asyncio: one descriptor an engine, any number of loops, cancelling costs nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from test_engine_python import LENGTH, Pair, pair_of

import eptransport as ept

Ranks = Callable[..., list[ept.Group]]


@pytest.fixture(params=["auto", "thread", "inline"])
def pair(request: pytest.FixtureRequest, ranks: Ranks) -> Pair:
    return pair_of(ranks(2, progress=request.param))


def run(what: Coroutine[Any, Any, Any], limit_s: float = 20) -> Any:
    return asyncio.run(asyncio.wait_for(what, limit_s))


@pytest.mark.parametrize("backend", ["loopback", "tcp"])
def test_transfers_and_signals_are_awaited(ranks: Ranks, backend: str) -> None:
    pair = pair_of(ranks(2, backend))

    async def main() -> None:
        for count in range(1, 100):
            transfer = pair.peer.write(pair.source_memory, pair.region, LENGTH, signal=pair.remote)
            await pair.signal.reached(count)
            await transfer
            await transfer  # the outcome stays
            assert pair.signal.value == count

    run(main())


def test_in_every_way_of_progress(pair: Pair) -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(pair.signal.reached(1))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await pair.peer.write(pair.source_memory, pair.region, LENGTH, signal=pair.remote)
        await waiting

    run(main())


def test_the_loop_goes_on_while_something_is_awaited(ranks: Ranks) -> None:
    pair = pair_of(ranks(2))

    async def main() -> int:
        ticks = 0
        waiting = asyncio.ensure_future(pair.signal.reached(1))
        while ticks < 100:
            await asyncio.sleep(0)
            ticks += 1
        pair.peer.write(None, None, 0, signal=pair.remote)
        await waiting
        return ticks

    assert run(main()) == 100


def test_many_await_one_signal_each_at_its_count(ranks: Ranks) -> None:
    pair = pair_of(ranks(2))

    async def main() -> None:
        reached: list[int] = []

        async def wait(target: int) -> None:
            await pair.signal.reached(target)
            assert pair.signal.value >= target
            reached.append(target)

        waiting = [asyncio.ensure_future(wait(target)) for target in (7, 1, 20, 3, 3, 12)]
        await asyncio.sleep(0.02)
        for count in range(1, 21):
            pair.peer.write(None, None, 0, signal=pair.remote)
            await pair.signal.reached(count)
            await asyncio.sleep(0.005)
        await asyncio.gather(*waiting)
        assert reached == [1, 3, 3, 7, 12, 20]

    run(main())


def test_many_transfers_at_once(ranks: Ranks) -> None:
    pair = pair_of(ranks(2))

    async def main() -> None:
        async def one() -> None:
            await pair.peer.write(pair.source_memory, pair.region, LENGTH, signal=pair.remote)

        await asyncio.gather(*(one() for _ in range(200)))
        await pair.signal.reached(200)

    run(main())


def test_loops_of_several_threads_share_an_engine(ranks: Ranks) -> None:
    pair = pair_of(ranks(2))
    errors: list[BaseException] = []

    async def main() -> None:
        for target in range(1, 51):
            await pair.signal.reached(target)

    def work() -> None:
        try:
            run(main())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        pair.peer.write(None, None, 0, signal=pair.remote)
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert not errors


def test_cancelling_forgets_the_wait_and_nothing_else(pair: Pair) -> None:
    async def main() -> None:
        for _ in range(20):
            waiting = asyncio.ensure_future(pair.signal.reached(1))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pair.signal.reached(1), 0.05)
        await pair.peer.write(None, None, 0, signal=pair.remote)
        await pair.signal.reached(1)

    run(main())


def test_a_deadline_of_an_await(pair: Pair) -> None:
    async def main() -> None:
        begun = time.monotonic()
        with pytest.raises(ept.Timeout, match=r"'test' of rank 0 reaching 3"):
            await pair.signal.reached(3, timeout=0.2)
        assert 0.15 < time.monotonic() - begun < 3

    run(main())


def test_a_failure_is_raised_where_it_is_awaited(pair: Pair) -> None:
    pair.target_memory.revoke(0)

    async def main() -> None:
        transfer = pair.peer.write(pair.source_memory, pair.region, LENGTH)
        for _ in range(2):
            with pytest.raises(ept.AccessDenied):
                await transfer

    run(main())


@pytest.mark.parametrize("backend", ["loopback", "tcp"])
def test_a_peer_that_leaves_ends_an_await(ranks: Ranks, backend: str) -> None:
    pair = pair_of(ranks(2, backend))

    async def main() -> None:
        waiting = asyncio.ensure_future(pair.signal.reached(1))
        await asyncio.sleep(0.05)
        await asyncio.get_running_loop().run_in_executor(None, pair.groups[0].close)
        with pytest.raises(ept.PeerLost):
            await waiting

    run(main())


def test_closing_the_engine_ends_an_await(pair: Pair) -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(pair.signal.reached(1))
        await asyncio.sleep(0.05)
        pair.groups[1].close()
        with pytest.raises(ept.ClosedError):
            await waiting

    run(main())


def test_one_loop_after_another(ranks: Ranks) -> None:
    """A loop that is gone leaves nothing behind that the next one stumbles over."""
    pair = pair_of(ranks(2))
    for count in range(1, 6):

        async def main(count: int = count) -> None:
            left = asyncio.ensure_future(pair.signal.reached(1000))
            pair.peer.write(None, None, 0, signal=pair.remote)
            await pair.signal.reached(count)
            assert not left.done()

        run(main())
