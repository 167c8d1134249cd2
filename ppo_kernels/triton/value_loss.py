"""The clipped value loss: loss, statistics and gradient in two launches."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels._types import ValueStats
from ppo_kernels.triton._launch import launch, mask_bytes, require_like, token_rows
from ppo_kernels.triton._loss import (
    chunk_for,
    columns,
    fold_loss,
    fold_m2,
    is_flat,
    launch_fold,
    load_tokens,
    locate,
    new_outputs,
    new_parts,
    pick,
    row_arguments,
    store_tokens,
    token_arguments,
)
from ppo_kernels.triton._math import INF, max_or_nan

# One binary for every size and stride.
INTEGERS = ("N", "T", "B", *(f"{name}_stride" for name in ("values", "old", "returns", "mask")))
# Columns of a line of partial sums: the statistics, then what explained_variance and the loss need.
(
    CLIPPED, ERROR, ERROR_M2, COUNT,
    TARGET, TARGET_M2, LOSS, COLUMNS,
) = columns(*ValueStats._fields, "target", "target_m2", "loss")  # fmt: skip


@triton.jit
def value_term(value, old, target, clip):
    """Loss of one token, d loss/d value, and whether the clipped term is the larger. Ties and NaN as autograd has them:
    max gives each side half, or all of it if one is NaN, and clamp nothing beyond its bounds."""
    # An infinite clip makes the two terms equal, whatever old holds.
    low, high = tl.where(clip == INF, -clip, old - clip), tl.where(clip == INF, clip, old + clip)
    within = tl.where(value < low, low, tl.where(value > high, high, value))
    bounded = tl.where(low == low, within, low)  # a NaN among the old values must show
    error, bounded_error = value - target, bounded - target
    plain, clipped = error * error, bounded_error * bounded_error
    share = tl.where(plain < clipped, 0.0, tl.where(plain == clipped, 0.5, 1.0))
    bounded_share = tl.where(clipped < plain, 0.0, tl.where(plain == clipped, 0.5, 1.0))
    from_bounded = tl.where((value >= low) & (value <= high), bounded_share * bounded_error, 0.0)
    return 0.5 * max_or_nan(plain, clipped), share * error + from_bounded, clipped > plain


@triton.jit(do_not_specialize=INTEGERS)
def value_chunks(
    values_ptr, old_ptr, returns_ptr, mask_ptr, grad_ptr, parts_ptr, row_weight_ptr, bounds_ptr,
    N, T, B, values_stride, old_stride, returns_stride, mask_stride,
    clip,
    FLAT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    whole = first + CHUNK <= N
    NEEDS_ROWS: tl.constexpr = not FLAT or row_weight_ptr is not None
    n, row, column, valid = locate(first, N, T, bounds_ptr, B, NEEDS_ROWS, CHUNK)
    inside = n < N
    value = load_tokens(values_ptr, n, row, column, values_stride, inside, whole, False, FLAT)
    old = load_tokens(old_ptr, n, row, column, old_stride, inside, whole, False, FLAT)
    target = load_tokens(returns_ptr, n, row, column, returns_stride, inside, whole, False, FLAT)
    if mask_ptr is not None:
        valid = valid & (load_tokens(mask_ptr, n, row, column, mask_stride, inside, whole, False, FLAT) != 0)
    # Zeros are a token without loss, gradient or statistics.
    value, old, target = tl.where(valid, value, 0.0), tl.where(valid, old, 0.0), tl.where(valid, target, 0.0)
    loss, slope, clipped = value_term(value, old, target, clip)
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + row, mask=valid, other=0.0)
        loss *= row_weight
        slope *= row_weight
    if grad_ptr is not None:
        store_tokens(grad_ptr, n, tl.where(valid, slope, 0.0), inside, whole)

    # Returns may have a mean far above their deviations: in float64 equal ones have variance 0.
    error, goal = value.to(tl.float64) - target.to(tl.float64), target.to(tl.float64)
    count = tl.sum(valid.to(tl.float64), 0)
    n_or_1 = tl.where(count == 0.0, 1.0, count)
    error_sum, goal_sum = tl.sum(error, 0), tl.sum(goal, 0)
    error, goal = error - error_sum / n_or_1, goal - goal_sum / n_or_1
    line = parts_ptr + chunk * COLUMNS
    tl.store(line + CLIPPED, tl.sum(clipped.to(tl.float32), 0))
    tl.store(line + ERROR, error_sum)
    tl.store(line + ERROR_M2, tl.sum(tl.where(valid, error * error, 0.0), 0))
    tl.store(line + COUNT, count)
    tl.store(line + TARGET, goal_sum)
    tl.store(line + TARGET_M2, tl.sum(tl.where(valid, goal * goal, 0.0), 0))
    tl.store(line + LOSS, tl.sum(loss, 0))


@triton.jit(do_not_specialize=("P",))
def value_fold(parts_ptr, normalizer_ptr, loss_ptr, stats_ptr, inverse_ptr, P, FOLD: tl.constexpr):
    q = tl.arange(0, COLUMNS)
    sums, _, count = fold_loss(
        parts_ptr, normalizer_ptr, loss_ptr, inverse_ptr, P, q, COUNT, LOSS, LOSS + 1, FOLD, COLUMNS
    )
    n = tl.where(count == 0.0, 1.0, count)
    error_m2 = fold_m2(parts_ptr, P, pick(sums, q, ERROR) / n, COUNT, ERROR, ERROR_M2, FOLD, COLUMNS)
    target_m2 = fold_m2(parts_ptr, P, pick(sums, q, TARGET) / n, COUNT, TARGET, TARGET_M2, FOLD, COLUMNS)
    explained = tl.where(target_m2 > 0.0, 1.0 - error_m2 / tl.where(target_m2 > 0.0, target_m2, 1.0), 0.0)
    stats = tl.where(q == ERROR_M2, explained, tl.where(q == COUNT, count, sums / n))
    tl.store(stats_ptr + q, tl.where(count == 0.0, 0.0, stats), mask=q <= COUNT)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    cliprange_value: float,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = token_rows(values, cu_seqlens)
    require_like("old_values", old_values, values)
    require_like("returns", returns, values)
    mask = mask_bytes(mask, values)
    chunk, num_warps = chunk_for(values.numel())
    parts = new_parts(values, chunk, COLUMNS.value)
    out = new_outputs(values, len(ValueStats._fields), grad)
    launch(
        value_chunks, parts.size(0),
        **token_arguments(values=values, old=old_values, returns=returns, mask=mask),
        **row_arguments(rows, values, row_weight),
        grad_ptr=out.grad if grad else None, parts_ptr=parts, clip=cliprange_value,
        FLAT=is_flat(values, old_values, returns, mask), CHUNK=chunk, num_warps=num_warps,
    )  # fmt: skip
    launch_fold(value_fold, parts, normalizer, out)
    return out
