"""How good a policy is: gold score and KL on held-out prompts, each with its standard error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from . import launch
from .config import SamplingConfig, UserError
from .data import Task
from .engines import Policy
from .experience import Judge, by_rows, score_tokens
from .generation import Generator
from .rollout import sample

T = TypeVar("T")
Completion = tuple[str, float | None]


@dataclass
class Evaluation:
    metrics: dict[str, float]
    prompts: list[str]
    completions: list[Completion]


def chosen(prompts: Sequence[T], config: SamplingConfig) -> Sequence[T]:
    """Of the held-out prompts those to evaluate on: as many for every rank."""
    ranks = launch.world_size()
    count = min(len(prompts), config.eval_prompts) // ranks * ranks
    if not count:
        raise UserError(
            f"{len(prompts)} held-out prompts, of which eval_prompts {config.eval_prompts} takes part, are too few for "
            f"{ranks} ranks: add rows to prompts.jsonl (a tenth is held out), raise eval_prompts, or start fewer ranks"
        )
    return prompts[:count]


def evaluate(
    policy: Policy,
    reference: Policy,
    prompts: Sequence[Sequence[int]],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    generator: Generator,
    judge: Judge | None,
    config: SamplingConfig,
) -> Evaluation:
    """One response per prompt, with the same noise at every call: two policies differ by themselves alone."""
    prompts = chosen(prompts, config)
    rows = config.local_rollout_forward_batch_size
    rollout = sample(
        policy,
        prompts,
        tokenizer,
        generator,
        response_length=config.response_length,
        seed=launch.seed_of(config.seed, len(prompts)),
    )
    logp = by_rows(lambda part: score_tokens(policy, part), rollout, rows)
    ref = by_rows(lambda part: score_tokens(reference, part), rollout, rows)
    columns = {"kl": (logp - ref).sum(dim=1), "response_length": rollout.mask.sum(dim=1).float()}
    if judge is not None:
        columns["score"] = by_rows(judge, rollout, rows)
    shown = [ids[mask] for ids, mask in zip(rollout.sequences, rollout.attention_mask, strict=True)]
    gold = task.gold([tokenizer.decode(ids, skip_special_tokens=True) for ids in shown])
    if gold is not None:
        columns["gold"] = torch.tensor(gold, device=logp.device)
    metrics = {}
    for name, values in columns.items():
        everywhere = launch.gather_rows(values.float()).double()
        metrics[f"eval/{name}"] = everywhere.mean().item()
        deviation = everywhere.std().item() if len(everywhere) > 1 else float("nan")
        metrics[f"eval/{name}_se"] = deviation / len(everywhere) ** 0.5
    width = rollout.prompt_width
    texts = [
        tokenizer.decode(row[width:][mask[width:]], skip_special_tokens=True)
        for row, mask in zip(rollout.sequences, rollout.attention_mask, strict=True)
    ]
    asked = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts[: len(texts)]]
    judged: list[float | None] = list(gold) if gold is not None else [None] * len(texts)
    return Evaluation(metrics, asked, list(zip(texts, judged, strict=True)))
