"""DeepSpeed-Chat (DeepSpeedExamples): a function of ``dschat.rlhf.ppo_trainer`` and methods of its trainer.

It is on no package index: its folder has to be on sys.path, as its own scripts have it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ppo_kernels.integrations._adapter import Adapter
from ppo_kernels.integrations._shared import whole
from ppo_kernels.integrations._target import Target
from ppo_kernels.ops.gae import gae
from ppo_kernels.ops.kl_rewards import kl_rewards
from ppo_kernels.ops.policy_loss import policy_loss
from ppo_kernels.ops.token_logprobs import token_logprobs
from ppo_kernels.ops.value_loss import value_loss


def gather_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    return token_logprobs(logits, labels)


def compute_rewards(
    self: Any, prompts: Tensor, log_probs: Tensor, ref_log_probs: Tensor, reward_score: Tensor, action_mask: Tensor
) -> Tensor:
    """The penalty is on every token; the score on the one behind the last of the answer, or on the last there is."""
    start, length = prompts.shape[1] - 1, log_probs.shape[1]
    ends = start + action_mask[:, start:].sum(1) + 1
    return kl_rewards(
        log_probs,
        ref_log_probs,
        reward_score,
        kl_coef=self.kl_ctl,
        score_clip=self.clip_reward_value,
        score_index=ends.clamp(max=length) - 1,
    )[0]


def get_advantages_and_returns(self: Any, values: Tensor, rewards: Tensor, start: int) -> tuple[Tensor, Tensor]:
    return gae(rewards[:, start:], values[:, start:], gamma=self.gamma, lam=self.lam)


def actor_loss_fn(self: Any, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    mask = whole(mask, logprobs)  # type: ignore[assignment]
    return policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=self.cliprange, log_ratio_clamp=None)[0]


def critic_loss_fn(self: Any, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    mask = whole(mask, values)  # type: ignore[assignment]
    return value_loss(values, old_values, returns, mask, cliprange_value=self.cliprange_value)[0]


def _targets() -> list[Target]:
    module, trainer = "dschat.rlhf.ppo_trainer", "DeepSpeedPPOTrainer"
    return [
        Target(module, "gather_log_probs", "(logits, labels)", gather_log_probs, "log-probabilities"),
        Target(
            module,
            f"{trainer}.compute_rewards",
            "(self, prompts, log_probs, ref_log_probs, reward_score, action_mask)",
            compute_rewards,
            "the KL penalty and the score in the reward",
        ),
        Target(
            module,
            f"{trainer}.get_advantages_and_returns",
            "(self, values, rewards, start)",
            get_advantages_and_returns,
            "GAE",
        ),
        Target(
            module,
            f"{trainer}.actor_loss_fn",
            "(self, logprobs, old_logprobs, advantages, mask)",
            actor_loss_fn,
            "the clipped policy loss",
        ),
        Target(
            module,
            f"{trainer}.critic_loss_fn",
            "(self, values, old_values, returns, mask)",
            critic_loss_fn,
            "the clipped value loss",
        ),
    ]


ADAPTER = Adapter("deepspeed_chat", "dschat", ("DeepSpeedExamples 45b4b71, March 2026",), _targets())
apply: Any = ADAPTER.apply
revert: Any = ADAPTER.revert
status: Any = ADAPTER.status
