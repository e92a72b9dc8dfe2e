"""`eptransport bench p2p --against ...`: what users would take instead, measured side by side with us.

Every library runs in two processes of its own (two copies of UCX in one would break each other, and one that crashes
takes nobody's figures along), is asked the same questions by the same code (`side.py`), and takes its turn in every
round (`compare.py`). One file a library.
"""

from __future__ import annotations

import difflib

from eptransport.bench.against.gloo import find as find_gloo
from eptransport.bench.against.libfabric import find as find_libfabric
from eptransport.bench.against.mooncake import find as find_mooncake
from eptransport.bench.against.nixl import find as find_nixl
from eptransport.bench.against.side import Find
from eptransport.bench.against.ucx import find as find_ucx
from eptransport.bench.against.verbs import find as find_verbs
from eptransport.errors import InvalidArgument

__all__ = ["FINDERS", "names"]

FINDERS: dict[str, Find] = {
    "gloo": find_gloo,
    "ucx": find_ucx,
    "libfabric": find_libfabric,
    "mooncake": find_mooncake,
    "nixl": find_nixl,
    "verbs": find_verbs,
}


def names(comma_list: str) -> tuple[str, ...]:
    """What `--against` names, each once; InvalidArgument for a name that isn't one."""
    wanted = [name.strip() for name in comma_list.split(",") if name.strip()]
    for name in wanted:
        if name not in FINDERS:
            close = difflib.get_close_matches(name, FINDERS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InvalidArgument(f"--against knows no {name!r}, but {', '.join(FINDERS)}{hint}")
    if not wanted:
        raise InvalidArgument(f"--against names nobody; it knows {', '.join(FINDERS)}")
    return tuple(dict.fromkeys(wanted))
