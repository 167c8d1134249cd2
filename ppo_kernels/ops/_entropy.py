"""The entropy bonus of a policy loss. It is linear in the entropy: torch's own operations around the kernel's launches
are all there is to it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ppo_kernels._registered import not_a_graph
from ppo_kernels._rows import find_rows, scalar, scaled_or_off, spread, valid_tokens
from ppo_kernels._types import PolicyStats, wide_dtype
from ppo_kernels.ops._autograd import first_order_only, once, recorded, transformed
from ppo_kernels.ops._inputs import keepable


def with_entropy(
    op: str,
    loss: Tensor,
    stats: PolicyStats,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    *,
    entropy: Tensor,
    entropy_coef: float | Tensor,
    entropy_normalizer: Tensor | None,
) -> tuple[Tensor, PolicyStats]:
    """A loss and its statistics with those of the entropy, in the dtype of the loss; None is the number of tokens."""
    eager = not (torch.compiler.is_compiling() or transformed())
    x = entropy.detach() if eager else first_order_only(op, entropy)
    valid, weight = _valid_and_weight(x, cu_seqlens, mask, row_weight)
    if valid is not None:
        x = torch.where(valid, x, 0.0)
    total = _total(x if weight is None else x * weight)
    with torch.no_grad():
        count = stats.count.clamp(min=1.0)
        mean = ((total if weight is None else _total(x)) / count).to(loss.dtype)
        factor = scalar(entropy_coef, loss).to(total.dtype)
        factor = factor / (count if entropy_normalizer is None else entropy_normalizer)
        if entropy_normalizer is not None:
            factor = torch.where(entropy_normalizer == 0, 0.0, factor)
    bonus = scaled_or_off(factor, total)
    if eager and recorded(entropy):
        loss, _ = _EagerBonus.apply(op, loss, entropy, bonus, factor, valid, weight)
    else:
        loss = (loss - bonus).to(loss.dtype)
    return loss, stats._replace(entropy=mean)


class _EagerBonus(torch.autograd.Function):
    """``loss - bonus``; a quarter of the host's time of what autograd makes of the operations."""

    @staticmethod
    def forward(ctx, op, loss, entropy, bonus, factor, valid, weight):
        # An output, so that a gradient depends on the entropy for who differentiates twice.
        origin = loss.new_empty(0)
        ctx.op, ctx.shape = op, entropy.shape
        ctx.save_for_backward(factor, keepable(valid), keepable(weight), origin)
        return (loss - bonus).to(loss.dtype), origin

    @staticmethod
    @not_a_graph
    def backward(ctx, grad_loss, _grad_origin):
        factor, valid, weight, origin = ctx.saved_tensors
        slope = (-factor * grad_loss).to(grad_loss.dtype)
        grad = slope.expand(ctx.shape) if weight is None else slope * weight
        if valid is not None:
            grad = torch.where(valid, grad, 0.0)
        return None, grad_loss, once(ctx.op, grad, origin), None, None, None, None


def _valid_and_weight(
    x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, row_weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens count, None for all; and the weights of their rows, 0 where they do not."""
    weight = None
    if cu_seqlens is None:
        valid = None if mask is None else mask.bool()
        if row_weight is not None:
            weight = row_weight[:, None].expand_as(x)
    else:
        rows = find_rows(x, cu_seqlens)
        valid = valid_tokens(x, mask, rows).view_as(x)
        if row_weight is not None:
            weight = spread(row_weight, rows)
    if weight is not None and valid is not None:
        weight = torch.where(valid, weight, 0.0)
    return valid, weight


def _total(x: Tensor) -> Tensor:
    """The sum of all elements, in parts that do not depend on the number of threads."""
    if x.dim() == 1 or x.size(0) == 1:
        parts = (x.numel() + 1023) // 1024
        x = pad(x.reshape(-1), (0, 1024 * parts - x.numel())).unflatten(0, (parts, 1024))
    return x.sum(1).to(wide_dtype(x.device)).sum()
