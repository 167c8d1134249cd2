"""The policy loss, its statistics and its gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from bench.oracle._kl import kl_token
from bench.oracle._tokens import (
    bools,
    clamp,
    effective_share,
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


class Term(NamedTuple):
    """Loss of one token, its derivatives with respect to the ratio and, directly, to logp, and what happened."""

    loss: float
    of_ratio: float = 0.0
    of_logp: float = 0.0
    high: bool = False
    low: bool = False
    lowered: bool = False


def clip(rho, a, low, high, dual_clip, delta) -> Term:
    inside = 1.0 - low <= rho <= 1.0 + high
    cap = math.inf if delta is None else delta
    loss, of_plain, of_clipped = maximum(-a * min(rho, cap), -a * min(max(rho, 1.0 - low), 1.0 + high))
    slope = (of_plain * -a if rho <= cap or math.isnan(rho) else 0.0) + (of_clipped * -a if inside else 0.0)
    lowered = a < 0 and rho > cap and rho > 1.0 + high
    if dual_clip is not None and a < 0:
        ceiling = -dual_clip * a
        lowered = lowered or loss > ceiling
        slope = 0.0 if loss > ceiling else 0.5 * slope if loss == ceiling else slope
        loss = min(loss, ceiling)
    return Term(loss, slope, 0.0, a > 0 and rho > 1.0 + high, a < 0 and rho < 1.0 - low, lowered)


def cispo(rho, a, logp, low, high) -> Term:
    constant = min(max(rho, 1.0 - low), 1.0 + high)
    return Term(-a * constant * logp, 0.0, -a * constant, rho > 1.0 + high, rho < 1.0 - low)


def sapo(rho, a, tau_pos, tau_neg) -> Term:
    tau = tau_pos if a > 0 else tau_neg
    x = tau * (rho - 1.0)
    gate = 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0
    return Term(-a * gate * 4.0 / tau, -a * 4.0 * gate * (1.0 - gate))


def dppo(rho, a, logp, old, low, high, delta, kind) -> Term:
    p, q = math.exp(logp), math.exp(old)
    moved = abs(p - q)
    if kind == "dppo_kl":
        moved = q * (old - logp) + (1.0 - q) * math.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
    is_high, is_low = a > 0 and p > q and moved > high, a < 0 and p < q and moved > low
    if is_high or is_low:
        return Term(0.0, high=is_high, low=is_low)
    if delta is None or delta == math.inf:
        return Term(-a * rho, -a)
    constant = min(rho, delta)
    return Term(-a * constant * logp, 0.0, -a * constant, lowered=rho > delta)


def log_ratios_of_rows(rows, raw, adv, valid, level, low, high) -> tuple[list[float], list[bool]]:
    """For each token the mean log-ratio of its row, and whether its own log-ratio moves it."""
    mean, moves = [0.0] * len(raw), [True] * len(raw)
    for row in rows:
        kept = [t for t in row if valid[t]]
        xs = []
        for t in kept:
            x = raw[t]
            if level == "geometric":
                x = min(x, high) if adv[t] > 0 else max(x, -low)
                moves[t] = x == raw[t]
            xs.append(x)
        for t in kept:
            mean[t] = total(xs) / len(kept)
    return mean, moves


def term_of(kind, level, rho, a, logp, old, options) -> Term:
    low, high = options["cliprange"]
    if level == "geometric":
        own = logp - old
        return Term(-a * rho, -a, 0.0, a > 0 and own > high, a < 0 and own < -low)
    if kind == "clip":
        return clip(rho, a, low, high, options["dual_clip"], options["delta"])
    if kind == "cispo":
        return cispo(rho, a, logp, low, high)
    if kind == "sapo":
        return sapo(rho, a, *options["taus"])
    return dppo(rho, a, logp, old, low, high, options["delta"], kind)


def policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask=None,
    *,
    surrogate="clip",
    importance_sampling_level="token",
    cliprange=0.2,
    dual_clip=None,
    delta=None,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    log_ratio_clamp=20.0,
    weights=None,
    ref_logprobs=None,
    kl_coef=0.0,
    kl_estimator="k2",
    kl_log_clamp=20.0,
    kl_clamp=None,
    unbiased_kl=False,
    entropy=None,
    entropy_coef=0.0,
    entropy_normalizer=None,
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
    level, taus = importance_sampling_level, (sapo_temperature_pos, sapo_temperature_neg)
    options = {"cliprange": (low, high), "dual_clip": dual_clip, "delta": delta, "taus": taus}
    raw = [now - before for now, before in zip(logp, old, strict=True)]
    moves = [True] * len(raw)
    own = raw
    if level != "token":
        raw, moves = log_ratios_of_rows(rows, own, adv, valid, level, low, high)
    shares = [1.0 if row_weight is None else float(row_weight[b].double()) for b in range(len(rows))]
    terms, ds, rhos, kls, flags, clamped_n = [], [], [], [], [], 0
    grad, through_mean = [0.0] * len(logp), [0.0] * len(rows)
    for b, t in owned:
        d, passes = clamp(raw[t], log_ratio_clamp)
        rho = exp(d)
        term = term_of(surrogate, level, rho, adv[t], logp[t], old[t], options)
        loss, g, of_ratio = term.loss * w[t], term.of_logp * w[t], term.of_ratio * rho * passes * w[t]
        if ref is not None:
            k, dk = kl_token(logp[t], ref[t], kl_estimator, kl_log_clamp, kl_clamp)
            kls.append(k)
            if unbiased_kl:
                k, dk = k * rho, dk * rho + (k * rho if passes else 0.0)
            loss, g = loss + scaled_or_off(kl_coef, k), g + scaled_or_off(kl_coef, dk)
        terms.append(loss * shares[b])
        if level in ("sequence", "geometric"):
            through_mean[b] += of_ratio
        else:
            g += of_ratio
        grad[t] = g
        ds.append(clamp(own[t], log_ratio_clamp)[0])
        rhos.append(rho)
        flags.append(term)
        clamped_n += log_ratio_clamp is not None and abs(raw[t]) > log_ratio_clamp
    lengths = [sum(valid[t] for t in row) for row in rows]
    for b, t in owned:
        grad[t] = (grad[t] + (through_mean[b] / lengths[b] if moves[t] else 0.0)) * shares[b] * inverse
    n = max(len(owned), 1)
    rho_mean = mean_of(rhos)
    stats = {
        "approx_kl_k1": -mean_of(ds),
        "approx_kl_k2": mean_of(0.5 * d * d for d in ds),
        "approx_kl_k3": mean_of(expm1(d) - d for d in ds),
        "ratio_mean": rho_mean,
        "ratio_var": mean_of((rho - rho_mean) ** 2 for rho in rhos),
        "ratio_max": max(rhos, default=0.0) if not math.isnan(rho_mean) else math.nan,
        "clipfrac_high": sum(f.high for f in flags) / n,
        "clipfrac_low": sum(f.low for f in flags) / n,
        "dual_clipfrac": sum(f.lowered for f in flags) / n,
        "ref_kl": mean_of(kls),
        "clamp_frac": clamped_n / n,
        "ess": effective_share([w[t] for _, t in owned]),
        "entropy": mean_of(floats(entropy)[t] for _, t in owned) if entropy is not None else 0.0,
        "count": float(len(owned)),
    }
    loss = total(terms) * inverse if scale else 0.0
    if entropy is not None:
        scale = scale if entropy_normalizer is None else float(entropy_normalizer)
        loss -= entropy_bonus(entropy, mask, entropy_coef, row_weight, scale, cu_seqlens)[0]
    return loss, stats, shaped(grad, logprobs)


def entropy_bonus(entropy, mask, coef, row_weight, normalizer, cu_seqlens=None) -> tuple[float, np.ndarray]:
    """What is taken from the loss, and the gradient of the loss with respect to the entropy."""
    values, valid, slopes = floats(entropy), bools(mask, entropy), [0.0] * entropy.numel()
    if float(coef) and normalizer:
        for b, row in enumerate(rows_of(entropy, cu_seqlens)):
            for t in row:
                if valid[t]:
                    slopes[t] = float(coef) * (1.0 if row_weight is None else float(row_weight[b])) / normalizer
    bonus = total(slope * value for slope, value in zip(slopes, values, strict=True) if slope)
    return bonus, -shaped(slopes, entropy)
