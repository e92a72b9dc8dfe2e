"""Which process this is: fork makes another one, in which no engine of the parent may be used."""

from __future__ import annotations

import os


class _Process:
    """`generation` goes up in a forked child; `token` tells this process from every other one, on any machine."""

    def __init__(self) -> None:
        self.generation = 0
        self.token = os.urandom(16).hex()

    def forked(self) -> None:
        self.generation += 1
        self.token = os.urandom(16).hex()


process = _Process()
os.register_at_fork(after_in_child=process.forked)


def cores() -> int:
    """Cores that this process may use: its affinity, less where a cgroup grants less CPU time."""
    count = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return count


def host_id() -> str:
    """The same for all processes that share this machine's cores."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return os.uname().nodename
