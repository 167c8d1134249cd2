"""The losses of verl's actor and critic, and its fused head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels._types import PolicyStats
from ppo_kernels.integrations._shared import aggregation, operands, plain, whole
from ppo_kernels.integrations._target import NotCoveredError
from ppo_kernels.ops.linear_token_logprobs import linear_token_logprobs
from ppo_kernels.ops.policy_loss import policy_loss
from ppo_kernels.ops.value_loss import value_loss

METRICS = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
Loss = tuple[Tensor, dict[str, Any]]


def _bounds(config: Any) -> tuple[float, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return config.clip_ratio if low is None else low, config.clip_ratio if high is None else high


def _policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    weights: Tensor | None,
    **options: Any,
) -> tuple[Tensor, PolicyStats]:
    """``options`` are those of ``policy_loss`` in which verl's losses differ."""
    if config is None:
        raise NotCoveredError("no config")
    plain(log_prob, old_log_prob, advantages)
    row_weight, normalizer = aggregation(response_mask, loss_agg_mode, **config.global_batch_info)
    chosen: dict[str, Any] = {"cliprange": _bounds(config), "log_ratio_clamp": 20.0} | options
    return policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        whole(response_mask, log_prob),
        weights=weights,
        row_weight=row_weight,
        normalizer=normalizer,
        **chosen,
    )


def _metrics(stats: PolicyStats, **changes: Tensor) -> dict[str, float]:
    """One synchronisation for the three."""
    found = {
        "clipfrac": stats.clipfrac_high + stats.clipfrac_low,
        "kl": stats.approx_kl_k1,
        "lower": stats.dual_clipfrac,
    }
    numbers = torch.stack([x.double() for x in (found | changes).values()]).tolist()
    return dict(zip(METRICS, numbers, strict=True))


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    dual_clip = 3.0 if config is None else config.get("clip_ratio_c", 3.0)
    arguments = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
    loss, stats = _policy_loss(*arguments, dual_clip=dual_clip)
    return loss, _metrics(stats)


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    arguments = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
    loss, stats = _policy_loss(*arguments, surrogate="cispo")
    return loss, _metrics(stats)


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    """The mean log-ratio of a row is bounded by 10 on both sides, in verl from above alone: by then it is lost."""
    arguments = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
    loss, stats = _policy_loss(*arguments, importance_sampling_level="sequence_token", log_ratio_clamp=10.0)
    return loss, _metrics(stats, kl=_ppo_kl(old_log_prob, log_prob, response_mask))


def compute_policy_loss_sapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    """Whatever ``loss_agg_mode`` is, verl takes the mean over sequences."""
    if config is None:
        raise NotCoveredError("no config")
    arguments = (old_log_prob, log_prob, advantages, response_mask, "seq-mean-token-mean", config, rollout_is_weights)
    taus = {"sapo_temperature_pos": config.tau_pos, "sapo_temperature_neg": config.tau_neg}
    loss, stats = _policy_loss(*arguments, surrogate="sapo", **taus)
    nothing = torch.zeros_like(stats.count)
    return loss, _metrics(stats, clipfrac=nothing, lower=nothing)


