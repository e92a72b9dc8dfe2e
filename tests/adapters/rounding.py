# SPDX-License-Identifier: Apache-2.0
"""How far apart two fp32 evaluations of one model can be: a running error analysis, carried to the logits.

u = 2^-24 is the unit roundoff. Each rounding is off by at most u, relatively, with mean zero, independently: the model
of N. Higham and T. Mary ("A new approach to probabilistic rounding error analysis", 2019). By Hoeffding's inequality
a sum of c_i d_i with such |d_i| <= 1 exceeds L sqrt(sum c_i^2) with a probability of at most 2 exp(-L^2 / 2); L = 8
makes that 3e-14.

1.  Every operation of the forward is its exact value plus an error, of a size e that its operands give, in whatever
    order its terms are added:

        a + b, a * b, a / b, x ** 2    u |y|
        a product of matrices          u sqrt(2 n) |A| |B|, n the length of the sums: n products and at most n sums, no
                                       partial sum larger than the sum of the moduli
        a sum, a mean of n             u sqrt(n) sum |x|,  u sqrt(n + 1) mean |x|
        sigmoid, silu, exp, rsqrt,     8 u |y|: library functions are right to 2 units in the last place (4 u), and the
          sqrt, cos, sin               composed ones add a sum, a quotient and a product. Between two evaluations these
                                       errors differ by something symmetric, whatever their own mean
        softmax over n                 p_i = exp(x_i - m) / sum: the subtraction is off by u |x_i - m|, which exp turns
                                       into a relative error; the sum adds u sqrt(n), exp and the quotient 8 u:
                                       p_i u (|x_i - m| + sum_j p_j |x_j - m| + sqrt(n) + 8)
        views, copies, selections      none

2.  To first order a computed logit is the exact one plus sum_s (d logit / d s) e_s over all elements s of all outputs.
    The derivatives come from autograd: a zero that requires a gradient is added to each operation's output.

3.  Two evaluations, of any batching, cache, order of summation and placement of the experts, draw their errors anew, so
    they differ by at most  L sqrt(2 sum_s (d logit / d s)^2 e_s^2),  if they chose the same experts: that is the only
    discontinuity, and the tests compare the choices. What is dropped is of second order: the bound times the relative
    change of the derivatives over a relative step of 1e-5 or so. `SLACK` covers it.

The expert-parallel evaluation is one of those that step 1 covers: rows are moved and not rounded (dispatch and combine
in fp32), an expert's products run over the same lengths, and a token's k weighted outputs are added in fp32: k products
and at most k sums, as combine adds within a rank first and over ranks after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

U = 2.0**-24
L = 8.0
SLACK = 1.01
MASKED = 1e30  # scores beyond are masked: their probability is zero, and its derivative too


def apart(evaluate: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A bound of |difference| between two evaluations, an element of what `evaluate` returns (1-d, fp32)."""
    with Probes() as probes:
        result = evaluate()
    variance = torch.zeros(result.numel())
    for rows in torch.arange(result.numel()).split(16):
        seeds = torch.zeros(len(rows), result.numel())
        seeds[torch.arange(len(rows)), rows] = 1
        slopes = torch.autograd.grad(
            result, probes.probes, seeds, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        for slope, error in zip(slopes, probes.errors, strict=True):
            if slope is not None:
                variance[rows] += (slope * error).square().flatten(1).sum(1)
    return SLACK * L * (2 * variance).sqrt()


class Probes(TorchFunctionMode):
    """Adds a zero to each rounding operation's output, and keeps how large its rounding error may be."""

    def __init__(self) -> None:
        super().__init__()
        self.probes: list[torch.Tensor] = []
        self.errors: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.strip("_").removesuffix("_")
        rule = RULES.get(name)
        if rule is None:
            output = func(*args, **kwargs)
            assert name in EXACT or not any(map(rounds, tensors(output))), f"no rule for {name}"
            return output
        operands = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]  # in-place ones overwrite
        with torch.enable_grad():  # also where a model says no_grad (rotary tables): those round too
            output = func(*args, **kwargs)
            if not rounds(output):
                return output
            with torch.no_grad():
                error = rule(output.detach(), *operands, **kwargs)
            probe = torch.zeros_like(output, requires_grad=True)
            self.probes.append(probe)
            self.errors.append(torch.where(output.abs() > MASKED, 0, error).expand_as(output))
            return output + probe


def rounds(value: Any) -> bool:
    if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
        return False
    assert value.dtype == torch.float32, f"an operation in {value.dtype}: the analysis is of fp32"
    return True


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


def once(y: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return U * y.abs()


def library(y: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return 8 * U * y.abs()


def product(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return U * math.sqrt(2 * a.shape[-1]) * (a.abs() @ b.abs())


def linear(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    size = product(y, x, weight.transpose(-1, -2))
    return size if bias is None else size + U * (y.abs() + bias.abs())


def total(y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return U * math.sqrt(x.numel() // y.numel()) * x.abs().sum(*args, **kwargs)


def mean(y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return U * math.sqrt(x.numel() // y.numel() + 1) * x.abs().mean(*args, **kwargs)


def softmax(p: torch.Tensor, x: torch.Tensor, *args: Any, dim: int = -1, **_: Any) -> torch.Tensor:
    dim = args[0] if args else dim
    distance = (x - x.amax(dim, keepdim=True)).abs()
    distance = torch.where(p > 0, distance, 0)
    return p * U * (distance + (p * distance).sum(dim, keepdim=True) + math.sqrt(x.shape[dim]) + 8)


RULES: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul"), once),
    **dict.fromkeys(("div", "truediv", "rtruediv", "itruediv", "pow", "square"), once),
    **dict.fromkeys(("sigmoid", "silu", "exp", "rsqrt", "sqrt", "cos", "sin"), library),
    **dict.fromkeys(("matmul", "bmm", "mm"), product),
    "linear": linear,
    "sum": total,
    "mean": mean,
    "softmax": softmax,
}

EXACT = frozenset(
    """
    get set getitem setitem embedding to float type type_as view reshape view_as expand expand_as transpose permute
    contiguous clone flatten unsqueeze squeeze cat stack chunk split gather scatter masked_fill where topk sort max
    index_select repeat_interleave zeros_like ones_like empty_like new_zeros new_ones new_empty neg abs dropout copy
    clamp relu data detach full tensor arange zeros ones empty
    """.split()  # noqa: SIM905
)
