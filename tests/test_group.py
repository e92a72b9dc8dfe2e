# SPDX-License-Identifier: Apache-2.0
"""How ranks find each other, agree, and are told when they don't."""

from __future__ import annotations

import datetime
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from children import torchrun

import eptransport as ept
from eptransport._bootstrap import LocalStore

Spawn = Callable[..., list[Any]]
SECRET = "a secret of sixteen bytes"


def hello(group: ept.Group) -> list[int]:
    """Each rank greets every other one; who greeted this one."""
    others = [rank for rank in range(group.world_size) if rank != group.rank]
    for rank in others:
        group.engine.peer(rank).send(b"hello")
    return sorted(group.engine.recv(timeout=20)[0] for _ in others)


def expected(group: ept.Group) -> list[int]:
    return [rank for rank in range(group.world_size) if rank != group.rank]


def on_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each returned or raised."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def make(store: Any, rank: int, world: int, name: str = "default", **fields: Any) -> ept.Group:
    settings = ept.Settings(**{"timeout_s": 20.0, **fields})
    return ept.Group(settings, store=store, rank=rank, world_size=world, name=name)


def close(groups: list[Any]) -> None:
    for group in groups:
        group.close()


# ---- stores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "hash", "file", "tcp", "prefix"])
def test_every_kind_of_store(kind: str, tmp_path: Path) -> None:
    store: Any = {
        "local": LocalStore,
        "hash": dist.HashStore,
        "file": lambda: dist.FileStore(str(tmp_path / "store"), 3),
        "tcp": lambda: dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False),
        "prefix": lambda: dist.PrefixStore("some/where", dist.HashStore()),
    }[kind]()
    groups = on_threads([lambda rank=rank: make(store, rank, 3) for rank in range(3)])  # type: ignore[misc]
    assert [group.rank for group in groups] == [0, 1, 2]
    assert ept.loopback_run(groups, hello) == [expected(group) for group in groups]
    close(groups)


def test_one_process_takes_loopback_and_says_why() -> None:
    groups = ept.loopback_groups(2)
    assert {group.backend for group in groups} == {"loopback"}
    close(groups)
    store = LocalStore()
    made = on_threads([lambda rank=rank: make(store, rank, 2) for rank in range(2)])  # type: ignore[misc]
    assert {group.backend for group in made} == {"loopback"}
    assert made[0].why == "auto: the first choice"
    close(made)


def test_a_group_of_one_needs_nobody() -> None:
    with ept.Group(world_size=1) as group:
        assert (group.rank, group.world_size, group.backend) == (0, 1, "loopback")
    assert group.engine.closed
    group.close()


def test_groups_on_one_store_do_not_mix() -> None:
    """Other names at the same moment, the same name one after the other, and a subset of the ranks."""
    store = LocalStore()
    for generation in range(3):
        names = ["default", "other"]
        calls = [lambda n=n, r=r: make(store, r, 2, n) for n in names for r in range(2)]  # type: ignore[misc]
        made = on_threads(calls)
        for pair in (made[:2], made[2:]):
            assert ept.loopback_run(pair, hello) == [[1], [0]], generation
        if generation != 1:
            close(made)
    again = on_threads([lambda r=r: make(store, r, 2, "subset") for r in range(2)])  # type: ignore[misc]
    assert ept.loopback_run(again, hello) == [[1], [0]]
    close(again)


@pytest.mark.parametrize("world", [16, 64])
def test_many_ranks_in_one_process(world: int) -> None:
    groups = ept.loopback_groups(world)
    assert ept.loopback_run(groups, hello) == [expected(group) for group in groups]
    close(groups)


# ---- processes -------------------------------------------------------------------------------------------------------


