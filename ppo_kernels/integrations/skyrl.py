"""SkyRL: log-probabilities, entropy, the advantage estimators, the KL estimate, and the losses of actor and critic.

Its registries are shared over a Ray actor, but a name that a process has keeps its own function: apply the adapter in
each worker.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ppo_kernels._types import PolicyStats
from ppo_kernels.integrations._adapter import Adapter
from ppo_kernels.integrations._shared import entropy_of, kl_per_token, no_gradient, over_groups, plain, whole
from ppo_kernels.integrations._target import NotCoveredError, Target
from ppo_kernels.ops.gae import gae
from ppo_kernels.ops.policy_loss import policy_loss
from ppo_kernels.ops.token_logprobs import token_logprobs
from ppo_kernels.ops.value_loss import value_loss
from ppo_kernels.ops.whiten import whiten

Pair = tuple[Tensor, Tensor]


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Never in place: SkyRL asks for that also where it differentiates the entropy of the same logits."""
    plain(logits)
    return token_logprobs(logits, labels)


def chunked_entropy_from_logits(
    logits: Tensor, requires_grad: bool = False, attention_mask: Tensor | None = None, chunk_size: int = 1024
) -> Tensor:
    plain(logits)
    return entropy_of(logits if requires_grad else logits.detach(), attention_mask)


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, loss_mask: Tensor | None = None, kl_estimator_type: str = "k3"
) -> Tensor:
    no_gradient(log_probs, log_probs_base)
    mask = None if loss_mask is None else whole(loss_mask, log_probs)
    bounds = (20.0, 10.0) if kl_estimator_type == "k3" else (None, None)
    return kl_per_token(log_probs, log_probs_base, mask, kl_estimator_type, *bounds)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    no_gradient(values)
    return whiten(values, whole(mask, values), shift_mean=shift_mean)


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lambd: float, **kwargs: Any
) -> Pair:
    """Every token is a transition, masked or not; padding has rewards and values 0."""
    advantages, returns = gae(token_level_rewards, values, gamma=gamma, lam=lambd)
    return whiten(advantages, response_mask), returns


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, **kwargs: Any
) -> Pair:
    advantages = over_groups(token_level_rewards, index, "rloo", alone="zero")[:, None] * response_mask
    return advantages, advantages


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    grpo_norm_by_std: bool = True,
    **kwargs: Any,
) -> Pair:
    mode, alone = ("grpo", "1 + eps") if grpo_norm_by_std else ("dr_grpo", "score")
    advantages = over_groups(token_level_rewards, index, mode, epsilon, alone=alone)[:, None] * response_mask
    return advantages, advantages


def compute_maxrl_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, **kwargs: Any
) -> Pair:
    advantages = over_groups(token_level_rewards, index, "maxrl", epsilon)[:, None] * response_mask
    return advantages, advantages


UTILS = "skyrl.backends.skyrl_train.utils.ppo_utils"
Loss = tuple[Tensor, dict[str, float]]


def _policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None,
    rollout_logprobs: Tensor | None,
    **options: Any,
) -> tuple[Tensor, PolicyStats, dict[str, float]]:
    """A sum: the advantages carry the denominator. With rollout_logprobs, also SkyRL's metrics of them.

    The off-policy correction is SkyRL's own, of a loss of ones: it says how much of its loss each token keeps.
    """
    mask = None if loss_mask is None else whole(loss_mask, log_probs)
    given: dict[str, Any] = {"old_logprobs": old_log_probs, "log_ratio_clamp": 20.0, "normalizer": 1.0} | options
    metrics: dict[str, float] = {}
    if rollout_logprobs is not None:
        if mask is None:
            raise NotCoveredError("rollout_logprobs without loss_mask")
        correct = sys.modules[UTILS].apply_off_policy_correction
        ones = torch.ones_like(log_probs)
        kept, live, metrics = correct(ones, old_log_probs, rollout_logprobs, mask, config.off_policy_correction)
        if kept is not ones or live is not mask:
            given["weights"] = kept * live
    loss, stats = policy_loss(log_probs, advantages=advantages, mask=mask, **given)
    return loss, stats, metrics


def _metrics(stats: PolicyStats, more: dict[str, float]) -> dict[str, float]:
    return {"clip_ratio": (stats.clipfrac_high + stats.clipfrac_low).item()} | more


