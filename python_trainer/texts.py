"""The loss of texts: what sft trains by, and what is mixed into reinforcement learning (ptx)."""

from collections.abc import Collection, Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ppo_kernels import token_logprobs

from . import distributed
from .config import RunConfig
from .data import Policy, Task, pad_right, shuffled_positions
from .deepspeed_engine import Trainable
from .ppo_config import PPOConfig
from .rollout import shard
from .tokens import Tokens, encode_examples, learnable


class Pretraining:
    """PPO-ptx (Ouyang et al., 2022): ptx_coef times the mean negative log-likelihood of texts.

    They are as many as the minibatch has responses.

    Its gradient joins the minibatch's before the one optimizer step of both, as in InstructGPT and DeepSpeed-Chat.
    """

    def __init__(
        self, config: PPOConfig, task: Task, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]
    ) -> None:
        self.config = config
        self.pad = tokenizer.pad_token_id
        texts = task.texts()[0]
        rows = encode_examples(texts, tokenizer, config.ptx_max_length, completion_only=True, ends=ends)
        self.rows = learnable(rows)

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
    policy: Trainable, rows: Sequence[Tokens], pad: int, config: RunConfig, micro: int
) -> Iterator[torch.Tensor]:
    """This rank's micro-batches of a global batch; added up and averaged over ranks, the mean per predicted token."""
    tokens = sum(row.predicted for row in rows)
    mine = rows[shard(len(rows))]
    for start in range(0, len(mine), micro):
        logprobs = text_logprobs(policy, mine[start : start + micro], pad, config.ops_impl)
        yield -logprobs.sum() / (tokens / distributed.world_size())


def text_logprobs(policy: Trainable, rows: Sequence[Tokens], pad: int, impl: str) -> torch.Tensor:
    """[B, L - 1] of the tokens to be learned; others are 0."""
    ids, mask = (x.to(distributed.device()) for x in pad_right([row.ids for row in rows], pad))
    learned = pad_right([row.learned for row in rows], False)[0].to(ids.device)[:, 1:]
    logits = policy(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
    logprobs = token_logprobs(logits, ids[:, 1:], mask=learned, impl=impl)
    assert isinstance(logprobs, torch.Tensor)
    return logprobs
