"""The loop: a rollout, then updates on it.

One step is a function of the seed, the step number and the weights. The micro-batch size and the number of
ranks change memory and speed, not the step: losses are divided by the valid tokens of the whole minibatch.
"""

import time
from pathlib import Path

import torch

from ppo_kernels import kl_rewards, moments

from . import checkpoint, launch, metrics
from .algorithms import load_algorithm
from .config import PPOConfig, UserError, save
from .data import encode_prompts, load_task, shuffled_positions
from .evaluation import Evaluation, evaluate
from .experience import (
    Experience,
    Judge,
    collect,
    gathered,
    minibatches,
    score_responses,
    score_tokens_and_entropy,
    score_values,
)
from .models import (
    Policy,
    ScalarModel,
    Trainable,
    checked,
    frozen,
    load_policy,
    load_scalar,
    load_tokenizer,
    save_model,
    stage_model,
)
from .rollout import sample, shard

RATIO_TOLERANCE = 1e-5


class Trainer:
    """The models of one run and the two phases of a step."""

    def __init__(self, config: PPOConfig) -> None:
        launch.start(config.seed, config.ddp_timeout)
        self.config = config
        self.folder = Path(config.output_dir) / "train"
        resume = config.resume_from_checkpoint is not None
        checkpoint.refuse_existing(self.folder, overwrite=config.overwrite_output_dir, resume=resume)
        self.algorithm = load_algorithm(config)
        self._check_sizes()
        self.task = load_task(config)
        start = stage_model(config, "sft", config.sft_model_path)
        self.tokenizer = checked(self.task.tokenizer()) if start is None else load_tokenizer(start)
        policy = load_policy(start, config, self.tokenizer)
        self.train_prompts, self.heldout_prompts = (
            encode_prompts(
                prompts,
                self.tokenizer,
                response_length=config.response_length,
                context=policy.config.max_position_embeddings,
            )
            for prompts in self.task.prompts()
        )
        self._build(policy, load_policy(start, config, self.tokenizer))
        self.done = 0
        if config.resume_from_checkpoint is not None:
            source = checkpoint.find(config.resume_from_checkpoint, self.folder / "checkpoints")
            self.done = checkpoint.load(source, self.trained, config)

    def _build(self, policy: torch.nn.Module, reference: torch.nn.Module) -> None:
        config = self.config
        updates = config.total_steps * config.num_ppo_epochs * config.num_mini_batches
        self.judge = self._judge()
        reference.load_state_dict(policy.state_dict())
        self.reference = Policy(frozen(reference, config), config.temperature, config.ops_impl)
        self.critic = None
        if self.algorithm.needs_critic:
            from_reward = config.value_model_init == "reward"
            critic = load_scalar(self._reward_path()) if from_reward else ScalarModel.on(policy, zero_head=True)
            rate = config.learning_rate if config.critic_learning_rate is None else config.critic_learning_rate
            self.critic = Trainable(critic, config, rate, updates)
        self.actor = Policy(
            Trainable(policy, config, config.learning_rate, updates), config.temperature, config.ops_impl
        )
        self.trained = {"actor": self.actor.model} | ({"critic": self.critic} if self.critic else {})

    def _judge(self) -> Judge:
        if self.task.verifiable:
            return self.task.score
        reward_model = frozen(load_scalar(self._reward_path()), self.config)
        return lambda rollout: score_responses(reward_model, rollout)

    def _reward_path(self) -> Path:
        path = stage_model(self.config, "reward", self.config.reward_model_path)
        if path is None:
            raise UserError("no reward model: give reward_model_path, or run the reward command first")
        return path

    def _check_sizes(self) -> None:
        share = self.config.num_mini_batches * launch.world_size() * self.algorithm.group_size
        if self.config.batch_size % share:
            raise UserError(
                f"batch_size {self.config.batch_size} must be a multiple of num_mini_batches x ranks x "
                f"responses per prompt = {share}"
            )

    def train(self) -> tuple[Evaluation, Evaluation]:
        """All remaining steps; returns the evaluations of the reference and of the trained policy."""
        with checkpoint.claimed(self.folder, overwrite=self.config.overwrite_output_dir, done=self.done):
            return self._train()

    def _train(self) -> tuple[Evaluation, Evaluation]:
        config, resumed = self.config, self.done
        if launch.is_main():
            save(config, self.folder)
        log = metrics.Log(self.folder, config.total_steps, start=resumed, title="ppo", disable=config.disable_tqdm)
        before = self.evaluate(self.reference)
        if not resumed:
            log.record(0, before.metrics)
        after = self.evaluate(self.actor) if resumed else before
        while self.done < config.total_steps:
            row = self.step()
            due = config.eval_steps and self.done % config.eval_steps == 0
            if due or self.done == config.total_steps:
                after = self.evaluate(self.actor)
                row |= after.metrics
            log.step(self.done, row)
            self._stop_if_unhealthy()
            if config.save_steps and self.done % config.save_steps == 0:
                checkpoint.save(self.folder / "checkpoints", self.done, self.trained, config)
        log.close()
        with checkpoint.committed(self.folder / "model") as place:
            save_model(self.actor.model, self.tokenizer, place)
        if launch.is_main():
            metrics.plot(self.folder)
        return before, after

    def evaluate(self, policy: Policy) -> Evaluation:
        result = evaluate(
            policy, self.reference, self.heldout_prompts, self.task, self.tokenizer, self.judge, self.config
        )
        result.metrics |= self.task.exact(policy, self.reference, self.config.kl_coef)
        return result

    def step(self) -> dict[str, float]:
        """One rollout and the updates on it."""
        started = time.perf_counter()
        experience = self.rollout()
        rolled_out = time.perf_counter()
        learning_rate = self.trained["actor"].learning_rate  # the schedule moves on with each update
        averages = self.update(experience)
        self.done += 1
        return (
            self._summary(experience)
            | averages
            | {
                "lr": learning_rate,
                "episode": self.done * self.config.batch_size,
                "val/skipped_updates": sum(model.skipped for model in self.trained.values()),
                "time/rollout": rolled_out - started,
                "time/update": time.perf_counter() - rolled_out,
            }
        )

    def rollout(self) -> Experience:
        """Responses of the current policy, scored and credited; the global batch on every rank."""
        config, group = self.config, self.algorithm.group_size
        distinct = config.batch_size // group
        chosen = shuffled_positions(len(self.train_prompts), config.seed, self.done * distinct, distinct)
        responses = sample(
            self.actor,
            [self.train_prompts[index] for index in chosen for _ in range(group)],
            self.tokenizer,
            response_length=config.response_length,
            rows=config.local_rollout_forward_batch_size,
            seed=launch.seed_of(config.seed, self.done, 1),
        )
        local = collect(
            self.actor,
            self.reference,
            self.critic,
            self.judge,
            responses,
            self.tokenizer.eos_token_id,
            config,
        )
        self.algorithm.credit(local)
        return gathered(local)

    def update(self, experience: Experience) -> dict[str, float]:
        config, averages = self.config, metrics.Averages()
        drift = torch.zeros((), device=launch.device())
        first = True
        for epoch in range(config.num_ppo_epochs):
            order = launch.seed_of(config.seed, self.done, 2, epoch)
            for rows in minibatches(len(experience.mask), self.algorithm.group_size, config.num_mini_batches, order):
                # DeepSpeed averages gradients over ranks, so each rank divides by its share of the tokens.
                normalizer = experience.mask[rows].sum() / launch.world_size()
                for micro in rows[shard(len(rows))].split(config.per_device_train_batch_size):
                    batch = experience[micro]
                    logprobs, seen = self._backward(batch, normalizer)
                    averages.add(seen, batch.mask.sum())
                    if first:
                        change = ((logprobs - batch.logprobs).abs() * batch.mask).max()
                        drift = torch.maximum(drift, change)
                if first:
                    self._check_ratio(launch.gather_rows(drift[None]).max().item())
                    first = False
                for model in self.trained.values():
                    model.step()
        return averages.reduce()

    def _backward(self, batch: Experience, normalizer: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Add this micro-batch's gradients; returns its log-probabilities and statistics."""
        rollout, per_token = batch.rollout, normalizer / batch.mask.sum().clamp(min=1)
        logprobs, entropy = score_tokens_and_entropy(self.actor, rollout)
        loss, seen = self.algorithm.policy_loss(logprobs, batch, normalizer)
        self.trained["actor"].backward(loss)
        seen |= {"loss/policy_avg": loss * per_token, "policy/entropy_avg": entropy.sum() / batch.mask.sum()}
        if self.critic is not None:
            loss, of_values = self.algorithm.value_loss(score_values(self.critic, rollout), batch, normalizer)
            self.critic.backward(loss)
            seen |= of_values | {"loss/value_avg": loss * per_token}
        return logprobs.detach(), seen

    def _check_ratio(self, drift: float) -> None:
        """Before the first update the policy is the one that sampled; anything else is a bug."""
        if drift <= RATIO_TOLERANCE:
            return
        text = f"before the first update of step {self.done + 1} the log-ratio is off by {drift:.2g}, not 0"
        if not self.config.bf16:
            raise RuntimeError(text + ": sampling-time and training-time scoring disagree")
        if launch.is_main():
            metrics.tqdm.write(f"warning: {text} (bf16)")

    def _stop_if_unhealthy(self) -> None:
        skipped = sum(model.skipped for model in self.trained.values())
        if skipped >= self.config.max_skipped_steps:
            raise UserError(
                f"{skipped} updates had a non-finite loss or gradient and were skipped; stopped after step "
                f"{self.done}, checkpoints are as they were"
            )

    def _summary(self, experience: Experience) -> dict[str, float]:
        mask, eos, impl = experience.mask, self.tokenizer.eos_token_id, self.config.ops_impl
        scores = experience.scores.double()
        log_ratio = experience.logprobs - experience.ref_logprobs
        k3 = kl_rewards(
            experience.logprobs,
            experience.ref_logprobs,
            experience.scores,
            mask,
            kl_estimator="k3",
            impl=impl,
        )[1]
        penalty = -self.config.kl_coef * experience.kl.double().mean()
        error = moments(experience.returns - experience.values, mask, impl=impl)[2]
        spread = moments(experience.returns, mask, impl=impl)[2]
        ended = experience.rollout.ended(eos).double()
        figures = {
            "objective/kl": (log_ratio.double() * mask).sum(dim=1).mean(),
            "objective/kl_k3": k3.double().mean(),
            "objective/entropy": -(experience.logprobs.double() * mask).sum(dim=1).mean(),
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": scores.mean() + penalty,
            "val/explained_variance": 1 - error / spread.clamp(min=1e-12),
            "val/response_length": mask.sum(dim=1).double().mean(),
            "val/num_eos_tokens": ended.sum(),
            "val/eos_rate": ended.mean(),
        }
        return {name: figure.item() for name, figure in figures.items()}
