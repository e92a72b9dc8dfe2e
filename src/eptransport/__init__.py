"""eptransport: expert-parallel dispatch and combine over any network.

    settings = eptransport.Settings()             # EPT_* of the environment
    group = eptransport.Group(settings)           # ranks from torchrun
    moe = eptransport.AllToAll(group, num_experts=256, top_k=8, hidden=7168, max_tokens=128)
    got = moe.dispatch(x, topk_ids, topk_weights)
    y = moe.combine(experts(got.x), got)

Importing loads no torch and no network library: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eptransport._membership import MaskedRank, Membership
    from eptransport._threads import loopback_groups, loopback_run
    from eptransport.all_to_all import AllToAll, Dispatched, Plan, Routing
    from eptransport.backends import choose, include_dir, registry
    from eptransport.engine import Engine, Memory, Peer, Region, RemoteSignal, Signal, Transfer, Write
    from eptransport.errors import (
        AccessDenied,
        AuthError,
        BackendUnavailable,
        CapacityError,
        ClosedError,
        Code,
        ConfigError,
        EptError,
        InternalError,
        InvalidArgument,
        LaneFault,
        LimitError,
        Masked,
        MismatchError,
        OutOfMemory,
        PeerLost,
        StuckError,
        Suspended,
        Timeout,
        TransportError,
        UnsupportedError,
        VersionError,
    )
    from eptransport.group import Group, Store
    from eptransport.host_counts import Counts, HostCounts
    from eptransport.metrics import Metrics, WaitFor
    from eptransport.prometheus import prometheus_text
    from eptransport.settings import Settings

__version__ = "0.1.0"

_HOMES = {
    "_membership": ("MaskedRank", "Membership"),
    "_threads": ("loopback_groups", "loopback_run"),
    "all_to_all": ("AllToAll", "Dispatched", "Plan", "Routing"),
    "backends": ("choose", "include_dir", "registry"),
    "engine": ("Engine", "Memory", "Peer", "Region", "RemoteSignal", "Signal", "Transfer", "Write"),
    "errors": (
        "AccessDenied",
        "AuthError",
        "BackendUnavailable",
        "CapacityError",
        "ClosedError",
        "Code",
        "ConfigError",
        "EptError",
        "InternalError",
        "InvalidArgument",
        "LaneFault",
        "LimitError",
        "Masked",
        "MismatchError",
        "OutOfMemory",
        "PeerLost",
        "StuckError",
        "Suspended",
        "Timeout",
        "TransportError",
        "UnsupportedError",
        "VersionError",
    ),
    "group": ("Group", "Store"),
    "host_counts": ("Counts", "HostCounts"),
    "metrics": ("Metrics", "WaitFor"),
    "prometheus": ("prometheus_text",),
    "settings": ("Settings",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 (in the order in which a reader meets them)
    "Settings",
    "Group",
    "Membership",
    "MaskedRank",
    "AllToAll",
    "Dispatched",
    "Routing",
    "HostCounts",
    "Counts",
    "Plan",
    "Engine",
    "Peer",
    "Memory",
    "Region",
    "Signal",
    "RemoteSignal",
    "Transfer",
    "Write",
    "Store",
    "loopback_groups",
    "loopback_run",
    "choose",
    "include_dir",
    "registry",
    "Metrics",
    "WaitFor",
    "prometheus_text",
    "AccessDenied",
    "AuthError",
    "BackendUnavailable",
    "CapacityError",
    "ClosedError",
    "Code",
    "ConfigError",
    "EptError",
    "InternalError",
    "InvalidArgument",
    "LaneFault",
    "LimitError",
    "Masked",
    "MismatchError",
    "OutOfMemory",
    "PeerLost",
    "StuckError",
    "Suspended",
    "Timeout",
    "TransportError",
    "UnsupportedError",
    "VersionError",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'eptransport' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"eptransport.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
