"""The table of ``tests/test_transforms.py``: every way to differentiate or batch an op, and what that gives.

A cell is a row of the table, a mode (eager, or a backend of torch.compile), an op and an implementation. It gives the
right value or one clear sentence, never a silent 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ppo_kernels as pk
from bench.cases import OPS as REGISTRY
from tests.lib import cases


def _differentiated(name: str) -> tuple[torch.Tensor, Callable]:
    """What the op is differentiated in, and a number made of what it returns, by an implementation."""
    case = cases.make(name, batch=2, length=3)
    wanted = cases.REGISTERED[name].differentiable

    def call(x: torch.Tensor, impl: str) -> torch.Tensor:
        found = case.call(case.tensors | {case.leaf: x}, impl)[:wanted]
        return sum((y * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() for y in found)

    return case.tensors[case.leaf], call


def _others(op: str) -> dict[str, tuple[torch.Tensor, Callable]]:
    """Each input that forward mode takes no tangent of, and the op's first result."""
    case = cases.make(op, batch=2, length=3)

    def call(name: str) -> Callable:
        return lambda x, impl: case.call(case.tensors | {name: x}, impl)[0]

    names = [name for name, x in case.tensors.items() if x.is_floating_point() and name != case.leaf]
    return {f"{op}.{name}": (case.tensors[name], call(name)) for name in names}


#: In their first input, and where a variant has a second result with a gradient in that, too.
OPS = {
    name: _differentiated(name)
    for name, case in cases.REGISTERED.items()
    if case.variant in ("", "entropy") and case.leaf == next(iter(cases.make(name).tensors))
}
#: What a tangent is refused of.
OTHERS = {name: found for op in REGISTRY for name, found in _others(op).items()}
OTHERS["aggregation_weights.mask"] = (torch.ones(2, 3), lambda x, impl: pk.aggregation_weights(x)[0])
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


def saved_selectively(f, x, mode):
    """Selective checkpointing that saves what every operation gives, or our ops alone, or nothing."""

    def gradient_where(saves):
        def policy(_, op, *arguments, **options):
            return CheckpointPolicy.MUST_SAVE if saves(str(op)) else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = partial(create_selective_checkpoint_contexts, policy)
        return gradient(lambda y: checkpoint(f, y, use_reentrant=False, context_fn=contexts), x)

    found = [gradient_where(saves) for saves in (lambda op: True, lambda op: "ppo_kernels" in op, lambda op: False)]
    torch.testing.assert_close(found[1:], found[:1] * 2)
    return found[0]


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
    "selective_checkpoint": Row(saved_selectively, modes=EAGER),
}


def refusing(function: str) -> tuple[str, ...]:
    """Whose name a refusal begins with: of a composition that of the part that refuses."""
    parts = getattr(pk.backends.op(function), "parts", ()) if function in REGISTRY else ()
    return (function, *parts)


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
    names = refusing(op.partition(":")[0])
    sentences = [line for line in text.splitlines() if any(f"{name}: " in line for name in names)]
    assert any(words in line for line in sentences), text
