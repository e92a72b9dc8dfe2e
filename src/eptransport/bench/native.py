"""The loops in libept_bench (native/bench), which do the timing that Python is too slow for."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from importlib import resources
from typing import Any

from eptransport._closing import Closing
from eptransport.errors import InvalidArgument, UnsupportedError, error_class

__all__ = [
    "Buffer",
    "Pair",
    "Shared",
    "atomics_pingpong",
    "barrier",
    "break_barrier",
    "copy_ranges",
    "copy_rate",
    "engine_rate",
    "mesh_exchange",
    "record_costs",
    "tcp_pingpong",
    "tcp_stream",
]

TIMEOUT_NS = 120_000_000_000


class Shared:
    """4 KiB that ranks share: words for their barrier, and for the probe of the cores."""

    BYTES = 4096
    _PROBE_AT = 1024

    def __init__(self, buffer: Any) -> None:
        self._bytes = (ctypes.c_char * self.BYTES).from_buffer(buffer)

    @property
    def barrier(self) -> int:
        return ctypes.addressof(self._bytes)

    @property
    def probe(self) -> int:
        return ctypes.addressof(self._bytes) + self._PROBE_AT


def barrier(shared: Shared, parties: int) -> None:
    """Until all parties have come."""
    _call("eptb_barrier", _pointer(shared.barrier), _u32(parties), _u64(TIMEOUT_NS))


def break_barrier(shared: Shared) -> None:
    """Ends every wait there, now and later, with ClosedError."""
    _call("eptb_barrier_break", _pointer(shared.barrier))


def atomics_pingpong(shared: Shared, side: int, iterations: int) -> array[float]:
    """One-way ns of each turn; side 1 gets zeros."""
    samples = array("d", bytes(8 * iterations))
    _call(
        "eptb_atomics_pingpong",
        _pointer(shared.probe),
        _u32(side),
        _u32(iterations),
        _pointer(samples.buffer_info()[0]),
        _u64(TIMEOUT_NS),
    )
    return samples


RECORDS = ("post", "completion", "receive", "message", "arrival", "wait")


def record_costs(count: int) -> dict[str, float]:
    """Nanoseconds of one record of each kind."""
    costs = array("d", bytes(8 * len(RECORDS)))
    _call("eptb_record_costs", _u64(count), _pointer(costs.buffer_info()[0]))
    return dict(zip(RECORDS, costs, strict=True))


def copy_rate(size: int, count: int, ring: int) -> float:
    """Seconds for `count` copies of `size` bytes, each with an atomic count."""
    seconds = ctypes.c_double()
    _call("eptb_copy_rate", _u64(size), _u64(count), _u32(ring), ctypes.byref(seconds))
    return seconds.value


def copy_ranges(destination: int, source: int, lengths: Sequence[int]) -> None:
    """Copies ranges that are packed as those of mesh_exchange. The addresses are the caller's to keep alive."""
    _call("eptb_copy_ranges", _pointer(destination), _pointer(source), _u64s(lengths), _u32(len(lengths)))


def tcp_pingpong(fd: int, side: int, size: int, iterations: int) -> array[float]:
    """One-way ns of each turn; side 1 gets zeros."""
    samples = array("d", bytes(8 * iterations))
    _call(
        "eptb_tcp_pingpong",
        _i32(fd),
        _u32(side),
        _u64(size),
        _u32(iterations),
        _pointer(samples.buffer_info()[0]),
        _u64(TIMEOUT_NS),
    )
    return samples


