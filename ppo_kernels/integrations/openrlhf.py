"""OpenRLHF: log-probabilities, entropy, the KL estimate of a rollout, GAE and returns, and the losses.

Its code runs in Ray workers: the adapter has to be applied in each of them (docs/adapters.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels.integrations._adapter import Adapter
from ppo_kernels.integrations._shared import aggregation, entropy_of, kl_per_token, no_gradient, whole
from ppo_kernels.integrations._target import NotCoveredError, Target
from ppo_kernels.ops.gae import gae
from ppo_kernels.ops.importance_weights import importance_weights
from ppo_kernels.ops.policy_loss import policy_loss
from ppo_kernels.ops.token_logprobs import token_logprobs
from ppo_kernels.ops.value_loss import value_loss


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The logits stay as they are; OpenRLHF divides them by a temperature in place."""
    return token_logprobs(logits, labels, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    return entropy_of(logits)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """The estimate per token. ``log_probs_old`` and ``unbiased_gradient`` change a gradient alone."""
    no_gradient(log_probs, log_probs_base)
    if kl_estimator == "abs":
        raise NotCoveredError("kl_estimator='abs'")
    return kl_per_token(log_probs, log_probs_base, None, kl_estimator, None, 10.0)


def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    mask = None if action_mask is None else whole(action_mask, rewards)
    return gae(rewards, values, mask, gamma=gamma, lam=lambd, masked_steps="zero")


def get_cumulative_returns(self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    """Returns without values, with lambda = 1."""
    mask = None if action_mask is None else whole(action_mask, rewards)
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0, masked_steps="zero")[1]


def _weights(
    mask: Tensor | None, token_level_loss: bool, dp_size: int, batch_num_tokens: Any, global_batch_size: Any
) -> tuple[Tensor | None, Any]:
    if mask is None and (not token_level_loss or batch_num_tokens is not None):
        raise NotCoveredError("no action_mask")
    mode = "token-mean" if token_level_loss else "seq-mean-token-mean"
    count = batch_num_tokens if token_level_loss else global_batch_size
    ranks = 1 if count is None else dp_size  # without the count of all ranks, that of this one
    if mask is None:
        return None, None
    return aggregation(mask, mode, ranks, batch_num_tokens, global_batch_size)


def _correction(self: Any, old: Tensor, rollout: Any, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the rollout, its KL, and the share that is out of bounds: of tokens, or of rows."""
    if self.is_correction_gating != "ratio":
        raise NotCoveredError(f"is_correction_gating={self.is_correction_gating!r}")
    bounds: Any = tuple(self.is_correction_threshold)
    if self.is_correction_level == "token":
        mode = "truncate" if self.is_correction_mode == "clip" else "icepop"
        weights, _, stats = importance_weights(old, rollout, mask, mode=mode, bounds=bounds, log_ratio_clamp=None)
        return weights, stats.kl_k1, stats.clipfrac_high + stats.clipfrac_low
    by_row: Any = {"level": "geometric", "mode": "mask", "bounds": bounds}
    _, keep, stats = importance_weights(old, rollout, mask, **by_row, log_ratio_clamp=None)
    weights, _, _ = importance_weights(old, rollout, mask, bounds=None, log_ratio_clamp=None)
    kept = keep.any(-1, keepdim=True)
    return weights * kept, stats.kl_k1, 1.0 - kept.float().mean()


def policy_loss_forward(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
) -> tuple[Tensor | None, ...]:
    """A correction of the rollout is another ratio in GSPO, and weights in PPO."""
    is_gspo, corrected = self.policy_loss_type == "gspo", self.is_correction_level != "off"
    if not (is_gspo or self.policy_loss_type == "ppo"):
        raise NotCoveredError(f"policy_loss_type={self.policy_loss_type!r}")
    if is_gspo and action_mask is None:
        raise NotCoveredError("no action_mask")
    if corrected and rollout_log_probs is None:
        raise NotCoveredError("no rollout_log_probs")
    mask, weights, rollout_kl, filtered = whole(action_mask, log_probs), None, None, None
    before: Any = rollout_log_probs if corrected and is_gspo else old_log_probs
    if corrected and not is_gspo:
        weights, rollout_kl, filtered = _correction(self, old_log_probs, rollout_log_probs, mask)
    row_weight, normalizer = _weights(mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    loss, stats = policy_loss(
        log_probs,
        before,
        advantages,
        mask,
        importance_sampling_level="sequence" if is_gspo else "token",
        cliprange=(self.clip_eps_low, self.clip_eps_high),
        dual_clip=self.dual_clip,
        log_ratio_clamp=None if is_gspo else 20.0,
        weights=weights,
        row_weight=row_weight,
        normalizer=normalizer,
    )
    # Theirs is not clamped.
    difference = (old_log_probs - log_probs).detach()
    if mask is None:
        kl = difference.mean()
    else:
        kl = torch.where(mask != 0, difference, 0.0).sum() / stats.count
    return loss, stats.clipfrac_high + stats.clipfrac_low, kl, rollout_kl, filtered


def value_loss_forward(
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
) -> Tensor:
    mask = whole(action_mask, values)
    row_weight, normalizer = _weights(mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    return value_loss(
        values, old_values, returns, mask, cliprange_value=self.clip_eps, row_weight=row_weight, normalizer=normalizer
    )[0]


def _targets() -> list[Target]:
    utils, loss = "openrlhf.models.utils", "openrlhf.models.loss"
    maker = "openrlhf.trainer.ppo_utils.experience_maker"
    counts = "dp_size=1, batch_num_tokens=None, global_batch_size=None"
    aggregate = {"aggregate_loss": f"(loss, loss_mask, token_level_loss=True, {counts})"}
    settings = (
        "(self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, policy_loss_type='ppo',"
        " is_correction_level='off', is_correction_mode='mask', is_correction_gating='ratio',"
        " is_correction_threshold=(0.5, 5.0))"
    )
    return [
        Target(
            utils,
            "log_probs_from_logits",
            "(logits, labels, temperature=1.0)",
            log_probs_from_logits,
            "log-probabilities in Actor.forward",
        ),
        Target(utils, "compute_entropy", "(logits)", compute_entropy, "the entropy in Actor.forward"),
        Target(
            utils,
            "compute_approx_kl",
            "(log_probs, log_probs_base, log_probs_old=None, kl_estimator='k1', unbiased_gradient=False)",
            compute_approx_kl,
            "the KL estimate of a rollout (not the KL in the loss, which is differentiated)",
        ),
        Target(
            maker,
            "RemoteExperienceMaker.get_advantages_and_returns",
            "(self, values, rewards, action_mask, gamma, lambd)",
            get_advantages_and_returns,
            "GAE",
        ),
        Target(
            maker,
            "RemoteExperienceMaker.get_cumulative_returns",
            "(self, rewards, action_mask, gamma)",
            get_cumulative_returns,
            "returns of REINFORCE and its kin",
        ),
        Target(
            loss,
            "PolicyLoss.forward",
            f"(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, {counts})",
            policy_loss_forward,
            "the clipped policy loss with dual clip, and GSPO; the correction of the rollout by its ratio",
            reads={"PolicyLoss.__init__": settings, **aggregate},
        ),
        Target(
            loss,
            "ValueLoss.forward",
            f"(self, values, old_values, returns, action_mask=None, {counts})",
            value_loss_forward,
            "the clipped value loss",
            reads={"ValueLoss.__init__": "(self, clip_eps=None, token_level_loss=True)", **aggregate},
        ),
    ]


ADAPTER = Adapter("openrlhf", "openrlhf", ("0.11.2",), _targets())
apply: Any = ADAPTER.apply
revert: Any = ADAPTER.revert
status: Any = ADAPTER.status
