"""Proximal policy optimisation (Schulman et al., 2017), KL inside the reward (Ziegler et al., 2019)."""

import torch

from ppo_kernels import gae, policy_loss, value_loss, whiten

from .. import launch
from ..config import PPOConfig
from ..experience import Experience

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]


class PPO:
    """An algorithm says what it needs and gives credit and losses; the loop does the rest."""

    needs_critic = True
    group_size = 1

    def __init__(self, config: PPOConfig) -> None:
        self.config = config

    def credit(self, local: Experience) -> None:
        """Fill advantages and returns of this rank's rows; whitening is over the tokens of all ranks."""
        impl, group = self.config.ops_impl, launch.group()
        rewards = local.rewards
        if self.config.whiten_rewards:
            rewards = whiten(rewards, local.mask, shift_mean=False, group=group, impl=impl)
        advantages, local.returns = gae(
            rewards, local.values, local.mask, gamma=self.config.gamma, lam=self.config.lam, impl=impl
        )
        local.advantages = whiten(advantages, local.mask, group=group, impl=impl)

    def policy_loss(self, logprobs: torch.Tensor, batch: Experience, normalizer: torch.Tensor) -> Loss:
        loss, stats = policy_loss(
            logprobs,
            batch.logprobs,
            batch.advantages,
            batch.mask,
            cliprange=self.config.cliprange,
            normalizer=normalizer,
            impl=self.config.ops_impl,
        )
        return loss, {
            "policy/approxkl_avg": stats.kl_k2,
            "policy/clipfrac_avg": stats.clipfrac_high + stats.clipfrac_low,
            "val/ratio": stats.ratio_mean,
            "val/ratio_var": stats.ratio_var,
        }

    def value_loss(self, values: torch.Tensor, batch: Experience, normalizer: torch.Tensor) -> Loss:
        loss, stats = value_loss(
            values,
            batch.values,
            batch.returns,
            batch.mask,
            cliprange_value=self.config.cliprange_value,
            normalizer=normalizer,
            impl=self.config.ops_impl,
        )
        return loss, {"val/clipfrac_avg": stats.clipfrac}
