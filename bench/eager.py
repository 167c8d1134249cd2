"""The same work as a trainer writes it in a few lines, in the dtype of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

CLIP, GAMMA, LAM, KL_COEF, SCORE_CLIP = 0.2, 1.0, 0.95, 0.1, 5.0


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits, -1) - (torch.softmax(logits, -1) * logits).sum(-1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One step per token for all rows at once; masked tokens pass the carry on."""
    live = mask.to(rewards.dtype)
    advantage, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    steps = []
    for t in reversed(range(rewards.size(1))):
        m = live[:, t]
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = m * (delta + GAMMA * LAM * advantage) + (1 - m) * advantage
        next_value = m * values[:, t] + (1 - m) * next_value
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], 1) * live
    return advantages, (advantages + values) * live


def kl_rewards(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor, estimator: str) -> Tensor:
    x = ref_logprobs - logprobs
    k = -x if estimator == "k1" else torch.exp(x) - 1 - x
    rewards = torch.where(mask, -KL_COEF * k, 0.0)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    rewards[torch.arange(len(scores)), last] += scores.clamp(-SCORE_CLIP, SCORE_CLIP)
    return rewards


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def policy_loss(logprobs, old_logprobs, advantages, mask, ref_logprobs=None):
    d = (logprobs - old_logprobs).clamp(-20.0, 20.0)
    ratio = d.exp()
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    x = torch.zeros_like(d) if ref_logprobs is None else (ref_logprobs - logprobs).clamp(-20.0, 20.0)
    k3 = x.exp() - 1 - x
    loss = _mean(losses + KL_COEF * k3, mask)
    with torch.no_grad():
        mean = _mean(ratio, mask)
        return (
            loss,
            _mean(-d, mask),
            _mean(0.5 * d * d, mask),
            _mean(ratio - 1 - d, mask),
            mean,
            _mean((ratio - mean).square(), mask),
            torch.where(mask, ratio, 0.0).max(),
            _mean((ratio > 1 + CLIP) & (advantages > 0), mask),
            _mean((ratio < 1 - CLIP) & (advantages < 0), mask),
            torch.zeros_like(mean),
            _mean(k3, mask),
        )


def value_loss(values, old_values, returns, mask):
    clipped = values.clamp(old_values - CLIP, old_values + CLIP)
    plain_error, clipped_error = (values - returns).square(), (clipped - returns).square()
    loss = 0.5 * _mean(torch.max(plain_error, clipped_error), mask)
    with torch.no_grad():
        error = _mean(values - returns, mask)
        target = _mean(returns, mask)
        unexplained = _mean((values - returns - error).square(), mask)
        explained = 1 - unexplained / _mean((returns - target).square(), mask)
        return loss, _mean(clipped_error > plain_error, mask), error, explained


def p3o_loss(logprobs, old_logprobs, ref_logprobs, scores, mask, group_size):
    """Joint clipping, all pairs of each group."""
    s, s_old = ((x - ref_logprobs).mul(mask).sum(1).view(-1, group_size) for x in (logprobs, old_logprobs))
    first, second = torch.triu_indices(group_size, group_size, 1, device=logprobs.device)
    r = scores.view(-1, group_size)
    d, d_old = s[:, first] - s[:, second], s_old[:, first] - s_old[:, second]
    q = r[:, first] - r[:, second] - 0.05 * d.detach()
    drift = (s - s_old).detach()
    k = q * (drift[:, first] + drift[:, second]).exp().clamp(0.1, 10.0)
    return 0.5 * torch.max(-k * d, -k * torch.clamp(d, d_old - 0.2, d_old + 0.2)).mean()


def group_advantages(scores: Tensor, group_ids: Tensor) -> Tensor:
    """A loop over prompts, as most trainers have it."""
    advantages = torch.empty_like(scores)
    for prompt in group_ids.unique():
        mine = group_ids == prompt
        group = scores[mine]
        advantages[mine] = (group - group.mean()) / (group.std() + 1e-4)
    return advantages
