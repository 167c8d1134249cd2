"""The pairwise policy loss: sums over rows, then every row against the others of its group, then the loss.

These are three launches, because each reads what all programs of the one before wrote. What is not one per token is
float64, as in csrc/math/p3o_loss.h, but for options given as numbers: a launch on a GPU takes them as float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels._registered import require
from ppo_kernels._types import P3OStats
from ppo_kernels.triton._launch import (
    as_vector,
    block_for,
    launch,
    mask_bytes,
    new_tokens,
    require_code,
    require_like,
    row_sizes,
    token_rows,
)
from ppo_kernels.triton._loss import Outputs, columns, finish, fold_sums, launch_fold, new_outputs, pick
from ppo_kernels.triton._math import (
    clamp,
    clamp_gradient,
    exp,
    expm1_minus,
    load_valid,
    max_or_nan,
    row_span,
    scaled_or_off,
)

# Columns of a row's line of partial sums: the statistics, of rows and then of ordered pairs; and two more.
(
    K1, K3, REF, RATIO, RATIO_MAX, BEYOND,
    WEIGHT, BOUNDED, CLIPPED, GAP, MARGIN, AGREES, PAIRS,
    ROWS, LOSS, COLUMNS,
) = columns(*P3OStats._fields, "rows", "loss")  # fmt: skip
PAIRS_BLOCK, PAIRS_WARPS = 512, 4  # not by the row's length: it decides the order in which pairs are added


@triton.jit(do_not_specialize=("logprobs_stride", "old_stride", "ref_stride", "mask_stride", "length"))
def _row_sums(
    logprobs, old_logprobs, ref_logprobs, mask, starts, sums,
    logprobs_stride, old_stride, ref_stride, mask_stride, length,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per row the sums of logp - old and of logp - ref, and the number of valid tokens."""
    row = tl.program_id(0).to(tl.int64)
    first, length = row_span(starts, length, row, UNIT)
    logprobs += first * logprobs_stride
    old_logprobs += first * old_stride
    ref_logprobs += first * ref_stride
    if mask is not None:
        mask += first * mask_stride
    shift = tl.zeros([BLOCK], tl.float64)
    margin = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, length, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        inside = t < length
        valid = load_valid(mask, t, inside)
        logp = tl.where(valid, tl.load(logprobs + t, mask=inside, other=0.0), 0.0).to(tl.float64)
        old = tl.where(valid, tl.load(old_logprobs + t, mask=inside, other=0.0), 0.0).to(tl.float64)
        ref = tl.where(valid, tl.load(ref_logprobs + t, mask=inside, other=0.0), 0.0).to(tl.float64)
        shift += logp - old
        margin += logp - ref
        count += valid.to(tl.float64)
    tl.store(sums + row * 3, tl.sum(shift, 0))
    tl.store(sums + row * 3 + 1, tl.sum(margin, 0))
    tl.store(sums + row * 3 + 2, tl.sum(count, 0))


@triton.jit
def _add(line, column: tl.constexpr, live, x):
    tl.store(line + column, tl.sum(tl.where(live, x, 0.0), 0))


