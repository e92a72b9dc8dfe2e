"""Makes a Hugging Face MoE model expert-parallel.

    group = ept.Group(ept.Settings())
    model = AutoModelForCausalLM.from_pretrained(...).eval()
    parallel = expert_parallel(model, group, max_tokens=4096)
    with torch.inference_mode():
        model(input_ids=...)                    # on every rank, each with its own batch
        parallel.idle()                         # on a rank that has no tokens while others have

What it relies on. Since 5.0, transformers builds the experts of its MoE models as one module with stacked parameters
(`gate_up_proj`, `down_proj`: first dimension the expert) under the decorator `use_experts_implementation`, called with
(hidden states, expert ids, weights). Such a module needn't know that it holds a part of the experts only: it is given
rows of its own experts, each row for one, with local ids and weights of one. Everything else in the model (attention,
router, shared experts, head) is replicated and sees this rank's tokens alone.

Every rank takes part in each MoE layer of each step: a dispatch waits for a message from every peer, and nothing but
the order of calls says which layer it is for. So a rank without tokens steps through the same layers in the same order
with none (`idle`), and a model that calls its experts modules in another order than it registered them is refused, at
its first forward.

From 5.23 on transformers has a registry of such exchanges; importing this module enters `"eptransport"` there, for
`DistributedConfig(ep_size=..., ep_implementation="eptransport")`; see `configure_ep_implementation`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from eptransport.errors import InvalidArgument, UnsupportedError

if TYPE_CHECKING:
    from eptransport import AllToAll, Group

__all__ = ["ExpertParallel", "configure_ep_implementation", "expert_parallel"]

MAX_TOKENS = 4096
_LAYER = "_eptransport_layer"  # where a module that is expert-parallel keeps its _Layer


def expert_parallel(
    model: torch.nn.Module,
    group: Group,
    *,
    max_tokens: int = MAX_TOKENS,
    top_k: int | None = None,
    dtype: torch.dtype | None = None,
    **all_to_all_options: Any,
) -> ExpertParallel:
    """Makes every experts module of the model expert-parallel over the group, in place.

    Each module keeps its rank's experts (`AllToAll.local_experts`) and frees the others. `max_tokens` is the largest
    number of tokens that one forward has on one rank. `top_k` and `dtype` (of the hidden states) are read from the
    model if not given. The other options are those of `AllToAll`: `dispatch_dtype`, `combine_dtype`, `buffer_bytes`,
    ... Layers of the same shape share one AllToAll. A model on a CUDA device exchanges there.

    Collective: every rank calls it with the same model and options; blocks while buffers are set up. The model then
    serves under `no_grad` or `inference_mode` only, and every rank makes the same number of forwards or `idle` calls.
    Raises UnsupportedError, before anything is changed, for experts that it can't take apart.
    """
    _refuse_options(all_to_all_options)
    found = _find_experts(model, top_k, dtype)
    if (where := next(model.parameters()).device).type == "cuda":
        all_to_all_options.setdefault("device", where)
    exchanges = {
        shape: _all_to_all(group, shape, max_tokens, all_to_all_options)
        for shape in dict.fromkeys(experts.shape for experts in found)
    }
    layers = []
    for experts in found:
        exchange = exchanges[experts.shape]
        _keep_local(experts, list(exchange.local_experts))
        layer = _Layer(experts.name, experts.module, experts.module.forward, exchange, experts.shape)
        experts.module.forward = layer.forward
        setattr(experts.module, _LAYER, layer)
        layers.append(layer)
    return ExpertParallel(model, layers)


class ExpertParallel:
    """An expert-parallel model: what a rank without tokens calls, and the check that all ranks see one order."""

    def __init__(self, model: torch.nn.Module, layers: list[_Layer]) -> None:
        self.model = model
        self.layers = layers
        self._next: int | None = None  # the layer that the forward under way must call next; None: no forward
        for number, layer in enumerate(layers):
            layer.module.register_forward_pre_hook(functools.partial(self._in_order, number))
        self._forward: Callable[..., Any] = model.forward
        model.forward = self._wrapped_forward()

    @classmethod
    def of(cls, model: torch.nn.Module) -> ExpertParallel:
        """The same for a model that transformers built with `ep_implementation="eptransport"`. Where the plan makes
        other parts collective too (tensor parallelism, FSDP), ranks without tokens can't `idle`."""
        layers = [vars(module)[_LAYER] for module in model.modules() if _LAYER in vars(module)]
        if not layers:
            raise InvalidArgument('no module of this model was built with ep_implementation="eptransport"')
        return cls(model, layers)

    @property
    def exchanges(self) -> tuple[AllToAll, ...]:
        """The AllToAlls in use, one for each shape of experts."""
        return tuple({id(layer.exchange): layer.exchange for layer in self.layers}.values())

    @torch.no_grad()
    def idle(self) -> None:
        """This rank's part in a forward of the others while it has no tokens: its experts serve theirs.

        Blocks as a forward does. Calling the model with input of zero tokens does the same. A rank calls it once for
        every forward that any other rank makes, prefill and decode alike, until all are done.
        """
        for layer in self.layers:
            layer.serve()

    def close(self) -> None:
        """Closes the exchanges; the model can't be called after. Not collective."""
        for exchange in self.exchanges:
            exchange.close()
        for key in [key for key, exchange in _EP_EXCHANGES.items() if exchange in self.exchanges]:
            del _EP_EXCHANGES[key]

    def _wrapped_forward(self) -> Callable[..., Any]:
        @functools.wraps(self._forward)  # generate() reads the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            shape = _shape_of_input(args, kwargs)
            if 0 in shape:
                self.idle()
                return _output_of_nothing(self.model, shape)
            self._next = 0
            try:
                output = self._forward(*args, **kwargs)
                if self._next != len(self.layers):
                    raise self._disorder("the forward ended")
                return output
            finally:
                self._next = None

        return forward

    def _in_order(self, number: int, _module: torch.nn.Module, _arguments: tuple[Any, ...]) -> None:
        if self._next is None:  # a part of the model called by itself: its caller keeps the ranks together
            return
        if self._next != number:
            raise self._disorder(f"{self.layers[number].name} was called")
        self._next += 1

    def _disorder(self, what: str) -> UnsupportedError:
        due = self.layers[self._next].name if self._next is not None and self._next < len(self.layers) else "the end"
        return UnsupportedError(
            f"{what} where {due} was to come. Ranks without tokens step through the {len(self.layers)} experts modules "
            "in the order in which the model registered them, so a forward must call each once, in that order. Give "
            "expert_parallel the submodule that does (model.language_model, say)"
        )


