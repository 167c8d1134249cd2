"""Pairwise PPO (Wu et al., 2023, arXiv 2310.00212): differences of rewards move differences of log-ratios.

No critic, and adding anything that depends on the prompt alone to both scores changes nothing.
"""

from typing import ClassVar

import torch

from ppo_kernels import p3o_loss

from ..config import PPOConfig
from ..experience import Experience
from ..kl_control import KlControl
from .base import OF_TOKENS, Algorithm, Loss


class P3O(Algorithm):
    """Clipping of the pair's joint log-ratio (V2, "joint") or of each response's ratio (V1, "separate")."""

    responses_per_prompt: ClassVar[int] = 2
    fewest_responses: ClassVar[int] = 2
    kl_places: ClassVar[tuple[str, ...]] = ("reward",)
    of_responses: ClassVar[bool] = True
    ignored: ClassVar[tuple[str, ...]] = (
        *Algorithm.ignored,
        *OF_TOKENS,
        *("loss_aggregation", "cliprange_high", "dual_clip", "kl_estimator"),
    )

    def __init__(self, config: PPOConfig, kl: KlControl) -> None:
        super().__init__(config, kl)
        for name in ("score_clip", "score_scaling"):
            if getattr(config, name) != getattr(PPOConfig, name):
                raise ValueError(
                    f"p3o learns from differences of scores, which {name} would let depend on what all scores of a "
                    "prompt have in common; leave it out"
                )

    def credit(self, local: Experience) -> None:
        self.token_rewards(local)  # fills the KL; the loss weighs pairs by itself, at the current policy

    def normalizer(self, mask: torch.Tensor) -> torch.Tensor:
        """The number of pairs."""
        return mask.new_tensor(len(mask) * (self.group_size - 1) / 2, dtype=torch.float64)

    def policy_loss(self, logprobs: torch.Tensor, batch: Experience, normalizer: torch.Tensor) -> Loss:
        config = self.config
        loss, stats = p3o_loss(
            logprobs,
            batch.logprobs,
            batch.ref_logprobs,
            batch.scores,
            batch.mask,
            variant=config.p3o_variant,
            group_size=self.group_size,
            kl_coef=self.kl.coef,
            cliprange=config.cliprange,
            weight_clip=config.weight_clip,
            normalizer=normalizer,
            impl=config.ops_impl,
        )
        return loss, {
            "policy/approxkl_avg": stats.approx_kl_k3,
            "policy/clipfrac_avg": stats.clipfrac,
            "policy/pair_accuracy": stats.accuracy,
            "policy/pair_weight": stats.weight_mean,
            "val/ratio": stats.ratio_mean,
        }
