"""Log-probability and entropy from hidden states, and the gradients of hidden, weight and bias."""

from __future__ import annotations

import math

import numpy as np
import torch

from bench.oracle.token_logprobs import token_logprobs


def _numbers(x) -> np.ndarray:
    return np.array(x.detach().double().numpy())


def linear_token_logprobs(
    hidden, weight, labels, *, bias=None, softcap=None, logit_scale=1.0, mask=None, ignore_index=-100, **options
) -> tuple[np.ndarray, ...]:
    """logp, entropy, and of ``sum(grad_logp * logp) + sum(grad_entropy * entropy)`` the gradients of bias, weight and
    hidden, in this order."""
    x, w = _numbers(hidden).reshape(-1, hidden.shape[-1]), _numbers(weight)
    live = (labels != ignore_index).numpy()
    if mask is not None:
        live = live & (mask != 0).numpy()
    x = np.where(live.reshape(-1, 1), x, 0.0)
    b = np.zeros(len(w)) if bias is None else _numbers(bias)
    scaled = logit_scale * (x @ w.T + b)
    capped = softcap is not None and softcap < math.inf
    z = softcap * np.tanh(scaled / softcap) if capped else scaled
    slope = logit_scale * (1.0 - (z / softcap) ** 2 if capped else np.ones_like(z))
    logits = torch.from_numpy(z).view(*labels.shape, -1)
    logp, entropy, grad = token_logprobs(
        logits, labels, mask=torch.from_numpy(live), ignore_index=ignore_index, **options
    )
    d = grad.reshape(z.shape) * slope
    return logp, entropy, d.sum(0), d.T @ x, (d @ w).reshape(tuple(hidden.shape))
