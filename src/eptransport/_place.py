"""Who takes part: rank, world size and store, from whatever the caller has."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from eptransport._bootstrap import LocalStore, Store
from eptransport._process import host_id
from eptransport.errors import ConfigError, InvalidArgument
from eptransport.settings import Launch, launch_from_environment

if TYPE_CHECKING:
    import torch

__all__ = ["Place", "find_place"]


class Place:
    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise InvalidArgument(f"rank={rank}, world_size={world_size}: rank must be from 0 to world_size - 1")
        self.store = store
        self.rank = rank
        self.world_size = world_size


def find_place(
    store: Store | None, rank: int | None, world_size: int | None, process_group: torch.distributed.ProcessGroup | None
) -> Place:
    if process_group is not None:
        if store is not None or rank is not None or world_size is not None:
            raise InvalidArgument("process_group brings its own rank, world size and store; leave those out")
        return _from_process_group(process_group)
    if store is not None:
        if rank is None or world_size is None:
            raise InvalidArgument(f"store needs rank and world_size beside it (rank={rank}, world_size={world_size})")
        return Place(store, rank, world_size)
    if world_size == 1 and rank in (None, 0):
        return Place(LocalStore(), 0, 1)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return _checked(_from_process_group(distributed.group.WORLD), rank, world_size, "the default process group")
    return _checked(_from_environment(), rank, world_size, "the environment")


def _checked(place: Place, rank: int | None, world_size: int | None, source: str) -> Place:
    for name, given, found in (("rank", rank, place.rank), ("world_size", world_size, place.world_size)):
        if given is not None and given != found:
            raise InvalidArgument(f"{name}={given}, but {source} says {found}")
    return place


def _from_environment() -> Place:
    launch = launch_from_environment()
    if launch is None:
        raise ConfigError(
            "nobody says which ranks there are: start with torchrun, or give Group a store with rank and world_size, "
            "or a process_group"
        )
    if launch.world_size == 1:
        return Place(LocalStore(), launch.rank, 1)
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return Place(PrefixStore(f"eptransport/{launch.attempt}", _launchers_store(launch)), launch.rank, launch.world_size)


@functools.cache
def _launchers_store(launch: Launch) -> Any:
    """The store at the launcher's address. Kept as long as the process, also where rank 0 serves it: the program may
    use the address for torch.distributed later, which then shares the server instead of racing with its end."""
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        launch.master_addr,
        launch.master_port,
        launch.world_size,
        is_master=launch.rank == 0 and not launch.agent_store,
        timeout=timedelta(seconds=300),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _from_process_group(group: torch.distributed.ProcessGroup) -> Place:
    rank, world_size = group.rank(), group.size()
    if rank < 0:
        raise InvalidArgument("this process is not in the process group")
    return Place(_store_of(group) or _store_by_gathering(group, rank, world_size), rank, world_size)


def _store_of(group: torch.distributed.ProcessGroup) -> Store | None:
    """The store that the process group was made with, where this release of torch lets us see it."""
    from torch.distributed import distributed_c10d

    find = getattr(distributed_c10d, "_get_process_group_store", None)
    try:
        return None if find is None else find(group)
    except (RuntimeError, ValueError, KeyError, AttributeError):
        return None


def _store_by_gathering(group: torch.distributed.ProcessGroup, rank: int, world_size: int) -> Store:
    """A store of our own on rank 0; where it is goes through one collective of the process group."""
    import socket

    from torch.distributed import TCPStore, all_gather_object  # type: ignore[attr-defined]

    served = None
    mine: tuple[str, str, int] = (host_id(), "", 0)
    if rank == 0:
        served = TCPStore("0.0.0.0", 0, world_size, is_master=True, wait_for_workers=False)
        mine = (host_id(), socket.getfqdn(), served.port)
    said: list[Any] = [None] * world_size
    all_gather_object(said, mine, group=group)
    if served is not None:
        return served
    host, name, port = said[0]
    return TCPStore("127.0.0.1" if host == host_id() else name, port, world_size, is_master=False)
