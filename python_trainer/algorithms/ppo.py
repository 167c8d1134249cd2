"""Proximal policy optimisation (Schulman et al., 2017) as for language models (Ziegler et al., 2019)."""

from typing import ClassVar

from ppo_kernels import gae, whiten

from .. import launch
from ..experience import Experience
from .base import Algorithm


class PPO(Algorithm):
    """A critic, GAE, and the clipped surrogate of every token."""

    needs_critic: ClassVar[bool] = True
    ignored: ClassVar[tuple[str, ...]] = ()

    def credit(self, local: Experience) -> None:
        config, group = self.config, launch.group()
        rewards = self.token_rewards(local)
        if config.whiten_rewards:
            rewards = whiten(rewards, local.mask, shift_mean=False, group=group, impl=config.ops_impl)
        local.advantages, local.returns = gae(
            rewards, local.values, local.mask, gamma=config.gamma, lam=config.lam, impl=config.ops_impl
        )
        if config.whiten_advantages:
            local.advantages = whiten(local.advantages, local.mask, group=group, impl=config.ops_impl)
