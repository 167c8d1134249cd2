"""Online DPO (Guo et al., 2024, arXiv 2402.04792): fresh pairs from the policy, labelled by the score."""

from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from ..config import PPOConfig
from ..experience import Experience
from ..kl_control import KlControl
from .base import OF_TOKENS, Algorithm, Loss


class OnlineDPO(Algorithm):
    r"""-w log sigmoid(kl_coef · d) - (1 - w) log sigmoid(-kl_coef · d), with d the difference of the log-ratios.

    Hard labels: w is 1 if the first score is the higher one, else 0 (1/2 for a tie); there is no finite optimum.
    Soft labels: w = sigmoid(difference of the scores), whose optimum is that of the KL-penalised reward.
    """

    responses_per_prompt: ClassVar[int] = 2
    fewest_responses: ClassVar[int] = 2
    kl_places: ClassVar[tuple[str, ...]] = ("loss",)
    of_responses: ClassVar[bool] = True
    ignored: ClassVar[tuple[str, ...]] = (
        *Algorithm.ignored,
        *OF_TOKENS,
        *("loss_aggregation", "cliprange", "cliprange_high", "dual_clip", "kl_estimator"),
    )

    def __init__(self, config: PPOConfig, kl: KlControl) -> None:
        super().__init__(config, kl)
        if not config.kl_coef:
            raise ValueError("online_dpo needs a kl_coef above 0: it is the loss's beta, at 0 nothing is learned")

    def credit(self, local: Experience) -> None:
        self.token_rewards(local)  # fills the KL

    def normalizer(self, mask: torch.Tensor) -> torch.Tensor:
        """The number of pairs."""
        return mask.new_tensor(len(mask) * (self.group_size - 1) / 2, dtype=torch.float64)

    def policy_loss(self, logprobs: torch.Tensor, batch: Experience, normalizer: torch.Tensor) -> Loss:
        log_ratio = (logprobs - batch.ref_logprobs).sum(dim=1).view(-1, self.group_size)  # masked tokens are 0
        scores = batch.scores.view(-1, self.group_size)
        first, second = torch.triu_indices(self.group_size, self.group_size, 1, device=scores.device)
        margin = self.kl.coef * (log_ratio[:, first] - log_ratio[:, second])
        better = scores[:, first] - scores[:, second]
        wins = better.sigmoid() if self.config.dpo_labels == "soft" else (better.sign() + 1) / 2
        losses = -wins * logsigmoid(margin) - (1 - wins) * logsigmoid(-margin)
        moved = (logprobs.detach() - batch.logprobs).square().sum() / 2
        return losses.sum() / normalizer, {
            "policy/approxkl_avg": moved / len(logprobs),
            "policy/pair_accuracy": ((margin * better) > 0).float().mean(),
            "policy/pair_margin": (margin * better.sign()).mean(),
        }
