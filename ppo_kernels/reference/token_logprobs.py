"""Token log-probabilities and entropy, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._types import compute_dtype, wide_dtype


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool | str = False,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype, many = compute_dtype(logits), labels.dim() == logits.dim()
    y = labels if many else labels[..., None]  # [..., K]
    live = y != ignore_index
    if mask is not None:
        live = live & ((mask if mask.dim() == y.dim() else mask[..., None]) != 0)
    row_live = live.any(-1)
    in_range = (y >= 0) & (y < logits.size(-1))
    z = torch.where(row_live[..., None], logits.to(dtype), 0.0)
    tau = torch.as_tensor(temperature, dtype=wide_dtype(logits.device), device=logits.device)[..., None]
    smallest = torch.finfo(dtype).tiny  # near it and its inverse the softmax is as good as its limit
    tau = torch.where(tau > 0, tau.clamp(smallest * 2**13, 1 / smallest), float("nan")).to(dtype)
    log_p = torch.log_softmax((z - z.detach().amax(-1, keepdim=True)) / tau, -1)  # or z / tau may be infinite
    # Multiplying by NaN, rather than selecting it, makes the gradient of a row with a bad label NaN as well.
    bad = live & ~in_range
    chosen = log_p.gather(-1, torch.where(in_range, y, 0).to(torch.int64)) * _nan_where(bad, dtype)
    logp = torch.where(live, chosen, 0.0)
    logp = logp if many else logp.squeeze(-1)
    if entropy is False:
        return logp
    h = -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(-1) * _nan_where(bad.any(-1), dtype)
    h = torch.where(row_live, h, 0.0)
    return logp, h.detach() if entropy == "detached" else h


def _nan_where(bad: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ones_like(bad, dtype=dtype).masked_fill(bad, float("nan"))
