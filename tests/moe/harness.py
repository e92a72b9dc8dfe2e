# SPDX-License-Identifier: Apache-2.0
"""What the tests of dispatch and combine share: groups, inputs, experts that all differ, and a Scenario.

A Scenario is one dispatch and its combines over a whole group: it asks the reference (moe_model.py) what every rank
must get, and checks what a rank got, bit for bit. The rows that nobody filled are handed to combine as NaN: reading one
shows.

EPT_TEST_DEVICE=cuda runs these tests on a GPU, ranks as threads with a stream each: there a call that a kernel has
failed raises as one on a CPU does, since OnGpu waits for each (tests/gpu/run moe).
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import moe_model as model
import numpy as np
import spmd
import torch

import eptransport as ept
from eptransport.errors import error_class

T = TypeVar("T")

TORCH = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "u8": torch.uint8,
    "i8": torch.int8,
}
BITS = {"f32": torch.int32, "f16": torch.int16, "bf16": torch.int16, "e4m3": torch.uint8, "u8": torch.uint8, "i8": None}
LAYOUTS = ("rows", "by_rank", "contiguous", "masked")
DEVICE = os.environ.get("EPT_TEST_DEVICE", "cpu")
"""Read before a fixture clears EPT_*."""


# ---- groups ----------------------------------------------------------------------------------------------------------


def settings(**fields: Any) -> ept.Settings:
    """Loopback with deadlines that fit a test; `adversary=SEED` turns the schedule on."""
    options = {str(k): str(v) for k, v in fields.pop("options", {}).items()}
    if (seed := fields.pop("adversary", None)) is not None:
        options["loopback.adversary"] = str(seed)
    fields = {"backend": "loopback", "timeout_s": 60.0, "threads": 1, **fields}
    return ept.Settings(options=options, **fields)


def groups(n: int, **fields: Any) -> list[ept.Group]:
    if spmd.RANKS:
        return _groups_of_processes(n, **fields)
    return ept.loopback_groups(n, settings(**fields))


def _groups_of_processes(n: int, **fields: Any) -> list[Any]:
    if n != spmd.RANKS:
        spmd.skip(f"it is of {n} ranks; {spmd.RANKS} processes run")
    options = fields.pop("options", {})
    if options or fields.get("backend", spmd.BACKEND) != spmd.BACKEND:
        spmd.skip(f"it is about a backend of its own: {options or fields['backend']}")
    fields.pop("adversary", None)  # loopback's
    if spmd.BACKEND == "nvshmem" and _open:
        spmd.skip("it makes a second group while one is open, and a process is a PE of one")
    fields = {"backend": spmd.BACKEND, "timeout_s": 60.0, "threads": 1, **fields}
    if spmd.BACKEND == "nvshmem":
        fields = {"intra": "off", "gpu_path": "gpu", "options": {"nvshmem.heap_mib": "512"}, **fields}
    made = spmd.group(ept.Settings(**fields))
    _open.append(made[spmd.RANK])
    return made


_open: list[ept.Group] = []


def each(all_groups: Sequence[ept.Group], run: Callable[[ept.Group], T]) -> list[Any]:
    """run(group) of every rank."""
    if not spmd.RANKS:
        return ept.loopback_run(all_groups, run)
    mine = run(all_groups[spmd.RANK])
    return [mine if rank == spmd.RANK else spmd.Absent(rank) for rank in range(spmd.RANKS)]


def close(all_groups: Sequence[ept.Group]) -> None:
    each(all_groups, lambda group: group.close())
    _open[:] = [group for group in _open if group not in all_groups]


GRACE_S = 0.5


def together(all_groups: Sequence[ept.Group], calls: Sequence[Callable[[], T]]) -> list[T]:
    """Each call on a thread of its own; raises what was raised first.

    The others of a rank that failed an assertion may wait for it until their deadline: after a moment the groups are
    closed under them.
    """
    if spmd.RANKS:
        spmd.skip("its threads are of several ranks")
    answers: list[Any] = [None] * len(calls)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def on_thread(index: int) -> None:
        try:
            with on_device():
                answers[index] = calls[index]()
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    threads = [threading.Thread(target=on_thread, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    errors: list[BaseException] = []
    for _ in threads:
        try:
            error = ended.get(timeout=GRACE_S if errors else None)
        except queue.Empty:
            close(all_groups)
            break
        if error is not None:
            errors.append(error)
    for thread in threads:
        thread.join()
    if errors:
        for other in errors[1:]:
            if hasattr(errors[0], "add_note"):
                errors[0].add_note(f"and then: {other!r}")
        raise errors[0]
    return answers


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """What this thread makes is on the device under test, and what it launches on a stream of its own."""
    if DEVICE == "cpu":
        yield
        return
    stream = torch.cuda.Stream(DEVICE)
    with torch.device(DEVICE), torch.cuda.stream(stream):
        yield
        stream.synchronize()


BY_ENGINE: dict[str, Any] = {} if DEVICE == "cpu" else {"intra": "off"}
"""Settings of groups whose engine carries all that goes to others: a GPU would map it."""


def as_on_a_cpu(fault: ept.LaneFault) -> ept.EptError:
    """What the call itself would have raised on a CPU: the first cause."""
    cause = re.search(r"the first cause was EPT_E_(\w+) in", str(fault))
    code = ept.Code[cause[1]] if cause else ept.Code.FAULT
    return error_class(code)(str(fault), **{**fault.fields(), "code": int(code)})


class OnGpu:
    """An AllToAll on a GPU whose calls return, or raise, when their kernels have ended: the call that a kernel has
    failed raises the first cause, as on a CPU, and those after it LaneFault."""

    def __init__(self, moe: ept.AllToAll) -> None:
        self._moe = moe
        self._told: set[int] = set()  # lanes

    def reset(self, *given: Any) -> None:
        self._told.clear()
        self._moe.reset(*given)

    def _check(self, given: Sequence[Any], named: dict[str, Any]) -> None:
        got = next((each for each in (*given, named.get("got")) if isinstance(each, ept.Dispatched)), None)
        lane = named.get("lane")
        if lane is None:
            lane = 0 if got is None else got.routing.lane
        try:
            self._moe.check(lane)
        except ept.LaneFault as fault:
            if lane in self._told:
                raise
            self._told.add(lane)
            raise as_on_a_cpu(fault) from fault

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._moe, name)
        if name not in ("dispatch", "combine", "dispatch_send", "dispatch_recv", "combine_send", "combine_recv"):
            return found

        def waits(*given: Any, **named: Any) -> Any:
            answer = found(*given, **named)
            torch.cuda.current_stream().synchronize()
            self._check(given, named)
            return answer

        return waits


def checked(moe: ept.AllToAll) -> ept.AllToAll:
    """As OnGpu where it is on one."""
    return moe if DEVICE == "cpu" or isinstance(moe, spmd.Absent) else OnGpu(moe)  # type: ignore[return-value]


def on_ranks(all_groups: Sequence[ept.Group], run: Callable[[int], T]) -> list[T]:
    """run(rank) on a thread for each rank."""
    if spmd.RANKS:
        return list(on_some(all_groups, range(spmd.RANKS), run).values())
    return together(all_groups, [lambda rank=rank: run(rank) for rank in range(len(all_groups))])  # type: ignore[misc]


def on_some(all_groups: Sequence[ept.Group], ranks: Sequence[int], run: Callable[[int], T]) -> dict[int, T]:
    """run(rank) on a thread for each of those ranks."""
    if spmd.RANKS:
        with on_device():
            return spmd.on_ranks(ranks, run)
    answers = together(all_groups, [lambda rank=rank: run(rank) for rank in ranks])  # type: ignore[misc]
    return dict(zip(ranks, answers, strict=True))


def all_to_alls(
    all_groups: Sequence[ept.Group], config: model.Config, devices: Sequence[str] = (), **arguments: Any
) -> list[ept.AllToAll]:
    """`devices`: by rank; without, the CPU."""
    arguments.setdefault("max_tokens", 32)
    arguments.setdefault("lanes", 1)
    if config.placement is not None:
        arguments.setdefault("placement", list(config.placement))
    if spmd.RANKS and spmd.BACKEND == "nvshmem" and arguments.get("buffer_bytes"):
        spmd.skip("its calls may be streamed, which kernels that put by themselves refuse")
    if not devices and DEVICE != "cpu":
        devices = [DEVICE] * len(all_groups)
        return [checked(moe) for moe in all_to_alls(all_groups, config, devices, **arguments)]
    return each(
        all_groups,
        lambda group: ept.AllToAll(
            group,
            num_experts=config.num_experts,
            top_k=config.top_k,
            hidden=config.hidden,
            dtype=TORCH[config.dtype],
            dispatch_dtype=TORCH[config.sent],
            combine_dtype=TORCH[config.returned],
            alignment=config.alignment,
            scale_format=config.scale_format,
            device=devices[group.rank] if devices else None,
            **arguments,
        ),
    )


def plan(config: model.Config, **more: Any) -> ept.Plan:
    """What AllToAll.plan says of it."""
    return ept.AllToAll.plan(
        world=config.world,
        num_experts=config.num_experts,
        top_k=config.top_k,
        hidden=config.hidden,
        dtype=TORCH[config.dtype],
        dispatch_dtype=TORCH[config.sent],
        combine_dtype=TORCH[config.returned],
        **more,
    )


# ---- bits ------------------------------------------------------------------------------------------------------------


def tensor(raw: model.Array, dtype: str) -> torch.Tensor:
    raw = np.ascontiguousarray(raw)
    signed = {1: np.uint8, 2: np.int16, 4: np.int32}[raw.itemsize]
    return torch.from_numpy(raw.view(signed).copy()).view(TORCH[dtype]).to(DEVICE)


def bits(t: torch.Tensor) -> model.Array:
    """A tensor's bytes as unsigned integers of its element size."""
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[t.element_size()]
    return t.detach().cpu().contiguous().view(signed).numpy().view(unsigned)