def compute_policy_loss_dppo_tv(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    arguments = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
    return _dppo("dppo_tv", *arguments)


def compute_policy_loss_dppo_kl(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    arguments = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
    return _dppo("dppo_kl", *arguments)


def _dppo(
    surrogate: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    weights: Tensor | None,
) -> Loss:
    """verl's share of dropped tokens takes an advantage of 0 for a negative one. The least number is that to the share,
    and nothing to the loss."""
    if config is None:
        raise NotCoveredError("no config")
    advantages = torch.where(advantages == 0, -torch.finfo(advantages.dtype).tiny, advantages)
    arguments = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, weights)
    loss, stats = _policy_loss(*arguments, surrogate=surrogate, delta=config.get("clip_ratio_c", 20.0))
    return loss, _metrics(stats)


def compute_policy_loss_geo_mean(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    """Whatever ``loss_agg_mode`` is, verl takes the mean over rows, those without a token too.

    A token whose advantage is 0 counts there with the log-ratio 0, and its shares of clipped tokens take either bound.
    """
    if config is None:
        raise NotCoveredError("no config")
    plain(log_prob, old_log_prob, advantages)
    mask = whole(response_mask, log_prob)
    live = response_mask != 0
    lengths = live.sum(-1)
    low, high = _bounds(config)
    weights = None
    if rollout_is_weights is not None:
        logs = torch.where(live, torch.log(rollout_is_weights + 1e-10), 0.0)
        weights = (logs.sum(-1) / (lengths + 1e-8)).exp()[:, None].expand_as(log_prob)
    loss, _ = policy_loss(
        torch.where(advantages == 0, old_log_prob, log_prob),
        old_log_prob,
        advantages,
        mask,
        importance_sampling_level="geometric",
        cliprange=(low, high),
        log_ratio_clamp=None,
        weights=weights,
        row_weight=1.0 / lengths.clamp(min=1),
        normalizer=float(log_prob.size(0)),
    )
    with torch.no_grad():
        difference = log_prob - old_log_prob
        outside = live & ((difference > high) | (difference < -low))
        sums = [outside & (advantages > 0), torch.where(live, -difference, 0.0), outside & (advantages < 0)]
        numbers = (torch.stack([x.sum().double() for x in sums]) / lengths.sum().clamp(min=1)).tolist()
    return loss, dict(zip(METRICS, numbers, strict=True))


def _log_prob_loss(
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    weights: Tensor | None,
    **options: Any,
) -> Tensor:
    """``-A log p``: the ratio to itself is 1."""
    arguments = (log_prob.detach(), log_prob, advantages, response_mask, loss_agg_mode, config, weights)
    return _policy_loss(*arguments, surrogate="cispo", cliprange=None, **options)[0]


def _ppo_kl(old_log_prob: Tensor, log_prob: Tensor, response_mask: Tensor) -> Tensor:
    """The mean of log-ratios without a bound."""
    live = response_mask != 0
    return torch.where(live, (old_log_prob - log_prob).detach(), 0.0).sum() / live.sum().clamp(min=1)


def compute_policy_loss_gpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    return _log_prob_loss(log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights), {}


def compute_policy_loss_reinforce(
    rollout_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    loss = _log_prob_loss(log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
    return loss, {"actor/ppo_kl": _ppo_kl(rollout_log_prob, log_prob, response_mask).item()}


def compute_policy_loss_dro(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    """``-A log p`` and a penalty by the square of the log-ratio, which verl's weights multiply too, and ours do not."""
    if rollout_is_weights is not None:
        raise NotCoveredError("rollout_is_weights")
    beta = None if config is None else config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise NotCoveredError(f"dro_beta={beta}")
    penalty = {"kl_coef": beta, "kl_estimator": "k2", "kl_log_clamp": None, "ref_logprobs": old_log_prob}
    loss = _log_prob_loss(log_prob, advantages, response_mask, loss_agg_mode, config, None, **penalty)
    return loss, {"actor/ppo_kl": _ppo_kl(old_log_prob, log_prob, response_mask).item()}


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> tuple[Tensor, Tensor]:
    plain(vpreds, returns, values)
    counts = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    row_weight, normalizer = aggregation(response_mask, loss_agg_mode, *counts)
    mask = whole(response_mask, vpreds)
    loss, stats = value_loss(
        vpreds, values, returns, mask, cliprange_value=cliprange_value, row_weight=row_weight, normalizer=normalizer
    )
    return loss, stats.clipfrac


def fused_linear_for_ppo(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: Any = 1.0
) -> tuple[Tensor, Tensor]:
    """Both backends of the module, "torch" and "liger"; the entropy is float32, also of bfloat16 hidden states."""
    plain(hidden_states, vocab_weights)
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise NotCoveredError("temperatures of rows")
    hidden, weight = operands(hidden_states, vocab_weights)
    found = linear_token_logprobs(hidden, weight, input_ids, temperature=temperature, entropy=True)
    assert isinstance(found, tuple)
    return found
