"""Scores: who gives them, and what happens to one before anything is learned from it."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ppo_kernels import moments

from .config import PPOConfig, SamplingConfig, UserError
from .data import Rollout, Task
from .deepspeed_engine import frozen
from .models import load_scalar, stage_model
from .rollout import RewardFn, score_responses

Function = Callable[..., Sequence[float]]


def load_reward_fn(config: SamplingConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> RewardFn:
    """A Python function, the task's own verifier, or a reward model: whichever comes first."""
    if config.reward_function is not None:
        return FunctionReward(config.reward_function, tokenizer, task.columns())
    if task.verifiable:
        return task.score
    assert isinstance(config, PPOConfig)
    reward_model = frozen(load_scalar(reward_model_path(config), "reward_model_path", config), config)
    return lambda rollout: score_responses(reward_model, rollout)


def reward_model_path(config: PPOConfig) -> Path:
    path = stage_model(config, "reward", config.reward_model_path)
    if path is None:
        raise UserError("no reward model: give reward_model_path or reward_function, or run the reward command first")
    return path


class FunctionReward:
    """Calls ``function(prompts=[...], completions=[...], field=[...])`` and wants one number (or bool) per response.

    The further fields are those that all rows of prompts.jsonl share beside `prompt`: the answer that a verifier
    compares with, for example.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, Mapping[str, Any]]) -> None:
        self.name = name
        self.function = load(name)
        self.tokenizer = tokenizer
        self.columns: dict[tuple[int, ...], Mapping[str, Any]] = {}
        for prompt, row in columns.items():
            ids = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if self.columns.setdefault(ids, row) != row:
                raise UserError(f"the tokenizer makes the same tokens of {prompt[:60]!r} and of another prompt")

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        width = rollout.prompt_width
        asked = [
            tuple(ids[mask].tolist())
            for ids, mask in zip(rollout.sequences[:, :width], rollout.attention_mask[:, :width], strict=True)
        ]
        answers = [ids[mask].tolist() for ids, mask in zip(rollout.responses, rollout.mask, strict=True)]
        prompts, completions = (
            [self.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in rows] for rows in (asked, answers)
        )
        fields = {name for row in self.columns.values() for name in row}
        more = {name: [self.columns[ids][name] for ids in asked] for name in sorted(fields)}
        scores = list(self.function(prompts=prompts, completions=completions, **more))
        if len(scores) != len(prompts):
            raise UserError(f"{self.name} gave {len(scores)} scores for {len(prompts)} responses")
        try:
            return torch.tensor([float(score) for score in scores], device=rollout.sequences.device)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name} must give numbers: {error}") from error


def exact_match(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[bool]:
    """A verifier: the completion is the `answer` of its prompt, blanks and case aside."""
    return [
        completion.lower().split() == str(wanted).lower().split()
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def load(name: str) -> Function:
    """``file.py:function`` or ``package.module:function``."""
    place, colon, function = name.partition(":")
    if not colon:
        raise UserError(f"reward_function {name!r} must be file.py:name or package.module:name")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, function)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise UserError(f"cannot load reward_function {name!r}: {error}") from error


class ScoreShaping:
    """The missing end, scaling, and a bound. Statistics are over the scores of all ranks, so that all shape alike."""

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
