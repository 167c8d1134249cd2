"""The loop: a rollout, then updates on it. One step is a function of the seed, the step number and the weights."""

import time
from collections.abc import Callable
from pathlib import Path

from . import checkpoint, generation, launch, metrics, state
from .algorithms import load_algorithm
from .config import PPOConfig, UserError
from .data import encode_prompts, load_task, shuffled_positions
from .ema import MovingAverage
from .engines import Policy, save_model
from .evaluation import Evaluation, chosen, evaluate
from .experience import Experience, Judge, collect, gathered
from .kl_control import KlControl
from .models import context_of
from .pretraining import Pretraining
from .roles import cast, starting_point
from .rollout import sample
from .scores import ScoreShaping
from .settings import save
from .updates import Updates


class Trainer:
    """The models of one run and the two phases of a step."""

    def __init__(self, config: PPOConfig) -> None:
        launch.start(config.seed, config.ddp_timeout)
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
        self._check_sizes()
        self.generator = generation.chosen(config)
        self.task = load_task(config)
        train, heldout = self.task.prompts()
        chosen(heldout, config)  # before the models load
        policy, self.tokenizer = starting_point(config, self.task)
        self.train_prompts, self.heldout_prompts = (
            encode_prompts(prompts, self.tokenizer, response_length=config.response_length, context=context_of(policy))
            for prompts in (train, heldout)
        )
        self.roles = cast(config, self.task, policy, self.tokenizer, needs_critic=self.algorithm.needs_critic)
        self.judge: Judge = self.roles.judge
        self.ema = None if config.ema_decay is None else MovingAverage(self.actor.module, config.ema_decay)
        ptx = Pretraining(config, self.task, self.tokenizer) if config.ptx_coef else None
        self.updates = Updates(config, self.algorithm, self.roles, ptx, self.ema)
        self.done = 0
        for name, model in self.trained.items():
            state.refuse_unknown_layout(name, model)  # now, and not at the first save, which SIGTERM may ask for
        if source is not None:
            self.load_checkpoint(source)

    @property
    def actor(self) -> Policy:
        return self.roles.actor

    @property
    def reference(self) -> Policy:
        return self.roles.reference

    @property
    def trained(self) -> dict:
        return self.roles.trained

    def _check_sizes(self) -> None:
        share = self.config.num_mini_batches * launch.world_size() * self.algorithm.group_size
        if self.config.batch_size % share:
            raise UserError(
                f"batch_size {self.config.batch_size} must be a multiple of num_mini_batches x ranks x "
                f"responses per prompt = {share}"
            )
        micro, group = self.config.per_device_train_batch_size, self.algorithm.group_size
        if micro % group:
            raise UserError(
                f"per_device_train_batch_size {micro} must be a multiple of the {group} responses per prompt"
            )

    def train(self) -> tuple[Evaluation, Evaluation]:
        """All remaining steps; returns the evaluations of the reference and of the trained policy."""
        with (
            checkpoint.claimed(
                self.folder, overwrite=self.config.overwrite_output_dir, done=self.done if self.continues else 0
            ),
            launch.stop_requests() as asked_to_stop,
        ):
            return self._train(asked_to_stop)

    def _train(self, asked_to_stop: Callable[[], bool]) -> tuple[Evaluation, Evaluation]:
        config, resumed = self.config, self.done
        if launch.is_main():
            save(config, self.folder)
        log = metrics.Log(self.folder, config, config.total_steps, start=resumed, title=config.algorithm)
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
            stopping = self.done < config.total_steps and asked_to_stop()
            if stopping or (config.save_steps and self.done % config.save_steps == 0):
                self.save_checkpoint(self.folder / "checkpoints")
            if stopping:
                log.close()
                raise launch.Stopped(
                    f"asked to stop: step {self.done} is saved; --resume_from_checkpoint latest goes on from there"
                )
        log.close()
        with checkpoint.committed(self.folder / "model") as place:
            save_model(self.actor.model, self.tokenizer, place)
        if self.ema is not None:
            with checkpoint.committed(self.folder / "ema") as place, self.ema.in_place_of(self.actor.module):
                save_model(self.actor.model, self.tokenizer, place)
        if launch.is_main():
            metrics.plot(self.folder)
        return before, after

    def save_checkpoint(self, folder: Path) -> None:
        """Among those in `folder`."""
        memory = {"kl_coef": self.kl.coef, "scores": self.shaping.state()}
        checkpoint.save(folder, self.done, self.trained, self.config, memory, self._average())

    def load_checkpoint(self, source: Path) -> None:
        self.done, memory = checkpoint.load(source, self.trained, self.config, self._average())
        self.kl.coef = memory["kl_coef"]
        self.shaping.restore(memory["scores"])

    def _average(self) -> list[state.Slice]:
        return [] if self.ema is None else self.ema.slices(self.actor.module)

    def evaluate(self, policy: Policy) -> Evaluation:
        result = evaluate(
            policy,
            self.reference,
            self.heldout_prompts,
            self.task,
            self.tokenizer,
            self.generator,
            self.judge,
            self.config,
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
        for name, model in self.trained.items():
            model.refuse_non_finite_weights(name)
        self.done += 1
        kl_coef = self.kl.coef
        summary = metrics.summary(experience, self.tokenizer.eos_token_id, kl_coef, self.config.ops_impl)
        self.kl.update(summary["objective/kl"], self.config.batch_size)
        return (
            summary
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

    def rollout(self) -> Experience:
        """Responses of the current policy, scored and credited; the global batch on every rank."""
        config, group = self.config, self.algorithm.group_size
        distinct = config.batch_size // group
        chosen = shuffled_positions(len(self.train_prompts), config.seed, self.done * distinct, distinct)
        responses = sample(
            self.actor,
            [self.train_prompts[index] for index in chosen for _ in range(group)],
            self.tokenizer,
            self.generator,
            response_length=config.response_length,
            seed=launch.seed_of(config.seed, self.done, 1),
        )
        local = collect(
            self.actor,
            self.reference,
            self.roles.critic,
            self.judge,
            self.shaping,
            responses,
            self.tokenizer.eos_token_id,
            config,
        )
        self.algorithm.credit(local)
        return gathered(local)

    def update(self, experience: Experience) -> dict[str, float]:
        return self.updates.run(experience, self.done)

    def _stop_if_unhealthy(self) -> None:
        skipped = max(model.skipped for model in self.trained.values())
        if skipped >= self.config.max_skipped_steps:
            raise UserError(
                f"{skipped} updates had a non-finite loss, gradient or gradient norm and were skipped; stopped after "
                f"step {self.done}, checkpoints are as they were"
            )
