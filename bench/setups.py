"""One set-up per op: inputs, the call, the same work in eager code as a trainer writes it, and what may differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ppo_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Setup:
    op: str
    name: str
    forward: Callable[[str], object]  # takes ``impl``
    moved: int  # bytes that have to be read or written, once each
    tolerance: float
    eager: Callable[[], object]  # in the dtype of the inputs; its outputs are the first of ours
    eager_tolerance: float
    loop: Callable[[], object] | None = None  # the time loop that trainers run
    leaf: Tensor | None = None  # the first output is differentiated with respect to it

    def finish(self, outputs: object) -> list[Tensor]:
        """The outputs as a flat list, and the gradient where the set-up has one."""
        flat = _flat(outputs)
        if self.leaf is not None:
            flat.insert(1, torch.autograd.grad(flat[0].sum(), self.leaf)[0])
        return flat

    def call(self, impl: str) -> list[Tensor]:
        return self.finish(self.forward(impl))


def _flat(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    assert isinstance(result, (tuple, list))
    return [t for part in result for t in _flat(part)]


def _mask(*shape: int) -> Tensor:
    return torch.rand(shape, device=DEVICE) < 0.9


def token_logprobs(
    dtype: torch.dtype, rows: int, vocab: int, *, entropy: bool = False, backward: bool = False
) -> Setup:
    logits = torch.randn(rows, vocab, device=DEVICE).to(dtype).requires_grad_(backward)
    labels = torch.randint(vocab, (rows,), device=DEVICE)

    def eager():
        logp = torch.log_softmax(logits, -1).gather(-1, labels[:, None]).squeeze(-1)
        if not entropy:
            return logp
        p = torch.softmax(logits, -1)
        return logp, torch.logsumexp(logits, -1) - (p * logits).sum(-1)

    return Setup(
        op="token_logprobs",
        name=f"token_logprobs{' + entropy' if entropy else ''} {'fwd+bwd ' if backward else ''}"
        f"{'bf16' if dtype == torch.bfloat16 else 'fp32'} [{rows}, {vocab}]",
        forward=lambda impl: ppo_kernels.token_logprobs(logits, labels, entropy=entropy, impl=impl),
        moved=logits.nbytes * (3 if backward else 1),
        tolerance=1e-2 if backward and dtype == torch.bfloat16 else 2e-4,
        eager=eager,
        eager_tolerance=0.1 if dtype == torch.bfloat16 else 1e-3,
        leaf=logits if backward else None,
    )


def eager_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """One step per token for all rows at once; masked tokens pass the carry on."""
    live = mask.to(rewards.dtype)
    advantage, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    steps = []
    for t in reversed(range(rewards.size(1))):
        m = live[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = m * (delta + gamma * lam * advantage) + (1 - m) * advantage
        next_value = m * values[:, t] + (1 - m) * next_value
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], 1) * live
    return advantages, (advantages + values) * live


def gae(*shape: int) -> Setup:
    rewards, values = torch.randn(2, *shape, device=DEVICE)
    mask = _mask(*shape)

    def loop():
        return eager_gae(rewards, values, mask, 1.0, 0.95)

    return Setup(
        op="gae",
        name=f"gae fp32 {list(shape)}",
        forward=lambda impl: ppo_kernels.gae(rewards, values, mask, impl=impl),
        moved=4 * rewards.nbytes + mask.nbytes,
        tolerance=1e-4,
        eager=loop,
        eager_tolerance=1e-3,
        loop=loop,
    )


def eager_kl_rewards(logprobs: Tensor, ref: Tensor, scores: Tensor, mask: Tensor, estimator: str) -> Tensor:
    x = ref - logprobs
    k = -x if estimator == "k1" else torch.exp(x) - 1 - x
    rewards = torch.where(mask, -0.1 * k, 0.0)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    rewards[torch.arange(len(scores)), last] += scores.clamp(-5.0, 5.0)
    return rewards


def kl_rewards(estimator: str, *shape: int) -> Setup:
    logprobs, ref_logprobs = -torch.rand(2, *shape, device=DEVICE)
    scores, mask = torch.randn(shape[0], device=DEVICE), _mask(*shape)
    return Setup(
        op="kl_rewards",
        name=f"kl_rewards fp32 {estimator} {list(shape)}",
        forward=lambda impl: ppo_kernels.kl_rewards(
            logprobs, ref_logprobs, scores, mask, kl_estimator=estimator, impl=impl
        ),
        moved=3 * logprobs.nbytes + mask.nbytes,
        tolerance=1e-3,
        eager=lambda: eager_kl_rewards(logprobs, ref_logprobs, scores, mask, estimator),
        eager_tolerance=1e-4,
    )


def eager_whiten(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def whiten(*shape: int) -> Setup:
    x, mask = torch.randn(shape, device=DEVICE), _mask(*shape)
    return Setup(
        op="whiten",
        name=f"whiten fp32 {list(shape)}",
        forward=lambda impl: ppo_kernels.whiten(x, mask, impl=impl),
        moved=3 * x.nbytes + 2 * mask.nbytes,
        tolerance=1e-4,
        eager=lambda: eager_whiten(x, mask),
        eager_tolerance=1e-3,
    )


def experience(*shape: int) -> Setup:
    """kl_rewards, gae and whiten, one after another."""
    logprobs, ref_logprobs = -torch.rand(2, *shape, device=DEVICE)
    values, mask, scores = torch.randn(shape, device=DEVICE), _mask(*shape), torch.randn(shape[0], device=DEVICE)

    def forward(impl):
        rewards, kl = ppo_kernels.kl_rewards(logprobs, ref_logprobs, scores, mask, impl=impl)
        advantages, returns = ppo_kernels.gae(rewards, values, mask, impl=impl)
        return ppo_kernels.whiten(advantages, mask, impl=impl), returns, kl

    def loop():
        rewards = eager_kl_rewards(logprobs, ref_logprobs, scores, mask, "k1")
        advantages, returns = eager_gae(rewards, values, mask, 1.0, 0.95)
        return eager_whiten(advantages, mask), returns

    return Setup(
        op="gae",
        name=f"kl_rewards + gae + whiten fp32 {list(shape)}",
        forward=forward,
        moved=10 * values.nbytes + 4 * mask.nbytes,
        tolerance=1e-3,
        eager=loop,
        eager_tolerance=1e-3,
        loop=loop,
    )


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def policy_loss(*shape: int, ref: bool = False) -> Setup:
    logprobs = (-torch.rand(shape, device=DEVICE)).requires_grad_()
    old, advantages = logprobs.detach() + 0.1 * torch.randn_like(logprobs), torch.randn(shape, device=DEVICE)
    ref_logprobs = logprobs.detach() + 0.1 * torch.randn_like(logprobs)
    mask = _mask(*shape)
    penalty = {"ref_logprobs": ref_logprobs, "kl_coef": 0.1, "kl_estimator": "k3"} if ref else {}

    def eager():
        d = (logprobs - old).clamp(-20.0, 20.0)
        ratio = d.exp()
        losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
        x = (ref_logprobs - logprobs).clamp(-20.0, 20.0)
        k3 = x.exp() - 1 - x if ref else torch.zeros_like(x)
        loss = _mean(losses + 0.1 * k3, mask)
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
                _mean((ratio > 1.2) & (advantages > 0), mask),
                _mean((ratio < 0.8) & (advantages < 0), mask),
                torch.zeros_like(mean),
                _mean(k3, mask),
            )

    return Setup(
        op="policy_loss",
        name=f"policy_loss{' + ref KL k3' if ref else ''} fwd+bwd fp32 {list(shape)}",
        forward=lambda impl: ppo_kernels.policy_loss(logprobs, old, advantages, mask, impl=impl, **penalty),
        moved=(5 + ref) * logprobs.nbytes + mask.nbytes + logprobs.nbytes,
        tolerance=1e-4,
        eager=eager,
        eager_tolerance=1e-3,
        leaf=logprobs,
    )


def value_loss(*shape: int) -> Setup:
    values = torch.randn(shape, device=DEVICE, requires_grad=True)
    old, returns = values.detach() + 0.3 * torch.randn_like(values), torch.randn(shape, device=DEVICE)
    mask = _mask(*shape)

    def eager():
        clipped = old + (values - old).clamp(-0.2, 0.2)
        plain_error, clipped_error = (values - returns).square(), (clipped - returns).square()
        loss = 0.5 * _mean(torch.max(plain_error, clipped_error), mask)
        with torch.no_grad():
            error = _mean(values - returns, mask)
            target = _mean(returns, mask)
            unexplained = _mean((values - returns - error).square(), mask)
            explained = 1 - unexplained / _mean((returns - target).square(), mask)
            return loss, _mean(clipped_error > plain_error, mask), error, explained

    return Setup(
        op="value_loss",
        name=f"value_loss fwd+bwd fp32 {list(shape)}",
        forward=lambda impl: ppo_kernels.value_loss(values, old, returns, mask, impl=impl),
        moved=6 * values.nbytes + mask.nbytes,
        tolerance=1e-4,
        eager=eager,
        eager_tolerance=1e-3,
        leaf=values,
    )