def by_store(rank: int, world: int, folder: Path, kind: str, rounds: int) -> Any:
    if kind == "file":
        store: Any = dist.FileStore(str(folder / "store"), world)
    else:
        port = int((folder / "port").read_text())
        store = dist.TCPStore("127.0.0.1", port, world, rank == 0, wait_for_workers=False)
    seen = []
    for _ in range(rounds):
        with ept.Group(ept.Settings(timeout_s=60.0), store=store, rank=rank, world_size=world) as group:
            seen.append((group.backend, hello(group), "auto" in group.why))
    (folder / f"done{rank}").touch()
    while rank == 0 and not all((folder / f"done{other}").exists() for other in range(world)):
        time.sleep(0.02)
    return seen


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("kind", ["file", "tcp"])
def test_processes_take_tcp_and_may_make_groups_again(spawn: Spawn, tmp_path: Path, kind: str) -> None:
    (tmp_path / "port").write_text(str(free_port()))
    answers = spawn(3, by_store, kind, 3)
    for rank, answer in enumerate(answers):
        others = [other for other in range(3) if other != rank]
        assert answer == [("tcp", others, True)] * 3


def by_process_group(rank: int, world: int, folder: Path, way: str) -> Any:
    from eptransport import _place as place_module

    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    if way == "gathered":
        place_module._store_of = lambda group: None  # type: ignore[assignment]
    pg = None if way == "default" else dist.new_group([1, 2]) if way == "subgroup" else dist.group.WORLD
    if way == "subgroup" and rank == 0:
        dist.barrier()
        return None
    collectives = count_collectives()
    settings = ept.Settings(timeout_s=60.0)
    with ept.Group(settings, process_group=pg) if pg is not None else ept.Group(settings) as group:
        at_set_up = dict(collectives)
        answer = (group.rank, group.world_size, hello(group))
        assert collectives == at_set_up
        assert sum(at_set_up.values()) == (1 if way == "gathered" else 0), at_set_up
        dist_barrier(way)
    if way == "subgroup":
        dist.barrier()
    dist.destroy_process_group()
    return answer


def dist_barrier(way: str) -> None:
    """So that nobody closes while another still reads what was sent; our own messages would do too."""
    if way != "subgroup":
        dist.barrier()


def count_collectives() -> dict[str, int]:
    """Calls of torch.distributed's collectives from now on, by name."""
    counts: dict[str, int] = {}
    for name in (
        "all_gather_object",
        "all_gather",
        "all_reduce",
        "broadcast",
        "all_to_all_single",
        "broadcast_object_list",
    ):
        wrapped = getattr(dist, name)

        def counted(*args: Any, _name: str = name, _wrapped: Any = wrapped, **kwargs: Any) -> Any:
            counts[_name] = counts.get(_name, 0) + 1
            return _wrapped(*args, **kwargs)

        setattr(dist, name, counted)
    return counts


@pytest.mark.parametrize("way", ["default", "given", "gathered", "subgroup"])
def test_ranks_and_store_of_a_process_group(spawn: Spawn, way: str) -> None:
    answers = spawn(3, by_process_group, way)
    if way == "subgroup":
        assert answers == [None, (0, 2, [1]), (1, 2, [0])]
    else:
        assert answers == [(rank, 3, [other for other in range(3) if other != rank]) for rank in range(3)]


def torchrun_rank(folder: str) -> tuple[int, list[int]]:
    with ept.Group(ept.Settings(timeout_s=60.0)) as group:
        greeted = hello(group)
        Path(folder, f"done{group.rank}").touch()
        while not all(Path(folder, f"done{rank}").exists() for rank in range(group.world_size)):
            time.sleep(0.02)
        return group.rank, greeted


def test_torchrun(tmp_path: Path) -> None:
    assert torchrun(2, torchrun_rank, str(tmp_path)) == [(0, [1]), (1, [0])]


def by_environment(rank: int, world: int, folder: Path, port: int) -> Any:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    answer = torchrun_rank(str(folder))
    # The same port serves torch.distributed afterwards, as in a program that needs both.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    dist.barrier()
    dist.destroy_process_group()
    return answer


