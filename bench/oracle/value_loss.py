"""The clipped value loss, its statistics and its gradient."""

from __future__ import annotations

import math

import numpy as np

from bench.oracle._tokens import bools, floats, maximum, mean_of, rows_of, shaped, total


def value_loss(
    values,
    old_values,
    returns,
    mask=None,
    *,
    cliprange_value=0.2,
    row_weight=None,
    normalizer=None,
    cu_seqlens=None,
) -> tuple[float, dict[str, float], np.ndarray]:
    """Loss, statistics and d loss / d values."""
    v, old, ret, valid = floats(values), floats(old_values), floats(returns), bools(mask, values)
    owned = [(b, t) for b, row in enumerate(rows_of(values, cu_seqlens)) for t in row if valid[t]]
    scale = float(len(owned)) if normalizer is None else float(normalizer)
    inverse = 0.0 if scale == 0 else 1.0 / scale
    grad, terms, larger = [0.0] * len(v), [], 0
    for b, t in owned:
        error, share = v[t] - ret[t], 1.0 if row_weight is None else float(row_weight[b].double())
        best, g = error * error, error
        if cliprange_value is not None:
            lo, hi = old[t] - cliprange_value, old[t] + cliprange_value
            clipped_error = math.nan if math.isnan(old[t]) else min(max(v[t], lo), hi) - ret[t]
            larger += clipped_error * clipped_error > best
            best, of_plain, of_clipped = maximum(best, clipped_error * clipped_error)
            g = of_plain * error + (of_clipped * clipped_error if lo <= v[t] <= hi else 0.0)
        terms.append(0.5 * best * share)
        grad[t] = g * share * inverse
    targets, errors = [ret[t] for _, t in owned], [v[t] - ret[t] for _, t in owned]
    target_mean, error_mean = mean_of(targets), mean_of(errors)
    target_var = mean_of((x - target_mean) ** 2 for x in targets)
    error_var = mean_of((x - error_mean) ** 2 for x in errors)
    stats = {
        "clipfrac": larger / max(len(owned), 1),
        "error_mean": error_mean,
        "explained_variance": 1.0 - error_var / target_var if target_var > 0 else 0.0,
        "count": float(len(owned)),
    }
    return (total(terms) * inverse if scale else 0.0), stats, shaped(grad, values)
