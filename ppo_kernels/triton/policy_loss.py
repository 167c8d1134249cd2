"""The policy loss: loss, statistics and gradient in two launches. Where the ratio is the row's, one before finds it."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels._registered import require
from ppo_kernels._types import KL_ESTIMATORS, RATIO_LEVELS, SURROGATES, PolicyStats
from ppo_kernels.triton._launch import (
    as_vector,
    block_for,
    launch,
    mask_bytes,
    require_code,
    require_like,
    row_sizes,
    row_stride,
    token_rows,
)
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
    store_weights,
    token_arguments,
)
from ppo_kernels.triton._math import (
    clamp,
    clamp_gradient,
    exp,
    expm1_minus,
    kl_term,
    load_valid,
    row_span,
    scaled_or_off,
)
from ppo_kernels.triton._surrogate import (
    CISPO,
    DPPO_KL,
    DPPO_TV,
    GEOMETRIC,
    SEQUENCE,
    SEQUENCE_TOKEN,
    TOKEN,
    beyond_geometric,
    policy_term,
    row_term,
)

# One binary for every size and stride.
INTEGERS = ("N", "T", "B", *(f"{name}_stride" for name in ("logp", "old", "adv", "mask", "weights", "ref")))
# Columns of a line of partial sums: the statistics, then the loss, and what the effective sample size is made of.
(
    K1, K2, K3, RATIO_MEAN, RATIO_VAR, RATIO_MAX, ABOVE, BELOW, DUAL, REF_KL, CLAMPED, COUNT,
    LOSS, WEIGHT, SQUARES, COLUMNS,
) = columns(*PolicyStats._fields[:-3], "count", "loss", "weights", "their squares")  # fmt: skip


@triton.jit(do_not_specialize=("length", "adv_row_stride", "weights_row_stride", *INTEGERS[3:]))
def policy_rows(
    logp_ptr, old_ptr, adv_ptr, mask_ptr, weights_ptr, bounds_ptr, ratios_ptr,
    adv_row_stride, weights_row_stride,
    logp_stride, old_stride, adv_stride, mask_stride, weights_stride, length,
    low, high, clip_low, clip_high, dual_clip, delta, log_ratio_clamp, tau_pos, tau_neg,
    UNIT: tl.constexpr, ADV_PER_ROW: tl.constexpr, WEIGHTS_PER_ROW: tl.constexpr,
    SURROGATE: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per row its log-ratio, and d loss/d logp of each of its tokens where the gradient passes through the mean."""
    row = tl.program_id(0).to(tl.int64)
    first, length = row_span(bounds_ptr, length, row, UNIT)
    logp_ptr += first * logp_stride
    old_ptr += first * old_stride
    adv_ptr += row * adv_row_stride if ADV_PER_ROW else first * adv_stride
    if mask_ptr is not None:
        mask_ptr += first * mask_stride
    if weights_ptr is not None:
        weights_ptr += row * weights_row_stride if WEIGHTS_PER_ROW else first * weights_stride
    count = tl.zeros([BLOCK], tl.float64)
    log_ratio = tl.zeros([BLOCK], tl.float64)
    positive = tl.zeros([BLOCK], tl.float64)
    negative = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, length, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        inside = t < length
        valid = load_valid(mask_ptr, t, inside)
        logp = tl.where(valid, tl.load(logp_ptr + t, mask=inside, other=0.0), 0.0)
        old = tl.where(valid, tl.load(old_ptr + t, mask=inside, other=0.0), 0.0)
        adv = tl.where(valid, tl.load(adv_ptr + (t * 0 if ADV_PER_ROW else t), mask=inside, other=0.0), 0.0)
        weight = tl.where(valid, 1.0, 0.0).to(logp.dtype)
        if weights_ptr is not None:
            w = tl.load(weights_ptr + (t * 0 if WEIGHTS_PER_ROW else t), mask=inside, other=0.0)
            weight = tl.where(valid, w, 0.0)
        own, up, down = row_term(logp - old, adv, weight, clip_low, clip_high, LEVEL)
        count += valid.to(tl.float64)
        log_ratio += own.to(tl.float64)
        positive += up.to(tl.float64)
        negative += down.to(tl.float64)
    n = tl.sum(count, 0)
    n = tl.where(n == 0.0, 1.0, n)
    raw = (tl.sum(log_ratio, 0) / n).to(ratios_ptr.dtype.element_ty)
    # Every surrogate is |adv| times that of adv = 1 or -1.
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(raw.dtype)
    both = tl.zeros([2], raw.dtype)
    _, slope, _, _, _, _, _, _, _, _ = policy_term(
        both + raw,
        both,
        both,
        sign,
        both + 1.0,
        low,
        high,
        dual_clip,
        delta,
        log_ratio_clamp,
        tau_pos,
        tau_neg,
        SURROGATE,
    )
    sums = tl.where(sign > 0.0, tl.sum(positive, 0), tl.sum(negative, 0))
    tl.store(ratios_ptr + row * 2, raw)
    tl.store(ratios_ptr + row * 2 + 1, tl.sum(slope.to(tl.float64) * sums, 0) / n)


