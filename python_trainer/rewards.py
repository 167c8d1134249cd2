"""Scores: who gives them, and what happens to one before anything is learned from it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ppo_kernels import moments

from . import distributed
from .config import SamplingConfig, SharedError, UserError
from .data import Content, Prompt, Rollout, Task, pad_right, readable
from .deepspeed_engine import frozen
from .ppo_config import CompareConfig, PPOConfig
from .reward_functions import FunctionReward
from .rollout import RewardFn, by_rows, score_responses
from .tokens import (
    SEQUENCES,
    context_of,
    prompt_ids,
    reads_ids_of,
    refuse_missing_embeddings,
    refuse_short_context,
    whole_ids,
)

# A model of one number per token, and its tokenizer: models.load_reward_model.
LoadModel = Callable[[Any, PreTrainedTokenizerBase], tuple[Any, PreTrainedTokenizerBase]]


def load_reward_fn(
    config: SamplingConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    drawn: int,
    load_model: LoadModel,
) -> RewardFn:
    """Python functions, the task's own verifier, or a reward model, which is loaded then: whichever comes first.

    It will be asked about responses to these prompts, made of ids below `drawn`.
    """
    if config.reward_function is not None:
        _refuse_unused_model(config)
        columns = prompts[0].columns if prompts else ()
        return FunctionReward(*config.reward_functions(), tokenizer, columns)
    if task.verifiable:
        return task.score
    assert isinstance(config, PPOConfig | CompareConfig)
    return ModelReward(*load_model(config, tokenizer), config, tokenizer, prompts, drawn)


def _refuse_unused_model(config: SamplingConfig) -> None:
    """Beside a function a reward model may only be what the critic starts from."""
    if isinstance(config, PPOConfig) and config.reward_model_path is not None and config.value_model_init != "reward":
        raise UserError(
            "reward_model_path and reward_function are both given, and one of them scores: leave one out, or call the "
            "model in a function of yours"
        )


class ModelReward:
    """A reward model's number at the end of prompt and response.

    One that has the policy's tokenizer reads the ids as they are, another one the text in tokens of its own. A chat it
    reads by its own template, closed as in its training where the response has ended.
    """

    def __init__(
        self,
        model: Any,
        own: PreTrainedTokenizerBase,
        config: SamplingConfig,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        drawn: int,
    ) -> None:
        self.policy_tokenizer, self.tokenizer = tokenizer, own
        chat = any(not isinstance(prompt.content, str) for prompt in prompts)
        probes = [readable(prompt.content) for prompt in prompts[:64]]
        self.reads_ids = not chat and reads_ids_of(self.tokenizer, tokenizer, probes)
        self.context, self.rows = context_of(model.model), config.local_rollout_forward_batch_size
        rows = [list(prompt.ids) for prompt in prompts]
        if not self.reads_ids:
            rows = prompt_ids([prompt.content for prompt in prompts], self.tokenizer)
        longest = max(map(len, rows)) + config.response_length
        refuse_short_context(model.model, longest, *SEQUENCES)
        used = [drawn - 1] if self.reads_ids else [self.tokenizer.pad_token_id, self.tokenizer.eos_token_id]
        refuse_missing_embeddings(
            model.model, [*used, *(token for row in rows for token in row)], "reward_model_path: texts"
        )
        self.model = frozen(model, config)

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return by_rows(self._scores, rollout, self.rows)

    def _scores(self, rollout: Rollout) -> torch.Tensor:
        if self.reads_ids:
            return score_responses(self.model, rollout)
        texts = rollout.texts(self.policy_tokenizer)
        pairs = [
            (prompt.content, text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}])
            for prompt, text in zip(rollout.prompts, texts, strict=True)
        ]
        with distributed.raise_on_all_ranks(UserError):  # also what the chat template has against a response
            rows = whole_ids(pairs, self.tokenizer, {self.tokenizer.eos_token_id}, rollout.ended.tolist())
            if (longest := max(map(len, rows))) > self.context:
                raise UserError(
                    f"prompt and response are {longest} tokens of the reward model, which reads {self.context}: lower "
                    "max_prompt_length or response_length"
                )
        ids, mask = (x.to(distributed.device()) for x in pad_right(rows, self.tokenizer.pad_token_id))
        scores = self.model(input_ids=ids, attention_mask=mask.long())
        return scores.gather(1, mask.sum(dim=1, keepdim=True) - 1).squeeze(1)


def exact_match(prompts: list[Content], completions: list[Content], answer: list[str], **_: Any) -> list[bool]:
    """A verifier: the completion, of a chat its last message, is the `answer` of its prompt, blanks and case aside."""
    texts = [said if isinstance(said, str) else said[-1]["content"] for said in completions]
    return [text.lower().split() == str(wanted).lower().split() for text, wanted in zip(texts, answer, strict=True)]


def refuse_non_finite_scores(scores: torch.Tensor, rollout: Rollout) -> None:
    finite = distributed.gather_rows(scores).isfinite()  # all ranks stop together, or none
    if not finite.all():
        bad = int((~finite).sum())
        own = zip(scores.tolist(), rollout.prompts, strict=False)
        mine = [f"{x} for one to {readable(prompt.content)[:60]!r}" for x, prompt in own if not math.isfinite(x)]
        first = next(found[0] for found in distributed.gather_objects(mine) if found)
        raise SharedError(
            f"the score of {bad} of {len(finite)} responses is not finite ({first}); the weights are untouched. Scores "
            "must be finite in float32; a reward function gives None for what it has nothing to say on"
        )


def means_of_parts(reward_fn: RewardFn) -> dict[str, float]:
    """Of several reward functions what each gave, on average over the responses that it has something to say on."""
    parts: dict[str, torch.Tensor] = getattr(reward_fn, "parts", {})
    if len(parts) < 2:
        return {}
    return {f"rewards/{name}": distributed.gather_rows(part).nanmean().item() for name, part in parts.items()}


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