def same_bits(got: torch.Tensor, expected: model.Array, dtype: str, what: str) -> None:
    """Bit for bit, but that any NaN is as good as another."""
    assert got.dtype == TORCH[dtype], f"{what}: {got.dtype}, expected {TORCH[dtype]}"
    seen = bits(got)
    assert seen.shape == expected.shape, f"{what}: shape {seen.shape}, expected {expected.shape}"
    differ = seen != expected
    if differ.any() and dtype in ("f32", "f16", "bf16", "e4m3"):
        differ &= ~(np.isnan(model.decode(seen, dtype)) & np.isnan(model.decode(expected, dtype)))
    if differ.any():
        first = tuple(int(i[0]) for i in np.nonzero(differ))
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.size} differ, first at {first}: "
            f"{int(seen[first]):#x}, expected {int(expected[first]):#x}"
        )


# ---- inputs ----------------------------------------------------------------------------------------------------------


def random_ids(
    rng: np.random.Generator,
    tokens: int,
    config: model.Config,
    *,
    none: float = 0.1,
    repeat: float = 0.1,
    skew: float = 0,
) -> model.Array:
    """Mostly distinct experts a token, some -1, some repeated; `skew` prefers low ids."""
    ids = np.empty((tokens, config.top_k), np.int64)
    for t in range(tokens):
        keys = rng.random(config.num_experts) * np.arange(1, config.num_experts + 1) ** skew
        order = np.argsort(keys)
        ids[t] = np.resize(order, config.top_k)
    repeated = rng.random(ids.shape) < repeat
    ids = np.where(repeated, np.roll(ids, 1, axis=1), ids)
    return np.where(rng.random(ids.shape) < none, -1, ids)


