"""The policy loss of log-probabilities from hidden states, and the gradients of hidden, weight and bias."""

from __future__ import annotations

import numpy as np
import torch

from bench.oracle.linear_token_logprobs import linear_token_logprobs
from bench.oracle.policy_loss import policy_loss

HEAD = ("bias", "temperature", "softcap", "logit_scale")


def linear_policy_loss(
    hidden, weight, labels, old_logprobs, advantages, mask=None, *, ignore_index=-100, **options
) -> tuple:
    """loss, statistics, log-probabilities, and the gradients of bias, weight and hidden."""
    of_head = {name: options.pop(name) for name in HEAD if name in options} | {"ignore_index": ignore_index}
    valid = labels != ignore_index
    if mask is not None:
        valid = valid & (mask != 0)
    logp = linear_token_logprobs(hidden, weight, labels, mask=valid, **of_head)[0]
    loss, stats, grad = policy_loss(torch.from_numpy(logp), old_logprobs, advantages, valid, **options)
    grad_logp = torch.from_numpy(np.asarray(grad))
    found = linear_token_logprobs(hidden, weight, labels, mask=valid, grad_logp=grad_logp, **of_head)
    return loss, stats, logp, *found[2:]
