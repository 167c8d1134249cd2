"""The policy loss of log-probabilities from hidden states, and the gradients of hidden, weight and bias."""

from __future__ import annotations

import numpy as np
import torch

from bench.oracle.linear_token_logprobs import linear_token_logprobs
from bench.oracle.policy_loss import entropy_bonus, policy_loss

HEAD = ("bias", "temperature", "softcap", "logit_scale")


def linear_policy_loss(
    hidden, weight, labels, old_logprobs, advantages, mask=None, *, ignore_index=-100, entropy=False, **options
) -> tuple:
    """loss, statistics, log-probabilities, and the gradients of bias, weight and hidden."""
    of_head = {name: options.pop(name) for name in HEAD if name in options} | {"ignore_index": ignore_index}
    valid = labels != ignore_index
    if mask is not None:
        valid = valid & (mask != 0)
    logp, of_entropy, *_ = linear_token_logprobs(hidden, weight, labels, mask=valid, **of_head)
    h = torch.from_numpy(of_entropy) if entropy is not False else None
    loss, stats, grad = policy_loss(torch.from_numpy(logp), old_logprobs, advantages, valid, entropy=h, **options)
    slopes = {"grad_logp": torch.from_numpy(np.asarray(grad))}
    if entropy is True:
        scale = next((x for x in (options.get(f"{of}normalizer") for of in ("entropy_", "")) if x is not None), None)
        scale = float(valid.sum()) if scale is None else float(scale)
        coef = float(options.get("entropy_coef", 0.0))
        given = (options.get("row_weight"), scale, options.get("cu_seqlens"))
        slopes["grad_entropy"] = torch.from_numpy(np.asarray(entropy_bonus(h, valid, coef, *given)[1]))
    found = linear_token_logprobs(hidden, weight, labels, mask=valid, **slopes, **of_head)
    return loss, stats, logp, *found[2:]
