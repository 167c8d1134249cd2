"""Learning from texts: imitation and a reward model, before reinforcement learning, and ptx mixed into it."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from . import checkpoint, distributed
from .atomic import atomic_dir
from .config import RewardConfig, SftConfig, TextConfig, UserError
from .data import Pair, load_task, pad_right, readable, shuffled_positions
from .deepspeed_engine import Trainable, init_distributed, step_together
from .logging import Log, plot
from .models import (
    ScalarModel,
    adapted,
    checked,
    load_policy,
    load_tokenizer,
    save_model,
    stage_model,
    undamaged,
)
from .pretrained import end_tokens
from .rollout import shard
from .settings import save
from .texts import text_logprobs, text_losses
from .tokens import (
    Tokens,
    encode_examples,
    learnable,
    refuse_missing_embeddings,
    refuse_short_context,
    tell,
    whole_ids,
)

C = TypeVar("C", bound=TextConfig)
R = TypeVar("R")
SHOWN = ("loss", "lr", "eval/perplexity", "eval/accuracy")


class PairTokens(NamedTuple):
    chosen: list[int]
    rejected: list[int]
    margin: float


def sft(config: SftConfig) -> dict[str, float]:
    """Train on texts; returns the perplexity on held-out ones."""
    folder = _start(config, "sft")
    task = load_task(config)
    if config.model_path is not None:
        undamaged(Path(config.model_path))
    tokenizer = checked(task.tokenizer()) if config.model_path is None else load_tokenizer(config.model_path)
    model = load_policy(config.model_path, config, tokenizer, continue_rank=config.lora_r)
    texts, others = task.texts()
    only, ends = config.completion_only_loss, end_tokens(model.generation_config)
    rows = encode_examples(texts + others, tokenizer, config.max_length, completion_only=only, ends=ends)
    train, heldout = learnable(rows[: len(texts)]), learnable(rows[len(texts) :])
    refuse_short_context(model, max(len(row.ids) for row in rows), "texts", "max_length")
    refuse_missing_embeddings(model, (token for row in rows for token in row.ids), "texts")
    config = _with_steps(config, len(train))
    policy = Trainable(adapted(model, config, config.lora_r), config, config.learning_rate, config.max_steps)
    pad = tokenizer.pad_token_id

    def losses(rows: list[Tokens]) -> Iterator[torch.Tensor]:
        return text_losses(policy, rows, pad, config, config.per_device_train_batch_size)

    def evaluate() -> dict[str, float]:
        size = config.per_device_train_batch_size
        parts = [heldout[at : at + size] for at in range(0, len(heldout), size)]
        total = sum(text_logprobs(policy, part, pad, config.ops_impl).sum().item() for part in parts)
        return {"eval/perplexity": perplexity(-total / sum(row.predicted for row in heldout))}

    return _train(config, folder, policy, tokenizer, train, losses, evaluate)


def perplexity(loss: float) -> float:
    """exp(loss); of a model that has diverged infinity, which is no reason to lose it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def reward(config: RewardConfig) -> dict[str, float]:
    """Train on chosen and rejected texts; returns the share of held-out pairs put in the right order."""
    folder = _start(config, "reward")
    task = load_task(config)
    source = stage_model(config, "sft", config.model_path)
    if source is None:
        raise UserError("no model to start from: give model_path, or run the sft command first")
    tokenizer = load_tokenizer(source)
    train, heldout = task.pairs()
    if not train:
        raise UserError("the set of preference pairs is empty")
    torch.manual_seed(config.seed)
    policy = load_policy(source, config, tokenizer)
    encoded = _encode_pairs(train + heldout, tokenizer, end_tokens(policy.generation_config), config)
    train_rows, heldout_rows = encoded[: len(train)], encoded[len(train) :][: config.eval_pairs]
    longest = max(len(ids) for row in encoded for ids in row[:2])
    refuse_short_context(policy, longest, "pairs", "max_length")
    refuse_missing_embeddings(policy, (token for row in encoded for ids in row[:2] for token in ids), "pairs")
    config = _with_steps(config, len(train))
    model = ScalarModel.on(policy, zero_head=False)
    reward_model = Trainable(adapted(model, config, config.lora_r), config, config.learning_rate, config.max_steps)
    pad = tokenizer.pad_token_id

    def losses(pairs: list[PairTokens]) -> Iterator[torch.Tensor]:
        mine = pairs[shard(len(pairs))]
        for start in range(0, len(mine), config.per_device_train_batch_size):
            micro = mine[start : start + config.per_device_train_batch_size]
            yield pair_loss(reward_model, micro, pad, config) / (len(pairs) / distributed.world_size())

    def evaluate() -> dict[str, float]:
        right = 0
        size = config.per_device_train_batch_size
        for start in range(0, len(heldout_rows), size):
            chosen, rejected = _pair_scores(reward_model, heldout_rows[start : start + size], pad)
            right += int((chosen > rejected).sum())
        accuracy = right / len(heldout_rows)
        error = (accuracy * (1 - accuracy) / len(heldout_rows)) ** 0.5
        return {"eval/accuracy": accuracy, "eval/accuracy_se": error}

    return _train(config, folder, reward_model, tokenizer, train_rows, losses, evaluate)


