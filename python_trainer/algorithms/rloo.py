"""REINFORCE leave-one-out (Ahmadian et al., 2024, arXiv 2402.14740): the others of the group are the baseline."""

from typing import ClassVar

import torch

from ppo_kernels import group_advantages, policy_loss

from ..experience import Experience
from .base import OF_TOKENS, Algorithm, Loss


class RLOO(Algorithm):
    """A whole response is one action: R = score - kl_coef · KL, and the ratio is that of the sequence."""

    responses_per_prompt: ClassVar[int] = 2
    fewest_responses: ClassVar[int] = 2
    kl_places: ClassVar[tuple[str, ...]] = ("reward",)
    aggregation: ClassVar[str] = "seq-mean-token-sum"
    of_responses: ClassVar[bool] = True
    ignored: ClassVar[tuple[str, ...]] = (*Algorithm.ignored, *OF_TOKENS, "loss_aggregation")

    def credit(self, local: Experience) -> None:
        self.token_rewards(local)  # fills the KL
        shaped = local.scores - self.kl.coef * local.kl
        credit = group_advantages(shaped, group_size=self.group_size, mode="rloo", impl=self.config.ops_impl)
        local.advantages = credit[:, None] * local.mask

    def policy_loss(self, logprobs: torch.Tensor, batch: Experience, normalizer: torch.Tensor) -> Loss:
        loss, stats = policy_loss(
            logprobs.sum(dim=1, keepdim=True),  # masked tokens are 0
            batch.logprobs.sum(dim=1, keepdim=True),
            batch.advantages[:, :1],
            cliprange=self.clip_bounds,
            dual_clip=self.config.dual_clip,
            normalizer=normalizer,
            impl=self.config.ops_impl,
        )
        return loss, {
            "policy/approxkl_avg": stats.approx_kl_k2,
            "policy/clipfrac_avg": stats.clipfrac_high + stats.clipfrac_low,
            "val/ratio": stats.ratio_mean,
            "val/ratio_var": stats.ratio_var,
        }
