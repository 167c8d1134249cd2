"""KL estimators and KL-shaped rewards, eager."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_kernels._rows import (
    find_rows,
    last_valid,
    row_sum,
    scalar,
    scaled_or_off,
    select,
    spread,
    valid_tokens,
)
from ppo_kernels._types import compute_dtype


def clamp(x: Tensor, bound: float | Tensor | None) -> Tensor:
    """``x`` bounded to +-bound; None or infinity is off, and then the gradient of a NaN passes too."""
    if isinstance(bound, Tensor):  # of a traced graph
        return torch.where(bound == math.inf, x, x.clamp(-bound, bound))
    return x if bound is None or bound == math.inf else x.clamp(-bound, bound)


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: str,
    kl_log_clamp: float | Tensor | None,
    kl_clamp: float | Tensor | None,
) -> Tensor:
    """Per-token estimate of KL(pi || ref): k1, abs, k2 or k3 (Schulman, 2020), bounded before and after."""
    x = clamp(ref_logprobs - logprobs, kl_log_clamp)
    if kl_clamp is None or (not isinstance(kl_clamp, Tensor) and kl_clamp == math.inf):
        return _estimate(x, estimator)
    # What lies beyond the clamp is a constant. An infinite estimate is not left to clamp: its gradient, 0, would meet
    # an infinite slope.
    k = _estimate(x.detach(), estimator)
    off = torch.as_tensor(kl_clamp == math.inf, device=k.device)
    within = torch.logical_or(k.abs() <= kl_clamp, off)
    return torch.where(within, _estimate(torch.where(within, x, 0.0), estimator), clamp(k, kl_clamp))


def _estimate(x: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return -x
    if estimator == "abs":
        return x.abs()
    if estimator == "k2":
        return 0.5 * x * x
    return torch.expm1(x) - x


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
