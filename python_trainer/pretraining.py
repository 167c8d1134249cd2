"""PPO-ptx: the language-model loss on texts, mixed into the policy's updates (Ouyang et al., 2022)."""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ppo_kernels import token_logprobs

from . import launch
from .config import PPOConfig, RunConfig
from .data import Task, encode_texts, pad_right, shuffled_positions
from .engines import Policy, Trainable
from .rollout import shard


class Pretraining:
    """ptx_coef times the mean negative log-likelihood of as many texts as the minibatch has responses.

    Its gradient joins the minibatch's before the one optimizer step of both, as in InstructGPT and DeepSpeed-Chat.
    """

    def __init__(self, config: PPOConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.pad = tokenizer.pad_token_id
        self.rows = encode_texts(task.texts()[0], tokenizer, config.ptx_max_length)

    def backward(self, actor: Policy, update: int, size: int) -> dict[str, torch.Tensor]:
        """Add the gradients of the texts that belong to this update."""
        seed = launch.seed_of(self.config.seed, 3)
        rows = [self.rows[at] for at in shuffled_positions(len(self.rows), seed, update * size, size)]
        assert isinstance(actor.model, Trainable)
        total = torch.zeros((), device=launch.device())
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
        yield -logprobs.sum() / (tokens / launch.world_size())


def text_logprobs(policy: Trainable, rows: Sequence[list[int]], pad: int, impl: str) -> torch.Tensor:
    ids, mask = (x.to(launch.device()) for x in pad_right(rows, pad))
    logits = policy(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
    logprobs = token_logprobs(logits, ids[:, 1:], mask=mask[:, 1:], impl=impl)
    assert isinstance(logprobs, torch.Tensor)
    return logprobs
