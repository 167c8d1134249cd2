"""Algorithms, a class each: what it needs, how it makes advantages of scores, and its loss."""

from typing import Any, ClassVar

import torch
from torch.nn.functional import logsigmoid

from ppo_kernels import aggregation_weights, gae, group_advantages, kl_rewards, p3o_loss, policy_loss, whiten

from . import distributed, files
from .config import UserError
from .data import Experience
from .ppo_config import NAMED, PPOConfig, without_use

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]


class KlControl:
    r"""Proportional control in log space (Ziegler et al., 2019).

    coef grows by the factor ``1 + clip(KL / kl_target - 1, -0.2, 0.2) · episodes / kl_horizon`` after each rollout,
    KL in nats per response. Without kl_target it stays what it is.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.coef = config.kl_coef
        self.target = config.kl_target
        self.horizon = config.kl_horizon

    def update(self, kl: float, episodes: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon


class Algorithm:
    """The defaults: no critic, one response per prompt, KL in the reward, the mean over the minibatch's tokens."""

    needs_critic: ClassVar[bool] = False
    responses_per_prompt: ClassVar[int] = 1
    fewest_responses: ClassVar[int] = 1
    kl_places: ClassVar[tuple[str, ...]] = ("reward", "loss")
    kl_in_loss: ClassVar[str] = "k2"  # the estimator there: k2 has the gradient of the reverse KL
    aggregation: ClassVar[str] = "token-mean"
    of_responses: ClassVar[bool] = False  # True: the statistics of its loss are means over responses or their pairs

    def __init__(self, config: PPOConfig, kl: KlControl) -> None:
        self.config = config
        self.kl = kl
        self.group_size = config.num_generations or self.responses_per_prompt
        if self.group_size < self.fewest_responses:
            raise ValueError(f"{config.algorithm} needs num_generations of at least {self.fewest_responses}")
        self._refuse_what_is_not_read()
        if config.mask_zero_variance_groups and self.group_size == 1:
            raise ValueError(
                "mask_zero_variance_groups needs num_generations of at least 2: one response alone scores like all of "
                "its group, so that nothing would be learned; set num_generations, or leave it out"
            )
        self.place = config.kl_in or self.kl_places[0]
        if self.place not in self.kl_places:
            raise ValueError(f"{config.algorithm} has its KL penalty in the {self.kl_places[0]}; leave out kl_in")
        self.estimator = config.kl_estimator or (self.kl_in_loss if self.place == "loss" else "k1")
        if self.place == "loss" and self.estimator in ("k1", "abs"):
            raise ValueError(f"kl_in loss needs kl_estimator k2 or k3: {self.estimator} has no such gradient")
        self.mode = config.loss_aggregation or self.aggregation
        for name in ("cliprange", "cliprange_high") if config.surrogate == "sapo" else ():
            if getattr(config, name) != getattr(PPOConfig, name):
                raise ValueError(f"surrogate sapo clips nothing and has no use for {name}; leave it out")
        if config.surrogate != "clip" or config.importance_sampling_level != "token":
            policy_loss(*torch.zeros(3, 1, 1), **self._surrogate)  # refuses what does not go together

    def _refuse_what_is_not_read(self) -> None:
        algorithm, config = self.config.algorithm, self.config
        given = [name for name in without_use(algorithm) if getattr(config, name) != getattr(PPOConfig, name)]
        for name in given:
            if name not in NAMED:
                raise ValueError(f"{algorithm} has no use for {name}; leave it out")
        if given and distributed.is_main():
            files.say_once(f"{algorithm} has no critic, and no use for {', '.join(given)}")

    def refuse_sizes(self) -> None:
        """Batches that cannot be divided so that the responses to one prompt stay together."""
        config, group = self.config, self.group_size
        share = config.num_mini_batches * distributed.world_size() * group
        if config.batch_size % share:
            raise UserError(
                f"batch_size {config.batch_size} must be a multiple of num_mini_batches x ranks x "
                f"responses per prompt = {share}"
            )
        micro = config.per_device_train_batch_size
        if micro % group:
            raise UserError(
                f"per_device_train_batch_size {micro} must be a multiple of the {group} responses per prompt"
            )

    def compute_advantages(self, local: Experience, rewards: torch.Tensor) -> None:
        """Fill advantages (and returns) of this rank's rows; statistics are over the rows of all ranks.

        Without it the loss weighs the scores of pairs by itself.
        """

    def policy_loss(self, logprobs: torch.Tensor, batch: Experience, normalizer: torch.Tensor) -> Loss:
        """The loss of a micro-batch, to be added up over the minibatch that `normalizer` is of."""
        return self.clipped(logprobs, batch, batch.advantages, normalizer)

    def normalizer(self, mask: torch.Tensor) -> torch.Tensor:
        """What the losses of a whole minibatch are divided by."""
        return aggregation_weights(mask, self.mode, max_length=self.config.response_length)[1]

    def weight(self, mask: torch.Tensor) -> torch.Tensor:
        """How much the statistics of a micro-batch count among those of others: by what they are means over."""
        return mask.any(dim=1).sum() if self.of_responses else mask.sum()

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
            **self._surrogate,
            weights=None if config.rollout_correction == "none" else batch.weights,
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
    def _surrogate(self) -> dict[str, Any]:
        config = self.config
        return {
            "surrogate": config.surrogate,
            "importance_sampling_level": config.importance_sampling_level,
            "cliprange": self.clip_bounds,
            "dual_clip": config.dual_clip,
        }

    @property
    def clip_bounds(self) -> tuple[float, float]:
        low, high = self.config.cliprange, self.config.cliprange_high
        return low, low if high is None else high


