"""Importance weights: what a row decides by, then its tokens, then the statistics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels._types import ImportanceStats
from ppo_kernels.triton._launch import (
    block_for,
    launch,
    mask_bytes,
    new_tokens,
    require_code,
    require_like,
    row_sizes,
    token_rows,
)
from ppo_kernels.triton._loss import (
    FOLD,
    chunk_for,
    columns,
    fold_sums,
    is_flat,
    load_tokens,
    locate,
    new_parts,
    pick,
    row_arguments,
    store_tokens,
    store_weights,
    token_arguments,
)
from ppo_kernels.triton._math import clamp, exp, expm1_minus, load_valid, row_span

LEVELS, MODES, ESTIMATES, REJECT_LEVELS = 3, 3, 4, 4
TOKEN, SEQUENCE, GEOMETRIC = map(tl.constexpr, range(LEVELS))
TRUNCATE, MASK, ICEPOP = map(tl.constexpr, range(MODES))
SUM, MEAN, MAX = map(tl.constexpr, range(1, REJECT_LEVELS))
INTEGERS = ("N", "T", "B", "logp_stride", "rollout_stride", "mask_stride")
# Columns of a line of partial sums: the statistics, of which the first is made of the last two.
(
    ESS, K1, K3, CHI2, PERPLEXITY, ROLLOUT_PERPLEXITY, WEIGHT, RATIO_MAX, HIGH, LOW, REJECTED, COUNT,
    SQUARES, COLUMNS,
) = columns(*ImportanceStats._fields, "squares")  # fmt: skip


@triton.jit
def _estimate(d, k3, REJECT: tl.constexpr):
    if REJECT == 1:
        k = -d
    elif REJECT == 2:
        k = 0.5 * d * d
    elif REJECT == 3:
        k = k3
    else:
        k = d * 0.0
    return k


@triton.jit(do_not_specialize=("logp_stride", "rollout_stride", "mask_stride", "length"))
def importance_rows(
    logp_ptr, rollout_ptr, mask_ptr, bounds_ptr, rows_ptr,
    logp_stride, rollout_stride, mask_stride, length, log_ratio_clamp,
    UNIT: tl.constexpr, LEVEL: tl.constexpr, REJECT: tl.constexpr, REJECT_LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per row its ratio and its estimate of the divergence."""
    row = tl.program_id(0).to(tl.int64)
    first, length = row_span(bounds_ptr, length, row, UNIT)
    logp_ptr += first * logp_stride
    rollout_ptr += first * rollout_stride
    if mask_ptr is not None:
        mask_ptr += first * mask_stride
    count = tl.zeros([BLOCK], tl.float64)
    log_ratio = tl.zeros([BLOCK], tl.float64)
    estimate = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, length, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        inside = t < length
        valid = load_valid(mask_ptr, t, inside)
        logp = tl.where(valid, tl.load(logp_ptr + t, mask=inside, other=0.0), 0.0)
        rollout = tl.where(valid, tl.load(rollout_ptr + t, mask=inside, other=0.0), 0.0)
        d = clamp(logp - rollout, log_ratio_clamp)
        k = _estimate(d, expm1_minus(d, exp(d)), REJECT).to(tl.float64)
        count += valid.to(tl.float64)
        log_ratio += logp.to(tl.float64) - rollout.to(tl.float64)
        estimate += k
        largest = tl.where(k > largest, k, largest)
    n = tl.sum(count, 0)
    n = tl.where(n == 0.0, 1.0, n)
    of_row = tl.sum(log_ratio, 0)
    if LEVEL == GEOMETRIC:
        of_row = of_row / n
    whole = tl.sum(estimate, 0)
    if REJECT_LEVEL == MEAN:
        k_of_row = whole / n
    elif REJECT_LEVEL == MAX:
        k_of_row = tl.where(whole == whole, tl.max(largest, 0), whole)  # a maximum may drop a NaN
    else:
        k_of_row = whole
    both = tl.zeros([1], rows_ptr.dtype.element_ty)
    ratio = exp(clamp(both + of_row.to(both.dtype), log_ratio_clamp))
    tl.store(rows_ptr + row * 2 + tl.arange(0, 1), ratio)
    tl.store(rows_ptr + row * 2 + 1, k_of_row)


