"""The native object under an `AllToAll`: made in the group's arena, and closed before it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eptransport._call import ffi, lib, new_error, text
from eptransport._guard import CLOSE_S, Guard
from eptransport._members import BY_MEMBERSHIP

if TYPE_CHECKING:
    from eptransport.group import Group

__all__ = ["NativeMoe", "create_moe"]

logger = logging.getLogger("eptransport")


class NativeMoe:
    """The `ept_moe`, and its place among the engine's children: closed before the arena, which is closed before the
    engine."""

    def __init__(self, pointer: Any, children: dict[int, Callable[[], None]], rank: int) -> None:
        self.pointer = pointer
        self.guard = Guard("this AllToAll")
        self._children = children
        self._rank = rank
        children[id(self)] = self.close

    def close(self) -> None:
        if self.guard.forked or not self.guard.shut():
            return
        if not self.guard.wait_idle(CLOSE_S):
            logger.error("rank %d: a thread is still inside an AllToAll, which is left open", self._rank)
            return
        self._children.pop(id(self), None)
        error = new_error()
        if lib.ept_moe_close(self.pointer, error) < 0:
            logger.warning("rank %d: closing an AllToAll: %s", self._rank, text(error.text))


def create_moe(group: Group, config: Any) -> NativeMoe:
    engine = group.engine._native
    arena = group.arena()
    group._members.learn_if_told()
    handle = ffi.new("ept_moe **")
    try:
        engine.call_arena(lib.ept_moe_create, arena, config, handle)
    except BY_MEMBERSHIP as error:
        group._members.after(error, group.settings.on_lost)
        raise
    return NativeMoe(handle[0], engine.children, group.rank)