class Buffer:
    """Memory that was written to, so that no page is missing when it is measured with."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._bytes = (ctypes.c_char * length)()
        ctypes.memset(self._bytes, 0x5A, length)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._bytes)


def tcp_stream(fd: int, side: int, buffer: Buffer, size: int, count: int, ring: int) -> float:
    """Seconds from the first byte to the answer. The buffer holds `ring` times `size`."""
    if size * ring > buffer.length:
        raise InvalidArgument(f"a ring of {ring} times {size} bytes does not fit a buffer of {buffer.length}")
    seconds = ctypes.c_double()
    _call(
        "eptb_tcp_stream",
        _i32(fd),
        _u32(side),
        _pointer(buffer.address),
        _u64(size),
        _u32(count),
        _u32(ring),
        ctypes.byref(seconds),
        _u64(TIMEOUT_NS),
    )
    return seconds.value


def mesh_exchange(
    fds: Sequence[int], rank: int, send_bytes: Sequence[int], recv_bytes: Sequence[int], send: int, recv: int
) -> None:
    """One phase of an all-to-all over plain sockets. The addresses are the caller's to keep alive."""
    _call(
        "eptb_mesh_exchange",
        (ctypes.c_int32 * len(fds))(*fds),
        _u32(len(fds)),
        _u32(rank),
        _u64s(send_bytes),
        _u64s(recv_bytes),
        _pointer(send),
        _pointer(recv),
        _u64(TIMEOUT_NS),
    )


class Pair(Closing):
    """Memory of `most` bytes, a signal and the peer's counterpart of both, over an `ept_engine` (its address). Set up
    once, so that it is no part of what is measured; both sides make the same calls."""

    def __init__(self, engine: int, peer: int, side: int, most: int, tag: int = 0) -> None:
        self._pair = ctypes.c_void_p()
        _call(
            "eptb_pair_open",
            _pointer(engine),
            _u32(peer),
            _u32(side),
            _u64(most),
            _u64(tag),
            _u64(TIMEOUT_NS),
            ctypes.byref(self._pair),
        )

    def pingpong(self, size: int, iterations: int) -> array[float]:
        """As tcp_pingpong, by a write with a signal each way."""
        samples = array("d", bytes(8 * iterations))
        _call(
            "eptb_pair_pingpong",
            self._pair,
            _u64(size),
            _u32(iterations),
            _pointer(samples.buffer_info()[0]),
            _u64(TIMEOUT_NS),
        )
        return samples

    def stream(self, size: int, count: int, ring: int) -> float:
        """As tcp_stream, by writes with a signal, at most `ring` in flight."""
        seconds = ctypes.c_double()
        _call(
            "eptb_pair_stream",
            self._pair,
            _u64(size),
            _u32(count),
            _u32(ring),
            ctypes.byref(seconds),
            _u64(TIMEOUT_NS),
        )
        return seconds.value

    def close(self) -> None:
        pair, self._pair = self._pair, ctypes.c_void_p()
        if pair:
            _call("eptb_pair_close", pair, _u64(TIMEOUT_NS))


def engine_rate(
    sender: int, sender_rank: int, receiver: int, receiver_rank: int, size: int, count: int, batch: int
) -> float:
    """Seconds for `count` writes with a signal between two engines that this thread alone drives."""
    seconds = ctypes.c_double()
    _call(
        "eptb_engine_rate",
        _pointer(sender),
        _u32(sender_rank),
        _pointer(receiver),
        _u32(receiver_rank),
        _u64(size),
        _u64(count),
        _u32(batch),
        ctypes.byref(seconds),
        _u64(TIMEOUT_NS),
    )
    return seconds.value


@functools.cache
def _library() -> ctypes.CDLL:
    # The core first: libept_bench is linked with it, and must meet the copy that this process has.
    import eptransport._native

    del eptransport
    path = resources.files("eptransport").joinpath("libept_bench.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as problem:
        raise UnsupportedError(
            f"the loops of eptransport bench can't be loaded: {problem} (build with -Dbench=true)", operation="bench"
        ) from None
    library.eptb_last_error.restype = ctypes.c_char_p
    return library


def _call(name: str, *arguments: Any) -> None:
    library = _library()
    code = getattr(library, name)(*arguments)
    if code < 0:
        sentence = library.eptb_last_error().decode("utf-8", "replace")
        raise error_class(code)(sentence or f"{name} failed", code=code, operation="bench")


def _u64s(values: Sequence[int]) -> Any:
    return (ctypes.c_uint64 * len(values))(*values)


_i32 = ctypes.c_int32
_u32 = ctypes.c_uint32
_u64 = ctypes.c_uint64
_pointer = ctypes.c_void_p
