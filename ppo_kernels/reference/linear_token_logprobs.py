"""Token log-probabilities and entropy from hidden states, eager: all logits at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_kernels._types import compute_dtype
from ppo_kernels.reference.token_logprobs import token_logprobs


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool | str = False,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = compute_dtype(hidden, weight, bias)
    live = labels != ignore_index
    if mask is not None:
        live = live & (mask != 0)
    with torch.autocast(hidden.device.type, enabled=False):
        x = torch.where(live[..., None], hidden.to(dtype), 0.0)
        z = torch.nn.functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    z = z * logit_scale
    if softcap is not None and not (isinstance(softcap, float) and math.isinf(softcap)):
        z = torch.where(torch.as_tensor(softcap) == math.inf, z, _capped(z, softcap))
    return token_logprobs(z, labels, temperature=temperature, mask=live, ignore_index=ignore_index, entropy=entropy)


def _capped(z: Tensor, softcap: float | Tensor) -> Tensor:
    cap = torch.as_tensor(softcap, dtype=z.dtype, device=z.device)
    cap = torch.where(cap == math.inf, 1.0, cap)
    return cap * torch.tanh(z / cap)


def tile_statistics(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Of some columns of each row ``[rows, columns]``: the maximum, the logarithm of the sum of exponentials over it,
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
    return torch.stack([most[:, 0], total.log(), h])


def tile_gradient_(
    logits: Tensor, labels: Tensor, temperature: float | Tensor, grads: list, logprobs: Tensor, stats: Tensor
) -> None:
    """Write the gradient over such columns, from the log-probabilities and the statistics of whole rows."""
    g, g_h = (torch.zeros_like(logprobs) if x is None else x for x in grads)
    entropy = stats[2] if len(stats) > 2 else torch.zeros_like(logprobs)

    def gradient(log_p: Tensor, rest: Tensor, g: Tensor, g_h: Tensor, entropy: Tensor) -> Tensor:
        p = log_p.exp()
        return g * rest - g_h * torch.where(p > 0, p * (log_p + entropy), 0.0 * p)

    tau = _column(temperature, stats.dtype)
    log_p = (logits.to(stats.dtype) - stats[0][:, None]) / tau - stats[1][:, None]
    of_all = gradient(log_p, -log_p.exp(), g[:, None], g_h[:, None], entropy[:, None])
    of_label = gradient(logprobs, -torch.expm1(logprobs), g, g_h, entropy)
    idle = ((g == 0) & (g_h == 0))[:, None]
    logits.copy_(torch.where(idle, 0.0, of_all.scatter(1, labels[:, None], of_label[:, None]) / tau))


def _column(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature
