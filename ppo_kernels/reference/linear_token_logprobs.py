"""Token log-probabilities and entropy from hidden states, eager: all logits at once."""

from __future__ import annotations

import contextlib
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
    support: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """And behind them the logits, -inf outside of ``support [..., S]``, padded with -1."""
    dtype = compute_dtype(hidden, weight, bias)
    live = labels != ignore_index
    if mask is not None:
        live = live & (mask != 0)
    # Of a meta tensor torch knows no autocast.
    without_autocast = contextlib.nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False)
    with without_autocast:
        x = torch.where(live[..., None], hidden.to(dtype), 0.0)
        z = torch.nn.functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    z = z * logit_scale
    if softcap is not None and not (isinstance(softcap, float) and math.isinf(softcap)):
        z = torch.where(torch.as_tensor(softcap, device=z.device) == math.inf, z, _capped(z, softcap))
    if support is not None:
        allowed = torch.zeros(*z.shape[:-1], z.size(-1) + 1, dtype=torch.bool, device=z.device)
        ids = torch.where((support >= 0) & (support < z.size(-1)), support, z.size(-1))
        z = torch.where(allowed.scatter(-1, ids, True)[..., :-1], z, -torch.inf)
    found = token_logprobs(z, labels, temperature=temperature, mask=live, ignore_index=ignore_index, entropy=entropy)
    return (*found, z) if isinstance(found, tuple) else (found, z)


def _capped(z: Tensor, softcap: float | Tensor) -> Tensor:
    cap = torch.as_tensor(softcap, dtype=z.dtype, device=z.device)
    cap = torch.where(cap == math.inf, 1.0, cap)
    return cap * torch.tanh(z / cap)
