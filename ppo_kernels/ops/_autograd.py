"""What the ops' autograd functions share.

Each has three forms with one backward. The eager one is the cheapest to call. ``torch.func`` needs forward and
``setup_context`` apart, a rule for vmap, and every output that the backward reads. A traced one may have neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack
from torch.autograd import forward_ad

from ppo_kernels._registered import forward_mode_message, not_a_graph
from ppo_kernels._types import constant_of_a_graph
from ppo_kernels.backends import Op, register
from ppo_kernels.ops._fakes import like_first
from ppo_kernels.ops._public import any_tangent, differentiates_forward

Transform = torch._C._functorch.TransformType


def _triton_kernel():
    from ppo_kernels.triton.loss_backward import loss_backward

    return loss_backward


_LOSS_BACKWARD = register("loss_backward", fake=like_first, triton_kernel=_triton_kernel)


def transformed() -> bool:
    """Whether a transform of ``torch.func`` runs, eagerly."""
    return torch._C._are_functorch_transforms_active()


def is_batch(x: Tensor | None) -> bool:
    """Whether it is one gradient for each of many that are asked for: by vmap, or by ``is_grads_batched=True``."""
    functorch = torch._C._functorch
    return x is not None and (functorch.is_legacy_batchedtensor(x) or functorch.is_functorch_wrapped_tensor(x))


def recorded(x: Tensor) -> bool:
    """Whether autograd looks at what is computed from ``x``; if not, an op spares itself its autograd function."""
    return x.requires_grad and torch.is_grad_enabled()


@constant_of_a_graph
def _transforms() -> str:
    """The transforms around a traced call, outermost first, as text, which a graph may hold."""
    names = [str(interpreter.key()).rpartition(".")[2] for interpreter in get_interpreter_stack() or ()]
    return " ".join(names)


def twice_message(op: str) -> str:
    return f"{op}: differentiating twice is not supported; second derivatives of this op are not available"


def vmap_message(op: str) -> str:
    return (
        f"{op}: torch.func.vmap inside torch.compile is not supported; call vmap without torch.compile, or pass"
        ' impl="torch"'
    )


class _Once(torch.autograd.Function):
    """A gradient that depends on what it was taken by, and refuses to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op, grad, *_origins):
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, _grad):
        raise RuntimeError(twice_message(ctx.op))

    @staticmethod
    def jvp(ctx, *_tangents):
        raise RuntimeError(forward_mode_message(ctx.op))


