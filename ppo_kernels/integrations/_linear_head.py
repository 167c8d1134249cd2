"""Log-probabilities and entropy from hidden states, row tile by row tile, as TRL's fused head gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels.ops.token_logprobs import token_logprobs

#: Elements of the logits that exist at a time; twice as many in the backward.
TILE = 1 << 26


class LinearLogprobs(torch.autograd.Function):
    """``token_logprobs`` of ``hidden @ weight.T + bias`` without ``[N, V]`` logits; the backward recomputes them.

    Products are in ``dtype``; gradients are added up in float32 and rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        dtype: torch.dtype,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.dtype, ctx.entropy = temperature, dtype, "entropy" in outputs
        ctx.save_for_backward(hidden, weight, bias, targets)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        logprobs, entropy, top1 = [], [], []
        for rows in _tiles(hidden, weight):
            logits = _logits(hidden[rows], w, b)
            if ctx.entropy:
                logp, h = token_logprobs(logits, targets[rows], temperature=temperature, entropy="detached")
                entropy.append(h)
            else:
                logp = token_logprobs(logits, targets[rows], temperature=temperature)
            logprobs.append(logp)
            if "is_top1" in outputs:
                top1.append(logits.argmax(-1) == targets[rows])
        mean = None
        if "mean_logits" in outputs:  # the mean of a linear map is the map's mean
            mean = hidden.float() @ weight.float().mean(0) + (0.0 if bias is None else bias.float().mean())
            mean = mean / temperature
        is_top1 = torch.cat(top1) if top1 else None
        ctx.mark_non_differentiable(*(x for x in (mean, is_top1) if x is not None))
        return torch.cat(logprobs), torch.cat(entropy) if entropy else None, None, mean, is_top1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple:
        hidden, weight, bias, targets = ctx.saved_tensors
        w, b = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        wants = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants[2] else None
        for rows in _tiles(hidden, weight):
            logits = _logits(hidden[rows], w, b).requires_grad_()
            with torch.enable_grad():
                found = token_logprobs(logits, targets[rows], temperature=ctx.temperature, entropy=ctx.entropy)
            values = found if isinstance(found, tuple) else (found,)
            grads = (grad_logprobs, grad_entropy)
            given = [(x, g[rows]) for x, g in zip(values, grads, strict=False) if g is not None]
            (grad,) = torch.autograd.grad([x for x, _ in given], logits, [g for _, g in given])
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ w
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), hidden[rows].to(ctx.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _tiles(hidden: Tensor, weight: Tensor) -> list[slice]:
    n, step = hidden.size(0), max(1, TILE // weight.size(0))
    return [slice(i, min(i + step, n)) for i in range(0, n, step)] or [slice(0, 0)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).detach()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in float32, without rounding the product to the inputs' dtype."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
