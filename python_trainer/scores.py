"""What happens to a score before anything is learned from it: the missing end, scaling, and a bound."""

import torch

from ppo_kernels import moments

from .config import PPOConfig


class ScoreShaping:
    """Statistics are over the scores of all ranks, so that all shape alike."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.count, self.mean, self.m2 = 0.0, 0.0, 0.0

    def penalised(self, scores: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        """Scores of responses that do not end lose the penalty, or have minus the penalty in their place."""
        penalty = self.config.missing_eos_penalty
        if penalty is None:
            return scores
        kept = 0.0 if self.config.missing_eos_mode == "replace" else scores
        return torch.where(ended, scores, kept - penalty)

    def scaled(self, scores: torch.Tensor) -> torch.Tensor:
        """Shifted and scaled by what has been observed, then clipped."""
        if self.config.score_scaling != "none" and self.count > 1:
            shift = self.mean if self.config.score_scaling == "ref" else 0.0
            deviation = (self.m2 / (self.count - 1)) ** 0.5
            scores = (scores - shift) / max(deviation, 1e-8)
        bound = self.config.score_clip
        return scores if bound is None else scores.clamp(-bound, bound)

    def observe(self, everywhere: torch.Tensor) -> None:
        """Take in the scores of a global batch: all of them (running), or those of the first batch (ref)."""
        if self.config.score_scaling == "none" or (self.config.score_scaling == "ref" and self.count):
            return
        count, mean, m2 = (figure.item() for figure in moments(everywhere, impl=self.config.ops_impl))
        total, difference = self.count + count, mean - self.mean
        self.m2 += m2 + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def restore(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]
