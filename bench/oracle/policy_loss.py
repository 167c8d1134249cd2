"""The clipped policy loss, its statistics and its gradient."""

from __future__ import annotations

import math

import numpy as np

from bench.oracle._kl import kl_token
from bench.oracle._tokens import (
    bools,
    clamp,
    exp,
    expm1,
    floats,
    maximum,
    mean_of,
    per_token,
    rows_of,
    scaled_or_off,
    shaped,
    total,
)


def surrogate(rho, a, low, high, dual_clip) -> tuple[float, float, bool]:
    """Clipped loss of one token, its derivative with respect to rho, and whether the dual clip lowered it."""
    inside = 1.0 - low <= rho <= 1.0 + high
    loss, of_plain, of_clipped = maximum(-a * rho, -a * min(max(rho, 1.0 - low), 1.0 + high))
    slope = of_plain * -a + (of_clipped * -a if inside else 0.0)
    lowered = False
    if dual_clip is not None and a < 0:
        ceiling = -dual_clip * a
        lowered = loss > ceiling
        slope = 0.0 if lowered else 0.5 * slope if loss == ceiling else slope
        loss = min(loss, ceiling)
    return loss, slope, lowered


def policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask=None,
    *,
    cliprange=0.2,
    dual_clip=None,
    log_ratio_clamp=20.0,
    weights=None,
    ref_logprobs=None,
    kl_coef=0.0,
    kl_estimator="k2",
    kl_log_clamp=20.0,
    kl_clamp=None,
    row_weight=None,
    normalizer=None,
    cu_seqlens=None,
) -> tuple[float, dict[str, float], np.ndarray]:
    """Loss, statistics and d loss / d logprobs."""
    kl_coef = float(kl_coef)
    low, high = cliprange if isinstance(cliprange, tuple) else (cliprange, cliprange)
    rows = rows_of(logprobs, cu_seqlens)
    logp, old, valid = floats(logprobs), floats(old_logprobs), bools(mask, logprobs)
    adv = per_token(advantages, logprobs, rows)
    w = [1.0] * len(logp) if weights is None else per_token(weights, logprobs, rows)
    ref = None if ref_logprobs is None else floats(ref_logprobs)
    owned = [(b, t) for b, row in enumerate(rows) for t in row if valid[t]]
    scale = float(len(owned)) if normalizer is None else float(normalizer)
    inverse = 0.0 if scale == 0 else 1.0 / scale
    terms, ds, rhos, kls, high_n, low_n, dual_n, clamped_n = [], [], [], [], 0, 0, 0, 0
    grad = [0.0] * len(logp)
    for b, t in owned:
        raw, a = logp[t] - old[t], adv[t]
        d, passes = clamp(raw, log_ratio_clamp)
        rho = exp(d)
        loss, slope, lowered = surrogate(rho, a, low, high, dual_clip)
        loss, g = loss * w[t], slope * rho * passes * w[t]
        if ref is not None:
            k, dk = kl_token(logp[t], ref[t], kl_estimator, kl_log_clamp, kl_clamp)
            loss, g = loss + scaled_or_off(kl_coef, k), g + scaled_or_off(kl_coef, dk)
            kls.append(k)
        share = 1.0 if row_weight is None else float(row_weight[b].double())
        terms.append(loss * share)
        grad[t] = g * share * inverse
        ds.append(d)
        rhos.append(rho)
        high_n += a > 0 and rho > 1.0 + high
        low_n += a < 0 and rho < 1.0 - low
        dual_n += lowered
        clamped_n += log_ratio_clamp is not None and abs(raw) > log_ratio_clamp
    n = max(len(owned), 1)
    rho_mean = mean_of(rhos)
    stats = {
        "approx_kl_k1": -mean_of(ds),
        "approx_kl_k2": mean_of(0.5 * d * d for d in ds),
        "approx_kl_k3": mean_of(expm1(d) - d for d in ds),
        "ratio_mean": rho_mean,
        "ratio_var": mean_of((rho - rho_mean) ** 2 for rho in rhos),
        "ratio_max": max(rhos, default=0.0) if not math.isnan(rho_mean) else math.nan,
        "clipfrac_high": high_n / n,
        "clipfrac_low": low_n / n,
        "dual_clipfrac": dual_n / n,
        "ref_kl": mean_of(kls),
        "clamp_frac": clamped_n / n,
        "count": float(len(owned)),
    }
    return (total(terms) * inverse if scale else 0.0), stats, shaped(grad, logprobs)