def test_the_same_variables_without_a_launcher(spawn: Spawn) -> None:
    assert spawn(2, by_environment, free_port()) == [(0, [1]), (1, [0])]


def test_nobody_says_which_ranks_there_are() -> None:
    with pytest.raises(ept.ConfigError, match="torchrun"):
        ept.Group()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"rank": 0},
        {"rank": 2, "world_size": 2},
        {"rank": -1, "world_size": 2},
        {"rank": 0, "world_size": 0},
    ],
    ids=str,
)
def test_half_a_place_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ept.InvalidArgument, match=r"rank|world_size"):
        ept.Group(store=LocalStore(), **arguments)


# ---- who disagrees is told, on every rank ----------------------------------------------------------------------------


def test_ranks_that_want_other_backends() -> None:
    store = LocalStore()
    wanted = ["tcp", "tcp", "loopback"]
    answers = on_threads([lambda r=r: make(store, r, 3, backend=wanted[r]) for r in range(3)])  # type: ignore[misc]
    for answer in answers:
        assert isinstance(answer, ept.MismatchError), answer
        assert "backend" in str(answer)
        assert "tcp" in str(answer)
        assert "loopback" in str(answer)
    again = on_threads([lambda r=r: make(store, r, 3) for r in range(3)])  # type: ignore[misc]
    assert ept.loopback_run(again, hello) == [[1, 2], [0, 2], [0, 1]]
    close(again)


def test_ranks_that_count_others() -> None:
    store = LocalStore()
    answers = on_threads([lambda: make(store, 0, 2), lambda: make(store, 1, 3)])
    for answer in answers:
        assert isinstance(answer, ept.MismatchError), answer
        assert "world_size" in str(answer)
        assert "2" in str(answer)
        assert "3" in str(answer)


def test_a_secret_on_one_rank_alone() -> None:
    store = LocalStore()
    secrets = [SECRET, None]
    answers = on_threads([lambda r=r: make(store, r, 2, secret=secrets[r]) for r in range(2)])  # type: ignore[misc]
    for answer in answers:
        assert isinstance(answer, ept.MismatchError), answer
        assert "secret" in str(answer)
        assert SECRET not in str(answer)


@pytest.mark.parametrize("backend", ["tcp", "loopback"])
def test_another_secret(backend: str) -> None:
    store = LocalStore()
    secrets = [SECRET, "another secret of sixteen bytes", SECRET]
    begun = time.monotonic()
    answers = on_threads(
        [lambda r=r: make(store, r, 3, backend=backend, secret=secrets[r]) for r in range(3)]  # type: ignore[misc]
    )
    assert time.monotonic() - begun < 15
    for answer in answers:
        assert isinstance(answer, ept.AuthError), repr(answer)
        assert SECRET not in str(answer)
    again = on_threads(
        [lambda r=r: make(store, r, 3, backend=backend, secret=SECRET) for r in range(3)]  # type: ignore[misc]
    )
    assert ept.loopback_run(again, hello) == [[1, 2], [0, 2], [0, 1]]
    close(again)


def test_a_rank_that_fails_tells_the_others_why() -> None:
    """They don't wait for it until their deadline."""
    store = LocalStore()
    begun = time.monotonic()
    fields = [{}, {"backend": "/nowhere/ept_plugin.so"}, {}]
    answers = on_threads([lambda r=r: make(store, r, 3, **fields[r]) for r in range(3)])  # type: ignore[misc]
    assert time.monotonic() - begun < 15
    assert all(isinstance(answer, ept.InvalidArgument) for answer in answers), answers
    assert "rank 1" in str(answers[0])
    assert "/nowhere/ept_plugin.so" in str(answers[0])


def test_a_rank_that_does_not_come_is_named() -> None:
    store = LocalStore()
    begun = time.monotonic()
    answers = on_threads([lambda r=r: make(store, r, 3, timeout_s=1.0) for r in (0, 2)])  # type: ignore[misc]
    assert 0.9 < time.monotonic() - begun < 6
    for answer in answers:
        assert isinstance(answer, ept.Timeout), answer
        assert "rank 1 " in str(answer)
        assert (answer.expected, answer.seen) == (3, 2)