@triton.jit(do_not_specialize=("mask_stride", "grad_stride", "length", "group_size"))
def _pairs(
    sums, scores, mask, starts, kl_coef_tensor,
    parts,
    grad,
    mask_stride, grad_stride, length,
    group_size, kl_coef, low, high, log_weight_bound, log_ratio_clamp,
    UNIT: tl.constexpr, JOINT: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The half of each pair that is this row's, its sums, and its gradient, one number for all of its tokens."""
    row = tl.program_id(0).to(tl.int64)
    if kl_coef_tensor is not None:
        kl_coef = tl.load(kl_coef_tensor)
    shift, margin = tl.load(sums + row * 3), tl.load(sums + row * 3 + 1)
    alive, score = tl.load(sums + row * 3 + 2) > 0.0, tl.load(scores + row).to(tl.float64)
    d = clamp(shift, log_ratio_clamp)
    ratio = exp(d)

    member = tl.arange(0, MEMBERS)
    other = row // group_size * group_size + member
    there = (member < tl.where(alive, group_size, 0)) & (other != row)
    b_shift = tl.load(sums + other * 3, mask=there, other=0.0)
    b_margin = tl.load(sums + other * 3 + 1, mask=there, other=0.0)
    live = there & (tl.load(sums + other * 3 + 2, mask=there, other=0.0) > 0.0)
    reward = score - tl.load(scores + other, mask=there, other=0.0).to(tl.float64)
    gap = margin - b_margin
    q = reward - scaled_or_off(kl_coef, gap)
    if JOINT:
        # d - d_old takes the place of d, so that no d_old, however large, can round away what decides.
        log_weight, x = shift + b_shift, shift - b_shift
    else:
        log_weight, x = b_shift, tl.zeros([MEMBERS], tl.float64) + ratio
    weight = exp(clamp(log_weight, log_weight_bound))
    slope = -q * weight
    plain, clipped = slope * x, slope * tl.where(x < low, low, tl.where(x > high, high, x))
    from_plain = tl.where(plain > clipped, 1.0, tl.where(plain == clipped, 0.5, 0.0))
    inside_clip = tl.where((x >= low) & (x <= high), 1.0, 0.0)
    change = slope * (from_plain + (1.0 - from_plain) * inside_clip)
    loss = max_or_nan(plain, clipped)
    if JOINT:
        # What joint adds has no gradient: with the reference off, one that is not finite drops out.
        constant = tl.where(gap - gap == 0.0, gap - x, tl.where(kl_coef == 0.0, 0.0, gap - x))
        loss = 0.25 * (loss + slope * constant)
    else:
        loss = 0.5 * loss
        change = clamp_gradient(tl.zeros([MEMBERS], tl.float64) + shift, log_ratio_clamp, change * ratio)
    preferred = tl.where(reward > 0.0, gap, tl.where(reward < 0.0, -gap, reward * gap))
    line = parts + row * COLUMNS
    _add(line, LOSS, live, loss)
    _add(line, PAIRS, live, 1.0)
    _add(line, WEIGHT, live, weight)
    _add(line, BOUNDED, live & (tl.abs(log_weight) > log_weight_bound), 1.0)
    _add(line, CLIPPED, live & (clipped > plain), 1.0)
    _add(line, GAP, live, tl.abs(q))
    _add(line, MARGIN, live, preferred)
    _add(line, AGREES, live & (preferred > 0.0), 1.0)
    tl.store(line + ROWS, tl.where(alive, 1.0, 0.0))
    tl.store(line + K1, tl.where(alive, -d, 0.0))
    tl.store(line + K3, tl.where(alive, expm1_minus(d, ratio), 0.0))
    tl.store(line + REF, tl.where(alive, margin, 0.0))
    tl.store(line + RATIO, tl.where(alive, ratio, 0.0))
    tl.store(line + RATIO_MAX, tl.where(alive, ratio, 0.0))
    tl.store(line + BEYOND, tl.where(alive & (tl.abs(shift) > log_ratio_clamp), 1.0, 0.0))

    if grad is not None:
        gradient = (0.5 * tl.sum(tl.where(live, change, 0.0), 0)).to(grad.dtype.element_ty)
        first, length = row_span(starts, length, row, UNIT)
        grad += first * grad_stride
        if mask is not None:
            mask += first * mask_stride
        for begin in range(0, length, BLOCK):
            t = begin + tl.arange(0, BLOCK)
            inside = t < length
            tl.store(grad + t, tl.where(load_valid(mask, t, inside), gradient, 0.0), mask=inside)


@triton.jit(do_not_specialize=("P",))
def _fold(parts_ptr, normalizer_ptr, loss_ptr, stats_ptr, inverse_ptr, P, FOLD: tl.constexpr):
    q = tl.arange(0, COLUMNS)
    sums, peak = fold_sums(parts_ptr, P, q, LOSS + 1, FOLD, COLUMNS)
    rows, pairs = pick(sums, q, ROWS), pick(sums, q, PAIRS)
    finish(pick(sums, q, LOSS), 0.5 * pairs, normalizer_ptr, loss_ptr, inverse_ptr)
    stats = sums / tl.where(q <= BEYOND, tl.where(rows == 0.0, 1.0, rows), tl.where(pairs == 0.0, 1.0, pairs))
    stats = tl.where((q == RATIO_MAX) & (sums == sums), peak, tl.where(q == PAIRS, 0.5 * pairs, stats))
    tl.store(stats_ptr + q, stats, mask=q <= PAIRS)


def _log(x: float) -> float:
    """As C has it, without an exception."""
    return math.log(x) if x > 0.0 else -math.inf if x == 0.0 else math.nan


def p3o_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef_tensor: Tensor | None,
    variant: int,
    group_size: int,
    kl_coef: float,
    cliprange: float,
    weight_clip: float,
    log_ratio_clamp: float,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = token_rows(logprobs, cu_seqlens)
    require_code("variant", variant, 2)
    require(
        group_size >= 1 and rows.batch % group_size == 0,
        f"group_size must divide the {rows.batch} rows, got {group_size}",
    )
    require_like("old_logprobs", old_logprobs, logprobs)
    require_like("ref_logprobs", ref_logprobs, logprobs)
    mask = mask_bytes(mask, logprobs)
    out = new_outputs(logprobs, len(P3OStats._fields), False)
    gradient = new_tokens(logprobs, rows) if grad else out.grad
    sums = torch.empty(rows.batch, 3, dtype=torch.float64, device=logprobs.device)
    parts = torch.empty(rows.batch, COLUMNS.value, dtype=torch.float64, device=logprobs.device)
    # Packed lengths are not known here, and a row's sum must not follow its neighbours' lengths.
    block = block_for(rows.length, most=1024, least=128) if rows.starts is None else 512
    launch(
        _row_sums, rows.batch,
        logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, mask=mask, starts=rows.starts,
        sums=sums,
        **row_sizes(rows, logprobs=logprobs, old=old_logprobs, ref=ref_logprobs, mask=mask),
        BLOCK=block, num_warps=block // 128,
    )  # fmt: skip
    middle = 0.0 if variant == 1 else 1.0
    launch(
        _pairs, rows.batch,
        sums=sums, scores=as_vector("scores", scores, (rows.batch,), logprobs.dtype), mask=mask, starts=rows.starts,
        kl_coef_tensor=as_vector("kl_coef_tensor", kl_coef_tensor, (), torch.float64),
        parts=parts, grad=gradient if grad else None,
        **row_sizes(rows, mask=mask, grad=gradient),
        group_size=group_size, kl_coef=kl_coef, low=middle - cliprange, high=middle + cliprange,
        log_weight_bound=_log(weight_clip), log_ratio_clamp=log_ratio_clamp,
        JOINT=variant == 1, MEMBERS=triton.next_power_of_2(group_size), BLOCK=PAIRS_BLOCK, num_warps=PAIRS_WARPS,
    )  # fmt: skip
    launch_fold(_fold, parts, normalizer, out)
    return Outputs(out.loss, out.stats, gradient, out.inv_normalizer)
