"""Scores from Python: a function of prompts, completions and what else stands in prompts.jsonl."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .config import UserError
from .rollout import Rollout

Function = Callable[..., Sequence[float]]


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