def make_batch(
    config: model.Config,
    tokens: int,
    seed: Any,
    *,
    weights: bool = True,
    ids: model.Array | None = None,
    **routing: Any,
) -> model.Batch:
    rng = np.random.default_rng(seed)
    x = model.encode(rng.normal(0, 2, (tokens, config.hidden)).astype(np.float32), config.dtype)
    if ids is None:
        ids = random_ids(rng, tokens, config, **routing)
    w = rng.random((tokens, config.top_k)).astype(np.float32) if weights else None
    return model.Batch(x, ids, w)


def make_batches(config: model.Config, tokens: Sequence[int], seed: int, **arguments: Any) -> list[model.Batch]:
    return [make_batch(config, n, (seed, rank), **arguments) for rank, n in enumerate(tokens)]


def arguments(config: model.Config, batch: model.Batch, ids_dtype: torch.dtype = torch.int64) -> dict[str, Any]:
    """A batch as `dispatch` takes it."""
    made: dict[str, Any] = {
        "x": tensor(batch.x, config.sent if batch.quantised else config.dtype),
        "topk_ids": torch.from_numpy(batch.ids.copy()).to(ids_dtype),
        "topk_weights": None if batch.weights is None else torch.from_numpy(batch.weights.copy()),
    }
    if batch.scales is not None:
        made["scales"] = torch.from_numpy(batch.scales.copy())
    return {name: None if value is None else value.to(DEVICE) for name, value in made.items()}


