# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine, plain and slow: what the executors are compared with, bit for bit.

Nothing here is taken from the library: row sizes come from the drawing in wire.h, numbers from its NUMBERS paragraph.
Ranks are list positions, a whole group is one call, there is no network and no buffer. Read it in this order:

    Config, Batch       what the ranks agreed on, what one rank brings
    dispatch            who gets which row                                -> one Arrived for each rank
    unpack              an Arrived in one of the four layouts             -> Unpacked
    combine             expert outputs back to the tokens' ranks          -> y for each rank
    messages            how many bytes and writes that takes
    numbers             bf16, fp16, e4m3, the fused multiply-add, the quantiser

Values travel as numpy arrays of raw bits (uint32 for fp32, uint16 for bf16 and fp16, uint8 for e4m3), so that nothing
is rounded by accident; `decode` and `encode` are the only ways between bits and fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK = 128
E4M3_MAX = np.float32(448.0)
HEADER_BYTES = 128
RAW = {"f32": np.uint32, "f16": np.uint16, "bf16": np.uint16, "e4m3": np.uint8, "u8": np.uint8, "i8": np.uint8}


# ---- what the ranks agreed on, and what one brings ---------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    world: int
    num_experts: int
    top_k: int
    hidden: int
    dtype: str = "bf16"
    dispatch_dtype: str | None = None  # None: dtype; "e4m3": quantised on the way
    combine_dtype: str | None = None  # None: dtype
    alignment: int = 1
    scale_format: str = "fp32"  # or "ue8m0"
    epsilon: float = 1e-4
    placement: tuple[int, ...] | None = None

    @property
    def sent(self) -> str:
        return self.dispatch_dtype or self.dtype

    @property
    def returned(self) -> str:
        return self.combine_dtype or self.dtype

    def local_experts(self, rank: int) -> list[int]:
        """Without placement: blocks in rank order, the first (num_experts % world) ranks hold one more."""
        if self.placement is not None:
            return [e for e in range(self.num_experts) if self.placement[e] == rank]
        each, more = divmod(self.num_experts, self.world)
        start = rank * each + min(rank, more)
        return list(range(start, start + each + (1 if rank < more else 0)))

    def home(self, expert: int) -> tuple[int, int]:
        """Rank and local number of a global expert."""
        for rank in range(self.world):
            held = self.local_experts(rank)
            if expert in held:
                return rank, held.index(expert)
        raise ValueError(f"expert {expert} of {self.num_experts} lives nowhere")

    def homes(self) -> dict[int, tuple[int, int]]:
        return {e: (r, i) for r in range(self.world) for i, e in enumerate(self.local_experts(r))}


@dataclass
class Batch:
    """One rank's input. `x` is raw bits [tokens, hidden] of `dtype`, or of `dispatch_dtype` where `quantised`."""

    x: Array
    ids: Array  # [tokens, top_k] global, -1: none
    weights: Array | None = None  # [tokens, top_k] float32
    scales: Array | None = None  # [tokens, bytes] uint8, the caller's own
    quantised: bool = False  # the caller did it: payload and scales are opaque

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Row:
    source: int
    token: int
    payload: bytes
    scales: bytes
    experts: tuple[int, ...]  # local numbers by the place k they had, -1: not here
    weights: tuple[float, ...] | None  # by k


@dataclass
class Arrived:
    rank: int
    local: int  # number of local experts
    rows: list[Row]  # by source rank, then token

    @property
    def counts(self) -> list[int]:
        """Rows of each local expert; a repeated id counts as often as it stands there."""
        counts = [0] * self.local
        for row in self.rows:
            for expert in row.experts:
                if expert >= 0:
                    counts[expert] += 1
        return counts


# ---- dispatch ------------------------------------------------------------------------------------------------------


def dispatch(config: Config, batches: list[Batch], masked: frozenset[int] = frozenset()) -> list[Arrived]:
    """A token goes once to each rank that holds at least one of its experts. Ranks that are masked bring nothing and
    get nothing: their experts' share is left out."""
    arrived = [Arrived(r, len(config.local_experts(r)), []) for r in range(config.world)]
    homes = config.homes()
    for source, batch in enumerate(batches):
        if source in masked:
            continue
        for token in range(batch.tokens):
            payload, scales = _payload(config, batch, token)
            for target in arrived:
                if target.rank in masked:
                    continue
                local = tuple(
                    homes[int(e)][1] if e >= 0 and homes[int(e)][0] == target.rank else -1 for e in batch.ids[token]
                )
                if any(e >= 0 for e in local):
                    weights = None if batch.weights is None else tuple(float(w) for w in batch.weights[token])
                    target.rows.append(Row(source, token, payload, scales, local, weights))
    return arrived


