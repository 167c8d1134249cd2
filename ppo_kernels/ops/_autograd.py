"""What the ops' autograd functions share."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels.backends import Op


def refuse_double_backward(op: str) -> None:
    """Raise if a backward is itself recorded: second-order terms would be silently dropped.

    While a graph is traced, grad mode does not tell; a compiled backward refuses by itself.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op}: differentiating twice is not supported; call backward without create_graph=True")


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, x):
        ctx.op = op
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward(ctx.op)
        return None, grad


def first_order_only(op: str, x: Tensor) -> Tensor:
    """``x`` for the reference: autograd could differentiate it twice, but a switch of ``impl`` changes no contract."""
    return _FirstOrderOnly.apply(op, x) if x.requires_grad else x


def fused_loss(op: Op, impl: str, x: Tensor, arguments: tuple[object, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and statistics of a kernel that takes ``x``, the arguments and whether to write the gradient."""
    loss, stats = _ScaledGradient.apply(op, impl, x, arguments)
    return loss, stats.unbind(0)


class _ScaledGradient(torch.autograd.Function):
    """A scalar loss. Its kernel already wrote d(loss * normalizer)/dx, which the backward scales, on the device."""

    @staticmethod
    def forward(ctx, op, impl, x, arguments):
        ctx.set_materialize_grads(False)
        ctx.op = op.name
        loss, stats, grad, inv_normalizer = op.kernel(impl)(x, *arguments, ctx.needs_input_grad[2])
        ctx.save_for_backward(grad, inv_normalizer)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, _grad_stats):
        refuse_double_backward(ctx.op)
        if grad_loss is None:
            return None, None, None, None
        grad, inv_normalizer = ctx.saved_tensors
        return None, None, grad * (grad_loss * inv_normalizer), None
