"""The table of ``tests/test_transforms.py``: every way to differentiate or batch an op, and what that gives.

A cell is a row of the table, a mode (eager, or a backend of torch.compile), an op and an implementation. It gives the
right value or one clear sentence, never a silent 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ppo_kernels as pk

torch.manual_seed(0)
B, T, V = 2, 3, 5
LOGP, OLD, REF, ADV = torch.randn(4, B, T)
LOGITS, LABELS, SCORES = torch.randn(B, T, V), torch.randint(V, (B, T)), torch.randn(B)
HIDDEN, WEIGHT = torch.randn(B, T, 4), torch.randn(V, 4)
OPS = {
    "policy_loss": (LOGP, lambda x, impl: pk.policy_loss(x, OLD, ADV, ref_logprobs=REF, kl_coef=0.1, impl=impl)[0]),
    "value_loss": (LOGP, lambda x, impl: pk.value_loss(x, OLD, ADV, impl=impl)[0]),
    "p3o_loss": (LOGP, lambda x, impl: pk.p3o_loss(x, OLD, REF, SCORES, impl=impl)[0]),
    "token_logprobs": (LOGITS, lambda x, impl: (pk.token_logprobs(x, LABELS, impl=impl) * ADV).sum()),
    "linear_token_logprobs": (
        HIDDEN,
        lambda x, impl: (pk.linear_token_logprobs(x, WEIGHT, LABELS, softcap=3.0, impl=impl) * ADV).sum(),
    ),
    "linear_policy_loss": (
        HIDDEN,
        lambda x, impl: pk.linear_policy_loss(x, WEIGHT, LABELS, OLD, ADV, impl=impl)[0],
    ),
    "entropy": (LOGITS, lambda x, impl: (pk.token_logprobs(x, LABELS, entropy=True, impl=impl)[1] * ADV).sum()),
}
#: Each takes a tensor that no gradient flows to: a tangent of it is refused in every op.
CONSTANTS = {
    "gae": lambda x, impl: pk.gae(x, OLD, impl=impl)[0],
    "kl_rewards": lambda x, impl: pk.kl_rewards(x, REF, SCORES, impl=impl)[0],
    "whiten": lambda x, impl: pk.whiten(x, impl=impl),
    "moments": lambda x, impl: pk.moments(x, impl=impl)[1],
    "group_advantages": lambda x, impl: pk.group_advantages(x[:, 0], group_size=2, impl=impl),
    "aggregation_weights": lambda x, impl: pk.aggregation_weights(x)[0],
    "importance_weights": lambda x, impl: pk.importance_weights(x, OLD, level="geometric", impl=impl)[0],
    "policy_loss": lambda x, impl: pk.policy_loss(LOGP, OLD, x, impl=impl)[0],
    "value_loss": lambda x, impl: pk.value_loss(LOGP, OLD, x, impl=impl)[0],
    "p3o_loss": lambda x, impl: pk.p3o_loss(LOGP, OLD, x, SCORES, impl=impl)[0],
    "token_logprobs": lambda x, impl: pk.token_logprobs(LOGITS, LABELS, temperature=x.exp(), impl=impl),
    "linear_token_logprobs": lambda x, impl: pk.linear_token_logprobs(
        HIDDEN, WEIGHT, LABELS, temperature=x.exp(), impl=impl
    ),
    "linear_policy_loss": lambda x, impl: pk.linear_policy_loss(HIDDEN, WEIGHT, LABELS, OLD, x, impl=impl)[0],
}
#: Options that are numbers and may be tensors.
NUMBERS = {
    "gae": ("gamma", "lam"),
    "kl_rewards": ("kl_coef", "score_clip", "kl_log_clamp", "kl_clamp"),
    "whiten": ("eps",),
    "group_advantages": ("eps",),
    "aggregation_weights": ("max_length",),
    "importance_weights": ("bounds", "reject_bounds", "log_ratio_clamp"),
    "policy_loss": (
        "cliprange",
        "dual_clip",
        "delta",
        "log_ratio_clamp",
        "kl_coef",
        "kl_log_clamp",
        "kl_clamp",
        "entropy_coef",
        "entropy_normalizer",
        "normalizer",
    ),
    "value_loss": ("cliprange_value", "normalizer"),
    "p3o_loss": ("kl_coef", "cliprange", "weight_clip", "log_ratio_clamp", "normalizer"),
    "token_logprobs": ("temperature",),
    "linear_token_logprobs": ("temperature", "softcap", "logit_scale"),
    "linear_policy_loss": ("temperature", "softcap", "logit_scale"),  # those of policy_loss are refused by it
}
NEEDED = {
    "gae": (LOGP, OLD),
    "kl_rewards": (LOGP, REF, SCORES),
    "whiten": (ADV,),
    "group_advantages": (SCORES, torch.zeros(B, dtype=torch.int64)),
    "aggregation_weights": (ADV != 0,),
    "importance_weights": (LOGP, OLD),
    "policy_loss": (LOGP, OLD, ADV),
    "value_loss": (LOGP, OLD, ADV),
    "p3o_loss": (LOGP, OLD, REF, SCORES),
    "token_logprobs": (LOGITS, LABELS),
    "linear_token_logprobs": (HIDDEN, WEIGHT, LABELS),
    "linear_policy_loss": (HIDDEN, WEIGHT, LABELS, OLD, ADV),
}
#: "whole" must become one graph, the others of torch.compile may break it: eager code then does the rest.
MODES = {
    "eager": None,
    "dynamo": {"backend": "eager"},
    "whole": {"backend": "eager", "fullgraph": True},
    "aot_eager": {"backend": "aot_eager", "fullgraph": True},
    "inductor": {"backend": "inductor", "fullgraph": True},
}
COMPILED = tuple(mode for mode in MODES if mode != "eager")


def compiled(f: Callable, mode: str) -> Callable:
    return f if MODES[mode] is None else torch.compile(f, **MODES[mode])


def gradient(f: Callable, x: torch.Tensor, **options) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, **options)[0]


def tangent(f: Callable, x: torch.Tensor) -> torch.Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


def twice(f: Callable, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    slope = slope_of(f, x)
    return torch.autograd.grad(slope.square().sum() + x.sum(), x)[0]


def slope_of(f: Callable, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(f(x), x, create_graph=True)[0]


class Model(torch.nn.Module):
    def __init__(self, f: Callable, x: torch.Tensor):
        super().__init__()
        self.f, self.x = f, torch.nn.Parameter(x.clone())

    def forward(self):
        return self.f(self.x)


def through_ddp(f, x, mode):
    model = DistributedDataParallel(Model(f, x))
    model.register_comm_hook(None, allreduce_hook)
    torch.compile(model, backend=MODES[mode]["backend"])().backward() if MODES[mode] else model().backward()
    return model.module.x.grad


def with_hooks(f, x, mode):
    seen, leaf = [], x.clone().requires_grad_()
    leaf.register_hook(lambda g: seen.append(g) or 2 * g)
    leaf.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    compiled(f, mode)(leaf).backward()
    torch.testing.assert_close(seen[1], 2 * seen[0])
    return leaf.grad / 2


def with_compiled_autograd(f, x, mode):
    leaf = x.clone().requires_grad_()
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend=MODES[mode]["backend"])):
        f(leaf).backward()
    return leaf.grad


def saved_by_checkpoint(f, x, mode):
    step = compiled(lambda y: checkpoint(f, y, use_reentrant=False), mode)
    return gradient(step, x)


def exported(f, x):
    class Call(torch.nn.Module):
        def forward(self, y):
            return f(y)

    return torch.export.export(Call(), (x,)).module()


def dual_after_plain(f, x, mode):
    step = compiled(f, mode)
    step(x)
    return tangent(step, x)


def of_an_input_that_requires_grad(f, x, mode):
    """The outer differentiation must not take the inner gradient for a constant."""
    step = compiled(lambda y: func.grad(f)(y).square().sum() + y.sum(), mode)
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(step(leaf), leaf)[0]


def slope(f: Callable, x: torch.Tensor) -> torch.Tensor:
    """The derivative of ``f`` at ``x`` in the direction of ``x``."""
    return (gradient(f, x) * x).sum()


def pair(x):
    return torch.stack([x, 2 * x])


class Row(NamedTuple):
    """What to do with ``f`` at ``x`` in a mode; what that gives, of the reference; and the words that refuse it."""

    run: Callable
    want: Callable = gradient
    refused: str = ""
    of: str = "all"  #: "kernels" are refused, or all
    modes: tuple[str, ...] = tuple(MODES)
    vmaps: bool = False


EAGER, FORWARD, TWICE = ("eager",), "forward-mode", "twice"


def broken(f: Callable) -> Callable:
    """``f`` behind a break of the graph: Dynamo then makes graphs of what is called inside."""

    def call(y):
        torch._dynamo.graph_break()
        return f(y)

    return call


def inside(transform: Callable) -> Callable:
    """The transform and ``f`` in one graph."""
    return lambda f, x, mode: compiled(lambda y: transform(f, y), mode)(x)


ROWS = {
    "autograd": Row(lambda f, x, mode: gradient(compiled(f, mode), x)),
    "create_graph": Row(lambda f, x, mode: gradient(f, x, create_graph=True).detach(), modes=EAGER),
    "checkpoint": Row(saved_by_checkpoint),
    "hooks": Row(with_hooks),
    "DDP": Row(through_ddp, modes=("eager", "dynamo", "aot_eager", "inductor")),
    "compiled_autograd": Row(with_compiled_autograd, modes=("dynamo", "aot_eager", "inductor")),
    "make_fx": Row(lambda f, x, mode: make_fx(lambda y: gradient(f, y))(x.clone())(x), modes=EAGER),
    "export": Row(lambda f, x, mode: exported(f, x)(x), lambda f, x: f(x), modes=EAGER),
    "grad_of_export": Row(
        lambda f, x, mode: gradient(lambda y: exported(f, x)(y), x), refused="gradient", of="kernels", modes=EAGER
    ),
    "grad": Row(inside(lambda f, y: func.grad(f)(y))),
    "grad_and_value": Row(inside(lambda f, y: func.grad_and_value(f)(y)[0])),
    "vjp": Row(inside(lambda f, y: func.vjp(f, y)[1](torch.ones(()))[0])),
    "jacrev": Row(inside(lambda f, y: func.jacrev(lambda z: torch.stack([2 * f(z), f(z)]))(y)[1])),
    "vmap": Row(
        inside(lambda f, y: func.vmap(f)(pair(y))), lambda f, x: torch.stack([f(y) for y in pair(x)]), vmaps=True
    ),
    "grad_in_vmap": Row(inside(lambda f, y: func.vmap(func.grad(f))(pair(y))[0]), vmaps=True),
    "vmap_in_grad": Row(
        inside(lambda f, y: func.grad(lambda z: func.vmap(f)(torch.stack([z, 0 * z])).sum())(y)), vmaps=True
    ),
    "jvp": Row(inside(lambda f, y: func.jvp(f, (y,), (y,))[1]), slope),
    "jacfwd": Row(inside(lambda f, y: func.jacfwd(f)(y))),
    "hessian": Row(inside(lambda f, y: func.hessian(f)(y)), refused=TWICE),
    "dual": Row(lambda f, x, mode: tangent(compiled(f, mode), x), refused=FORWARD, modes=COMPILED),
    "dual_after_plain": Row(dual_after_plain, refused=FORWARD, modes=COMPILED),
    "grad_of_grad": Row(inside(lambda f, y: func.grad(lambda z: func.grad(f)(z).square().sum())(y)), refused=TWICE),
    "grad_of_grad_broken": Row(
        inside(lambda f, y: func.grad(lambda z: func.grad(broken(f))(z).square().sum())(y)),
        refused=TWICE,
        modes=("dynamo",),
    ),
    "grad_broken": Row(inside(lambda f, y: func.grad(broken(f))(y)), modes=("dynamo",)),
    # Not behind AOTAutograd: its graphs give a second derivative of 0, or refuse, whatever is in them (exp() too).
    "twice": Row(lambda f, x, mode: twice(compiled(f, mode), x), refused=TWICE, modes=("eager", "dynamo", "whole")),
    "grad_of_a_leaf": Row(of_an_input_that_requires_grad, refused=TWICE),
    "twice_broken": Row(
        lambda f, x, mode: compiled(broken(lambda y: twice(f, y)), mode)(x), refused=TWICE, modes=("dynamo",)
    ),
    "dual_in_eager_code": Row(lambda f, x, mode: tangent(f, x), slope, modes=EAGER),
    "dual_made_in_a_graph": Row(inside(lambda f, y: tangent(f, y)), refused=FORWARD, modes=COMPILED),
    "dual_of_grad": Row(lambda f, x, mode: tangent(func.grad(f), x), refused=TWICE, modes=EAGER),
    "double_backward_jvp": Row(
        lambda f, x, mode: torch.autograd.functional.jvp(f, x, x)[1], refused=TWICE, modes=EAGER
    ),
    "jvp_of_checkpoint": Row(
        inside(lambda f, y: func.jvp(lambda z: checkpoint(f, z, use_reentrant=False), (y,), (y,))[1]), slope
    ),
    "jvp_of_vmap": Row(inside(lambda f, y: func.jvp(lambda z: func.vmap(f)(z[None])[0], (y,), (y,))[1]), slope),
    "vmap_of_jvp": Row(inside(lambda f, y: func.vmap(lambda z: func.jvp(f, (z,), (z,))[1])(y[None])[0]), slope),
    "jvp_of_other": Row(
        inside(lambda f, y: func.jvp(lambda z: f(y) * z.sum(), (y,), (y,))[1]), lambda f, x: f(x) * x.sum()
    ),
    "jvp_of_grad": Row(inside(lambda f, y: func.jvp(func.grad(f), (y,), (y,))[1]), refused=TWICE),
    "grad_of_jvp": Row(inside(lambda f, y: func.grad(lambda z: func.jvp(f, (z,), (y,))[1])(y)), refused=TWICE),
    "jvp_of_a_leaf": Row(
        lambda f, x, mode: compiled(lambda y: func.jvp(f, (y,), (x,))[1], mode)(x.clone().requires_grad_()),
        refused=TWICE,
    ),
    "jvp_of_jvp": Row(
        inside(lambda f, y: func.jvp(lambda z: func.jvp(f, (z,), (y,))[1], (y,), (y,))[1]), refused=TWICE
    ),
}


def cells(modes: tuple[str, ...], impls: list[str]) -> list[tuple[str, str, str, str]]:
    """Row, mode, op and implementation of every cell of these modes."""
    rows = [(name, mode) for name, row in ROWS.items() for mode in modes if mode in row.modes]
    return [(*row, op, impl) for row in rows for op in OPS for impl in impls]


def refusal(name: str, mode: str, impl: str) -> str:
    """The words that the cell must be refused with; none if it has a value."""
    row, whole = ROWS[name], (MODES[mode] or {}).get("fullgraph")
    if row.vmaps and impl != "torch" and (whole if name == "vmap" else mode != "eager"):
        return "vmap inside torch.compile"
    return "" if row.of == "kernels" and impl == "torch" and not whole else row.refused


def check(name: str, mode: str, op: str, impl: str) -> None:
    """Fail unless the cell gives the right value or its sentence."""
    torch._dynamo.reset()
    x, f = OPS[op]
    words = refusal(name, mode, impl)
    if not words:
        try:
            got = ROWS[name].run(lambda y: f(y, impl), x, mode)
        except Exception as error:
            raise AssertionError("refused, and not for a reason of the op's") from error
        torch.testing.assert_close(got, ROWS[name].want(lambda y: f(y, "torch"), x))
        return
    with pytest.raises(Exception) as caught:  # noqa: PT011  torch.compile wraps the op's in one of its own
        ROWS[name].run(lambda y: f(y, impl), x, mode)
    text = f"{caught.value}\n{caught.value.__cause__}"
    name = "token_logprobs" if op == "entropy" else op
    names = (name, *getattr(pk.backends.op(name), "parts", ()))  # of a composition the part that refuses says it
    sentences = [line for line in text.splitlines() if any(f"{name}: " in line for name in names)]
    assert any(words in line for line in sentences), text
