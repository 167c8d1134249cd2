"""KL estimators and KL-shaped rewards, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._types import compute_dtype
from ppo_kernels.reference.rows import (
    find_rows,
    last_valid,
    row_sum,
    scalar,
    scaled_or_off,
    select,
    spread,
    valid_tokens,
)


def clamp(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(-bound, bound)


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: str, kl_log_clamp: float | None, kl_clamp: float | None
) -> Tensor:
    """Per-token estimate of KL(pi || ref): k1, abs, k2 or k3 (Schulman, 2020), bounded before and after."""
    x = clamp(ref_logprobs - logprobs, kl_log_clamp)
    if estimator == "k1":
        k = -x
    elif estimator == "abs":
        k = x.abs()
    elif estimator == "k2":
        k = 0.5 * x * x
    else:
        k = torch.expm1(x) - x
    return clamp(k, kl_clamp)


@torch.no_grad()
def kl_rewards(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: float | Tensor = 0.1,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    kl_log_clamp: float | None = None,
    kl_clamp: float | None = None,
    score_index: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logprobs, ref_logprobs, scores)
    rows = find_rows(logprobs, cu_seqlens)
    valid = valid_tokens(logprobs, mask, rows)
    logp, ref = select(logprobs, valid, dtype), select(ref_logprobs, valid, dtype)
    k = torch.where(valid, kl_estimate(logp, ref, kl_estimator, kl_log_clamp, kl_clamp), 0.0)

    at = last_valid(valid, rows)
    if score_index is not None:
        inside = (score_index >= 0) & (score_index < rows.end - rows.start)
        at = torch.where(inside & (at >= 0), rows.start + score_index, -1)
    here = rows.owned & (torch.arange(valid.numel(), device=valid.device) == spread(at, rows))
    bonus = torch.where(here, spread(clamp(scores.to(dtype), score_clip), rows), 0.0)
    return (bonus - scaled_or_off(scalar(kl_coef, k), k)).reshape(logprobs.shape), row_sum(k, rows)
