"""REINFORCE++ (Hu et al., 2025, arXiv 2501.03262): reward to go, whitened over the global batch; no critic."""

from typing import ClassVar

import torch

from ppo_kernels import gae, group_advantages, whiten

from .. import launch
from ..experience import Experience
from .base import Algorithm


class ReinforcePP(Algorithm):
    """The clipped surrogate with A_t = score - kl_coef · (KL from t on)."""

    def credit(self, local: Experience) -> None:
        config = self.config
        rewards = self.token_rewards(local)
        # With no values and lambda 1, GAE is the discounted reward to go.
        local.advantages, _ = gae(
            rewards, torch.zeros_like(rewards), local.mask, gamma=config.gamma, lam=1.0, impl=config.ops_impl
        )
        if config.whiten_advantages:
            local.advantages = whiten(local.advantages, local.mask, group=launch.group(), impl=config.ops_impl)


class ReinforcePPBaseline(ReinforcePP):
    """Scores first lose the mean of their group: for prompts of unlike difficulty."""

    responses_per_prompt: ClassVar[int] = 4
    fewest_responses: ClassVar[int] = 2

    def credit(self, local: Experience) -> None:
        scores = local.scores
        local.scores = group_advantages(
            scores, group_size=self.group_size, mode="dr_grpo", impl=self.config.ops_impl
        ).to(scores)
        super().credit(local)
        local.scores = scores