class BrokenStore(LocalStore):
    def check(self, keys: list[str], /) -> bool:
        raise RuntimeError("connection reset by peer")


def test_a_store_that_fails() -> None:
    with pytest.raises(ept.TransportError, match="connection reset by peer"):
        make(BrokenStore(), 0, 2)


# ---- what a group says and holds -------------------------------------------------------------------------------------


def test_one_line_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "eptransport"):
        groups = ept.loopback_groups(2, ept.Settings(proxy_cpus="0"))
        close(groups)
    said = [record.getMessage() for record in caplog.records if "backend loopback" in record.getMessage()]
    assert len(said) == 2  # one a rank
    assert "rank 0 of 2" in "".join(said)
    assert "(asked for)" in said[0]
    assert "bytes registered" in said[0]
    assert "on cores 0" in said[0]


def test_native_code_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    groups = ept.loopback_groups(2, ept.Settings(backend="tcp"))
    ept.loopback_run(groups, hello)
    with pytest.raises(ept.Timeout):
        groups[0].engine.recv(timeout=0.1)
    close(groups)
    seen = capfd.readouterr()
    assert seen.out == ""
    assert seen.err == ""


def test_a_setting_that_the_backend_has_no_use_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "eptransport"):
        close(ept.loopback_groups(1, ept.Settings(devices="mlx5_0")))
        assert "loopback has no use for devices" in caplog.text
        caplog.clear()
        close(ept.loopback_groups(1, ept.Settings(intra="off")))  # GPU ranks over it have
        close(ept.loopback_groups(1, ept.Settings(intra="shm")))
    said = [record.message for record in caplog.records if "has no use for" in record.message]
    assert said == ["rank 0: backend loopback has no use for intra"], said


def test_ept_log_shows_lines_without_any_set_up() -> None:
    import subprocess
    import sys

    code = "import eptransport as ept; ept.Group(world_size=1).close()"
    for level, there in (("info", True), ("error", False)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "EPT_LOG": level},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("backend loopback" in done.stderr) == there


def test_fault_and_active_mask() -> None:
    groups = ept.loopback_groups(3)
    mask = groups[0].active_mask
    assert mask.dtype == torch.int32
    assert mask.tolist() == [1, 1, 1]
    assert int(groups[0].fault) == 0
    assert groups[0].fault is groups[0].fault
    groups[2].close()
    deadline = time.monotonic() + 10
    while groups[0].active_mask.tolist() != [1, 1, 0]:
        assert time.monotonic() < deadline
        groups[0].engine.progress()
    assert groups[0].active_mask is mask
    close(groups)


def test_run_raises_the_first_error_and_ends_those_that_wait_for_it() -> None:
    groups = ept.loopback_groups(3)

    def run(group: ept.Group) -> None:
        if group.rank == 1:
            raise ZeroDivisionError("rank 1 was the first")
        group.engine.recv(peer=1)

    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="rank 1 was the first"):
        ept.loopback_run(groups, run)
    assert time.monotonic() - begun < 15
    assert ept.loopback_run(groups, hello) == [[1, 2], [0, 2], [0, 1]]  # still usable
    close(groups)


def test_settings_reach_the_engine() -> None:
    (group,) = ept.loopback_groups(1, ept.Settings(credits=256, spin_us=7, progress="thread"))
    info = group.engine.info()
    assert info.credits == 256
    assert info.spin_s == pytest.approx(7e-6)
    assert info.proxy_threads == 1
    group.close()


def test_more_ranks_than_cores_do_not_spin() -> None:
    count = len(os.sched_getaffinity(0)) + 1
    groups = ept.loopback_groups(count)
    assert groups[0].engine.info().spin_s == 0
    close(groups)
