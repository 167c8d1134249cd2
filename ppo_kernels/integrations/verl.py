"""verl: log-probabilities, entropy, the advantage estimators, the KL reward, and the losses of actor and critic."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

from ppo_kernels.integrations import _verl_losses as losses
from ppo_kernels.integrations._adapter import Adapter
from ppo_kernels.integrations._shared import entropy_of, no_gradient, over_groups, plain, whole
from ppo_kernels.integrations._target import NotCoveredError, Target
from ppo_kernels.ops.gae import gae
from ppo_kernels.ops.kl_rewards import kl_rewards
from ppo_kernels.ops.token_logprobs import token_logprobs
from ppo_kernels.ops.whiten import whiten

Pair = tuple[Tensor, Tensor]


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """``inplace_backward`` writes the gradient over the logits where verl's own function would: by flash-attn's."""
    plain(logits)
    inplace = inplace_backward and _flash_attn_serves() and logits.grad_fn is not None and torch.is_grad_enabled()
    return token_logprobs(logits, labels, inplace_backward=inplace)


def _flash_attn_serves() -> bool:
    module = sys.modules.get("verl.utils.torch_functional")
    there = getattr(module, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)  # their spelling
    return there and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"


def entropy_from_logits(logits: Tensor) -> Tensor:
    plain(logits)
    return entropy_of(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    plain(logits)
    return entropy_of(logits)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    no_gradient(values)
    plain(values)
    return whiten(values, whole(mask, values), shift_mean=shift_mean)


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
) -> Pair:
    plain(token_level_rewards, values)
    advantages, returns = gae(token_level_rewards, values, response_mask, gamma=gamma, lam=lam)
    return whiten(advantages, response_mask), returns


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
) -> Pair:
    """Discounted sums of rewards are returns without values, with lambda = 1."""
    if config is None:
        raise NotCoveredError("no config")
    plain(token_level_rewards)
    nothing = torch.zeros_like(token_level_rewards)
    _, returns = gae(token_level_rewards, nothing, response_mask, gamma=config.gamma, lam=1.0)
    return whiten(returns, response_mask), returns


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> Pair:
    mode, alone = ("grpo", "1 + eps") if norm_adv_by_std_in_grpo else ("dr_grpo", "score")
    advantages = over_groups(token_level_rewards, index, mode, epsilon, alone=alone)[:, None] * response_mask
    return advantages, advantages


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> Pair:
    advantages = over_groups(token_level_rewards, index, "rloo")[:, None] * response_mask
    return advantages, advantages


def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> Pair:
    advantages = over_groups(token_level_rewards, index, "rloo", alone="zero")[:, None] * response_mask
    return advantages, advantages


def compute_gpg_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    f_norm: float = 1.0,
    alpha: float = 1.0,
    config: Any = None,
    **kwargs: Any,
) -> Pair:
    """Whatever ``alpha`` is, verl takes the number of responses over that of scores other than 0."""
    nonzero = torch.count_nonzero(token_level_rewards.sum(-1)).clamp(min=1)
    scores = over_groups(token_level_rewards, index, "dr_grpo") * (response_mask.size(0) / nonzero / f_norm)
    advantages = scores[:, None] * response_mask
    return advantages, advantages


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> Pair:
    scores = over_groups(token_level_rewards, index, "dr_grpo")
    advantages = whiten(scores[:, None].expand(response_mask.shape), response_mask)
    return advantages, advantages


#: verl's names for an estimator, with the bounds that it has there (of the log-ratio, and of the estimate).
_ESTIMATORS = {
    "kl": ("k1", None, None),
    "k1": ("k1", None, None),
    "abs": ("abs", None, None),
    "mse": ("k2", None, None),
    "k2": ("k2", None, None),
    "low_var_kl": ("k3", 20.0, 10.0),
    "k3": ("k3", 20.0, 10.0),
}


def apply_kl_penalty(data: Any, kl_ctrl: Any, kl_penalty: str = "kl") -> tuple[Any, dict[str, Any]]:
    """``+`` after an estimator changes its gradient alone, and there is none here."""
    if kl_penalty.removesuffix("+") not in _ESTIMATORS:
        raise NotCoveredError(f"kl_penalty={kl_penalty!r}")
    estimator, log_clamp, clamp = _ESTIMATORS[kl_penalty.removesuffix("+")]
    batch, beta = data.batch, kl_ctrl.value
    mask, scores = batch["response_mask"], batch["token_level_scores"]
    logprobs = batch["old_log_probs"]
    plain(logprobs, scores)
    nowhere = torch.full((logprobs.size(0),), -1, device=logprobs.device)
    penalty, kl = kl_rewards(
        logprobs,
        batch["ref_log_prob"],
        torch.zeros(logprobs.size(0), device=logprobs.device),
        mask,
        kl_coef=beta,
        kl_estimator=estimator,
        kl_log_clamp=log_clamp,
        kl_clamp=clamp,
        score_index=nowhere,
    )
    current = (kl / mask.sum(-1).clamp(min=1)).mean().item()
    kl_ctrl.update(current_kl=current, n_steps=batch.batch_size[0])
    batch["token_level_rewards"] = scores + penalty
    return data, {"actor/reward_kl_penalty": current, "actor/reward_kl_penalty_coeff": beta}


def _targets() -> list[Target]:
    tensors, core = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
    rewards = "token_level_rewards, response_mask"
    grouped = f"({rewards}, index, epsilon=1e-06, config=None, **kwargs)"
    grpo = f"({rewards}, index, epsilon=1e-06, norm_adv_by_std_in_grpo=True, config=None)"
    counts = "dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None"
    values = f"(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode='token-mean', {counts})"
    agg_loss = f"(loss_mat, loss_mask, loss_agg_mode, {counts})"

    def estimator(name: str, signature: str, function: Any, covers: str, key: str) -> Target:
        return Target(core, name, signature, function, covers, (f"ADV_ESTIMATOR_REGISTRY[{key}]",))

    def loss(key: str, mode: str, covers: str, before: str = "old_log_prob") -> Target:
        name = f"compute_policy_loss_{key}"
        first = f"{before}, log_prob, advantages, response_mask, loss_agg_mode='{mode}'"
        signature = f"({first}, config=None, rollout_is_weights=None)"
        registry = (f"POLICY_LOSS_REGISTRY[{key}]",)
        return Target(core, name, signature, getattr(losses, name), covers, registry, {"agg_loss": agg_loss})

    return [
        Target(
            tensors,
            "logprobs_from_logits",
            "(logits, labels, inplace_backward=True)",
            logprobs_from_logits,
            "log-probabilities in the engines of FSDP, automodel and torchtitan",
        ),
        Target(tensors, "entropy_from_logits", "(logits)", entropy_from_logits, "the entropy of logits"),
        Target(
            tensors,
            "entropy_from_logits_with_chunking",
            "(logits, chunk_size=2048)",
            entropy_from_logits_with_chunking,
            "the entropy of logits",
        ),
        Target(tensors, "masked_whiten", "(values, mask, shift_mean=True)", masked_whiten, "whitening"),
        estimator(
            "compute_gae_advantage_return",
            "(token_level_rewards, values, response_mask, gamma, lam)",
            compute_gae_advantage_return,
            "GAE and whitening",
            "gae",
        ),
        estimator(
            "compute_reinforce_plus_plus_outcome_advantage",
            f"({rewards}, config=None, **kwargs)",
            compute_reinforce_plus_plus_outcome_advantage,
            "REINFORCE++",
            "reinforce_plus_plus",
        ),
        estimator(
            "compute_reinforce_plus_plus_baseline_outcome_advantage",
            grouped,
            compute_reinforce_plus_plus_baseline_outcome_advantage,
            "REINFORCE++ with the mean of the group as baseline",
            "reinforce_plus_plus_baseline",
        ),
        estimator("compute_grpo_outcome_advantage", grpo, compute_grpo_outcome_advantage, "GRPO and Dr. GRPO", "grpo"),
        estimator(
            "compute_grpo_vectorized_outcome_advantage",
            grpo,
            compute_grpo_outcome_advantage,
            "GRPO and Dr. GRPO",
            "grpo_vectorized",
        ),
        estimator(
            "compute_gpg_outcome_advantage",
            f"({rewards}, index, epsilon=1e-06, f_norm=1.0, alpha=1.0, config=None, **kwargs)",
            compute_gpg_outcome_advantage,
            "GPG",
            "gpg",
        ),
        estimator("compute_rloo_outcome_advantage", grouped, compute_rloo_outcome_advantage, "RLOO", "rloo"),
        estimator(
            "compute_rloo_vectorized_outcome_advantage",
            grouped,
            compute_rloo_vectorized_outcome_advantage,
            "RLOO",
            "rloo_vectorized",
        ),
        loss("vanilla", "token-mean", "the clipped policy loss with dual clip"),
        loss("cispo", "token-mean", "CISPO"),
        loss("gspo", "seq-mean-token-mean", "GSPO"),
        loss("sapo", "seq-mean-token-mean", "SAPO"),
        loss("dppo_tv", "token-mean", "DPPO by total variation"),
        loss("dppo_kl", "token-mean", "DPPO by the binary divergence"),
        loss("geo_mean", "token-mean", "GMPO"),
        loss("gpg", "token-mean", "GPG"),
        loss("dro", "token-mean", "DRO, without rollout_is_weights"),
        loss("reinforce", "seq-mean-token-sum", "REINFORCE of bypass_mode", before="rollout_log_prob"),
        Target(
            core,
            "compute_value_loss",
            values,
            losses.compute_value_loss,
            "the clipped value loss in all aggregation modes",
            reads={"agg_loss": agg_loss},
        ),
        Target(
            "verl.utils.experimental.torch_functional",
            "FusedLinearForPPO.forward",
            "(self, hidden_states, vocab_weights, input_ids, temperature=1.0)",
            losses.fused_linear_for_ppo,
            "the fused heads of FSDP, torch and liger",
            reads={"FusedLinearForPPO.__init__": "(self, chunk_size=512, impl_backend='torch')"},
        ),
        Target(
            "verl.trainer.ppo.ray_trainer",
            "apply_kl_penalty",
            "(data, kl_ctrl, kl_penalty='kl')",
            apply_kl_penalty,
            "the KL penalty in the reward: k1, abs, k2, k3",
        ),
    ]


ADAPTER = Adapter("verl", "verl", ("0.9.1",), _targets())
apply: Any = ADAPTER.apply
revert: Any = ADAPTER.revert
status: Any = ADAPTER.status
