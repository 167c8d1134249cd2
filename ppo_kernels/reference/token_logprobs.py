"""Token log-probabilities and entropy, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._types import compute_dtype


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    entropy: bool | str = False,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits)
    live = labels != ignore_index
    if mask is not None:
        live = live & (mask != 0)
    in_range = (labels >= 0) & (labels < logits.size(-1))
    z = torch.where(live[..., None], logits.to(dtype), 0.0)
    tau = temperature[..., None] if isinstance(temperature, Tensor) else torch.tensor(temperature, dtype=torch.float64)
    least = torch.finfo(dtype).tiny  # beyond it and its inverse the softmax is as good as its limit
    tau = torch.where(tau > 0, tau.clamp(least, 1 / least), float("nan")).to(dtype)
    log_p = torch.log_softmax((z - z.detach().amax(-1, keepdim=True)) / tau, -1)  # or z / tau may be infinite
    # Multiplying by NaN, rather than selecting it, makes the gradient of a bad row NaN as well.
    poison = torch.where(in_range, 1.0, float("nan")).to(dtype)
    chosen = log_p.gather(-1, torch.where(in_range, labels, 0).to(torch.int64)[..., None]).squeeze(-1)
    logp = torch.where(live, chosen * poison, 0.0)
    if entropy is False:
        return logp
    h = -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(-1)
    h = torch.where(live, h * poison, 0.0)
    return logp, h.detach() if entropy == "detached" else h
