"""Learning from texts: imitation and a reward model, before reinforcement learning, and ptx mixed into it."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from ppo_kernels import token_logprobs

from . import checkpoint, distributed
from .atomic import atomic_dir
from .config import PPOConfig, RewardConfig, RunConfig, SftConfig, UserError
from .data import Pair, Task, encode_texts, load_task, pad_right, shuffled_positions
from .deepspeed_engine import Policy, Trainable, init_distributed, step_together
from .logging import Log
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
from .rollout import shard
from .settings import save


def sft(config: SftConfig) -> dict[str, float]:
    """Train on texts; returns the perplexity on held-out ones."""
    folder = _start(config, "sft")
    task = load_task(config)
    if config.model_path is not None:
        undamaged(Path(config.model_path))
    tokenizer = checked(task.tokenizer()) if config.model_path is None else load_tokenizer(config.model_path)
    train, heldout = (encode_texts(texts, tokenizer, config.max_length) for texts in task.texts())
    _tell_of_cuts(train + heldout, tokenizer, config)
    policy = Trainable(
        adapted(load_policy(config.model_path, config, tokenizer, continue_rank=config.lora_r), config, config.lora_r),
        config,
        config.learning_rate,
        config.max_steps,
    )
    pad = tokenizer.pad_token_id
    with _locked(config, folder, "sft") as log, distributed.stop_requests() as asked_to_stop:
        for step in range(config.max_steps):
            rows = _batch(train, config, step)
            total = 0.0
            for loss in text_losses(policy, rows, pad, config, config.per_device_train_batch_size):
                policy.backward(loss)
                total += loss.item()
            learning_rate = policy.learning_rate
            step_together([policy])
            _stop_if_unhealthy(policy, config)
            log.record(step + 1, {"loss": distributed.mean(total), "lr": learning_rate})
            log.progress(step + 1)
            _stop_if_asked(asked_to_stop, "sft", step + 1, config)
        with torch.no_grad():
            figures = [
                (
                    text_logprobs(policy, heldout[i : i + 64], pad, config.ops_impl).sum().item(),
                    len(heldout[i : i + 64]),
                )
                for i in range(0, len(heldout), 64)
            ]
        scored = sum(len(row) - 1 for row in heldout)
        result = {"eval/perplexity": math.exp(-sum(total for total, _ in figures) / scored)}
        _finish(policy, tokenizer, folder, log, config.max_steps, result, config.lora_save)
    return result


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
    _refuse_equal(train + heldout, tokenizer, config)
    torch.manual_seed(config.seed)
    model = ScalarModel.on(load_policy(source, config, tokenizer), zero_head=False)
    reward_model = Trainable(adapted(model, config, config.lora_r), config, config.learning_rate, config.max_steps)
    with _locked(config, folder, "reward") as log, distributed.stop_requests() as asked_to_stop:
        for step in range(config.max_steps):
            pairs = _batch(train, config, step)
            mine = pairs[shard(len(pairs))]
            total = 0.0
            for start in range(0, len(mine), config.per_device_train_batch_size):
                micro = mine[start : start + config.per_device_train_batch_size]
                loss = _pair_loss(reward_model, micro, tokenizer, config) / (len(pairs) / distributed.world_size())
                reward_model.backward(loss)
                total += loss.item()
            learning_rate = reward_model.learning_rate
            step_together([reward_model])
            _stop_if_unhealthy(reward_model, config)
            log.record(step + 1, {"loss": distributed.mean(total), "lr": learning_rate})
            log.progress(step + 1)
            _stop_if_asked(asked_to_stop, "reward", step + 1, config)
        heldout = heldout[: config.eval_pairs]
        right = 0
        with torch.no_grad():
            for start in range(0, len(heldout), 64):
                chosen, rejected = _pair_scores(reward_model, heldout[start : start + 64], tokenizer, config)
                right += int((chosen > rejected).sum())
        accuracy = right / len(heldout)
        error = (accuracy * (1 - accuracy) / len(heldout)) ** 0.5
        result = {"eval/accuracy": accuracy, "eval/accuracy_se": error}
        _finish(reward_model, tokenizer, folder, log, config.max_steps, result, config.lora_save)
    return result


def _refuse_equal(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, config: RewardConfig) -> None:
    """Pairs of which a reward model sees no difference."""
    chosen = encode_texts([pair.chosen for pair in pairs], tokenizer, config.max_length)
    rejected = encode_texts([pair.rejected for pair in pairs], tokenizer, config.max_length)
    equal = [pair for pair, one, other in zip(pairs, chosen, rejected, strict=True) if one == other]
    if equal:
        raise UserError(
            f"{len(equal)} of {len(pairs)} pairs have the same first {config.max_length} tokens (max_length) on both "
            f"sides: raise max_length, or leave them out. The first: {equal[0].chosen[:60]!r}"
        )
    _tell_of_cuts(chosen + rejected, tokenizer, config)


def _tell_of_cuts(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, config: SftConfig) -> None:
    cut = sum(row[-1] != tokenizer.eos_token_id for row in rows)
    if cut and distributed.is_main():
        print(f"{cut} of {len(rows)} texts are cut at max_length {config.max_length}", flush=True)


def _pair_loss(
    reward_model: Trainable, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, config: RewardConfig
) -> torch.Tensor:
    """Sum over pairs of -log sigmoid(chosen - rejected - margin), at the last tokens or averaged over tokens."""
    values, ids, mask = _pair_values(reward_model, pairs, tokenizer, config)
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


def _pair_scores(
    reward_model: Trainable, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, config: RewardConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores at the last token of the chosen and of the rejected texts."""
    values, _, mask = _pair_values(reward_model, pairs, tokenizer, config)
    chosen, rejected = _at_the_end(values, mask).chunk(2)
    return chosen, rejected


