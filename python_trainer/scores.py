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
        """Shifted and scaled by what has been observed, once that has spread, then clipped."""
        if self._spread:
            shift = self.mean if self.config.score_scaling == "ref" else 0.0
            scores = (scores - shift) / self._spread
        bound = self.config.score_clip
        return scores if bound is None else scores.clamp(-bound, bound)

    def observe(self, everywhere: torch.Tensor) -> None:
        """Take in the scores of a global batch: of all (running), or of the first that are not all alike (ref)."""
        scaling = self.config.score_scaling
        if scaling == "none" or (scaling == "ref" and self._spread):
            return
        if scaling == "ref":
            self.count, self.mean, self.m2 = 0.0, 0.0, 0.0
        count, mean, m2 = (figure.item() for figure in moments(everywhere, impl=self.config.ops_impl))
        total, difference = self.count + count, mean - self.mean
        self.m2 += m2 + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    @property
    def _spread(self) -> float:
        """The deviation of what has been observed; 0 where the scores were alike, up to the rounding of float32."""
        deviation = (self.m2 / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0
        return deviation if deviation > 1e-6 * abs(self.mean) else 0.0

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def restore(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]
