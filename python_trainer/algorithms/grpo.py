"""GRPO (Shao et al., 2024, arXiv 2402.03300) and Dr. GRPO (Liu et al., 2025, arXiv 2503.20783)."""

from typing import ClassVar

from ppo_kernels import group_advantages

from ..experience import Experience
from .base import OF_TOKENS, Algorithm


class GRPO(Algorithm):
    """Scores standardised within the group, the clipped surrogate of every token, and k3 in the loss.

    Dividing by the group's deviation changes the objective: compare it with others on the KL-reward frontier.
    """

    responses_per_prompt: ClassVar[int] = 4
    fewest_responses: ClassVar[int] = 2
    kl_places: ClassVar[tuple[str, ...]] = ("loss",)
    kl_in_loss: ClassVar[str] = "k3"
    ignored: ClassVar[tuple[str, ...]] = (*Algorithm.ignored, *OF_TOKENS)
    aggregation: ClassVar[str] = "seq-mean-token-mean"
    credit_mode: ClassVar[str] = "grpo"

    def credit(self, local: Experience) -> None:
        self.token_rewards(local)  # fills the KL
        credit = group_advantages(
            local.scores, group_size=self.group_size, mode=self.credit_mode, impl=self.config.ops_impl
        )
        local.advantages = credit[:, None] * local.mask


class DrGRPO(GRPO):
    """Only the mean is taken off, and a response is divided by response_length, not by its own length."""

    aggregation: ClassVar[str] = "seq-mean-token-sum-norm"
    credit_mode: ClassVar[str] = "dr_grpo"
