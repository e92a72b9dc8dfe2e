"""The command `eptransport`.

    eptransport demo          a model served over 4 ranks, then a DeepSeek-V3 layer timed and checked
    eptransport bench p2p     latency and bandwidth beside a bare socket's
    eptransport bench moe     dispatch and combine beside a bare mesh's, and gloo's
    eptransport conformance   the contract, clause by clause, on a backend in or out of tree
    eptransport doctor        which backends can run here, and what the others lack
    eptransport settings      every setting, its value, and where that came from

An error that the user can mend is one line on stderr and an exit code: 2 for a wrong option or setting, 1 for the rest.
"""

from eptransport.cli.app import app, main

__all__ = ["app", "main"]
