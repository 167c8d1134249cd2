"""The pairwise policy loss, its statistics and its gradient."""

from __future__ import annotations

import math

import numpy as np

from bench.oracle._tokens import bools, clamp, exp, expm1, floats, mean_of, rows_of, scaled_or_off, shaped, total


def clipped_term(slope: float, x: float, low: float, high: float) -> tuple[float, float, bool]:
    """max(slope x, slope clip(x)), its derivative in x, and whether the clip took the gradient away."""
    if math.isnan(x) or math.isnan(slope):
        return math.nan, math.nan, False
    plain, clipped = slope * x, slope * min(max(x, low), high)
    if plain == clipped:
        return plain, slope if low <= x <= high else 0.5 * slope, False
    return (plain, slope, False) if plain > clipped else (clipped, 0.0, True)


def p3o_loss(
    logprobs,
    old_logprobs,
    ref_logprobs,
    scores,
    mask=None,
    *,
    variant="joint",
    group_size=2,
    kl_coef=0.05,
    cliprange=0.2,
    weight_clip=10.0,
    log_ratio_clamp=20.0,
    normalizer=None,
    cu_seqlens=None,
) -> tuple[float, dict[str, float], np.ndarray]:
    """Loss, statistics and d loss / d logprobs."""
    logp, old, ref, score = floats(logprobs), floats(old_logprobs), floats(ref_logprobs), floats(scores)
    valid, beta, edge = bools(mask, logprobs), float(kl_coef), math.log(weight_clip)
    tokens = [[t for t in row if valid[t]] for row in rows_of(logprobs, cu_seqlens)]
    s_new = [total(logp[t] - ref[t] for t in row) for row in tokens]
    s_old = [total(old[t] - ref[t] for t in row) for row in tokens]
    shift = [total(logp[t] - old[t] for t in row) for row in tokens]
    bounded = [clamp(x, log_ratio_clamp) for x in shift]
    pairs = [
        (i, j)
        for i in range(len(tokens))
        for j in range(i + 1, len(tokens))
        if i // group_size == j // group_size and tokens[i] and tokens[j]
    ]
    scale = float(len(pairs)) if normalizer is None else float(normalizer)
    inverse = 0.0 if scale == 0 else 1.0 / scale
    by_row = [0.0] * len(tokens)
    losses, weights, stopped, gaps, margins = [], [], [], [], []
    outside = 0

    def weight(log_ratio: float) -> float:
        nonlocal outside
        outside += abs(log_ratio) > edge
        w = exp(clamp(log_ratio, edge)[0])
        weights.append(w)
        return w

    for i, j in pairs:
        gap = s_new[i] - s_new[j]
        q = score[i] - score[j] - scaled_or_off(beta, gap)
        if variant == "separate":
            w = {i: weight(shift[i]), j: weight(shift[j])}
            for one, other, sign in ((i, j, 1.0), (j, i, -1.0)):
                (d, passes), k = bounded[one], -sign * q * w[other]
                rho = exp(d)
                loss, slope, stop = clipped_term(k, rho, 1.0 - cliprange, 1.0 + cliprange)
                losses.append(0.5 * loss)
                by_row[one] += 0.5 * (slope * rho * passes if passes else 0.0)
                stopped.append(stop)
        else:
            k = -q * weight(shift[i] + shift[j])
            # d_old is a constant of the loss: with the reference off, one that is not finite drops out.
            d, d_old = shift[i] - shift[j], s_old[i] - s_old[j] if beta or math.isfinite(gap) else 0.0
            loss, slope, stop = clipped_term(k, d, -cliprange, cliprange)
            losses.append(0.5 * (loss + k * d_old))
            by_row[i] += 0.5 * slope
            by_row[j] -= 0.5 * slope
            stopped.append(stop)
        better = float(score[i] > score[j]) - float(score[i] < score[j])
        gaps.append(abs(q))
        margins.append(better * gap)
    grad = [0.0] * len(logp)
    for row, g in zip(tokens, by_row, strict=True):
        for t in row:
            grad[t] = g * inverse
    alive = [b for b, row in enumerate(tokens) if row]
    ratios = [exp(bounded[b][0]) for b in alive]
    stats = {
        "approx_kl_k1": -mean_of(bounded[b][0] for b in alive),
        "approx_kl_k3": mean_of(expm1(bounded[b][0]) - bounded[b][0] for b in alive),
        "ref_kl": mean_of(s_new[b] for b in alive),
        "ratio_mean": mean_of(ratios),
        "ratio_max": math.nan if any(map(math.isnan, ratios)) else max(ratios, default=0.0),
        "clamp_frac": mean_of(log_ratio_clamp is not None and abs(shift[b]) > log_ratio_clamp for b in alive),
        "weight_mean": mean_of(weights),
        "weight_clipfrac": outside / max(len(weights), 1),
        "clipfrac": mean_of(stopped),
        "reward_gap": mean_of(gaps),
        "margin": mean_of(margins),
        "accuracy": mean_of(m > 0 for m in margins),
        "count": float(len(pairs)),
    }
    return (total(losses) * inverse if scale else 0.0), stats, shaped(grad, logprobs)
