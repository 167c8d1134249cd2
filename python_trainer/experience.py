"""From a rollout to what the losses need: four forward passes, scores, and minibatches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from ppo_kernels import token_logprobs

from . import launch
from .config import PPOConfig, UserError
from .engines import Policy
from .rollout import Rollout
from .scores import ScoreShaping

Judge = Callable[[Rollout], torch.Tensor]


@dataclass
class Experience:
    """Rows of the global batch, the same on every rank."""

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    raw_scores: torch.Tensor  # as a person reads them
    scores: torch.Tensor  # scaled and clipped, as the algorithm learns from them
    kl: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> "Experience":
        return Experience(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def rollout(self) -> Rollout:
        return Rollout(self.sequences, self.attention_mask, self.mask)


def score_tokens(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """[B, T] log-probabilities of the sampled tokens at the sampling temperature."""
    logprobs = token_logprobs(
        _response_logits(policy, rollout),
        rollout.responses,
        temperature=policy.temperature,
        mask=rollout.mask,
        impl=policy.impl,
    )
    assert isinstance(logprobs, torch.Tensor)
    return logprobs


def score_tokens_and_entropy(
    policy: Policy, rollout: Rollout, *, differentiable: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with the entropy of each token's distribution: as a metric, or with its gradient."""
    logprobs, entropy = token_logprobs(
        _response_logits(policy, rollout),
        rollout.responses,
        temperature=policy.temperature,
        mask=rollout.mask,
        entropy=True if differentiable else "detached",
        impl=policy.impl,
    )
    return logprobs, entropy


def _response_logits(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """Row t predicts response token t: the last prompt position is in, the last response position out."""
    width = rollout.mask.shape[1]
    logits = policy.model(**model_inputs(rollout), use_cache=False, logits_to_keep=width + 1).logits
    return logits[:, :-1]


def score_values(critic: Any, rollout: Rollout) -> torch.Tensor:
    """[B, T] the critic's value before each response token."""
    return critic(**model_inputs(rollout))[:, rollout.prompt_width - 1 : -1]


def score_responses(reward_model: Any, rollout: Rollout) -> torch.Tensor:
    """[B] the reward model's number at the last token of prompt and response."""
    scores = reward_model(**model_inputs(rollout))
    last = rollout.prompt_width + rollout.mask.sum(dim=1, keepdim=True) - 1
    return scores.gather(1, last).squeeze(1)


def model_inputs(rollout: Rollout) -> dict[str, torch.Tensor]:
    return {
        "input_ids": rollout.sequences,
        "attention_mask": rollout.attention_mask.long(),
        "position_ids": rollout.position_ids,
    }


@torch.no_grad()
def by_rows(function: Callable[[Rollout], torch.Tensor], rollout: Rollout, rows: int) -> torch.Tensor:
    """`function` over a few rows at a time, for memory."""
    return torch.cat([function(rollout[i : i + rows]) for i in range(0, len(rollout), rows)])


def collect(
    actor: Policy,
    reference: Policy,
    critic: Any,
    judge: Judge,
    shaping: ScoreShaping,
    rollout: Rollout,
    eos: int,
    config: PPOConfig,
) -> Experience:
    """Score this rank's rollout; advantages and returns are left to the algorithm."""
    rows = config.local_rollout_forward_batch_size
    logprobs = by_rows(lambda part: score_tokens(actor, part), rollout, rows)
    ref_logprobs = by_rows(lambda part: score_tokens(reference, part), rollout, rows)
    values = torch.zeros_like(logprobs)
    if critic is not None:
        values = by_rows(lambda part: score_values(critic, part), rollout, rows)
    raw = by_rows(judge, rollout, rows).to(logprobs)
    finite = launch.gather_rows(raw).isfinite()  # all ranks stop together, or none
    if not finite.all():
        bad = int((~finite).sum())
        raise UserError(f"the score of {bad} of {len(finite)} responses is not finite; the weights are untouched")
    raw = shaping.penalised(raw, rollout.ended(eos))
    shaping.observe(launch.gather_rows(raw))
    return Experience(
        rollout.sequences,
        rollout.attention_mask,
        rollout.mask,
        logprobs,
        ref_logprobs,
        values,
        raw,
        shaping.scaled(raw),
        kl=torch.zeros_like(raw),
        advantages=torch.zeros_like(values),
        returns=torch.zeros_like(values),
    )


def gathered(local: Experience) -> Experience:
    """The experience of all ranks: small next to logits, and every rank can then cut the same minibatches."""
    return Experience(*(launch.gather_rows(getattr(local, field.name)) for field in fields(local)))


def minibatches(rows: int, group_size: int, count: int, seed: int) -> Iterator[torch.Tensor]:
    """Row numbers of each minibatch, in an order of the seed's; responses to one prompt stay together."""
    order = torch.randperm(rows // group_size, generator=torch.Generator().manual_seed(seed))
    for groups in order.chunk(count):
        yield (groups[:, None] * group_size + torch.arange(group_size)).flatten()
