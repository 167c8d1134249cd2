"""The second phase of a step: gradients over the minibatches of a rollout.

The micro-batch size and the number of ranks change memory and speed, not the step: losses are divided by what the
whole minibatch holds.
"""

import torch

from ppo_kernels import value_loss

from . import launch, metrics
from .algorithms import Algorithm
from .config import PPOConfig
from .ema import MovingAverage
from .engines import step_together
from .experience import Experience, minibatches, score_tokens_and_entropy, score_values
from .pretraining import Pretraining
from .roles import Roles
from .rollout import shard

RATIO_TOLERANCE = 1e-5


class Updates:
    def __init__(
        self, config: PPOConfig, algorithm: Algorithm, roles: Roles, ptx: Pretraining | None, ema: MovingAverage | None
    ) -> None:
        self.config = config
        self.algorithm = algorithm
        self.roles = roles
        self.ptx = ptx
        self.ema = ema

    def run(self, experience: Experience, step: int) -> dict[str, float]:
        """All passes over one rollout; `step` counts from 0. Returns the averaged statistics."""
        config, averages = self.config, metrics.Averages()
        trained, one = self._trained(step), torch.ones((), device=launch.device())
        for epoch in range(config.num_ppo_epochs):
            order = launch.seed_of(config.seed, step, 2, epoch)
            chunks = minibatches(len(experience.mask), self.algorithm.group_size, config.num_mini_batches, order)
            for number, rows in enumerate(chunks):
                update = (step * config.num_ppo_epochs + epoch) * config.num_mini_batches + number
                first = epoch == 0 and number == 0
                seen = self._gradients(experience, rows, trained, step if first else None)
                if self.ptx is not None and "actor" in trained:
                    seen.add(self.ptx.backward(self.roles.actor, update, len(rows)), one)
                step_together(list(trained.values()))
                seen.add({f"{name}/grad_norm": one * model.gradient_norm for name, model in trained.items()}, one)
                if self.ema is not None and "actor" in trained:
                    self.ema.update(self.roles.actor.module)
                averages.merge(seen)
                if self._moved_too_far(seen):
                    return averages.reduce()
        return averages.reduce()

    def _trained(self, step: int) -> dict:
        everyone = self.roles.trained
        if step < self.config.critic_warmup_steps:
            return {name: model for name, model in everyone.items() if name == "critic"}
        return everyone

    def _gradients(
        self, experience: Experience, rows: torch.Tensor, trained: dict, check_step: int | None
    ) -> metrics.Averages:
        """Add up this rank's gradients of one minibatch."""
        seen, drift = metrics.Averages(), torch.zeros((), device=launch.device())
        ranks, mask = launch.world_size(), experience.mask[rows]
        # DeepSpeed averages gradients over ranks, so each rank divides by its share.
        of_policy, tokens = self.algorithm.normalizer(mask) / ranks, mask.sum() / ranks
        for micro in rows[shard(len(rows))].split(self.config.per_device_train_batch_size):
            batch = experience[micro]
            share = tokens / batch.mask.sum().clamp(min=1)  # so that the average of losses is the minibatch's loss
            if "actor" in trained:
                change, of_loss, of_tokens = self._policy(batch, of_policy, tokens, share)
                drift = torch.maximum(drift, change)
                seen.add(of_loss, self.algorithm.weight(batch.mask))
                seen.add(of_tokens, batch.mask.sum())
            if "critic" in trained:
                seen.add(self._value(batch, tokens, share), batch.mask.sum())
        if check_step is not None and "actor" in trained:
            self._check_ratio(launch.gather_rows(drift[None]).max().item(), check_step)
        return seen

    def _policy(
        self, batch: Experience, normalizer: torch.Tensor, tokens: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Backward of the policy's loss; returns how far log-probabilities are from the rollout's, and statistics:
        those the algorithm weighs, and those per token."""
        actor, bonus = self.roles.actor, self.config.entropy_coef
        logprobs, entropy = score_tokens_and_entropy(actor, batch.rollout, differentiable=bonus != 0)
        loss, figures = self.algorithm.policy_loss(logprobs, batch, normalizer)
        if bonus:
            loss = loss - bonus * entropy.sum() / tokens
        self.roles.trained["actor"].backward(loss)
        drift = ((logprobs.detach() - batch.logprobs).abs() * batch.mask).max()
        of_tokens = {
            "loss/policy_avg": loss.detach() * share,
            "policy/entropy_avg": entropy.detach().sum() / batch.mask.sum(),
        }
        return drift, figures, of_tokens

    def _value(self, batch: Experience, tokens: torch.Tensor, share: torch.Tensor) -> dict[str, torch.Tensor]:
        critic = self.roles.critic
        assert critic is not None
        loss, stats = value_loss(
            score_values(critic, batch.rollout),
            batch.values,
            batch.returns,
            batch.mask,
            cliprange_value=self.config.cliprange_value,
            normalizer=tokens,
            impl=self.config.ops_impl,
        )
        critic.backward(self.config.vf_coef * loss)
        return {"val/clipfrac_avg": stats.clipfrac, "loss/value_avg": loss.detach() * share}

    def _moved_too_far(self, seen: metrics.Averages) -> bool:
        if self.config.target_kl is None:
            return False
        return seen.reduce().get("policy/approxkl_avg", 0.0) > self.config.target_kl

    def _check_ratio(self, drift: float, step: int) -> None:
        """Before the first update the policy is the one that sampled; anything beyond rounding is a bug."""
        if drift <= RATIO_TOLERANCE:
            return
        text = f"before the first update of step {step + 1} the log-ratio is off by {drift:.2g}, not 0"
        exact = (
            launch.device().type == "cpu"
        )  # elsewhere another batch shape may choose a kernel that adds up otherwise
        if exact and not (self.config.bf16 or self.config.fp16):
            raise RuntimeError(text + ": sampling-time and training-time scoring disagree")
        if launch.is_main():
            metrics.tqdm.write(f"warning: {text} (rounding, or sampling-time and training-time scoring disagree)")