@triton.jit(do_not_specialize=INTEGERS)
def importance_chunks(
    logp_ptr, rollout_ptr, mask_ptr, weights_ptr, keep_ptr, parts_ptr, rows_ptr,
    row_weight_ptr, bounds_ptr,
    N, T, B, logp_stride, rollout_stride, mask_stride,
    low, high, reject_low, reject_high, log_ratio_clamp,
    FLAT: tl.constexpr, LEVEL: tl.constexpr, MODE: tl.constexpr, REJECT: tl.constexpr, REJECT_LEVEL: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    BY_ROW: tl.constexpr = LEVEL != TOKEN or REJECT_LEVEL != 0
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    whole = first + CHUNK <= N
    n, row, column, owned = locate(first, N, T, bounds_ptr, B, BY_ROW or not FLAT, CHUNK)
    inside = n < N
    logp = load_tokens(logp_ptr, n, row, column, logp_stride, inside, whole, False, FLAT)
    rollout = load_tokens(rollout_ptr, n, row, column, rollout_stride, inside, whole, False, FLAT)
    valid = owned
    if mask_ptr is not None:
        valid = owned & (load_tokens(mask_ptr, n, row, column, mask_stride, inside, whole, False, FLAT) != 0)
    logp, rollout = tl.where(valid, logp, 0.0), tl.where(valid, rollout, 0.0)
    low, high = tl.full(logp.shape, low, logp.dtype), tl.full(logp.shape, high, logp.dtype)
    d = clamp(logp - rollout, log_ratio_clamp)
    own = exp(d)
    k3 = expm1_minus(d, own)
    excess = tl.where((d > -0.5) & (d < 0.5), k3 + d, own - 1.0)
    ratio = own
    if LEVEL != TOKEN:
        ratio = tl.load(rows_ptr + row * 2, mask=valid, other=0.0)
    estimate = _estimate(d, k3, REJECT)
    if REJECT_LEVEL != 0:
        estimate = tl.load(rows_ptr + row * 2 + 1, mask=valid, other=0.0)
    within = (ratio >= low) & (ratio <= high)
    keep = valid
    if REJECT != 0:
        least = tl.full(logp.shape, reject_low, logp.dtype)
        keep = keep & (estimate >= least) & (estimate <= tl.full(logp.shape, reject_high, logp.dtype))
    if MODE == MASK:
        keep = keep & within
    if MODE == TRUNCATE:
        weight = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    else:
        weight = tl.where(within, ratio, 0.0)
    weight = tl.where(keep, weight, 0.0)
    store_tokens(weights_ptr, n, weight, inside, whole)
    store_tokens(keep_ptr, n, keep.to(tl.uint8), inside, whole)

    line = parts_ptr + chunk * COLUMNS
    ratio = tl.where(valid, ratio, 0.0)
    total = tl.sum(ratio, 0)
    tl.store(line + ESS, 0.0)
    tl.store(line + K1, tl.sum(-d, 0))
    tl.store(line + K3, tl.sum(k3, 0))
    tl.store(line + CHI2, tl.sum(excess * (excess + 2.0), 0))
    tl.store(line + PERPLEXITY, tl.sum(-logp, 0))
    tl.store(line + ROLLOUT_PERPLEXITY, tl.sum(-rollout, 0))
    store_weights(line, weight, WEIGHT, SQUARES)
    tl.store(line + RATIO_MAX, tl.where(total == total, tl.max(ratio, 0), total))
    tl.store(line + HIGH, tl.sum((valid & (ratio > high)).to(logp.dtype), 0))
    tl.store(line + LOW, tl.sum((valid & (ratio < low)).to(logp.dtype), 0))
    tl.store(line + REJECTED, tl.sum(tl.where(keep, 0.0, valid.to(logp.dtype)), 0))
    tl.store(line + COUNT, tl.sum(valid.to(logp.dtype), 0))


@triton.jit(do_not_specialize=("P",))
def importance_fold(parts_ptr, stats_ptr, P, FOLD: tl.constexpr):
    q = tl.arange(0, COLUMNS)
    sums, peak = fold_sums(parts_ptr, P, q, SQUARES + 1, FOLD, COLUMNS)
    count, weight, squares = pick(sums, q, COUNT), pick(sums, q, WEIGHT), pick(sums, q, SQUARES)
    n = tl.where(count == 0.0, 1.0, count)
    stats = sums / n
    ess = tl.where(squares == 0.0, 0.0, weight * weight / tl.where(squares == 0.0, 1.0, squares) / n)
    stats = tl.where((q == PERPLEXITY) | (q == ROLLOUT_PERPLEXITY), tl.exp(stats), tl.where(q == ESS, ess, stats))
    stats = tl.where((q == RATIO_MAX) & (sums == sums), peak, tl.where(q == COUNT, count, stats))
    tl.store(stats_ptr + q, tl.where(count == 0.0, 0.0, stats), mask=q <= COUNT)


def importance_weights(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    level: int,
    mode: int,
    reject: int,
    reject_level: int,
    low: float,
    high: float,
    reject_low: float,
    reject_high: float,
    log_ratio_clamp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = token_rows(logprobs, cu_seqlens)
    require_like("rollout_logprobs", rollout_logprobs, logprobs)
    mask = mask_bytes(mask, logprobs)
    require_code("level", level, LEVELS)
    require_code("mode", mode, MODES)
    require_code("reject", reject, ESTIMATES)
    require_code("reject_level", reject_level, REJECT_LEVELS)
    of_rows = None
    if level != TOKEN.value or reject_level != 0:
        of_rows = logprobs.new_empty(rows.batch, 2)
        # Packed lengths are not known here, and a row's sum must not follow its neighbours' lengths.
        block = block_for(rows.length, most=1024, least=128) if rows.starts is None else 512
        launch(
            importance_rows, rows.batch,
            logp_ptr=logprobs, rollout_ptr=rollout_logprobs, mask_ptr=mask, bounds_ptr=rows.starts, rows_ptr=of_rows,
            **row_sizes(rows, logp=logprobs, rollout=rollout_logprobs, mask=mask), log_ratio_clamp=log_ratio_clamp,
            LEVEL=level, REJECT=reject, REJECT_LEVEL=reject_level, BLOCK=block, num_warps=block // 128,
        )  # fmt: skip
    chunk, num_warps = chunk_for(logprobs.numel())
    parts = new_parts(logprobs, chunk, COLUMNS.value)
    weights = new_tokens(logprobs, rows)
    keep = torch.empty(logprobs.shape, dtype=torch.bool, device=logprobs.device)
    stats = logprobs.new_empty(len(ImportanceStats._fields))
    launch(
        importance_chunks, parts.size(0),
        **token_arguments(logp=logprobs, rollout=rollout_logprobs, mask=mask),
        **row_arguments(rows, logprobs, None),
        weights_ptr=weights, keep_ptr=keep.view(torch.uint8), parts_ptr=parts, rows_ptr=of_rows,
        low=low, high=high, reject_low=reject_low, reject_high=reject_high, log_ratio_clamp=log_ratio_clamp,
        FLAT=is_flat(logprobs, rollout_logprobs, mask), LEVEL=level, MODE=mode, REJECT=reject,
        REJECT_LEVEL=reject_level, CHUNK=chunk, num_warps=num_warps,
    )  # fmt: skip
    launch(importance_fold, 1, parts_ptr=parts, stats_ptr=stats, P=parts.size(0), FOLD=FOLD, num_warps=8)
    return weights, keep, stats
