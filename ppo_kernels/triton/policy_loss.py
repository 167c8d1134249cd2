"""The clipped policy loss: loss, statistics and gradient in two launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels._types import KL_ESTIMATORS, PolicyStats
from ppo_kernels.triton._launch import as_vector, launch, mask_bytes, require_code, require_like, row_stride, token_rows
from ppo_kernels.triton._loss import (
    chunk_for,
    columns,
    fold_loss,
    fold_m2,
    is_flat,
    is_per_row,
    launch_fold,
    load_tokens,
    locate,
    new_outputs,
    new_parts,
    pick,
    row_arguments,
    store_tokens,
)
from ppo_kernels.triton._math import INF, clamp, clamp_gradient, exp, expm1_minus, kl_term, scaled_or_off

# One binary for every size and stride.
INTEGERS = ("N", "T", "B", *(f"{name}_stride" for name in ("logp", "old", "adv", "mask", "weights", "ref")))
# Columns of a line of partial sums: the statistics, then the loss.
(
    K1, K2, K3, RATIO_MEAN, RATIO_VAR, RATIO_MAX, ABOVE, BELOW, DUAL, REF_KL, CLAMPED, COUNT,
    LOSS, COLUMNS,
) = columns(*PolicyStats._fields, "loss")  # fmt: skip


@triton.jit
def policy_term(logp, old, adv, weight, low, high, dual_clip, log_ratio_clamp):
    """Loss and d loss/d logp of one token, and what the statistics need. Ties as autograd has them: max and min give
    each side half, clamp passes the gradient at its bounds."""
    raw = logp - old
    d = clamp(raw, log_ratio_clamp)
    ratio = exp(d)
    # tl.where would round Python numbers to float32.
    low, high = tl.full(d.shape, low, d.dtype), tl.full(d.shape, high, d.dtype)
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    plain_loss, clipped_loss = -adv * ratio, -adv * clipped
    from_plain = tl.where(plain_loss > clipped_loss, 1.0, tl.where(plain_loss == clipped_loss, 0.5, 0.0))
    inside = tl.where((ratio < low) | (ratio > high), 0.0, 1.0)
    loss = tl.where(clipped_loss > plain_loss, clipped_loss, plain_loss)  # a NaN among the first must show
    share = from_plain + (1.0 - from_plain) * inside

    # Only compared where adv < 0, so that an infinite dual_clip makes no NaN of adv = 0.
    ceiling = tl.where(adv < 0.0, -dual_clip * adv, INF)
    dual = loss > ceiling
    share = tl.where(loss < ceiling, share, tl.where(dual, 0.0, 0.5 * share))
    loss = tl.where(dual, ceiling, loss)

    weighted = tl.where(share == 0.0, 0.0, share * weight)  # no weight, be it NaN, of what is clipped
    slope = clamp_gradient(raw, log_ratio_clamp, -adv * ratio * weighted)
    k3 = expm1_minus(d, ratio)
    excess = tl.where((d > -0.5) & (d < 0.5), k3 + d, ratio - 1.0)
    above, below = (adv > 0.0) & (ratio > high), (adv < 0.0) & (ratio < low)
    clamped = (raw < -log_ratio_clamp) | (raw > log_ratio_clamp)
    return loss * weight, slope, d, ratio, excess, k3, above, below, dual, clamped


@triton.jit(do_not_specialize=INTEGERS)
def policy_chunks(
    logp_ptr, old_ptr, adv_ptr, mask_ptr, weights_ptr, ref_ptr, kl_coef_ptr, grad_ptr, parts_ptr, row_weight_ptr,
    bounds_ptr,
    N, T, B, logp_stride, old_stride, adv_stride, mask_stride, weights_stride, ref_stride,
    low, high, dual_clip, log_ratio_clamp, kl_coef, kl_log_clamp, kl_clamp,
    FLAT: tl.constexpr, ADV_PER_ROW: tl.constexpr, WEIGHTS_PER_ROW: tl.constexpr, ESTIMATOR: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    NEEDS_ROWS: tl.constexpr = not FLAT or ADV_PER_ROW or WEIGHTS_PER_ROW or row_weight_ptr is not None
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    whole = first + CHUNK <= N
    n, row, column, owned = locate(first, N, T, bounds_ptr, B, NEEDS_ROWS, CHUNK)
    inside = n < N

    logp = load_tokens(logp_ptr, n, row, column, logp_stride, inside, whole, False, FLAT)
    old = load_tokens(old_ptr, n, row, column, old_stride, inside, whole, False, FLAT)
    adv = load_tokens(adv_ptr, n, row, column, adv_stride, owned, whole, ADV_PER_ROW, FLAT)
    valid = owned
    if mask_ptr is not None:
        valid = owned & (load_tokens(mask_ptr, n, row, column, mask_stride, inside, whole, False, FLAT) != 0)
    # Zeros are a token without loss, gradient or statistics.
    logp, old, adv = tl.where(valid, logp, 0.0), tl.where(valid, old, 0.0), tl.where(valid, adv, 0.0)
    weight = tl.where(valid, 1.0, 0.0).to(logp.dtype)
    if weights_ptr is not None:
        w = load_tokens(weights_ptr, n, row, column, weights_stride, owned, whole, WEIGHTS_PER_ROW, FLAT)
        weight = tl.where(valid, w, 0.0)
    loss, slope, d, ratio, excess, k3, above, below, dual, clamped = policy_term(
        logp, old, adv, weight, low, high, dual_clip, log_ratio_clamp
    )
    line = parts_ptr + chunk * COLUMNS
    if ref_ptr is not None:
        ref = tl.where(valid, load_tokens(ref_ptr, n, row, column, ref_stride, inside, whole, False, FLAT), 0.0)
        kl, kl_slope = kl_term(logp, ref, kl_log_clamp, kl_clamp, ESTIMATOR)
        coef = kl_coef
        if kl_coef_ptr is not None:
            coef = tl.load(kl_coef_ptr).to(logp.dtype)
        loss += scaled_or_off(coef, kl)
        slope += scaled_or_off(coef, kl_slope)
        tl.store(line + REF_KL, tl.sum(kl, 0))
    else:
        tl.store(line + REF_KL, 0.0)
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + row, mask=valid, other=0.0)
        loss *= row_weight
        slope *= row_weight
    if grad_ptr is not None:
        store_tokens(grad_ptr, n, tl.where(valid, slope, 0.0), inside, whole)

    count = tl.sum(valid.to(logp.dtype), 0)
    total = tl.sum(excess, 0)
    step = tl.where(valid, excess - total / tl.where(count == 0.0, 1.0, count), 0.0)
    tl.store(line + K1, tl.sum(-d, 0))
    tl.store(line + K2, tl.sum(0.5 * d * d, 0))
    tl.store(line + K3, tl.sum(k3, 0))
    tl.store(line + RATIO_MEAN, total)
    tl.store(line + RATIO_VAR, tl.sum(step * step, 0))
    # A maximum may drop a NaN, a sum does not.
    tl.store(line + RATIO_MAX, tl.where(total == total, tl.max(tl.where(valid, ratio, 0.0), 0), total))
    tl.store(line + ABOVE, tl.sum(above.to(logp.dtype), 0))
    tl.store(line + BELOW, tl.sum(below.to(logp.dtype), 0))
    tl.store(line + DUAL, tl.sum(dual.to(logp.dtype), 0))
    tl.store(line + CLAMPED, tl.sum(clamped.to(logp.dtype), 0))
    tl.store(line + COUNT, count)
    tl.store(line + LOSS, tl.sum(loss, 0))


@triton.jit(do_not_specialize=("P",))
def policy_fold(parts_ptr, normalizer_ptr, loss_ptr, stats_ptr, inverse_ptr, P, FOLD: tl.constexpr):
    q = tl.arange(0, COLUMNS)
    sums, peak, count = fold_loss(parts_ptr, normalizer_ptr, loss_ptr, inverse_ptr, P, q, COUNT, LOSS, FOLD, COLUMNS)
    n = tl.where(count == 0.0, 1.0, count)
    excess = pick(sums, q, RATIO_MEAN) / n
    m2 = fold_m2(parts_ptr, P, excess, COUNT, RATIO_MEAN, RATIO_VAR, FOLD, COLUMNS)
    stats = sums / n
    stats = tl.where(q == RATIO_MEAN, 1.0 + excess, tl.where(q == RATIO_VAR, m2 / n, stats))
    stats = tl.where((q == RATIO_MAX) & (sums == sums), peak, tl.where(q == COUNT, count, stats))
    tl.store(stats_ptr + q, tl.where(count == 0.0, 0.0, stats), mask=q <= COUNT)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef_tensor: Tensor | None,
    cliprange_low: float,
    cliprange_high: float,
    dual_clip: float,
    log_ratio_clamp: float,
    kl_coef: float,
    kl_estimator: int,
    kl_log_clamp: float,
    kl_clamp: float,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = token_rows(logprobs, cu_seqlens)
    adv_per_row = is_per_row("advantages", advantages, logprobs, rows)
    weights_per_row = is_per_row("weights", weights, logprobs, rows)
    token_level = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    token_level |= {} if adv_per_row else {"advantages": advantages}
    token_level |= {} if weights_per_row else {"weights": weights}
    for name, x in token_level.items():
        if x is not None:
            require_like(name, x, logprobs)
    mask = mask_bytes(mask, logprobs)
    require_code("kl_estimator", kl_estimator, len(KL_ESTIMATORS))
    chunk, num_warps = chunk_for(logprobs.numel())
    parts = new_parts(logprobs, chunk, COLUMNS.value)
    out = new_outputs(logprobs, len(PolicyStats._fields), grad)
    launch(
        policy_chunks, parts.size(0),
        logprobs, old_logprobs, advantages, mask, weights, ref_logprobs,
        as_vector("kl_coef_tensor", kl_coef_tensor, (), torch.float64), out.grad if grad else None,
        parts,
        *row_arguments(rows, logprobs, row_weight),
        *(row_stride(x) for x in (logprobs, old_logprobs, advantages, mask, weights, ref_logprobs)),
        1.0 - cliprange_low, 1.0 + cliprange_high, dual_clip, log_ratio_clamp, kl_coef, kl_log_clamp, kl_clamp,
        FLAT=is_flat(logprobs, mask, *token_level.values()), ADV_PER_ROW=adv_per_row, WEIGHTS_PER_ROW=weights_per_row,
        ESTIMATOR=kl_estimator if ref_logprobs is not None else 0, CHUNK=chunk, num_warps=num_warps,
    )  # fmt: skip
    launch_fold(policy_fold, parts, normalizer, out)
    return out
