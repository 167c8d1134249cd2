"""csrc/math/surrogate.h and the terms of csrc/math/policy_loss.h in Triton. Surrogates and levels come by number."""

from __future__ import annotations

import triton
import triton.language as tl

from ppo_kernels._types import RATIO_LEVELS, SURROGATES
from ppo_kernels.triton._math import INF, clamp, clamp_gradient, exp, expm1_minus

CLIP, CISPO, SAPO, DPPO_TV, DPPO_KL = map(tl.constexpr, range(len(SURROGATES)))
TOKEN, SEQUENCE, SEQUENCE_TOKEN, GEOMETRIC = map(tl.constexpr, range(len(RATIO_LEVELS)))


@triton.jit
def _clip(raw, ratio, adv, weight, low, high, dual_clip, delta, log_ratio_clamp):
    """Ties as autograd has them: max and min give each side half, clamp passes the gradient at its bounds."""
    bounded = tl.where(ratio > delta, delta, ratio)
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    plain_loss, clipped_loss = -adv * bounded, -adv * clipped
    from_plain = tl.where(plain_loss > clipped_loss, 1.0, tl.where(plain_loss == clipped_loss, 0.5, 0.0))
    inside = tl.where((ratio < low) | (ratio > high), 0.0, 1.0)
    loss = tl.where(clipped_loss > plain_loss, clipped_loss, plain_loss)  # a NaN among the first must show
    share = tl.where(ratio > delta, 0.0, from_plain) + (1.0 - from_plain) * inside

    # Only compared where adv < 0, so that an infinite dual_clip makes no NaN of adv = 0.
    ceiling = tl.where(adv < 0.0, -dual_clip * adv, INF)
    lowered = (loss > ceiling) | ((adv < 0.0) & (ratio > delta) & (ratio > high))
    share = tl.where(loss < ceiling, share, tl.where(loss > ceiling, 0.0, 0.5 * share))
    loss = tl.where(loss > ceiling, ceiling, loss)

    weighted = tl.where(share == 0.0, 0.0, share * weight)  # no weight, be it NaN, of what is clipped
    slope = clamp_gradient(raw, log_ratio_clamp, -adv * ratio * weighted)
    return loss, slope, (adv > 0.0) & (ratio > high), (adv < 0.0) & (ratio < low), lowered


@triton.jit
def _dppo(raw, ratio, logp, old, adv, weight, low, high, delta, log_ratio_clamp, BINARY_KL: tl.constexpr):
    prob, old_prob = exp(logp), exp(old)
    if BINARY_KL:
        others = tl.log((1.0 - old_prob + 1e-8) / (1.0 - prob + 1e-8))
        moved = old_prob * (old - logp) + (1.0 - old_prob) * others
    else:
        moved = tl.abs(prob - old_prob)
    above = (adv > 0.0) & (prob > old_prob) & (moved > high)
    below = tl.where(adv > 0.0, False, (prob < old_prob) & (moved > low))
    kept = tl.where(above | below, False, True)
    # A ratio that delta bounds is a constant, like cispo's.
    constant = delta < INF
    slope = -adv * tl.where(ratio > delta, delta, ratio)
    loss = tl.where(constant, slope * logp, slope)
    weighted = slope * weight
    grad = tl.where(constant, weighted, clamp_gradient(raw, log_ratio_clamp, weighted))
    return (
        tl.where(kept, loss, 0.0),
        tl.where(kept, grad, 0.0),
        above,
        below & (adv < 0.0),
        kept & (ratio > delta),
    )


@triton.jit
def policy_term(
    raw, logp, old, adv, weight,
    low, high, dual_clip, delta, log_ratio_clamp, tau_pos, tau_neg,
    SURROGATE: tl.constexpr,
):  # fmt: skip
    """Loss and d loss/d logp of one token by a log-ratio ``raw``, and what the statistics need."""
    d = clamp(raw, log_ratio_clamp)
    ratio = exp(d)
    k3 = expm1_minus(d, ratio)
    excess = tl.where((d > -0.5) & (d < 0.5), k3 + d, ratio - 1.0)
    clamped = (raw < -log_ratio_clamp) | (raw > log_ratio_clamp)
    # tl.where would round Python numbers to float32.
    low, high = tl.full(d.shape, low, d.dtype), tl.full(d.shape, high, d.dtype)
    delta = tl.full(d.shape, delta, d.dtype)
    never = tl.zeros(d.shape, tl.int1)
    if SURROGATE == CLIP:
        loss, slope, above, below, dual = _clip(
            raw, ratio, adv, weight, low, high, dual_clip, delta, log_ratio_clamp
        )  # fmt: skip
    elif SURROGATE == CISPO:
        constant = -adv * tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        loss, slope, above, below, dual = constant * logp, constant * weight, ratio > high, ratio < low, never
    elif SURROGATE == SAPO:
        tau = tl.where(adv > 0.0, tl.full(d.shape, tau_pos, d.dtype), tl.full(d.shape, tau_neg, d.dtype))
        x = tau * excess
        e = exp(tl.where(x < 0.0, x, -x))
        s = 1.0 / (1.0 + e)
        loss = -adv * (tl.where(x < 0.0, e * s, s) * (4.0 / tau))
        slope = clamp_gradient(raw, log_ratio_clamp, -adv * (4.0 * e * s * s * ratio) * weight)
        above, below, dual = never, never, never
    else:
        loss, slope, above, below, dual = _dppo(
            raw, ratio, logp, old, adv, weight, low, high, delta, log_ratio_clamp, SURROGATE == DPPO_KL
        )
    return loss * weight, slope, d, ratio, excess, k3, above, below, dual, clamped


@triton.jit
def beyond_geometric(own, adv, low, high):
    """Which log-ratios GMPO clips, above and below: on the side of their advantage."""
    low, high = tl.full(own.shape, low, own.dtype), tl.full(own.shape, high, own.dtype)
    return (adv > 0.0) & (own > high), tl.where(adv > 0.0, False, own < -low)


@triton.jit
def row_term(own, adv, weight, low, high, LEVEL: tl.constexpr):
    """A token's part of its row's sums: its log-ratio, and its weighted advantage by sign."""
    if LEVEL == GEOMETRIC:
        above, below = beyond_geometric(own, adv, low, high)
        low, high = tl.full(own.shape, low, own.dtype), tl.full(own.shape, high, own.dtype)
        own = tl.where(above, high, tl.where(below, -low, own))
    weighted = adv * weight
    return own, tl.where(adv < 0.0, 0.0, weighted), tl.where(adv < 0.0, -weighted, 0.0)
