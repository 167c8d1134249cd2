"""The algorithm from top to bottom: a rollout, then updates on it.

One step is a function of the seed, the step's number and the weights: nothing depends on what was drawn before.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ppo_kernels import value_loss

from . import checkpoint, distributed, zero_state
from .algorithms import KlControl, load_algorithm
from .atomic import atomic_dir
from .config import UserError
from .data import Experience, Policy, Rollout, fingerprint, load_task, shuffled_positions
from .deepspeed_engine import Trainable, init_distributed, step_together
from .deepspeed_engine import fingerprint as weights_fingerprint
from .evaluate import Best, Evaluation, Evaluator, choose_generator, completion_rows, evaluation_prompts
from .logging import Averages, Log, plot
from .models import (
    MovingAverage,
    build_models,
    load_reward_model,
    reward_model_path,
    save_model,
    starting_point,
)
from .ppo_config import PPOConfig
from .rewards import ScoreShaping, load_reward_fn, means_of_parts, refuse_non_finite_scores
from .rollout import (
    RewardFn,
    by_rows,
    check_ratio,
    gathered,
    learned_from,
    minibatches,
    one_micro_batch,
    sample,
    score_tokens,
    score_tokens_and_entropy,
    score_values,
    shard,
    summary,
)
from .rollout_correction import corrected
from .settings import save
from .texts import Pretraining
from .tokens import context_of, encode_prompts, refuse_missing_embeddings, vocabulary

Scored = tuple[torch.Tensor, torch.Tensor]  # log-probabilities and entropies [B, T], with their graph


class Trainer:
    """The models of one run, and the steps that train them."""

    def __init__(self, config: PPOConfig) -> None:
        init_distributed(config.seed, config.ddp_timeout)
        self.config = config
        self.folder = Path(config.output_dir) / "train"
        request, own = config.resume_from_checkpoint, self.folder / "checkpoints"
        source = None if request is None else checkpoint.find(request, own)
        # From another run's checkpoint a new run starts, which must not replace what is there.
        self.continues = source is not None and checkpoint.belongs(source, own)
        checkpoint.refuse_existing(self.folder, overwrite=config.overwrite_output_dir, resume=self.continues)
        self.kl = KlControl(config)
        self.shaping = ScoreShaping(config)
        self.algorithm = load_algorithm(config, self.kl)
        self.algorithm.refuse_sizes()
        self.generator = choose_generator(config)
        self.task = load_task(config)
        train, heldout = self.task.prompts()
        evaluation_prompts(heldout, config)  # before the models load
        policy, self.tokenizer = starting_point(config, self.task)
        self.train_prompts, self.heldout_prompts = (
            encode_prompts(prompts, self.tokenizer, config, context_of(policy)) for prompts in (train, heldout)
        )
        every_prompt = [*self.train_prompts, *self.heldout_prompts]
        refuse_missing_embeddings(policy, (token for prompt in every_prompt for token in prompt.ids), "prompts")
        drawn = vocabulary(policy, self.tokenizer)
        self.reward_fn: RewardFn = load_reward_fn(
            config, self.task, self.tokenizer, every_prompt, drawn, load_reward_model
        )
        needs_critic = self.algorithm.needs_critic
        like_the_reward_model = needs_critic and config.value_model_init == "reward" and config.value_model_path is None
        self.models = build_models(
            config,
            policy,
            self.tokenizer,
            needs_critic=needs_critic,
            longest=max(len(prompt.ids) for prompt in every_prompt) + config.response_length,
            reward_model_path=reward_model_path(config) if like_the_reward_model else None,
        )
        self.ema = None if config.ema_decay is None else MovingAverage(self.actor.module, config.ema_decay)
        self.ptx = Pretraining(config, self.task, self.tokenizer, self.actor.end_ids) if config.ptx_coef else None
        self.best = Best(config)
        self.done, self.saved, self.whole = 0, 0, True
        self.pass_of_update: Scored | None = None  # made when the rollout was scored
        # What a continued run must find as it was.
        texts = () if self.ptx is None else self.ptx.rows
        self.same = {
            "data": fingerprint(self.train_prompts, self.heldout_prompts, texts),
            "reference": weights_fingerprint(self.reference.module),
        }
        for name, model in self.trained.items():
            zero_state.refuse_unknown_layout(name, model)  # now, not at the first save, which SIGTERM may ask for
        if source is not None:
            self.load_checkpoint(source)

    @property
    def actor(self) -> Policy:
        return self.models.actor

    @property
    def reference(self) -> Policy:
        return self.models.reference

    @property
    def critic(self) -> Trainable | None:
        return self.models.critic

    @property
    def trained(self) -> dict[str, Trainable]:
        return self.models.trained

    def train_step(self) -> dict[str, float]:
        """Sample, score, make rewards and advantages of it; then epochs of minibatches: losses, and optimizer steps."""
        started = time.perf_counter()
        experience = self.collect_experience()
        rolled_out = time.perf_counter()
        learning_rate = self.trained["actor"].learning_rate  # the schedule moves on with each update
        learned = learned_from(experience, self.config, self.algorithm.group_size)
        self.whole = False
        weighted, of_engine = corrected(learned, self.config)
        averages = self.update(weighted)
        for name, model in self.trained.items():
            model.refuse_non_finite_weights(name)
        self.done, self.whole = self.done + 1, True
        kl_coef = self.kl.coef
        group_size, score_clip = self.algorithm.group_size, self.config.score_clip
        figures = summary(experience, learned, group_size, kl_coef, score_clip, self.config.ops_impl)
        figures |= means_of_parts(self.reward_fn) | of_engine
        self.kl.update(figures["objective/kl"], self.config.batch_size)
        return (
            figures
            | averages
            | {
                "objective/kl_coef": kl_coef,
                "lr": learning_rate,
                "episode": self.done * self.config.batch_size,
                "val/skipped_updates": max(model.skipped for model in self.trained.values()),
                "time/rollout": rolled_out - started,
                "time/update": time.perf_counter() - rolled_out,
            }
        )

    def collect_experience(self) -> Experience:
        """Responses of the current policy with all that the losses need: the global batch, the same on every rank."""
        config, group = self.config, self.algorithm.group_size
        # Sample: `group` responses to each prompt; from here to the end this rank has its share of them.
        distinct, rows = config.batch_size // group, config.local_rollout_forward_batch_size
        chosen = shuffled_positions(len(self.train_prompts), config.seed, self.done * distinct, distinct)
        prompts = [self.train_prompts[index] for index in chosen for _ in range(group)]
        rollout, logprobs, rollout_logprobs = sample(
            self.actor,
            prompts,
            self.tokenizer,
            self.generator,
            response_length=config.response_length,
            score=self._score,
            seed=distributed.seed_of(config.seed, self.done, 1),
        )
        # Score: log-probabilities of the reference too, the critic's values, and one number for each response.
        ref_logprobs = by_rows(functools.partial(score_tokens, self.reference), rollout, rows)
        values = torch.zeros_like(logprobs)
        if self.critic is not None:
            values = by_rows(functools.partial(score_values, self.critic), rollout, rows)
        raw = self.reward_fn(rollout).to(logprobs)  # in one call: a function may compare the responses of a group
        refuse_non_finite_scores(raw, rollout)
        raw = self.shaping.penalised(raw, rollout.ended)
        self.shaping.observe(distributed.gather_rows(raw))
        scaled = self.shaping.scaled(raw)
        local = Experience.of(rollout, logprobs, rollout_logprobs, ref_logprobs, values, raw, scaled)
        # Rewards: the score at the last token, minus the penalty for leaving the reference. Then advantages.
        rewards = self.algorithm.token_rewards(local)
        self.algorithm.compute_advantages(local, rewards)
        experience = gathered(local)
        self.rolled_out = prompts, experience  # to be shown
        return experience

    def update(self, experience: Experience) -> dict[str, float]:
        """All passes over one rollout; returns the averaged statistics.

        The micro-batch size and the number of ranks change memory and speed, not the step: losses are divided by what
        the whole minibatch holds.
        """
        config, algorithm, averages = self.config, self.algorithm, Averages()
        warming_up = self.done < config.critic_warmup_steps
        trained = {name: model for name, model in self.trained.items() if name == "critic" or not warming_up}
        one, ranks = torch.ones((), device=distributed.device()), distributed.world_size()
        made, self.pass_of_update = self.pass_of_update, None
        for epoch in range(config.num_ppo_epochs):
            order = distributed.seed_of(config.seed, self.done, 2, epoch)
            chunks = minibatches(len(experience.mask), algorithm.group_size, config.num_mini_batches, order)
            if made is not None:
                chunks = iter([torch.arange(len(experience.mask))])  # in the order of the rollout
            for number, rows in enumerate(chunks):
                seen, drift, mask = Averages(), 0.0 * one, experience.mask[rows]
                # DeepSpeed averages gradients over ranks, so each rank divides by its share.
                normalizer, tokens = algorithm.normalizer(mask) / ranks, mask.sum().clamp(min=1) / ranks
                for micro in rows[shard(len(rows))].split(config.per_device_train_batch_size):
                    batch = experience[micro]
                    if "actor" in trained:
                        scored = made or self._forward(batch.rollout)
                        drift = drift.maximum(self._policy_gradients(batch, scored, normalizer, tokens, seen))
                    if "critic" in trained:
                        self._value_gradients(batch, tokens, seen)
                if epoch == 0 and number == 0 and "actor" in trained:
                    check_ratio(distributed.gather_rows(drift[None]).max().item(), self.done + 1, config)
                if self.ptx is not None and "actor" in trained:
                    position = (self.done * config.num_ppo_epochs + epoch) * config.num_mini_batches + number
                    seen.add(self.ptx.backward(self.actor, position, len(rows)), one)
                step_together(list(trained.values()))
                seen.add({f"{name}/grad_norm": one * model.gradient_norm for name, model in trained.items()}, one)
                if self.ema is not None and "actor" in trained:
                    self.ema.update(self.actor.module)
                averages.merge(seen)
                if self._moved_too_far(seen):
                    return averages.reduce()
        return averages.reduce()

    def _score(self, rollout: Rollout) -> torch.Tensor:
        """The policy's log-probabilities. The forward pass of the only update of a rollout is kept for it."""
        config = self.config
        if self.done < config.critic_warmup_steps or not one_micro_batch(config):
            return by_rows(
                functools.partial(score_tokens, self.actor), rollout, config.local_rollout_forward_batch_size
            )
        with torch.enable_grad():
            self.pass_of_update = self._forward(rollout)
        return self.pass_of_update[0].detach()

    def _forward(self, rollout: Rollout) -> Scored:
        return score_tokens_and_entropy(self.actor, rollout, differentiable=self.config.entropy_coef != 0)

    def _policy_gradients(
        self, batch: Experience, scored: Scored, normalizer: torch.Tensor, tokens: torch.Tensor, seen: Averages
    ) -> torch.Tensor:
        """Those of a micro-batch, added up; returns how far its log-probabilities are from the sampled ones."""
        config, algorithm, actor = self.config, self.algorithm, self.trained["actor"]
        logprobs, entropy = (torch.where(batch.mask, x, 0.0) for x in scored)  # it may leave out responses
        loss, statistics = algorithm.policy_loss(logprobs, batch, normalizer)
        if config.entropy_coef:
            loss = loss - config.entropy_coef * entropy.sum() / tokens
        actor.backward(loss)
        valid = batch.mask.sum()
        share = tokens / valid.clamp(min=1)  # so that the average of losses is the minibatch's loss
        seen.add(statistics, algorithm.weight(batch.mask))
        of_tokens = {"loss/policy_avg": loss.detach() * share}
        seen.add(of_tokens | {"policy/entropy_avg": entropy.detach().sum() / valid}, valid)
        return ((logprobs.detach() - batch.logprobs).abs() * batch.mask).max()

    def _value_gradients(self, batch: Experience, tokens: torch.Tensor, seen: Averages) -> None:
        """Those of a micro-batch, added up."""
        config, critic = self.config, self.trained["critic"]
        loss, stats = value_loss(
            score_values(critic, batch.rollout),
            batch.values,
            batch.returns,
            batch.mask,
            cliprange_value=config.cliprange_value,
            normalizer=tokens,
            impl=config.ops_impl,
        )
        critic.backward(config.vf_coef * loss)
        valid = batch.mask.sum()
        share = tokens / valid.clamp(min=1)
        seen.add({"val/clipfrac_avg": stats.clipfrac, "loss/value_avg": loss.detach() * share}, valid)

    def train(self) -> tuple[Evaluation, Evaluation]:
        """All remaining steps; returns the evaluations of the reference and of the trained policy."""
        with (
            checkpoint.lock_run_dir(
                self.folder, overwrite=self.config.overwrite_output_dir, done=self.done if self.continues else 0
            ),
            distributed.stop_requests() as asked_to_stop,
        ):
            return self._train(asked_to_stop)

    def _train(self, asked_to_stop: Callable[[], bool]) -> tuple[Evaluation, Evaluation]:
        config, resumed = self.config, self.done
        if distributed.is_main():
            save(config, self.folder)
        log = Log(self.folder, config, config.total_steps, start=resumed, title=config.algorithm)
        before = self.evaluate(self.reference)
        self.best.refuse_unknown(before.metrics)
        if not resumed:
            log.record(0, before.metrics)
        after = self.evaluate(self.actor) if resumed else before
        with checkpoint.last_step_kept(self._save_last):
            while self.done < config.total_steps and not self.best.given_up:
                after = self._step_of_a_run(log, after)
                stopping = self.done < config.total_steps and asked_to_stop()
                if stopping or (config.save_steps and self.done % config.save_steps == 0):
                    self.save_checkpoint(self.folder / "checkpoints")
                if stopping:
                    log.close()
                    raise distributed.Stopped(
                        f"asked to stop: step {self.done} is saved; --resume_from_checkpoint latest goes on from there"
                    )
        if self.best.given_up:
            log.say(f"no better {self.best.name} in {self.best.worse} evaluations: stopped after step {self.done}")
        log.close()
        self._save_model("model")
        if self.ema is not None:
            with self.ema.in_place_of(self.actor.module):
                self._save_model("ema")
        if distributed.is_main():
            plot(self.folder)
        return before, after

    def _step_of_a_run(self, log: Log, after: Evaluation) -> Evaluation:
        """A step, what is recorded of it, and, where it is due, an evaluation; returns the last one of these."""
        config = self.config
        row = self.train_step()
        due = config.eval_steps and self.done % config.eval_steps == 0
        if due or self.done == config.total_steps:
            after = self.evaluate(self.actor)
            row |= after.metrics
            if self.best.is_beaten(after.metrics):
                self._save_model("best")
            self.best.observe(after.metrics)
        log.step(self.done, row)
        if config.log_completions_steps and self.done % config.log_completions_steps == 0:
            prompts, experience = self.rolled_out
            log.completions(self.done, completion_rows(experience, prompts, self.tokenizer))
        self._stop_if_unhealthy()
        return after

    def _save_model(self, name: str) -> None:
        with atomic_dir(self.folder / name) as place:
            save_model(self.actor.model, self.tokenizer, place, self.config.lora_save)

    def _save_last(self) -> int | None:
        if not self.whole or self.done in (0, self.saved):
            return None
        self.save_checkpoint(self.folder / "checkpoints")
        return self.done

    def evaluate(self, policy: Policy) -> Evaluation:
        return Evaluator(
            self.heldout_prompts,
            self.reference,
            self.task,
            self.tokenizer,
            self.generator,
            self.reward_fn,
            self.config,
        ).evaluate(policy)

    def save_checkpoint(self, folder: Path) -> None:
        """Among those in `folder`."""
        checkpoint.save(folder, self.done, self.trained, self.config, self._memory(), self._average())
        self.saved = self.done

    def load_checkpoint(self, source: Path) -> None:
        self.done, memory = checkpoint.load(source, self.trained, self.config, self._memory(), self._average())
        self.kl.coef = memory["kl_coef"]
        self.shaping.restore(memory["scores"])
        if self.continues:  # else the best model is another run's
            self.best.restore(memory["best"])
        self.saved = self.done if self.continues else 0

    def _memory(self) -> dict[str, Any]:
        return {"kl_coef": self.kl.coef, "scores": self.shaping.state(), "best": self.best.state()} | self.same

    def _average(self) -> list[zero_state.Slice]:
        return [] if self.ema is None else self.ema.slices(self.actor.module)

    def _moved_too_far(self, seen: Averages) -> bool:
        if self.config.target_kl is None:
            return False
        return seen.reduce().get("policy/approxkl_avg", 0.0) > self.config.target_kl

    def _stop_if_unhealthy(self) -> None:
        skipped = max(model.skipped for model in self.trained.values())
        if skipped >= self.config.max_skipped_steps:
            self.whole = False  # nothing to keep: it would stop again
            raise UserError(
                f"{skipped} updates had a non-finite loss, gradient or gradient norm and were skipped; stopped after "
                f"step {self.done}, checkpoints are as they were"
            )
