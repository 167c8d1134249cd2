"""What an algorithm is: it says what it needs, credits a rollout, and gives the loss of a micro-batch."""

from typing import ClassVar

import torch

from ppo_kernels import aggregation_weights, kl_rewards, policy_loss

from ..config import PPOConfig
from ..experience import Experience
from ..kl_control import KlControl

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
OF_TOKENS = ("gamma", "whiten_advantages")  # for those that credit a response as a whole to ignore


class Algorithm:
    """The defaults: no critic, one response per prompt, KL in the reward, the mean over the minibatch's tokens."""

    needs_critic: ClassVar[bool] = False
    responses_per_prompt: ClassVar[int] = 1
    fewest_responses: ClassVar[int] = 1
    kl_places: ClassVar[tuple[str, ...]] = ("reward", "loss")
    kl_in_loss: ClassVar[str] = "k2"  # the estimator there: k2 has the gradient of the reverse KL
    aggregation: ClassVar[str] = "token-mean"
    of_responses: ClassVar[bool] = False  # True: the statistics of its loss are means over responses or their pairs
    ignored: ClassVar[tuple[str, ...]] = (
        *("lam", "whiten_rewards", "critic_warmup_steps", "critic_lora_r", "value_model_path"),
    )

    def __init__(self, config: PPOConfig, kl: KlControl) -> None:
        self.config = config
        self.kl = kl
        self.group_size = config.num_generations or self.responses_per_prompt
        if self.group_size < self.fewest_responses:
            raise ValueError(f"{config.algorithm} needs num_generations of at least {self.fewest_responses}")
        for name in self.ignored:
            if getattr(config, name) != getattr(PPOConfig, name):
                raise ValueError(f"{config.algorithm} has no use for {name}; leave it out")
        self.place = config.kl_in or self.kl_places[0]
        if self.place not in self.kl_places:
            raise ValueError(f"{config.algorithm} has its KL penalty in the {self.kl_places[0]}; leave out kl_in")
        self.estimator = config.kl_estimator or (self.kl_in_loss if self.place == "loss" else "k1")
        if self.place == "loss" and self.estimator in ("k1", "abs"):
            raise ValueError(f"kl_in loss needs kl_estimator k2 or k3: {self.estimator} has no such gradient")
        self.mode = config.loss_aggregation or self.aggregation

    def credit(self, local: Experience) -> None:
        """Fill advantages (and returns) of this rank's rows; statistics are over the rows of all ranks."""
        raise NotImplementedError

    def policy_loss(self, logprobs: torch.Tensor, batch: Experience, normalizer: torch.Tensor) -> Loss:
        """The loss of a micro-batch, to be added up over the minibatch that `normalizer` is of."""
        return self.clipped(logprobs, batch, batch.advantages, normalizer)

    def normalizer(self, mask: torch.Tensor) -> torch.Tensor:
        """What the losses of a whole minibatch are divided by."""
        return aggregation_weights(mask, self.mode, max_length=self.config.response_length)[1]

    def weight(self, mask: torch.Tensor) -> torch.Tensor:
        """How much the statistics of a micro-batch count among those of others: by what they are means over."""
        return torch.tensor(len(mask), device=mask.device) if self.of_responses else mask.sum()

    def token_rewards(self, local: Experience) -> torch.Tensor:
        """[B, T] the score at the last token and, if the penalty stands in the reward, minus kl_coef times the KL."""
        rewards, local.kl = kl_rewards(
            local.logprobs,
            local.ref_logprobs,
            local.scores,
            local.mask,
            kl_coef=self.kl.coef if self.place == "reward" else 0.0,
            kl_estimator=self.estimator if self.place == "reward" else "k1",
            score_clip=None,  # scores come clipped
            impl=self.config.ops_impl,
        )
        return rewards

    def clipped(
        self, logprobs: torch.Tensor, batch: Experience, advantages: torch.Tensor, normalizer: torch.Tensor
    ) -> Loss:
        """The clipped surrogate of every token, with the KL penalty if that is where it stands."""
        config, in_loss = self.config, self.place == "loss"
        row_weight, _ = aggregation_weights(batch.mask, self.mode, max_length=config.response_length)
        loss, stats = policy_loss(
            logprobs,
            batch.logprobs,
            advantages,
            batch.mask,
            cliprange=self.clip_bounds,
            dual_clip=config.dual_clip,
            ref_logprobs=batch.ref_logprobs if in_loss else None,
            kl_coef=self.kl.coef if in_loss else 0.0,
            kl_estimator=self.estimator if in_loss else "k2",
            row_weight=row_weight,
            normalizer=normalizer,
            impl=config.ops_impl,
        )
        return loss, {
            "policy/approxkl_avg": stats.approx_kl_k2,
            "policy/clipfrac_avg": stats.clipfrac_high + stats.clipfrac_low,
            "policy/dual_clipfrac_avg": stats.dual_clipfrac,
            "val/ratio": stats.ratio_mean,
            "val/ratio_var": stats.ratio_var,
        }

    @property
    def clip_bounds(self) -> tuple[float, float]:
        low, high = self.config.cliprange, self.config.cliprange_high
        return low, low if high is None else high