# ---- experts that all differ -----------------------------------------------------------------------------------------


def values(config: model.Config, row: model.Row) -> model.Array:
    """A row's numbers in fp32."""
    if config.sent == "i8":
        return np.frombuffer(row.payload, np.int8).astype(np.float32)
    raw = np.frombuffer(row.payload, model.RAW[config.sent])
    if config.sent == "u8":
        return raw.astype(np.float32)
    value = model.decode(raw, config.sent)
    if config.sent == "e4m3" and row.scales:
        blocks = -(-config.hidden // model.BLOCK)
        if len(row.scales) == 4 * blocks:
            scale = np.frombuffer(row.scales, np.float32)
        else:
            scale = np.ldexp(np.float32(1), np.frombuffer(row.scales, np.uint8).astype(np.int32) - 127)
        if len(scale) == blocks:
            value = value * np.repeat(scale, model.BLOCK)[: config.hidden]
    return value.astype(np.float32)


def expert(number: int, value: model.Array) -> model.Array:
    """Global expert `number`: turns the row by its number, and scales by a power of two, so that nothing is rounded."""
    turn, rest = number % len(value), number // len(value)
    sign = -1 if rest % 2 else 1
    return (np.roll(value, turn) * np.float32(sign * 2.0 ** (rest // 2))).astype(np.float32)


# ---- one dispatch and its combines -----------------------------------------------------------------------------------


@dataclass
class Scenario:
    config: model.Config
    batches: list[model.Batch]
    layouts: list[str]  # by rank
    late: list[model.Array] | None = None
    weights_applied: bool = False
    out_dtype: str | None = None
    y_dtype: str | None = None
    row_weights: bool = False
    salt: int = 0  # makes the outputs of two combines of one dispatch differ
    masked: frozenset[int] = frozenset()
    arrived: list[model.Arrived] = field(init=False)
    expected: list[model.Array] = field(init=False)
    expected_row_weights: list[model.Array] = field(init=False)

    def __post_init__(self) -> None:
        self.arrived = model.dispatch(self.config, self.batches, self.masked)
        self.recombine()

    def recombine(self) -> None:
        ranks = range(self.config.world)
        tight = [self.unpacked(r, self.tight_capacity(r)) for r in ranks]
        self.expected, self.expected_row_weights = model.combine(
            self.config,
            self.batches,
            self.arrived,
            tight,
            [self.out_bits(r, tight[r]) for r in ranks],
            out_dtype=[self.out] * self.config.world,
            late=self.late,
            weights_applied=self.weights_applied,
            y_dtype=[self.y] * self.config.world,
            row_weights=[self.carried(r, tight[r]) for r in ranks] if self.row_weights else None,
        )

    @property
    def out(self) -> str:
        return self.out_dtype or self.config.dtype

    @property
    def y(self) -> str:
        return self.y_dtype or self.config.dtype

    def tight_capacity(self, rank: int) -> int:
        if self.layouts[rank] == "by_rank":
            return max((model.row_count(self.arrived, s, rank) for s in range(self.config.world)), default=0)
        return max(self.arrived[rank].counts, default=0)

    def unpacked(self, rank: int, capacity: int) -> model.Unpacked:
        return model.unpack(
            self.arrived[rank],
            self.layouts[rank],
            world=self.config.world,
            alignment=self.config.alignment,
            capacity=capacity,
        )

    # -- what the experts make

    def out_values(self, rank: int, unpacked: model.Unpacked) -> dict[int, model.Array]:
        """By slot, in fp32, before rounding to `out`."""
        held = self.config.local_experts(rank)
        made = {}
        for slot, (j, k) in unpacked.place.items():
            row = self.arrived[rank].rows[j]
            value = values(self.config, row) * np.float32(2.0**self.salt)
            if k >= 0:
                made[slot] = expert(held[row.experts[k]], value)
                if self.weights_applied and row.weights is not None:
                    made[slot] = made[slot] * np.float32(row.weights[k])
                continue
            acc = np.zeros(self.config.hidden, np.float32)
            for k2, local in enumerate(row.experts):
                if local >= 0:
                    weight = np.float32(1 if row.weights is None else row.weights[k2])
                    rounded = model.decode(model.encode(expert(held[local], value), self.out), self.out)
                    acc = model.fma(weight, rounded, acc)
            made[slot] = acc
        return made

    def out_bits(self, rank: int, unpacked: model.Unpacked) -> model.Array:
        out = np.full((unpacked.slots, self.config.hidden), np.nan, np.float32)
        for slot, value in self.out_values(rank, unpacked).items():
            out[slot] = value
        return model.encode(out, self.out)

    def carried(self, rank: int, unpacked: model.Unpacked) -> model.Array:
        """Row weights: a number for each place k of a row; NaN where no row is."""
        made = np.full((unpacked.slots, self.config.top_k), np.nan, np.float32)
        for slot, (j, _) in unpacked.place.items():
            row = self.arrived[rank].rows[j]
            made[slot] = [np.float32((row.token + 1) * 0.1 + k + rank) for k in range(self.config.top_k)]
        return made

    def expert_out(self, rank: int, shape: Sequence[int]) -> torch.Tensor:
        """For a layout of the leading dimensions that a dispatch gave."""
        unpacked = self.fitted(rank, shape)
        return tensor(self.out_bits(rank, unpacked), self.out).view(*shape, self.config.hidden)

    def row_weights_in(self, rank: int, shape: Sequence[int]) -> torch.Tensor:
        made = self.carried(rank, self.fitted(rank, shape))
        return torch.from_numpy(made).view(*shape, self.config.top_k).to(DEVICE)

    def fitted(self, rank: int, shape: Sequence[int]) -> model.Unpacked:
        """The reference's layout, with as many unfilled slots as the real one has."""
        unpacked = self.unpacked(rank, shape[1] if len(shape) == 2 else 0)
        assert int(np.prod(shape)) >= unpacked.slots, f"{unpacked.layout} {shape} is shorter than {unpacked.shape}"
        unpacked.shape = tuple(shape)
        return unpacked

    # -- what a rank must see

    def check(self, rank: int, got: ept.Dispatched) -> None:
        if DEVICE == "cpu":
            self._check(rank, got)
            return
        values = {each.name: getattr(got, each.name) for each in fields(got)}
        here = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
        with torch.device("cpu"):
            self._check(rank, replace(got, **here))

    def _check(self, rank: int, got: ept.Dispatched) -> None:
        what = f"rank {rank}, {self.layouts[rank]}"
        rows = self.arrived[rank].rows
        leading = tuple(got.x.shape[:-1])
        unpacked = self.fitted(rank, leading)
        slots = sorted(unpacked.place)
        place = [unpacked.place[s] for s in slots]
        at = torch.tensor(slots, dtype=torch.int64)

        def pick(t: torch.Tensor) -> torch.Tensor:
            return t.reshape(-1, *t.shape[len(leading) :])[at]

        payload = b"".join(rows[j].payload for j, _ in place)
        dtype = self.config.sent
        expected = np.frombuffer(payload, model.RAW[dtype]).reshape(len(place), self.config.hidden)
        same_bits(pick(got.x), expected, dtype, f"{what}: x")
        if rows and rows[0].scales:
            assert got.scales is not None, f"{what}: scales are missing"
            # Strides are the layout's business (row or column); bytes of each row are what was sent.
            seen = np.frombuffer(bits(pick(got.scales)).tobytes(), np.uint8)
            sent = np.frombuffer(b"".join(rows[j].scales for j, _ in place), np.uint8)
            np.testing.assert_array_equal(seen, sent, f"{what}: scales")
        assert got.counts.dtype == torch.int32
        assert got.counts.tolist() == unpacked.counts, f"{what}: counts"
        assert got.lost_ranks == tuple(sorted(self.masked)), f"{what}: lost ranks"
        if self.masked:
            lost = model.lost(self.config, self.batches[rank], self.masked)
            np.testing.assert_array_equal(got.lost.numpy(), lost, f"{what}: lost")
        else:
            assert got.lost is None
        if self.layouts[rank] == "contiguous":
            assert got.offsets.tolist() == unpacked.offsets, f"{what}: offsets"

        source = np.full((unpacked.slots, 2), -1, np.int32)
        for slot, (j, _) in unpacked.place.items():
            source[slot] = rows[j].source, rows[j].token
        np.testing.assert_array_equal(got.source.reshape(-1, 2).numpy(), source, f"{what}: source")
        if self.layouts[rank] in ("rows", "by_rank"):
            ids = np.full((unpacked.slots, self.config.top_k), -1, np.int32)
            for slot, (j, _) in unpacked.place.items():
                ids[slot] = rows[j].experts
            np.testing.assert_array_equal(got.topk_ids.reshape(-1, self.config.top_k).numpy(), ids, f"{what}: ids")
        if rows and rows[0].weights is not None:
            assert got.topk_weights is not None, f"{what}: weights are missing"
            for slot, (j, k) in unpacked.place.items():
                weights = got.topk_weights.reshape(unpacked.slots, -1)[slot].numpy()
                if k >= 0:
                    assert float(weights[0]) == rows[j].weights[k], f"{what}: weight of slot {slot}"
                    continue
                for k2, local in enumerate(rows[j].experts):
                    if local >= 0:
                        assert float(weights[k2]) == rows[j].weights[k2], f"{what}: weight {k2} of slot {slot}"

    def check_y(self, rank: int, y: torch.Tensor) -> None:
        same_bits(y, self.expected[rank], self.y, f"rank {rank}, {self.layouts[rank]}: y")

    # -- the ordinary step

    def arguments(self, rank: int, **more: Any) -> dict[str, Any]:
        return {**arguments(self.config, self.batches[rank]), "layout": self.layouts[rank], **more}

    def combine_arguments(self, rank: int, got: ept.Dispatched, **more: Any) -> dict[str, Any]:
        made: dict[str, Any] = {"expert_out": self.expert_out(rank, got.x.shape[:-1]), "got": got}
        if self.late is not None:
            made["topk_weights"] = torch.from_numpy(self.late[rank].copy()).to(DEVICE)
        if self.weights_applied:
            made["weights_applied"] = True
        if self.row_weights:
            made["row_weights"] = self.row_weights_in(rank, got.x.shape[:-1])
        if self.y != self.config.dtype:
            made["out"] = torch.empty(self.batches[rank].tokens, self.config.hidden, dtype=TORCH[self.y], device=DEVICE)
        return {**made, **more}

    def run(self, rank: int, moe: ept.AllToAll, *, lane: int = 0, halves: bool = False, **more: Any) -> torch.Tensor:
        """Dispatch and combine on one rank, checked."""
        if halves:
            moe.dispatch_send(**self.arguments(rank, lane=lane, **more))
            got = moe.dispatch_recv(lane=lane)
        else:
            got = moe.dispatch(**self.arguments(rank, lane=lane, **more))
        self.check(rank, got)
        sent = self.combine_arguments(rank, got)
        if halves:
            out = sent.pop("out", None)
            moe.combine_send(**sent)
            result = moe.combine_recv(got, out=out)
        else:
            result = moe.combine(**sent)
        y = result[0] if isinstance(result, tuple) else result
        self.check_y(rank, y)
        if self.row_weights:
            same_bits(result[1], self.expected_row_weights[rank], "f32", f"rank {rank}: row weights")
        return y


def run_all(
    scenario: Scenario, moes: Sequence[ept.AllToAll], all_groups: Sequence[ept.Group], **more: Any
) -> list[torch.Tensor]:
    return on_ranks(all_groups, lambda rank: scenario.run(rank, moes[rank], **more))