@triton.jit(do_not_specialize=INTEGERS)
def policy_chunks(
    logp_ptr, old_ptr, adv_ptr, mask_ptr, weights_ptr, ref_ptr, kl_coef_ptr, grad_ptr, parts_ptr, ratios_ptr,
    row_weight_ptr, bounds_ptr,
    N, T, B, logp_stride, old_stride, adv_stride, mask_stride, weights_stride, ref_stride,
    low, high, clip_low, clip_high, dual_clip, delta, log_ratio_clamp, tau_pos, tau_neg,
    kl_coef, kl_log_clamp, kl_clamp,
    FLAT: tl.constexpr, ADV_PER_ROW: tl.constexpr, WEIGHTS_PER_ROW: tl.constexpr, ESTIMATOR: tl.constexpr,
    UNBIASED: tl.constexpr, SURROGATE: tl.constexpr, LEVEL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    NEEDS_ROWS: tl.constexpr = (
        not FLAT or ADV_PER_ROW or WEIGHTS_PER_ROW or row_weight_ptr is not None or LEVEL != TOKEN
    )
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
    line = parts_ptr + chunk * COLUMNS
    weight = tl.where(valid, 1.0, 0.0).to(logp.dtype)
    if weights_ptr is not None:
        w = load_tokens(weights_ptr, n, row, column, weights_stride, owned, whole, WEIGHTS_PER_ROW, FLAT)
        weight = tl.where(valid, w, 0.0)
        store_weights(line, weight, WEIGHT, SQUARES)
    own = logp - old
    raw = own
    if LEVEL != TOKEN:
        raw = tl.load(ratios_ptr + row * 2, mask=valid, other=0.0)
    loss, slope, d, ratio, excess, k3, above, below, dual, clamped = policy_term(
        raw, logp, old, adv, weight, low, high, dual_clip, delta, log_ratio_clamp, tau_pos, tau_neg, SURROGATE
    )
    if LEVEL != TOKEN:  # the estimates of the KL divergence are the token's own
        d = clamp(own, log_ratio_clamp)
        k3 = expm1_minus(d, exp(d))
    if LEVEL != TOKEN and LEVEL != SEQUENCE_TOKEN:  # the gradient passes through the mean of the row
        slope = tl.load(ratios_ptr + row * 2 + 1, mask=valid, other=0.0)
    if LEVEL == GEOMETRIC:
        above, below = beyond_geometric(own, adv, clip_low, clip_high)
        slope = tl.where(above | below, 0.0, slope)
        below = below & (adv < 0.0)
    if ref_ptr is not None:
        ref = tl.where(valid, load_tokens(ref_ptr, n, row, column, ref_stride, inside, whole, False, FLAT), 0.0)
        kl, kl_slope = kl_term(logp, ref, kl_log_clamp, kl_clamp, ESTIMATOR)
        coef = kl_coef
        if kl_coef_ptr is not None:
            coef = tl.load(kl_coef_ptr).to(logp.dtype)
        tl.store(line + REF_KL, tl.sum(kl, 0))
        if UNBIASED:
            kl_slope = kl_slope * ratio + scaled_or_off(clamp_gradient(raw, log_ratio_clamp, ratio), kl)
            kl = kl * ratio
        loss += scaled_or_off(coef, kl)
        slope += scaled_or_off(coef, kl_slope)
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
def policy_fold(
    parts_ptr, normalizer_ptr, loss_ptr, stats_ptr, inverse_ptr, P, WEIGHTED: tl.constexpr, FOLD: tl.constexpr
):
    q = tl.arange(0, COLUMNS)
    USED: tl.constexpr = SQUARES + 1 if WEIGHTED else LOSS + 1
    sums, peak, count = fold_loss(
        parts_ptr, normalizer_ptr, loss_ptr, inverse_ptr, P, q, COUNT, LOSS, USED, FOLD, COLUMNS
    )
    n = tl.where(count == 0.0, 1.0, count)
    excess = pick(sums, q, RATIO_MEAN) / n
    m2 = fold_m2(parts_ptr, P, excess, COUNT, RATIO_MEAN, RATIO_VAR, FOLD, COLUMNS)
    stats = sums / n
    stats = tl.where(q == RATIO_MEAN, 1.0 + excess, tl.where(q == RATIO_VAR, m2 / n, stats))
    stats = tl.where((q == RATIO_MAX) & (sums == sums), peak, stats)
    tl.store(stats_ptr + q, tl.where(count == 0.0, 0.0, stats), mask=q < COUNT)
    ess = tl.where(count == 0.0, 0.0, 1.0)
    if WEIGHTED:
        weight, squares = pick(sums, q, WEIGHT), pick(sums, q, SQUARES)
        ess = tl.where(squares == 0.0, 0.0, weight * weight / tl.where(squares == 0.0, 1.0, squares) / n)
    tl.store(stats_ptr + COUNT, ess)
    tl.store(stats_ptr + COUNT + 1, 0.0)  # the entropy, which the caller adds: it is linear, and no kernel looks at it
    tl.store(stats_ptr + COUNT + 2, count)


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
    unbiased_kl: bool,
    surrogate: int,
    level: int,
    delta: float,
    tau_pos: float,
    tau_neg: float,
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
    _require_codes(kl_estimator, surrogate, level, unbiased_kl)
    if surrogate == CISPO.value and level == SEQUENCE.value:
        level = SEQUENCE_TOKEN.value  # a constant ratio has no gradient that could pass through the mean
    if surrogate in (DPPO_TV.value, DPPO_KL.value):
        bounds = cliprange_low, cliprange_high
    elif level == GEOMETRIC.value:
        bounds = -math.inf, math.inf  # of the row's ratio, which is not clipped again
    else:
        bounds = 1.0 - cliprange_low, 1.0 + cliprange_high
    options: dict[str, Any] = {
        "low": bounds[0], "high": bounds[1], "clip_low": cliprange_low, "clip_high": cliprange_high,
        "dual_clip": dual_clip, "delta": delta, "log_ratio_clamp": log_ratio_clamp,
        "tau_pos": tau_pos, "tau_neg": tau_neg,
    }  # fmt: skip
    per_row = {"ADV_PER_ROW": adv_per_row, "WEIGHTS_PER_ROW": weights_per_row}
    ratios = None
    if level != TOKEN.value:
        ratios = logprobs.new_empty(rows.batch, 2)
        # Packed lengths are not known here, and a row's sum must not follow its neighbours' lengths.
        block = block_for(rows.length, most=1024, least=128) if rows.starts is None else 512
        launch(
            policy_rows, rows.batch,
            logp_ptr=logprobs, old_ptr=old_logprobs, adv_ptr=advantages, mask_ptr=mask, weights_ptr=weights,
            bounds_ptr=rows.starts, ratios_ptr=ratios,
            adv_row_stride=row_stride(advantages), weights_row_stride=row_stride(weights),
            **row_sizes(rows, logp=logprobs, old=old_logprobs, adv=None if adv_per_row else advantages, mask=mask,
                        weights=None if weights_per_row else weights),
            **options, **per_row, SURROGATE=surrogate, LEVEL=level, BLOCK=block, num_warps=block // 128,
        )  # fmt: skip
    chunk, num_warps = chunk_for(logprobs.numel())
    if level != TOKEN.value or surrogate in (DPPO_TV.value, DPPO_KL.value):
        num_warps = max(num_warps, 2)  # eight tokens a lane would spill for sm_80
    parts = new_parts(logprobs, chunk, COLUMNS.value)
    out = new_outputs(logprobs, len(PolicyStats._fields), grad)
    launch(
        policy_chunks, parts.size(0),
        **token_arguments(logp=logprobs, old=old_logprobs, adv=advantages, mask=mask),
        **token_arguments(weights=weights, ref=ref_logprobs),
        **row_arguments(rows, logprobs, row_weight),
        kl_coef_ptr=as_vector("kl_coef_tensor", kl_coef_tensor, (), torch.float64),
        grad_ptr=out.grad if grad else None, parts_ptr=parts, ratios_ptr=ratios,
        **options, kl_coef=kl_coef, kl_log_clamp=kl_log_clamp, kl_clamp=kl_clamp,
        FLAT=is_flat(logprobs, mask, *token_level.values()), **per_row,
        ESTIMATOR=kl_estimator if ref_logprobs is not None else 0,
        UNBIASED=unbiased_kl and ref_logprobs is not None, SURROGATE=surrogate, LEVEL=level,
        CHUNK=chunk, num_warps=num_warps,
    )  # fmt: skip
    launch_fold(policy_fold, parts, normalizer, out, WEIGHTED=weights is not None)
    return out


def _require_codes(kl_estimator: int, surrogate: int, level: int, unbiased_kl: bool) -> None:
    require_code("kl_estimator", kl_estimator, len(KL_ESTIMATORS))
    require_code("surrogate", surrogate, len(SURROGATES))
    require_code("level", level, len(RATIO_LEVELS))
    is_dppo = surrogate in (DPPO_TV.value, DPPO_KL.value)
    require(level == 0 or not is_dppo, f"surrogate {surrogate} takes level 0, got {level}")
    require(level != GEOMETRIC.value or surrogate == 0, f"level 3 takes surrogate 0, got {surrogate}")
    require(level == 0 or not unbiased_kl, f"unbiased_kl takes level 0, got {level}")