def lost(config: Config, batch: Batch, masked: frozenset[int]) -> Array:
    """[tokens, top_k]: whether the expert is at a rank that is masked."""
    homes = config.homes()
    gone = [[int(e) >= 0 and homes[int(e)][0] in masked for e in row] for row in batch.ids]
    return np.array(gone, bool).reshape(batch.ids.shape)


def _payload(config: Config, batch: Batch, token: int) -> tuple[bytes, bytes]:
    if batch.quantised:
        return batch.x[token].tobytes(), b"" if batch.scales is None else batch.scales[token].tobytes()
    if config.sent != "e4m3":
        assert config.sent == config.dtype
        return batch.x[token].tobytes(), b""
    q, scales = quantise(decode(batch.x[token], config.dtype), config.scale_format, config.epsilon)
    return q.tobytes(), scales.tobytes()


# ---- layouts -------------------------------------------------------------------------------------------------------


@dataclass
class Unpacked:
    """A layout's content. `place[slot] = (row of Arrived, k)` says what stands where; k is -1 where the slot holds a
    whole row (rows, by_rank). Slots that nobody fills are not in `place`."""

    layout: str
    shape: tuple[int, ...]  # leading dimensions of x
    place: dict[int, tuple[int, int]]
    counts: list[int]
    offsets: list[int]

    @property
    def slots(self) -> int:
        return int(np.prod(self.shape))