def _train(
    config: TextConfig,
    folder: Path,
    model: Trainable,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[R],
    losses: Callable[[list[R]], Iterator[torch.Tensor]],
    evaluate: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """All steps, and the model they end with; returns its evaluation."""
    stage, figures = folder.name, {}
    with _locked(config, folder, stage) as log, distributed.stop_requests() as asked_to_stop:
        for step in range(1, config.max_steps + 1):
            total = 0.0
            for loss in losses(_batch(rows, config, step - 1)):
                model.backward(loss)
                total += loss.item()
            row = {"loss": distributed.mean(total), "lr": model.learning_rate}
            step_together([model])
            _stop_if_unhealthy(model, config)
            last = step == config.max_steps
            if last or (config.eval_steps and step % config.eval_steps == 0):
                with torch.no_grad():
                    figures = evaluate()
                row |= figures
            if last or step % config.logging_steps == 0 or figures.keys() & row.keys():
                log.step(step, row, SHOWN)
            else:
                log.record(step, row)
                log.progress(step)
            _stop_if_asked(asked_to_stop, stage, step, config)
        log.close()
        with atomic_dir(folder / "model") as place:
            save_model(model, tokenizer, place, config.lora_save)
        if distributed.is_main():
            plot(folder)
    return figures


def _with_steps(config: C, rows: int) -> C:
    """The steps of so many epochs, where that is what was asked for."""
    if config.num_train_epochs is None:
        return config
    return replace(config, max_steps=max(math.ceil(config.num_train_epochs * rows / config.batch_size), 1))


def _encode_pairs(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, ends: Collection[int], config: RewardConfig
) -> list[PairTokens]:
    """All pairs; those of which a reward model would see no difference are refused."""
    whole = [
        whole_ids([(pair.prompt, text) for pair, text in zip(pairs, texts, strict=True)], tokenizer, ends)
        for texts in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    ]
    chosen, rejected = ([ids[: config.max_length] for ids in rows] for rows in whole)
    equal = [pair for pair, one, other in zip(pairs, chosen, rejected, strict=True) if one == other]
    if equal:
        raise UserError(
            f"{len(equal)} of {len(pairs)} pairs have the same first {config.max_length} tokens (max_length) on both "
            f"sides: raise max_length, or leave them out. The first: {readable(equal[0].chosen)[:60]!r}"
        )
    cut = sum(len(ids) > config.max_length for rows in whole for ids in rows)
    tell(cut, 2 * len(pairs), f"texts are cut at max_length {config.max_length}")
    margins = [pair.margin for pair in pairs]
    return [PairTokens(*row) for row in zip(chosen, rejected, margins, strict=True)]


def pair_loss(reward_model: Trainable, pairs: list[PairTokens], pad: int, config: RewardConfig) -> torch.Tensor:
    """Sum over pairs of -log sigmoid(chosen - rejected - margin), at the last tokens or averaged over tokens."""
    values, ids, mask = _pair_values(reward_model, pairs, pad)
    margin = torch.tensor([pair.margin for pair in pairs], device=values.device)
    chosen, rejected = _at_the_end(values, mask).chunk(2)
    centering = config.center_rewards_coefficient * (chosen + rejected).square().sum()
    if config.reward_loss == "end_token":
        return -logsigmoid(chosen - rejected - margin).sum() + centering
    counted = _unlike_tokens(*ids.chunk(2), *mask.chunk(2))
    better = values[: len(pairs)] - values[len(pairs) :] - margin[:, None]
    return -((logsigmoid(better) * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)).sum() + centering


def _unlike_tokens(
    chosen: torch.Tensor, rejected: torch.Tensor, chosen_mask: torch.Tensor, rejected_mask: torch.Tensor
) -> torch.Tensor:
    """[B, T] from the first difference to the end of the longer text; where there is none, its last token."""
    either = chosen_mask | rejected_mask
    differ = ((chosen != rejected) | (chosen_mask != rejected_mask)) & either
    last = either.sum(dim=1, keepdim=True) - 1
    differ = differ.scatter(1, last, True)
    return (differ.cumsum(dim=1) > 0) & either


def _pair_scores(reward_model: Trainable, pairs: list[PairTokens], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores at the last token of the chosen and of the rejected texts."""
    values, _, mask = _pair_values(reward_model, pairs, pad)
    chosen, rejected = _at_the_end(values, mask).chunk(2)
    return chosen, rejected


def _pair_values(
    reward_model: Trainable, pairs: list[PairTokens], pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, ids and mask [2B, T]: the chosen texts, then the rejected ones, in one forward pass."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    ids, mask = (x.to(distributed.device()) for x in pad_right(rows, pad))
    return reward_model(input_ids=ids, attention_mask=mask.long()), ids, mask


def _at_the_end(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values.gather(1, mask.sum(dim=1, keepdim=True) - 1).squeeze(1)


def _start(config: TextConfig, stage: str) -> Path:
    init_distributed(config.seed, config.ddp_timeout)
    if config.batch_size % distributed.world_size():
        raise UserError(f"batch_size {config.batch_size} must be a multiple of the {distributed.world_size()} ranks")
    folder = Path(config.output_dir) / stage
    checkpoint.refuse_existing(folder, overwrite=config.overwrite_output_dir, resume=False)
    return folder


@contextlib.contextmanager
def _locked(config: TextConfig, folder: Path, title: str) -> Iterator[Log]:
    with checkpoint.lock_run_dir(folder, overwrite=config.overwrite_output_dir):
        if distributed.is_main():
            save(config, folder)
        yield Log(folder, config, config.max_steps, title=title)


def _batch(rows: list[R], config: TextConfig, step: int) -> list[R]:
    size = config.batch_size
    return [rows[index] for index in shuffled_positions(len(rows), config.seed, step * size, size)]


def _stop_if_unhealthy(model: Trainable, config: TextConfig) -> None:
    model.refuse_non_finite_weights("model")
    if model.skipped >= config.max_skipped_steps:
        raise UserError(
            f"{model.skipped} updates had a non-finite loss, gradient or gradient norm and were skipped; stopped"
        )


def _stop_if_asked(asked_to_stop: Callable[[], bool], command: str, step: int, config: TextConfig) -> None:
    """Between two steps; after the last one the model is saved all the same."""
    if step < config.max_steps and asked_to_stop():
        raise UserError(
            f"asked to stop after step {step} of {config.max_steps}: {command} keeps no checkpoints and has no model "
            "before its end; start it again with --overwrite_output_dir True"
        )
