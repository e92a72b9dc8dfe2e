"""Memory of the sides that are driven from Python by addresses: where the peer writes, and what is written from."""

from __future__ import annotations

import ctypes
import mmap

from eptransport.bench.against.side import MOST_BYTES

__all__ = ["ORDER", "TwoBuffers"]

ORDER = MOST_BYTES
"""Offset of the bytes after the buffers, for a word that is no data."""


class TwoBuffers:
    """Landing and source, of MOST_BYTES and a page each; the source is filled."""

    LENGTH = MOST_BYTES + mmap.PAGESIZE

    def __init__(self) -> None:
        self.landing, self.source = mmap.mmap(-1, self.LENGTH), mmap.mmap(-1, self.LENGTH)
        self.source[:MOST_BYTES] = b"\xa5" * MOST_BYTES
        self.landing_address, self.source_address = (
            ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in (self.landing, self.source)
        )
