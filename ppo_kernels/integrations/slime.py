"""slime: its advantages and returns, for an option that takes a function's path; nothing is replaced.

    --custom-advantage-function-path ppo_kernels.integrations.slime.compute_advantages_and_returns

``slime/backends/megatron_utils/loss.py`` calls it (read in 0.3.1, of August 2026), and it computes what slime's own
functions compute.
"""

from __future__ import annotations

from argparse import Namespace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ppo_kernels.ops.gae import gae

__all__ = ["compute_advantages_and_returns"]


def compute_advantages_and_returns(args: Namespace, rollout_data: dict[str, Any]) -> None:
    """Fill in ``advantages`` and ``returns`` of "ppo" (GAE) and "reinforce_plus_plus" (discounted returns).

    The other estimators spread one number over a response: there is no function to pass for them. Responses that
    context parallelism cuts into pieces are refused, and so is one that has no token for its reward. slime whitens
    afterwards, if it is told to.
    """
    estimator = args.advantage_estimator
    if estimator not in ("ppo", "reinforce_plus_plus"):
        raise ValueError(
            f"compute_advantages_and_returns: advantage_estimator must be ppo or reinforce_plus_plus, got {estimator};"
            " leave --custom-advantage-function-path out"
        )
    if args.context_parallel_size > 1:
        raise ValueError(
            f"compute_advantages_and_returns: responses lie in pieces on {args.context_parallel_size} ranks; set"
            " --context-parallel-size 1 or leave --custom-advantage-function-path out"
        )
    lengths = [kl.numel() for kl in rollout_data["kl"]]
    if 0 in lengths:
        raise ValueError(
            f"compute_advantages_and_returns: response {lengths.index(0)} of {len(lengths)} has no tokens to bear its"
            " reward; leave it out of the rollout"
        )
    if len(rollout_data["rewards"]) != len(lengths):
        raise ValueError(
            f"compute_advantages_and_returns: {len(lengths)} responses need a reward each, got"
            f" {len(rollout_data['rewards'])}"
        )
    kl = torch.cat(rollout_data["kl"]).float()
    starts = torch.tensor([0, *accumulate(lengths)], device=kl.device)
    scores = torch.as_tensor(rollout_data["rewards"], dtype=kl.dtype, device=kl.device)
    with torch.no_grad():
        if estimator == "ppo":
            rewards = -args.kl_coef * kl
            values, lam, last = torch.cat(rollout_data["values"]), args.lambd, starts[1:] - 1
        else:
            mask = torch.cat(rollout_data["loss_masks"])
            rewards = -args.kl_coef * torch.where(mask != 0, kl, 0.0)
            values, lam, last = torch.zeros_like(kl), 1.0, _last_of_rows(mask, starts)
        rewards[last] += scores
        advantages, returns = gae(rewards, values, gamma=args.gamma, lam=lam, cu_seqlens=starts)
    if estimator == "reinforce_plus_plus":
        advantages = returns
    rollout_data["advantages"], rollout_data["returns"] = (list(x.split(lengths)) for x in (advantages, returns))


def _last_of_rows(mask: Tensor, starts: Tensor) -> Tensor:
    """Where the last valid token of each row is; this synchronises once, where slime does for every response."""
    positions = torch.arange(mask.numel(), device=mask.device)
    rows = torch.searchsorted(starts, positions, right=True) - 1
    nowhere = torch.full_like(starts[:-1], -1)
    last = nowhere.scatter_reduce(0, rows, torch.where(mask != 0, positions, -1), "amax")
    if masked := (last < 0).nonzero().flatten().tolist():
        raise ValueError(
            f"compute_advantages_and_returns: response {masked[0]} of {len(last)} is fully masked and has no token to"
            " bear its reward; leave it out of the rollout"
        )
    return last