class PPO(Algorithm):
    """PPO (Schulman et al., 2017; for language models Ziegler et al., 2019): a critic, GAE, the clipped surrogate."""

    needs_critic: ClassVar[bool] = True

    def compute_advantages(self, local: Experience, rewards: torch.Tensor) -> None:
        config, group = self.config, distributed.group()
        if config.whiten_rewards:
            rewards = whiten(rewards, local.mask, shift_mean=False, group=group, impl=config.ops_impl)
        local.advantages, local.returns = gae(
            rewards, local.values, local.mask, gamma=config.gamma, lam=config.lam, impl=config.ops_impl
        )
        if config.whiten_advantages:
            local.advantages = whiten(local.advantages, local.mask, group=group, impl=config.ops_impl)


class P3O(Algorithm):
    """Pairwise PPO (Wu et al., 2023, arXiv 2310.00212): differences of rewards move differences of log-ratios.

    There is no critic, and adding anything that depends on the prompt alone to both scores changes nothing. Clipping is
    of the pair's joint log-ratio (V2, "joint") or of each response's ratio (V1, "separate").
    """

    responses_per_prompt: ClassVar[int] = 2
    fewest_responses: ClassVar[int] = 2
    kl_places: ClassVar[tuple[str, ...]] = ("reward",)
    of_responses: ClassVar[bool] = True

    def __init__(self, config: PPOConfig, kl: KlControl) -> None:
        super().__init__(config, kl)
        for name in ("score_clip", "score_scaling"):
            if getattr(config, name) != getattr(PPOConfig, name):
                raise ValueError(
                    f"p3o learns from differences of scores, which {name} would let depend on what all scores of a "
                    "prompt have in common; leave it out"
                )

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


