"""The policy loss, eager."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_kernels._rows import (
    Rows,
    effective_share,
    find_rows,
    how_many,
    masked_mean,
    per_token,
    reduce_loss,
    row_sum,
    scalar,
    scaled_or_off,
    select,
    spread,
    valid_tokens,
)
from ppo_kernels._types import PolicyStats, compute_dtype
from ppo_kernels.reference.kl_rewards import clamp, kl_estimate

Number = float | Tensor
Bound = Number | None
#: Loss of every token, and whether it was clipped above, clipped below, lowered by the dual clip or by delta.
Surrogate = tuple[Tensor, Tensor, Tensor, Tensor]


def at_most(x: Tensor, most: Bound) -> Tensor:
    """``x`` bounded from above; None or infinity is off, and then the gradient of a NaN passes too."""
    if isinstance(most, Tensor):  # of a traced graph
        return torch.where(most == math.inf, x, x.clamp(max=most))
    return x if most is None or most == math.inf else x.clamp(max=most)


def clip(ratio: Tensor, adv: Tensor, low: Number, high: Number, dual_clip: Bound, delta: Bound) -> Surrogate:
    clipped = ratio.clamp(min=1.0 - low).clamp(max=1.0 + high)
    loss = torch.maximum(-adv * at_most(ratio, delta), -adv * clipped)
    lowered = torch.zeros_like(adv, dtype=torch.bool)
    if delta is not None:
        lowered = (adv < 0) & (ratio > delta) & (ratio > 1.0 + high)
    if dual_clip is not None:
        ceiling = -dual_clip * adv
        lowered = lowered | ((adv < 0) & (loss > ceiling))
        loss = torch.where(adv < 0, torch.minimum(loss, ceiling), loss)
    return loss, (adv > 0) & (ratio > 1.0 + high), (adv < 0) & (ratio < 1.0 - low), lowered


def cispo(ratio: Tensor, adv: Tensor, logp: Tensor, low: Number, high: Number) -> Surrogate:
    """The clipped ratio is a constant that weighs logp; it is clipped whatever the sign of the advantage."""
    clipped = ratio.detach().clamp(min=1.0 - low).clamp(max=1.0 + high)
    never = torch.zeros_like(adv, dtype=torch.bool)
    return -adv * clipped * logp, ratio > 1.0 + high, ratio < 1.0 - low, never


def sapo(d: Tensor, adv: Tensor, tau_pos: Number, tau_neg: Number) -> Surrogate:
    """A sigmoid of the ratio ``exp(d)`` takes the place of its clip."""
    tau = torch.where(adv > 0, scalar(tau_pos, adv), scalar(tau_neg, adv))
    never = torch.zeros_like(adv, dtype=torch.bool)
    # Not torch.sigmoid, whose last elements of a tensor are rounded in another way than those before them.
    gate = 1.0 / (1.0 + torch.exp(-(tau * torch.expm1(d)).clamp(min=-80.0)))
    return -adv * gate * (4.0 / tau), never, never, never


def dppo(
    ratio: Tensor, adv: Tensor, logp: Tensor, old: Tensor, low: Number, high: Number, delta: Bound, binary_kl: bool
) -> Surrogate:
    """A token that has moved too far in the direction of its advantage has no loss."""
    with torch.no_grad():
        prob, old_prob = logp.exp(), old.exp()
        moved = (prob - old_prob).abs()
        if binary_kl:
            others = torch.log((1.0 - old_prob + 1e-8) / (1.0 - prob + 1e-8))
            moved = old_prob * (old - logp) + (1.0 - old_prob) * others
        is_high = (adv > 0) & (prob > old_prob) & (moved > high)
        is_low = ~(adv > 0) & (prob < old_prob) & (moved > low)
        kept = ~(is_high | is_low)
    loss = -adv * ratio
    if delta is not None and (isinstance(delta, Tensor) or delta < math.inf):
        # Bounded, the ratio is a constant that weighs logp: its own gradient would be 0 beyond the bound.
        constant = -adv * ratio.detach().clamp(max=delta) * logp
        loss = torch.where(torch.as_tensor(delta, device=loss.device) == math.inf, loss, constant)
    beyond = torch.zeros_like(kept) if delta is None else kept & (ratio > delta)
    return torch.where(kept, loss, 0.0), is_high, (adv < 0) & is_low, beyond


def row_log_ratio(x: Tensor, valid: Tensor, rows: Rows) -> Tensor:
    """The mean of a row's log-ratios, for each of its tokens."""
    if rows.batch == 0:
        return torch.where(valid, x, 0.0)  # not fresh zeros: a loss over no rows is still differentiable
    wide = torch.where(valid, x, 0.0).to(how_many(valid).dtype)
    total, count = row_sum(wide, rows), row_sum(valid.to(wide.dtype), rows)
    return torch.where(valid, spread((total / count.clamp(min=1.0)).to(x.dtype), rows), 0.0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    surrogate: str = "clip",
    importance_sampling_level: str = "token",
    cliprange: float | tuple[float, float] = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    log_ratio_clamp: float | None = 20.0,
    weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_estimator: str = "k2",
    kl_log_clamp: float | None = 20.0,
    kl_clamp: float | None = None,
    unbiased_kl: bool = False,
    entropy: Tensor | None = None,
    entropy_coef: float | Tensor = 0.0,
    entropy_normalizer: float | Tensor | None = None,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    dtype = compute_dtype(logprobs, old_logprobs, advantages, weights, ref_logprobs, entropy)
    low, high = cliprange if isinstance(cliprange, tuple) else (cliprange, cliprange)
    rows = find_rows(logprobs, cu_seqlens)
    valid = valid_tokens(logprobs, mask, rows)
    logp, old = select(logprobs, valid, dtype), select(old_logprobs.detach(), valid, dtype)
    adv = torch.where(valid, per_token(advantages.detach(), logprobs, rows, dtype), 0.0)

    own = logp - old
    log_ratio = own
    if importance_sampling_level == "geometric":
        clipped = torch.where(adv > 0, own.clamp(max=high), own.clamp(min=-low))
        log_ratio = row_log_ratio(clipped, valid, rows)
    elif importance_sampling_level == "sequence":
        log_ratio = row_log_ratio(own, valid, rows)
    elif importance_sampling_level == "sequence_token":
        log_ratio = row_log_ratio(own.detach(), valid, rows) + torch.where(logp.isfinite(), logp - logp.detach(), 0.0)
    d = clamp(log_ratio, log_ratio_clamp)
    ratio = d.exp()
    if importance_sampling_level == "geometric":
        loss, dual = -adv * ratio, torch.zeros_like(valid)
        is_high, is_low = (adv > 0) & (own > high), (adv < 0) & (own < -low)
    elif surrogate == "clip":
        loss, is_high, is_low, dual = clip(ratio, adv, low, high, dual_clip, delta)
    elif surrogate == "cispo":
        loss, is_high, is_low, dual = cispo(ratio, adv, logp, low, high)
    elif surrogate == "sapo":
        loss, is_high, is_low, dual = sapo(d, adv, sapo_temperature_pos, sapo_temperature_neg)
    else:
        loss, is_high, is_low, dual = dppo(ratio, adv, logp, old, low, high, delta, surrogate == "dppo_kl")
    weight = None
    if weights is not None:
        weight = torch.where(valid, per_token(weights.detach(), logprobs, rows, dtype), 0.0)
        loss = loss * weight
    ref_kl = torch.zeros_like(loss)
    if ref_logprobs is not None:
        ref = select(ref_logprobs.detach(), valid, dtype)
        coef = scalar(kl_coef, loss)
        ref_kl = kl_estimate(logp.detach(), ref, kl_estimator, kl_log_clamp, kl_clamp)
        # A coefficient of 0 is off: what it multiplies must be finite and have a finite gradient.
        x, y = torch.where(coef != 0, logp, 0.0), torch.where(coef != 0, ref, 0.0)
        penalty = kl_estimate(x, y, kl_estimator, kl_log_clamp, kl_clamp)
        loss = loss + coef * (penalty * torch.where(coef != 0, ratio, 0.0) if unbiased_kl else penalty)
    total, count = reduce_loss(loss, valid, rows, row_weight, normalizer)
    of_entropy = None
    if entropy is not None:
        of_entropy = select(entropy, valid, dtype)
        scale = normalizer if entropy_normalizer is None else entropy_normalizer
        bonus, _ = reduce_loss(of_entropy, valid, rows, row_weight, scale)
        total = total - scaled_or_off(scalar(entropy_coef, bonus), bonus)

    with torch.no_grad():
        number = how_many(valid)
        excess = ratio.to(number.dtype) - 1.0
        ratio_mean = masked_mean(excess, valid, number)
        of_token = clamp(own, log_ratio_clamp)
        stats = PolicyStats(
            approx_kl_k1=masked_mean(-of_token, valid, number),
            approx_kl_k2=masked_mean(0.5 * of_token * of_token, valid, number),
            approx_kl_k3=masked_mean(torch.expm1(of_token) - of_token, valid, number),
            ratio_mean=torch.where(count > 0, 1.0 + ratio_mean, 0.0),
            ratio_var=masked_mean((excess - ratio_mean).square(), valid, number),
            ratio_max=torch.cat([torch.where(valid, ratio, 0.0), ratio.new_zeros(1)]).max(),
            clipfrac_high=masked_mean(is_high, valid, number),
            clipfrac_low=masked_mean(is_low, valid, number),
            dual_clipfrac=masked_mean(dual, valid, number),
            ref_kl=masked_mean(ref_kl, valid, number),
            clamp_frac=masked_mean(
                torch.zeros_like(valid) if log_ratio_clamp is None else log_ratio.abs() > log_ratio_clamp,
                valid,
                number,
            ),
            ess=(number > 0) if weight is None else effective_share(weight, number),
            entropy=torch.zeros_like(count) if of_entropy is None else masked_mean(of_entropy.detach(), valid, number),
            count=count,
        )
        return total, PolicyStats(*(s.to(dtype) for s in stats))