def _pair_values(
    reward_model: Trainable, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, config: RewardConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, ids and mask [2B, T]: the chosen texts, then the rejected ones, in one forward pass."""
    texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rows = encode_texts(texts, tokenizer, config.max_length)
    ids, mask = (x.to(distributed.device()) for x in pad_right(rows, tokenizer.pad_token_id))
    return reward_model(input_ids=ids, attention_mask=mask.long()), ids, mask


def _at_the_end(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values.gather(1, mask.sum(dim=1, keepdim=True) - 1).squeeze(1)


def _start(config: SftConfig, stage: str) -> Path:
    init_distributed(config.seed, config.ddp_timeout)
    if config.batch_size % distributed.world_size():
        raise UserError(f"batch_size {config.batch_size} must be a multiple of the {distributed.world_size()} ranks")
    folder = Path(config.output_dir) / stage
    checkpoint.refuse_existing(folder, overwrite=config.overwrite_output_dir, resume=False)
    return folder


@contextlib.contextmanager
def _locked(config: SftConfig, folder: Path, title: str) -> Iterator[Log]:
    with checkpoint.lock_run_dir(folder, overwrite=config.overwrite_output_dir):
        if distributed.is_main():
            save(config, folder)
        yield Log(folder, config, config.max_steps, title=title)


def _batch(rows: list, config: SftConfig, step: int) -> list:
    size = config.batch_size
    return [rows[index] for index in shuffled_positions(len(rows), config.seed, step * size, size)]


def _stop_if_unhealthy(model: Trainable, config: SftConfig) -> None:
    model.refuse_non_finite_weights("model")
    if model.skipped >= config.max_skipped_steps:
        raise UserError(
            f"{model.skipped} updates had a non-finite loss, gradient or gradient norm and were skipped; stopped"
        )


def _stop_if_asked(asked_to_stop: Callable[[], bool], command: str, step: int, config: SftConfig) -> None:
    """Between two steps; after the last one the model is saved all the same."""
    if step < config.max_steps and asked_to_stop():
        raise UserError(
            f"asked to stop after step {step} of {config.max_steps}: {command} keeps no checkpoints and has no model "
            "before its end; start it again with --overwrite_output_dir True"
        )


def _finish(
    model: Trainable,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    log: Log,
    step: int,
    result: dict[str, float],
    form: str,
) -> None:
    log.record(step, result)
    log.close()
    with atomic_dir(folder / "model") as place:
        save_model(model, tokenizer, place, form)


class Pretraining:
    """PPO-ptx (Ouyang et al., 2022): ptx_coef times the mean negative log-likelihood of texts.

    They are as many as the minibatch has responses.

    Its gradient joins the minibatch's before the one optimizer step of both, as in InstructGPT and DeepSpeed-Chat.
    """

    def __init__(self, config: PPOConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.pad = tokenizer.pad_token_id
        self.rows = encode_texts(task.texts()[0], tokenizer, config.ptx_max_length)

    def backward(self, actor: Policy, update: int, size: int) -> dict[str, torch.Tensor]:
        """Add the gradients of the texts that belong to this update."""
        seed = distributed.seed_of(self.config.seed, 3)
        rows = [self.rows[at] for at in shuffled_positions(len(self.rows), seed, update * size, size)]
        assert isinstance(actor.model, Trainable)
        total = torch.zeros((), device=distributed.device())
        for loss in text_losses(actor.model, rows, self.pad, self.config, self.config.per_device_train_batch_size):
            actor.model.backward(self.config.ptx_coef * loss)
            total += loss.detach()
        return {"loss/ptx_avg": total}


def text_losses(
    policy: Trainable, rows: Sequence[list[int]], pad: int, config: RunConfig, micro: int
) -> Iterator[torch.Tensor]:
    """This rank's micro-batches of a global batch; added up and averaged over ranks, the mean per predicted token."""
    tokens = sum(len(row) - 1 for row in rows)
    mine = rows[shard(len(rows))]
    for start in range(0, len(mine), micro):
        logprobs = text_logprobs(policy, mine[start : start + micro], pad, config.ops_impl)
        yield -logprobs.sum() / (tokens / distributed.world_size())


def text_logprobs(policy: Trainable, rows: Sequence[list[int]], pad: int, impl: str) -> torch.Tensor:
    ids, mask = (x.to(distributed.device()) for x in pad_right(rows, pad))
    logits = policy(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
    logprobs = token_logprobs(logits, ids[:, 1:], mask=mask[:, 1:], impl=impl)
    assert isinstance(logprobs, torch.Tensor)
    return logprobs