class RLOO(Algorithm):
    """REINFORCE leave-one-out (Ahmadian et al., 2024, arXiv 2402.14740): the others of the group are the baseline.

    A whole response is one action: R = score - kl_coef · KL, and the ratio is that of the sequence.
    """

    responses_per_prompt: ClassVar[int] = 2
    fewest_responses: ClassVar[int] = 2
    kl_places: ClassVar[tuple[str, ...]] = ("reward",)
    aggregation: ClassVar[str] = "seq-mean-token-sum"
    of_responses: ClassVar[bool] = True

    def compute_advantages(self, local: Experience, rewards: torch.Tensor) -> None:
        shaped = local.scores - self.kl.coef * local.kl
        advantages = group_advantages(shaped, group_size=self.group_size, mode="rloo", impl=self.config.ops_impl)
        local.advantages = advantages[:, None] * local.mask

    def policy_loss(self, logprobs: torch.Tensor, batch: Experience, normalizer: torch.Tensor) -> Loss:
        loss, stats = policy_loss(
            logprobs.sum(dim=1, keepdim=True),  # masked tokens are 0
            batch.logprobs.sum(dim=1, keepdim=True),
            batch.advantages[:, :1],
            batch.mask.any(dim=1, keepdim=True),  # a response that is left out has no ratio
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


class GRPO(Algorithm):
    """GRPO (Shao et al., 2024, arXiv 2402.03300): scores are standardised within the group, and k3 stands in the loss.

    Dividing by the group's deviation changes the objective: compare it with others on the KL-reward frontier.
    """

    responses_per_prompt: ClassVar[int] = 4
    fewest_responses: ClassVar[int] = 2
    kl_places: ClassVar[tuple[str, ...]] = ("loss",)
    kl_in_loss: ClassVar[str] = "k3"
    aggregation: ClassVar[str] = "seq-mean-token-mean"
    group_mode: ClassVar[str] = "grpo"

    def compute_advantages(self, local: Experience, rewards: torch.Tensor) -> None:
        advantages = group_advantages(
            local.scores, group_size=self.group_size, mode=self.group_mode, impl=self.config.ops_impl
        )
        local.advantages = advantages[:, None] * local.mask


class DrGRPO(GRPO):
    """Dr. GRPO (Liu et al., 2025, arXiv 2503.20783): only the mean is taken off.

    A response is divided by response_length, not by its own length.
    """

    aggregation: ClassVar[str] = "seq-mean-token-sum-norm"
    group_mode: ClassVar[str] = "dr_grpo"


class ReinforcePP(Algorithm):
    """REINFORCE++ (Hu et al., 2025, arXiv 2501.03262): A_t = score - kl_coef · (KL from t on), whitened; no critic."""

    def compute_advantages(self, local: Experience, rewards: torch.Tensor) -> None:
        config = self.config
        # With no values and lambda 1, GAE is the discounted reward to go.
        local.advantages, _ = gae(
            rewards, torch.zeros_like(rewards), local.mask, gamma=config.gamma, lam=1.0, impl=config.ops_impl
        )
        if config.whiten_advantages:
            local.advantages = whiten(local.advantages, local.mask, group=distributed.group(), impl=config.ops_impl)


class ReinforcePPBaseline(ReinforcePP):
    """Scores first lose the mean of their group: for prompts of unlike difficulty."""

    responses_per_prompt: ClassVar[int] = 4
    fewest_responses: ClassVar[int] = 2

    def token_rewards(self, local: Experience) -> torch.Tensor:
        scores = local.scores
        local.scores = group_advantages(
            scores, group_size=self.group_size, mode="dr_grpo", impl=self.config.ops_impl
        ).to(scores)
        rewards = super().token_rewards(local)
        local.scores = scores
        return rewards


class OnlineDPO(Algorithm):
    r"""Online DPO (Guo et al., 2024, arXiv 2402.04792): fresh pairs from the policy, labelled by the score.

    -w log sigmoid(kl_coef · d) - (1 - w) log sigmoid(-kl_coef · d), with d the difference of the log-ratios.

    Hard labels: w is 1 if the first score is the higher one, else 0 (1/2 for a tie); there is no finite optimum.
    Soft labels: w = sigmoid(difference of the scores), whose optimum is that of the KL-penalised reward.
    """

    responses_per_prompt: ClassVar[int] = 2
    fewest_responses: ClassVar[int] = 2
    kl_places: ClassVar[tuple[str, ...]] = ("loss",)
    of_responses: ClassVar[bool] = True

    def __init__(self, config: PPOConfig, kl: KlControl) -> None:
        super().__init__(config, kl)
        if not config.kl_coef:
            raise ValueError("online_dpo needs a kl_coef above 0: it is the loss's beta, at 0 nothing is learned")

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


ALGORITHMS: dict[str, type[Algorithm]] = {
    "ppo": PPO,
    "p3o": P3O,
    "rloo": RLOO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "reinforce++": ReinforcePP,
    "reinforce++_baseline": ReinforcePPBaseline,
    "online_dpo": OnlineDPO,
}


def load_algorithm(config: PPOConfig, kl: KlControl) -> Algorithm:
    try:
        return ALGORITHMS[config.algorithm](config, kl)
    except ValueError as error:
        raise UserError(str(error)) from error