@not_a_graph
def once(op: str, grad: Tensor, *origins: Tensor | None) -> Tensor:
    """A gradient as a backward returns it, which depends on what it was computed of.

    It is recorded with create_graph=True, and under torch.func always: only who differentiates it is refused.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return grad
    return _Once.apply(op, grad, *origins)


class _FirstOrderOnly(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op, x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @not_a_graph
    def backward(ctx, grad):
        return None, once(ctx.op, grad, ctx.saved_tensors[0])


def has_tangent(x: Tensor) -> bool:
    """Whether forward mode differentiates ``x``: every implementation then computes by the reference."""
    if forward_ad._current_level < 0:
        return False
    return differentiates_forward() if torch.compiler.is_compiling() else any_tangent((x,))


def first_order_only(op: str, x: Tensor) -> Tensor:
    """``x`` for the reference: autograd could differentiate it twice, but a switch of ``impl`` changes no contract."""
    if torch.compiler.is_compiling():
        return traced_input(op, x, kernel=False)
    if has_tangent(x):
        kinds = [interpreter.key() for interpreter in get_interpreter_stack() or ()]
        if Transform.Grad in kinds or kinds.count(Transform.Jvp) > 1:
            raise RuntimeError(twice_message(op))
        if recorded(_base(x)):
            raise RuntimeError(f"{twice_message(op)}; pass a detached tensor, or differentiate within torch.no_grad()")
        return x
    return _FirstOrderOnly.apply(op, x) if x.requires_grad or transformed() else x


# Opaque to Dynamo, whose own way with an autograd function loses the refusal; nothing is left of it in a graph.
_library = torch.library.Library("ppo_kernels_traced", "FRAGMENT")
_library.define("first_order_only(str op, Tensor(a) x) -> Tensor(a)")
_library.impl("first_order_only", _FirstOrderOnly.apply, "CompositeImplicitAutograd")


def _base(x: Tensor) -> Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


@constant_of_a_graph
def _allow_in_graph() -> bool:
    """Make ``_differentiated_once`` opaque to Dynamo, which runs this before it looks at that."""
    torch.compiler.allow_in_graph(_differentiated_once)
    return True


def _differentiated_once(op: str, x: Tensor, kernel: bool) -> Tensor:
    """``x`` apart from what torch.func differentiates, whose gradient Dynamo would make 0.

    Where a graph would hold wrong derivatives, one sentence, which ends the compilation: behind a break of the graph
    eager code would run within a transform that Dynamo has half undone.
    """
    stack = get_interpreter_stack() or []
    kinds = [interpreter.key() for interpreter in stack]
    if kinds.count(Transform.Grad) + kinds.count(Transform.Jvp) > 1:
        raise RuntimeError(twice_message(op))
    if kernel and Transform.Vmap in kinds:
        raise RuntimeError(vmap_message(op))
    outer = _base(x)
    grads = [torch._C._functorch.CGradInterpreterPtr(i).prevGradMode() for i in stack if i.key() == Transform.Grad]
    if outer.requires_grad and all(grads or [torch.is_grad_enabled()]):
        raise RuntimeError(
            f"{op}: torch.func inside torch.compile got an input that requires grad by itself, and differentiating"
            " twice is not supported; pass it detached, or call torch.func without torch.compile"
        )
    return x.clone() if Transform.Jvp in kinds else _FirstOrderOnly.apply(op, x)  # no view: AOTAutograd fails on it


def traced_input(op: str, x: Tensor, *, kernel: bool) -> Tensor:
    """``x`` as a traced autograd function takes it, or one sentence where torch.compile would make a graph with
    gradients of 0 or break inside itself: for a kernel under vmap, too, and in a strict export.
    """
    names = _transforms()
    if kernel and names == "Vmap":  # eager code can do it, behind a break of the graph
        raise RuntimeError(vmap_message(op))
    strict = torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling()
    if kernel and strict and x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: torch.export with strict=True drops the gradient of this op; pass strict=False, export under"
            ' torch.no_grad(), or pass impl="torch"'
        )
    if names and _allow_in_graph():
        return _differentiated_once(op, x, kernel)
    return torch.ops.ppo_kernels_traced.first_order_only(op, x)


def fused_loss(op: Op, impl: str, x: Tensor, arguments: tuple[object, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and statistics of a kernel that takes ``x``, the arguments and whether to write the gradient."""
    if torch.compiler.is_compiling():
        kernel, (x, *rest) = op.traceable(impl, (traced_input(op.name, x, kernel=True), *arguments))
        loss, stats = _TracedLoss.apply(kernel, x, tuple(rest))
    elif transformed():
        loss, stats, _, _ = _TransformedLoss.apply(op, impl, x, *arguments)
    elif recorded(x):
        loss, stats, _ = _EagerLoss.apply(op, impl, x, arguments)
    else:
        loss, stats, _, _ = op.run(impl, x, *arguments, False)
    return loss, stats.unbind(0)


class _TracedLoss(torch.autograd.Function):
    """A scalar loss. Its kernel already wrote d(loss * normalizer)/dx, which the backward scales, on the device."""

    @staticmethod
    def forward(ctx, kernel, x, arguments):
        ctx.set_materialize_grads(False)
        loss, stats, grad, inv_normalizer = kernel(x, *arguments, ctx.needs_input_grad[1])
        ctx.save_for_backward(grad, inv_normalizer)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, _grad_stats):
        if grad_loss is None:
            return None, None, None
        grad, inv_normalizer = ctx.saved_tensors
        return None, grad * (grad_loss * inv_normalizer), None


class _EagerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, impl, x, arguments):
        ctx.set_materialize_grads(False)
        loss, stats, grad, inv_normalizer = op.run(impl, x, *arguments, ctx.needs_input_grad[2])
        ctx.op, ctx.impl = op.name, impl
        ctx.save_for_backward(grad, inv_normalizer)
        ctx.mark_non_differentiable(stats)
        # An output, so that it depends on x for who differentiates twice. Nothing keeps x, or its memory, for that.
        return loss, stats, grad

    @staticmethod
    @not_a_graph
    def backward(ctx, grad_loss, *_others):
        if grad_loss is None:
            return None, None, None, None
        grad, inv_normalizer = ctx.saved_tensors
        if is_batch(grad_loss) or has_tangent(grad_loss):
            scaled = grad * (grad_loss * inv_normalizer)
        else:
            scaled = _LOSS_BACKWARD.run(ctx.impl, grad, grad_loss, inv_normalizer)
        return None, None, once(ctx.op, scaled, grad, grad_loss), None


class _TransformedLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @not_a_graph
    def forward(op, impl, x, *arguments):
        return op.kernel(impl)(x, *arguments, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        op, _, x, *arguments = inputs
        ctx.op, ctx.inputs = op.name, 3 + len(arguments)
        ctx.save_for_backward(*output[2:], x)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @not_a_graph
    def backward(ctx, grad_loss, *_others):
        grad, inv_normalizer, x = ctx.saved_tensors
        grads: list[Any] = [None] * ctx.inputs
        grads[2] = once(ctx.op, grad * (grad_loss * inv_normalizer), x)
        return tuple(grads)
