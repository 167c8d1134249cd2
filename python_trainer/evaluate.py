"""How good a policy is: gold score and KL on held-out prompts, each with its standard error."""

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from . import distributed
from .config import SamplingConfig, UserError
from .data import Experience, Policy, Prompt, Rollout, Task, readable
from .ppo_config import PPOConfig
from .rollout import Generator, HfGenerator, RewardFn, by_rows, sample, score_tokens

T = TypeVar("T")
Completion = tuple[str, float | None]
LOWEST = -sys.float_info.max  # a checkpoint holds no infinity


@dataclass
class Evaluation:
    metrics: dict[str, float]
    prompts: list[str]
    completions: list[Completion]


class Best:
    """The best evaluation so far by metric_for_best_model, and how many came since."""

    def __init__(self, config: PPOConfig) -> None:
        self.name, self.sign = config.metric_for_best_model, 1 if config.greater_is_better else -1
        self.patience = config.early_stopping_patience
        self.highest, self.worse = LOWEST, 0  # of sign times the metric

    def is_beaten(self, metrics: Mapping[str, float]) -> bool:
        """Whether this evaluation is the best yet."""
        if self.name is None:
            return False
        value = metrics[self.key(metrics)]
        return math.isfinite(value) and self.sign * value > self.highest

    def observe(self, metrics: Mapping[str, float]) -> None:
        """To be called once a model that is better has been saved: what is remembered has to be on the disk."""
        if self.is_beaten(metrics):
            self.highest, self.worse = self.sign * metrics[self.key(metrics)], 0
        elif self.name is not None:
            self.worse += 1

    def refuse_unknown(self, metrics: Mapping[str, float]) -> None:
        """The metric has to be among those of an evaluation."""
        if self.name is not None:
            self.key(metrics)

    def key(self, metrics: Mapping[str, float]) -> str:
        found = next((key for key in (self.name, f"eval/{self.name}") if key in metrics), None)
        if found is None:
            raise UserError(f"metric_for_best_model {self.name} is not evaluated; there are {', '.join(metrics)}")
        return found

    @property
    def given_up(self) -> bool:
        return self.patience is not None and self.worse >= self.patience

    def state(self) -> dict[str, Any]:
        return self._of() | {"highest": self.highest, "worse": self.worse}

    def restore(self, state: dict[str, Any]) -> None:
        """Unless it is of another metric: then every evaluation is a new one."""
        if self._of() == {key: state[key] for key in self._of()}:
            self.highest, self.worse = state["highest"], int(state["worse"])

    def _of(self) -> dict[str, Any]:
        return {"name": (self.name or "").removeprefix("eval/"), "sign": self.sign}


def completion_rows(
    experience: Experience, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """What a person reads to see what a policy does: each response of the global batch, beside its prompt."""
    return [
        {"prompt": prompt.content, "completion": text, "score": score, "kl": kl, "length": length, "ended": ended}
        for prompt, text, length, score, kl, ended in zip(
            prompts,
            experience.rollout.texts(tokenizer),
            experience.mask.sum(dim=1).tolist(),
            experience.raw_scores.tolist(),
            ((experience.logprobs - experience.ref_logprobs) * experience.mask).sum(dim=1).tolist(),
            experience.ended.tolist(),
            strict=True,
        )
    ]


def choose_generator(config: SamplingConfig) -> Generator:
    """That of `generation_engine`."""
    if config.generation_engine == "hf":
        return HfGenerator(config.local_rollout_forward_batch_size)
    return _vllm(config.vllm_gpu_memory_utilization)


@functools.cache  # its engines stay: one run after another in a process uses the same
def _vllm(memory_share: float) -> Generator:
    try:
        from .vllm import VllmGenerator
    except ImportError as error:
        raise UserError(f"generation_engine vllm needs vLLM: pip install 'vllm>=0.32' ({error})") from error
    return VllmGenerator(memory_share)


def evaluation_prompts(prompts: Sequence[T], config: SamplingConfig) -> Sequence[T]:
    """Of the held-out prompts those to evaluate on: as many for every rank."""
    ranks = distributed.world_size()
    count = min(len(prompts), config.eval_prompts) // ranks * ranks
    if not count:
        raise UserError(
            f"{len(prompts)} held-out prompts, of which eval_prompts {config.eval_prompts} takes part, are too few for "
            f"{ranks} ranks: add prompts (a tenth is held out), name more in eval_data_path, raise eval_prompts, or "
            "start fewer ranks"
        )
    return prompts[:count]


@dataclass
class Responses:
    """One response to each evaluation prompt: of this rank, and what all of them are like."""

    rollout: Rollout
    texts: list[str]
    gold: list[float] | None  # an independent score, where the task has one
    columns: dict[str, torch.Tensor]  # a number for each response of this rank


@dataclass(frozen=True)
class Evaluator:
    """What policies are asked, what they are compared with, and who scores them."""

    prompts: Sequence[Prompt]
    reference: Policy
    task: Task
    tokenizer: PreTrainedTokenizerBase
    generator: Generator
    reward_fn: RewardFn | None
    config: SamplingConfig

    def respond(self, policy: Policy) -> Responses:
        """With the same noise at every call: two policies differ by themselves alone."""
        prompts, config = evaluation_prompts(self.prompts, self.config), self.config
        rows = config.local_rollout_forward_batch_size
        rollout, logprobs, _ = sample(
            policy,
            prompts,
            self.tokenizer,
            self.generator,
            response_length=config.response_length,
            score=functools.partial(by_rows, functools.partial(score_tokens, policy), rows=rows),
            seed=distributed.seed_of(config.seed, len(prompts)),
        )
        ref_logprobs = by_rows(functools.partial(score_tokens, self.reference), rollout, rows)
        kl, length = (logprobs - ref_logprobs).sum(dim=1), rollout.mask.sum(dim=1).float()
        columns = {"kl": kl, "response_length": length}
        if self.reward_fn is not None:
            columns["score"] = self.reward_fn(rollout)
        gold = self.task.gold(rollout.texts(self.tokenizer, with_prompts=True))
        if gold is not None:
            columns["gold"] = torch.tensor(gold, device=kl.device)
        return Responses(rollout, rollout.texts(self.tokenizer), gold, columns)

    def evaluate(self, policy: Policy) -> Evaluation:
        """Means over one response per prompt, each with its standard error."""
        found = self.respond(policy)
        metrics = {}
        for name, values in found.columns.items():
            mean, error = mean_and_error(distributed.gather_rows(values.float()))
            metrics[f"eval/{name}"], metrics[f"eval/{name}_se"] = mean, error
        scored, by_reference = (functools.partial(score_tokens, each) for each in (policy, self.reference))
        metrics |= self.task.exact(scored, by_reference, self.config.kl_coef)
        asked = [readable(prompt.content) for prompt in found.rollout.prompts]
        scores: list[float | None] = list(found.gold) if found.gold is not None else [None] * len(found.texts)
        return Evaluation(metrics, asked, list(zip(found.texts, scores, strict=True)))


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean of independent numbers and its standard error; NaN of a single one."""
    values = values.double()
    deviation = values.std().item() if len(values) > 1 else float("nan")
    return values.mean().item(), deviation / len(values) ** 0.5
