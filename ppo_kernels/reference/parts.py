"""Some columns of rows of logits, eager: their statistics, and their gradient from the statistics of whole rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._types import compute_dtype


def statistics(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Of some columns of each row ``[..., columns]``: the maximum, the logarithm of the sum of exponentials over it,
    and the entropy; NaN without a distribution.
    """
    dtype = compute_dtype(logits)
    z, tau = logits.to(dtype), _column(temperature, dtype)
    most = z.amax(-1, keepdim=True)
    most = torch.where(most == -torch.inf, torch.nan, most)
    x = (z - most) / tau
    e = x.exp()
    total = e.sum(-1)
    h = total.log() - torch.where(e > 0, e * x, 0.0 * e).sum(-1) / total
    return torch.stack([most[..., 0], total.log(), h])


def gradient_(
    logits: Tensor, labels: Tensor, temperature: float | Tensor, grads: tuple, logprobs: Tensor, stats: Tensor
) -> None:
    """Write the gradient over such columns ``[..., C]``, from the log-probabilities and the statistics of whole rows.

    ``labels [..., K]`` are columns, -1 where a label lies in none of them; ``grads`` are those of
    ``logprobs [..., K]`` and of the entropy.
    """
    columns = labels.clamp(min=0)
    at = gradient_at(logits.gather(-1, columns), columns, labels, temperature, grads, logprobs, stats)
    nowhere = labels.new_full((*labels.shape[:-1], 1), -2)
    every = gradient_at(logits, nowhere, labels, temperature, grads, logprobs, stats)
    logits.copy_(every.scatter(-1, columns, at))


def gradient_at(
    logits: Tensor,
    columns: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    grads: tuple,
    logprobs: Tensor,
    stats: Tensor,
) -> Tensor:
    """Of single logits ``[..., C]``, which those of the ``columns`` are; near p = 1 as exact as the log-probability."""
    g, g_entropy = grads
    log_p = (logits.to(stats.dtype) - stats[0][..., None]) / _column(temperature, stats.dtype) - stats[1][..., None]
    p = log_p.exp()
    found, idle = torch.zeros_like(p), torch.ones_like(stats[0], dtype=torch.bool)[..., None]
    if g is not None:
        for k in range(labels.size(-1)):
            own = labels[..., k, None] == columns
            found = found + g[..., k, None] * torch.where(own, -torch.expm1(logprobs[..., k, None]), -p)
        idle = (g == 0).all(-1, keepdim=True)
    if g_entropy is not None:
        of_entropy = torch.where(p > 0, p * (log_p + stats[2][..., None]), 0.0 * p)
        found = found - g_entropy[..., None] * of_entropy
        idle = idle & (g_entropy == 0)[..., None]
    return torch.where(idle, 0.0, found / _column(temperature, stats.dtype))


def _column(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return temperature.to(dtype)[..., None] if isinstance(temperature, Tensor) else temperature