def configure_ep_implementation(
    group: Group | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    top_k: int | None = None,
    dtype: torch.dtype | None = None,
    **all_to_all_options: Any,
) -> None:
    """What models use that transformers builds with `ep_implementation="eptransport"` from now on.

    Without a group, one is made from the process group of the expert-parallel mesh, with the settings of the
    environment. The options are those of `expert_parallel`. Neither collective nor blocking.
    """
    _refuse_options(all_to_all_options)
    _EP_OPTIONS.update(group=group, max_tokens=max_tokens, top_k=top_k, dtype=dtype, options=all_to_all_options)


# ---- one layer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """Layers that agree in all of it share an AllToAll."""

    num_experts: int
    top_k: int
    hidden: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Layer:
    """One experts module: its own forward over its own experts, and the exchange that brings it tokens."""

    name: str
    module: torch.nn.Module
    experts: Callable[..., torch.Tensor]
    exchange: AllToAll
    shape: _Shape

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, wherever they live."""
        self._refuse_grad(hidden_states, top_k_weights)
        x = hidden_states.reshape(-1, self.shape.hidden).contiguous()
        ids, weights = self._routing(top_k_index, top_k_weights)
        return self._exchange(x, ids, weights).view(hidden_states.shape)

    def serve(self) -> None:
        """The experts' part for the tokens of the other ranks, with none of our own. Through the module, so that what
        transformers or others have put around its forward is there too."""
        device = next(self.module.parameters()).device
        x = torch.empty(0, self.shape.hidden, dtype=self.shape.dtype, device=device)
        ids = torch.empty(0, self.shape.top_k, dtype=torch.int64, device=device)
        self.module(x, ids, torch.empty(0, self.shape.top_k, device=device))

    def _refuse_grad(self, *inputs: torch.Tensor) -> None:
        """Before anything is sent: an error between dispatch and combine would leave the other ranks waiting."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *self.module.parameters())):
            raise UnsupportedError(
                f"{self.name}: no gradient flows through expert-parallel experts; call the model under "
                "torch.no_grad() or torch.inference_mode()"
            )

    def _routing(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`top_k` ids a token and as many weights, whatever the router gave."""
        ids = ids.reshape(-1, ids.shape[-1])
        weights = weights.reshape(-1, weights.shape[-1])
        if weights.shape[-1] == self.shape.num_experts != ids.shape[-1]:  # DeepSeek-V2 in 5.0: one for every expert
            weights = weights.gather(-1, ids)
        missing = self.shape.top_k - ids.shape[-1]
        if missing > 0:
            ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
            weights = torch.nn.functional.pad(weights, (0, missing))
        return ids.contiguous(), weights.float().contiguous()

    def _exchange(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        got = self.exchange.dispatch(x, ids, weights, layout="contiguous", host_counts=True)
        return self.exchange.combine(self._run_local(got.x, got.counts), got)

    def _run_local(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows come grouped by expert. The module sees each as a token that has one expert, of weight one: the
        router's weights are for combine, which sums in fp32 and in a fixed order."""
        if rows.shape[0] == 0:
            return rows
        local = torch.arange(counts.shape[0], device=rows.device)
        ids = torch.repeat_interleave(local, counts.to(local), output_size=rows.shape[0])
        return self.experts(rows, ids[:, None], torch.ones_like(rows[:, :1]))


def _all_to_all(group: Group, shape: _Shape, max_tokens: int, options: Mapping[str, Any]) -> AllToAll:
    from eptransport import AllToAll

    return AllToAll(
        group,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden=shape.hidden,
        dtype=shape.dtype,
        max_tokens=max_tokens,
        layout="contiguous",
        **options,
    )


def _refuse_options(options: Mapping[str, Any]) -> None:
    ours = {"num_experts", "hidden", "layout", "alignment", "lanes"} & options.keys()
    if ours:
        raise InvalidArgument(f"the adapter sets {', '.join(sorted(ours))} itself; leave it out")


# ---- finding experts, and taking them apart -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Experts:
    name: str
    module: torch.nn.Module
    stacked: tuple[str, ...]  # parameters and buffers whose first dimension is the expert
    shape: _Shape


def _find_experts(model: torch.nn.Module, top_k: int | None, dtype: torch.dtype | None) -> list[_Experts]:
    decorated = [(name or "the model", module) for name, module in model.named_modules() if _is_decorated(module)]
    if not decorated:
        alike = sorted({type(m).__name__ for m in model.modules() if "expert" in type(m).__name__.lower()})
        raise UnsupportedError(
            f"{type(model).__name__} has no module built with transformers' use_experts_implementation"
            + (f"; {', '.join(alike)} keep their experts otherwise" if alike else ", so no experts to spread")
        )
    return [_describe(model, name, module, top_k, dtype) for name, module in decorated]


def _is_decorated(module: torch.nn.Module) -> bool:
    """By what the decorator leaves on its instances in every release since 5.0."""
    return {"has_bias", "is_transposed", "config"} <= vars(module).keys() and "down_proj" in module._parameters


def _describe(
    model: torch.nn.Module, name: str, module: torch.nn.Module, top_k: int | None, dtype: torch.dtype | None
) -> _Experts:
    down = module._parameters["down_proj"]
    up = module._parameters.get("gate_up_proj", module._parameters.get("up_proj"))
    if up is None or down is None:
        raise UnsupportedError(f"{name}: {type(module).__name__} has neither gate_up_proj nor up_proj beside down_proj")
    if _LAYER in vars(module):
        raise InvalidArgument(f"{name} is expert-parallel already")
    if getattr(module.config, "_experts_implementation", None) == "deepgemm_megamoe":
        raise UnsupportedError(f"{name}: deepgemm_megamoe exchanges tokens by itself; choose another implementation")

    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    num_experts = down.shape[0]
    for key, tensor in tensors.items():
        if hasattr(tensor, "placements"):
            raise UnsupportedError(
                f"{name}.{key} is spread over ranks already (a DTensor); load the model without a transformers plan"
            )
        if tensor.dim() == 0 or tensor.shape[0] != num_experts:
            raise UnsupportedError(
                f"{name}.{key} has shape {tuple(tensor.shape)}, whose first dimension is not the {num_experts} experts "
                "of down_proj: which part of it belongs to which expert isn't known"
            )
    return _Experts(name, module, tuple(tensors), _shape(model, name, module, num_experts, top_k, dtype))


def _shape(
    model: torch.nn.Module,
    name: str,
    module: torch.nn.Module,
    num_experts: int,
    top_k: int | None,
    dtype: torch.dtype | None,
) -> _Shape:
    down = module.get_parameter("down_proj")
    up = module.get_parameter("gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj")
    hidden, out = (up.shape[-2], down.shape[-1]) if module.is_transposed else (up.shape[-1], down.shape[-2])
    if down.dim() != 3 or up.dim() != 3 or hidden != out:
        raise UnsupportedError(
            f"{name}: up projection {tuple(up.shape)} and down projection {tuple(down.shape)} don't take and give one "
            "hidden size (packed weights, or another layout than transformers' stacked one)"
        )
    if top_k is None:
        named = (getattr(module.config, key, None) for key in _TOP_K_NAMES)
        top_k = next((value for value in named if isinstance(value, int)), None)
        if top_k is None:
            raise UnsupportedError(
                f"{name}: {type(module.config).__name__} has none of {', '.join(_TOP_K_NAMES)}; give top_k"
            )
    if dtype is None:  # of the activations: quantised experts are narrower than what they are given
        parameters = (down, *model.parameters())
        dtype = next((p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize >= 2), torch.float32)
    return _Shape(num_experts, top_k, hidden, dtype)


_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k")


def _keep_local(experts: _Experts, local: list[int]) -> None:
    module = experts.module
    for key in experts.stacked:
        tensor = getattr(module, key)
        kept = tensor.detach()[torch.tensor(local, dtype=torch.long, device=tensor.device)]  # a copy: the rest is freed
        if key in module._parameters:
            module._parameters[key] = torch.nn.Parameter(kept, requires_grad=tensor.requires_grad)
        else:
            module._buffers[key] = kept
    if hasattr(module, "num_experts"):
        module.num_experts = len(local)  # type: ignore[assignment]


# ---- a forward without tokens ---------------------------------------------------------------------------------------


def _shape_of_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """[batch, length] of the ids or embeddings that a forward was given; () where there are neither."""
    for given in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(given, torch.Tensor):
            return tuple(given.shape[:2])
    return ()


def _output_of_nothing(model: torch.nn.Module, shape: tuple[int, ...]) -> Any:
    """What the forward of a batch without tokens would return. The model can't make it: its attention reshapes with
    a dimension left open, which torch refuses where there are no elements."""
    outputs = importlib.import_module("transformers.modeling_outputs")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        return outputs.MoeCausalLMOutputWithPast(logits=head.weight.new_empty(*shape, head.weight.shape[0]))
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    return outputs.MoeModelOutputWithPast(last_hidden_state=embeddings.new_empty(*shape, embeddings.shape[1]))


# ---- transformers' own registry (5.23 on) ---------------------------------------------------------------------------

_EP_OPTIONS: dict[str, Any] = {"group": None, "max_tokens": MAX_TOKENS, "top_k": None, "dtype": None, "options": {}}
_EP_GROUPS: dict[tuple[int, ...], Any] = {}
_EP_EXCHANGES: dict[tuple[Any, _Shape], Any] = {}


def _register() -> bool:
    """Enters `"eptransport"` where this release has the registry."""
    try:
        registry = importlib.import_module("transformers.distributed.expert_parallel")
        interface, base = registry.EPImplementationInterface, registry.EPImplementation
    except (ImportError, AttributeError):
        return False

    class EptransportEP(base):  # type: ignore[misc, valid-type]
        """Tokens reach their experts through eptransport's dispatch and combine, one AllToAll for all like layers."""

        def __init__(self, experts: torch.nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self.layer = _layer_of_mesh(experts, ep_mesh)
            setattr(experts, _LAYER, self.layer)

        def __call__(
            self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            if self.tp_mesh.size() == 1:
                return self.layer.forward(hidden_states, top_k_index, top_k_weights)
            return _shared_batch(self.layer, self.tp_mesh, hidden_states, top_k_index, top_k_weights)

    interface.register("eptransport", EptransportEP)
    return True


def _layer_of_mesh(experts: torch.nn.Module, ep_mesh: Any) -> _Layer:
    name = type(experts).__name__
    held: Any = experts.num_experts  # transformers has split them already: evenly, in rank order
    num_experts = held * ep_mesh.size()
    shape = _shape(experts, name, experts, num_experts, _EP_OPTIONS["top_k"], _EP_OPTIONS["dtype"])
    group = _EP_OPTIONS["group"] or _group_of_mesh(ep_mesh)
    key = (group, shape)
    if key not in _EP_EXCHANGES:
        _EP_EXCHANGES[key] = _all_to_all(group, shape, _EP_OPTIONS["max_tokens"], _EP_OPTIONS["options"])
    return _Layer(name, experts, experts.forward, _EP_EXCHANGES[key], shape)


def _group_of_mesh(ep_mesh: Any) -> Any:
    from eptransport import Group, Settings

    process_group = ep_mesh.get_group()
    ranks = tuple(torch.distributed.get_process_group_ranks(process_group))
    if ranks not in _EP_GROUPS:
        _EP_GROUPS[ranks] = Group(Settings(), process_group=process_group)
    return _EP_GROUPS[ranks]


def _shared_batch(
    layer: _Layer, tp_mesh: Any, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Ranks of one tensor-parallel group hold the same batch: each sends its slice, and the results are gathered."""
    tensor = importlib.import_module("torch.distributed.tensor")
    tokens, ranks, rank = hidden_states.shape[0], tp_mesh.size(), tp_mesh.get_local_rank()
    share = -(-tokens // ranks)  # as Shard(0) splits: full shares first, the rest shorter or empty
    mine = slice(min(rank * share, tokens), min((rank + 1) * share, tokens))
    part = layer.forward(hidden_states[mine], ids[mine], weights[mine])
    whole = tensor.DTensor.from_local(
        part.contiguous(), tp_mesh, [tensor.Shard(0)], shape=hidden_states.shape, stride=(hidden_states.shape[1], 1)
    )
    gathered: torch.Tensor = whole.full_tensor()
    return gathered


_register()