def ppo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> Loss:
    if config.policy_loss_type not in ("regular", "dual_clip"):
        raise NotCoveredError(f"policy_loss_type={config.policy_loss_type!r}")
    options: dict[str, Any] = {
        "cliprange": (config.eps_clip_low, config.eps_clip_high),
        "dual_clip": config.clip_ratio_c if config.policy_loss_type == "dual_clip" else None,
    }
    arguments = (log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    loss, stats, more = _policy_loss(*arguments, **options)
    return loss, _metrics(stats, more)


def gspo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> Loss:
    """The mean log-ratio of a row is bounded by 10 on both sides, in SkyRL from above alone: by then it is lost."""
    options: dict[str, Any] = {
        "cliprange": (config.eps_clip_low, config.eps_clip_high),
        "importance_sampling_level": "sequence_token",
        "log_ratio_clamp": 10.0,
    }
    arguments = (log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    loss, stats, more = _policy_loss(*arguments, **options)
    return loss, _metrics(stats, more)


def compute_policy_loss_cispo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> Loss:
    bounds = (config.cispo.cispo_eps_clip_low, config.cispo.cispo_eps_clip_high)
    options: dict[str, Any] = {"cliprange": bounds, "surrogate": "cispo"}
    arguments = (log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    loss, stats, more = _policy_loss(*arguments, **options)
    return loss, _metrics(stats, more)


def sapo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> Loss:
    taus = {"sapo_temperature_pos": config.sapo.tau_pos, "sapo_temperature_neg": config.sapo.tau_neg}
    arguments = (log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    loss, _, more = _policy_loss(*arguments, surrogate="sapo", **taus)
    return loss, {"clip_ratio": 0.0} | more


def dppo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> Loss:
    """Its ratio is that to the rollout, where there is one."""
    surrogates = {"binary_tv": "dppo_tv", "binary_kl": "dppo_kl"}
    if config.dppo.dppo_type not in surrogates:
        raise NotCoveredError(f"dppo_type={config.dppo.dppo_type!r}")
    options: dict[str, Any] = {
        "surrogate": surrogates[config.dppo.dppo_type],
        "cliprange": (config.dppo.delta_low, config.dppo.delta_high),
        "old_logprobs": old_log_probs if rollout_logprobs is None else rollout_logprobs,
    }
    arguments = (log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs)
    loss, stats, more = _policy_loss(*arguments, **options)
    return loss, _metrics(stats, more)


def importance_sampling_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> Loss:
    """Neither a bound nor a correction, whatever the rollout says."""
    arguments = (log_probs, old_log_probs, advantages, config, loss_mask, None)
    loss, stats, _ = _policy_loss(*arguments, cliprange=None, log_ratio_clamp=None)
    return loss, {"importance_ratio": stats.ratio_mean.item()}


def ppo_critic_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, config: Any, loss_mask: Tensor | None = None
) -> tuple[Tensor, float | None]:
    """The mean over rows of means over tokens; a row without tokens counts among the rows."""
    mask = torch.ones_like(values, dtype=torch.bool) if loss_mask is None else whole(loss_mask, values)
    assert mask is not None
    loss, stats = value_loss(
        values,
        old_values,
        returns,
        mask,
        cliprange_value=config.value_clip,
        row_weight=1.0 / mask.sum(-1).clamp(min=1),
        normalizer=float(values.size(0)),
    )
    return loss, None if config.value_clip is None else stats.clipfrac.item()


def _targets() -> list[Target]:
    tensors, ppo = "skyrl.backends.skyrl_train.utils.torch_utils", UTILS
    policy = "(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None)"
    estimators = "AdvantageEstimatorRegistry._functions"

    def loss(name: str, function: Any, covers: str, *keys: str) -> Target:
        registries = tuple(f"PolicyLossRegistry._functions[{key}]" for key in keys)
        correction = "(loss, old_log_probs, rollout_logprobs, loss_mask, off_policy_correction)"
        reads = {"reduce_loss": "(loss, loss_mask)", "apply_off_policy_correction": correction}
        return Target(ppo, name, policy, function, covers, registries, reads)

    return [
        Target(
            tensors,
            "logprobs_from_logits",
            "(logits, labels, inplace_backward=True)",
            logprobs_from_logits,
            "log-probabilities in the model wrapper",
        ),
        Target(
            tensors,
            "chunked_entropy_from_logits",
            "(logits, requires_grad=False, attention_mask=None, chunk_size=1024)",
            chunked_entropy_from_logits,
            "the entropy in the model wrapper",
        ),
        Target(
            ppo,
            "compute_approx_kl",
            "(log_probs, log_probs_base, loss_mask=None, kl_estimator_type='k3')",
            compute_approx_kl,
            "the KL penalty in the reward (not the KL in the loss, which is differentiated)",
        ),
        Target(ppo, "masked_whiten", "(values, mask, shift_mean=True)", masked_whiten, "whitening"),
        Target(
            ppo,
            "compute_gae_advantage_return",
            "(token_level_rewards, values, response_mask, gamma, lambd, **kwargs)",
            compute_gae_advantage_return,
            "GAE and whitening",
            (f"{estimators}[gae]",),
        ),
        Target(
            ppo,
            "compute_rloo_outcome_advantage",
            "(token_level_rewards, response_mask, index, **kwargs)",
            compute_rloo_outcome_advantage,
            "RLOO",
            (f"{estimators}[rloo]",),
        ),
        Target(
            ppo,
            "compute_grpo_outcome_advantage",
            "(token_level_rewards, response_mask, index, epsilon=1e-06, grpo_norm_by_std=True, **kwargs)",
            compute_grpo_outcome_advantage,
            "GRPO and Dr. GRPO",
            (f"{estimators}[grpo]",),
        ),
        Target(
            ppo,
            "compute_maxrl_advantage",
            "(token_level_rewards, response_mask, index, epsilon=1e-06, **kwargs)",
            compute_maxrl_advantage,
            "MaxRL",
            (f"{estimators}[maxrl]",),
        ),
        loss(
            "ppo_policy_loss", ppo_policy_loss, "the clipped policy loss, regular and dual_clip", "regular", "dual_clip"
        ),
        loss("gspo_policy_loss", gspo_policy_loss, "GSPO", "gspo"),
        loss("compute_policy_loss_cispo", compute_policy_loss_cispo, "CISPO", "cispo"),
        loss("sapo_policy_loss", sapo_policy_loss, "SAPO", "sapo"),
        loss("dppo_policy_loss", dppo_policy_loss, "DPPO", "dppo"),
        loss("importance_sampling_loss", importance_sampling_loss, "importance sampling", "importance_sampling"),
        Target(
            ppo,
            "ppo_critic_loss",
            "(values, old_values, returns, config, loss_mask=None)",
            ppo_critic_loss,
            "the clipped value loss",
        ),
    ]


ADAPTER = Adapter("skyrl", "skyrl", ("0.3.0",), _targets())
apply: Any = ADAPTER.apply
revert: Any = ADAPTER.revert
status: Any = ADAPTER.status
