"""Shares of a GPU's multiprocessors for ranks that are processes, where NVIDIA's MPS runs.

Without MPS a GPU takes processes in turn. With it their kernels run side by side, and a process that starts with
CUDA_MPS_ACTIVE_THREAD_PERCENTAGE has so much of the multiprocessors for itself: CUDA's device properties say how many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["SHARE", "has_share", "runs", "shares"]

SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


def runs() -> bool:
    """The daemon that this process, and those that it starts, would find."""
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    try:
        daemon = int((folder / "nvidia-cuda-mps-control.pid").read_text())
        os.kill(daemon, 0)
    except PermissionError:
        return True  # another user's
    except (OSError, ValueError):
        return False
    return True


def has_share() -> bool:
    return SHARE in os.environ and runs()


@contextmanager
def shares(processes: int) -> Iterator[None]:
    """Processes that are started inside have equal shares of each GPU, where MPS runs and nobody has set others."""
    if processes < 2 or SHARE in os.environ or not runs():
        yield
        return
    import torch

    of_each = -(-processes // max(1, torch.cuda.device_count()))
    os.environ[SHARE] = f"{100 / of_each:g}"
    try:
        yield
    finally:
        del os.environ[SHARE]
