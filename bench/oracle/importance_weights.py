"""Importance weights, what a rejection keeps, and the statistics of both."""

from __future__ import annotations

import math

import numpy as np

from bench.oracle._tokens import (
    bools,
    clamp,
    effective_share,
    exp,
    expm1,
    floats,
    mean_of,
    rows_of,
    shaped,
    total,
)

ESTIMATES = {"k1": lambda d: -d, "k2": lambda d: 0.5 * d * d, "k3": lambda d: expm1(d) - d, None: lambda d: 0.0}


def importance_weights(
    logprobs,
    rollout_logprobs,
    mask=None,
    *,
    level="token",
    mode="truncate",
    bounds=(None, 2.0),
    reject=None,
    reject_level="token",
    reject_bounds=None,
    log_ratio_clamp=20.0,
    cu_seqlens=None,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Weights, kept tokens and statistics."""
    low, high = bounds if isinstance(bounds, tuple) else (None, bounds)
    low, high = 0.0 if low is None else low, math.inf if high is None else high
    least, most = reject_bounds if isinstance(reject_bounds, tuple) else (None, reject_bounds)
    least, most = -math.inf if least is None else least, math.inf if most is None else most
    logp, rollout, valid = floats(logprobs), floats(rollout_logprobs), bools(mask, logprobs)
    weights, keep = [0.0] * len(logp), [False] * len(logp)
    owned, ds, ratios = [], [], []
    for row in rows_of(logprobs, cu_seqlens):
        kept = [t for t in row if valid[t]]
        raw = [logp[t] - rollout[t] for t in kept]
        d = [clamp(x, log_ratio_clamp)[0] for x in raw]
        estimates = [ESTIMATES[reject](x) for x in d]
        if kept and reject_level != "token":
            whole = {"sum": total(estimates), "mean": mean_of(estimates), "max": max(estimates)}[reject_level]
            estimates = [whole] * len(kept)
        whole = total(raw) if level == "sequence" else mean_of(raw)
        for t, own, estimate in zip(kept, d, estimates, strict=True):
            ratio = exp(own if level == "token" else clamp(whole, log_ratio_clamp)[0])
            inside = low <= ratio <= high
            keep[t] = (reject is None or least <= estimate <= most) and (mode != "mask" or inside)
            bounded = ratio if math.isnan(ratio) else min(max(ratio, low), high)
            weights[t] = (bounded if mode == "truncate" else ratio if inside else 0.0) if keep[t] else 0.0
            ratios.append(ratio)
        owned += kept
        ds += d
    n = max(len(owned), 1)
    used = [weights[t] for t in owned]
    some = float(bool(owned))
    stats = {
        "ess": effective_share(used),
        "kl_k1": -mean_of(ds),
        "kl_k3": mean_of(expm1(d) - d for d in ds),
        "chi2": mean_of(expm1(2.0 * d) for d in ds),
        "perplexity": some * exp(-mean_of(logp[t] for t in owned)),
        "rollout_perplexity": some * exp(-mean_of(rollout[t] for t in owned)),
        "weight_mean": mean_of(used),
        "ratio_max": max(ratios, default=0.0),
        "clipfrac_high": sum(r > high for r in ratios) / n,
        "clipfrac_low": sum(r < low for r in ratios) / n,
        "rejectfrac": sum(not keep[t] for t in owned) / n,
        "count": float(len(owned)),
    }
    return shaped(weights, logprobs), shaped([float(k) for k in keep], logprobs) != 0, stats
