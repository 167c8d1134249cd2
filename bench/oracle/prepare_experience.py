"""Rewards, whitened advantages, returns and the KL of each sequence."""

from __future__ import annotations

import torch

from bench.oracle.gae import gae
from bench.oracle.kl_rewards import kl_rewards
from bench.oracle.whiten import whiten

OF_REWARDS = ("kl_coef", "kl_estimator", "score_clip", "kl_log_clamp", "kl_clamp", "score_index")


def prepare_experience(logprobs, ref_logprobs, values, scores, mask=None, *, cu_seqlens=None, **options) -> tuple:
    of_rewards = {name: options.pop(name) for name in OF_REWARDS if name in options} | {"cu_seqlens": cu_seqlens}
    of_scale = {name: options.pop(name) for name in ("shift_mean", "unbiased", "eps") if name in options}
    rewards, kl = kl_rewards(logprobs, ref_logprobs, scores, mask, **of_rewards)
    advantages, returns = gae(torch.from_numpy(rewards), values, mask, cu_seqlens=cu_seqlens, **options)
    return rewards, whiten(torch.from_numpy(advantages), mask, **of_scale), returns, kl
