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