def unpack(arrived: Arrived, layout: str, *, world: int, alignment: int = 1, capacity: int = 0) -> Unpacked:
    """`capacity`: tokens a rank (by_rank) or rows an expert (masked)."""
    place: dict[int, tuple[int, int]] = {}
    counts = arrived.counts
    offsets = [0]
    for count in counts:
        pad = alignment if layout == "contiguous" else 1
        offsets.append(offsets[-1] + (count + pad - 1) // pad * pad)
    if layout == "rows":
        shape: tuple[int, ...] = (len(arrived.rows),)
        place = {j: (j, -1) for j in range(len(arrived.rows))}
    elif layout == "by_rank":
        shape = (world, capacity)
        filled = [0] * world
        for j, row in enumerate(arrived.rows):
            place[row.source * capacity + filled[row.source]] = (j, -1)
            filled[row.source] += 1
        assert max(filled, default=0) <= capacity
    elif layout in ("contiguous", "masked"):
        shape = (offsets[-1],) if layout == "contiguous" else (arrived.local, capacity)
        starts = offsets if layout == "contiguous" else [e * capacity for e in range(arrived.local)]
        filled = [0] * arrived.local
        for j, row in enumerate(arrived.rows):
            for k, expert in enumerate(row.experts):
                if expert >= 0:
                    place[starts[expert] + filled[expert]] = (j, k)
                    filled[expert] += 1
        assert layout == "contiguous" or max(filled, default=0) <= capacity
    else:
        raise ValueError(layout)
    return Unpacked(layout, shape, place, counts, offsets)


# ---- combine -------------------------------------------------------------------------------------------------------


def combine(
    config: Config,
    batches: list[Batch],
    arrived: list[Arrived],
    unpacked: list[Unpacked],
    outs: list[Array],
    *,
    out_dtype: list[str] | None = None,
    late: list[Array] | None = None,
    weights_applied: bool = False,
    y_dtype: list[str] | None = None,
    row_weights: list[Array] | None = None,
) -> tuple[list[Array], list[Array]]:
    """`outs[r]` is raw bits [slots, hidden] of `out_dtype[r]`; `late[r]` the weights that rank r brings for its tokens.

    Returns y[r] as raw bits [tokens, hidden] of y_dtype[r], and row weights [tokens, top_k] as fp32 bits (zeros if
    none).
    """
    out_dtype = out_dtype or [config.dtype] * config.world
    y_dtype = y_dtype or [config.dtype] * config.world
    sums = [np.zeros((b.tokens, config.hidden), np.float32) for b in batches]
    row_sums = [np.zeros((b.tokens, config.top_k), np.float32) for b in batches]
    for rank in range(config.world):  # the source adds ranks in rank order
        slot_of = {place: slot for slot, place in unpacked[rank].place.items()}
        values = decode(outs[rank], out_dtype[rank]).reshape(unpacked[rank].slots, config.hidden)
        for j, row in enumerate(arrived[rank].rows):
            if (j, -1) in slot_of:
                acc = values[slot_of[j, -1]]  # the caller weighed and added
            else:
                acc = np.zeros(config.hidden, np.float32)
                for k, expert in enumerate(row.experts):
                    if expert < 0:
                        continue
                    weight = np.float32(1.0)
                    if late is not None and not weights_applied:
                        weight = np.float32(late[row.source][row.token][k])
                    elif row.weights is not None and not weights_applied:
                        weight = np.float32(row.weights[k])
                    acc = fma(weight, values[slot_of[j, k]], acc)
            sent_back = decode(encode(acc, config.returned), config.returned)
            sums[row.source][row.token] = add(sums[row.source][row.token], sent_back)
            if row_weights is not None and (j, -1) in slot_of:
                carried = row_weights[rank].reshape(unpacked[rank].slots, config.top_k)[slot_of[j, -1]]
                row_sums[row.source][row.token] = add(row_sums[row.source][row.token], carried)
    return [encode(s, d) for s, d in zip(sums, y_dtype, strict=True)], [encode(s, "f32") for s in row_sums]


# ---- bytes on the wire -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    messages: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.messages + other.messages, self.bytes + other.bytes)


def align(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def dispatch_row_bytes(payload: int, scales: int, top_k: int) -> int:
    return align(align(payload, 16) + align(scales, 16) + 4 + 4 + 12 * top_k, 16)


def combine_row_bytes(payload: int, top_k: int, row_weights: bool = False) -> int:
    return align(payload, 16) + (align(4 * top_k, 16) if row_weights else 0)


def dispatch_header_bytes(local_experts: int) -> int:
    return HEADER_BYTES + align(4 * local_experts, 64)


def row_count(arrived: list[Arrived], source: int, target: int) -> int:
    return sum(1 for row in arrived[target].rows if row.source == source)


def dispatch_traffic(config: Config, arrived: list[Arrived], source: int, payload: int, scales: int) -> Traffic:
    """What `source` writes to other ranks in one unstreamed dispatch: one message a peer, rows or not."""
    total = Traffic()
    for target in range(config.world):
        if target != source:
            rows = row_count(arrived, source, target)
            header = dispatch_header_bytes(len(config.local_experts(target)))
            total += Traffic(1, header + rows * dispatch_row_bytes(payload, scales, config.top_k))
    return total


def combine_traffic(config: Config, arrived: list[Arrived], source: int, row_weights: bool = False) -> Traffic:
    """What `source` sends back to other ranks in one unstreamed combine."""
    total = Traffic()
    row = combine_row_bytes(config.hidden * np.dtype(RAW[config.returned]).itemsize, config.top_k, row_weights)
    for target in range(config.world):
        if target != source:
            total += Traffic(1, HEADER_BYTES + row_count(arrived, target, source) * row)
    return total


# ---- numbers ---------------------------------------------------------------------------------------------------------


def decode(raw: Array, dtype: str) -> Array:
    """Bits to fp32; exact for every format here."""
    raw = np.ascontiguousarray(raw)
    if dtype == "f32":
        return raw.view(np.uint32).view(np.float32)
    if dtype == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == "f16":
        return raw.view(np.uint16).view(np.float16).astype(np.float32)
    if dtype == "e4m3":
        return _E4M3[raw]
    raise ValueError(dtype)


def encode(value: Array, dtype: str) -> Array:
    """fp32 to bits, to nearest, ties to even; e4m3 saturates, the others overflow to infinity."""
    value = np.ascontiguousarray(value, np.float32)
    if dtype == "f32":
        return value.view(np.uint32)
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return value.astype(np.float16).view(np.uint16)
    if dtype == "bf16":
        bits = value.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(value), bits >> 16 | 0x40, rounded).astype(np.uint16)
    if dtype == "e4m3":
        return encode_e4m3(value)
    raise ValueError(dtype)


def _e4m3_value(code: int) -> float:
    """sign:1 exponent:4 mantissa:3, bias 7, no infinity, NaN only at S.1111.111."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


_E4M3 = np.array([_e4m3_value(code) for code in range(256)], np.float32)


def encode_e4m3(value: Array) -> Array:
    """By looking for the nearest of all 127 magnitudes; on a tie the even code."""
    value = np.asarray(value, np.float32)
    magnitudes = _E4M3[:127].astype(np.float64)
    size = np.minimum(np.abs(value.astype(np.float64)), 448.0)
    with np.errstate(invalid="ignore"):
        above = np.clip(np.searchsorted(magnitudes, np.where(np.isnan(size), 0.0, size)), 0, 126)
        below = np.maximum(above - 1, 0)
        up, down = magnitudes[above] - size, size - magnitudes[below]
        nearer_above = (up < down) | ((up == down) & (above % 2 == 0))
    code = np.where(nearer_above, above, below).astype(np.uint8)
    code = np.where(np.isnan(value), np.uint8(0x7F), code)
    return (code | (np.signbit(value).astype(np.uint8) << 7)).astype(np.uint8)


def quantise(x: Array, scale_format: str, epsilon: float) -> tuple[Array, Array]:
    """fp32 values of one row to e4m3 codes, and the scales: fp32, or exponent bytes for UE8M0."""
    codes, scales = [], []
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK]
        amax = np.float32(np.max(np.abs(block), where=~np.isnan(block), initial=0))  # a NaN is no maximum
        quotient = np.float32(max(amax, np.float32(epsilon)) / E4M3_MAX)
        if scale_format == "fp32":
            scale = quotient
            scales.append(scale)
        elif np.isinf(quotient):
            scale = quotient
            scales.append(np.uint8(255))
        else:
            fraction, exponent = np.frexp(quotient)  # quotient = fraction * 2^exponent, 0.5 <= fraction < 1
            power = int(exponent) - 1 if fraction == 0.5 else int(exponent)
            scale = np.float32(2.0**power)
            scales.append(np.uint8(power + 127))
        with np.errstate(invalid="ignore"):  # infinity by infinity
            codes.append(encode_e4m3(block / scale))
    return np.concatenate(codes), np.array(scales, np.float32 if scale_format == "fp32" else np.uint8)


def add(a: Array, b: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(a, np.float32) + np.asarray(b, np.float32)


def fma(a: Any, b: Array, c: Array) -> Array:
    """a * b + c, rounded once to fp32.

    The product of two fp32 numbers is exact in fp64. The sum is rounded to odd: to fp64 towards zero with the last bit
    set if anything was cut off. fp64 has more than 24 + 2 bits, so rounding that to fp32 gives what one rounding would.
    `fma_exact` does the same with fractions; the self-test compares them.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        p = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
        c = np.asarray(c, np.float32).astype(np.float64)
        p, c = np.broadcast_arrays(p, c)
        s = p + c
        t = s - p  # Knuth's two-sum: s + error == p + c exactly
        error = (p - (s - t)) + (c - t)
        bits = s.view(np.uint64) if s.ndim else np.atleast_1d(s).view(np.uint64)
        even = (bits & np.uint64(1)) == 0
        inexact = np.isfinite(s) & (error != 0) & even
        away = np.signbit(error) == np.signbit(s)  # the true sum lies further from zero than s
        odd = np.where(away, bits + np.uint64(1), bits - np.uint64(1))
        bits = np.where(inexact, odd, bits)
        return bits.view(np.float64).astype(np.float32).reshape(np.shape(s))


def fma_exact(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """The same for finite scalars, by rational arithmetic."""
    value = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if value == 0:
        with np.errstate(under="ignore"):
            return np.float32(np.float64(a) * np.float64(b) + np.float64(c))  # the sign of zero
    return round_fraction(value)


def round_fraction(value: Fraction) -> np.float32:
    """Nearest fp32, ties to even."""
    sign = -1 if value < 0 else 1
    size = abs(value)
    if size == 0:
        return np.float32(0)
    log2 = size.numerator.bit_length() - size.denominator.bit_length()  # at most 1 too large, never too small
    exponent = max(-149, log2 - 25)  # of the last place; subnormals stop at -149
    while size / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    quanta, rest = divmod(size, Fraction(2) ** exponent)
    half = Fraction(2) ** exponent / 2
    if rest > half or (rest == half and quanta % 2 == 1):
        quanta += 1
    result = int(quanta) * 2.0**exponent
    return np.float32(np.inf if result > float(np.finfo(np.float32).max) else result) * np.float32(sign)
