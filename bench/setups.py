"""One set-up per op: its inputs, the call, and the same work in eager code as a trainer writes it.

Speed, memory and error are all measured on these. Inputs are made when they are first asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

import ppo_kernels
from bench import eager
from bench.eager import CLIP, GAMMA, KL_COEF, LAM, SCORE_CLIP
from bench.work import DEVICE, Inputs, Setup


def _mask(*shape: int) -> Tensor:
    """Responses of 80 to 100 % of the columns, padded on the right."""
    rows, columns = shape
    lengths = torch.randint(max(1, columns * 4 // 5), columns + 1, (rows, 1), device=DEVICE)
    return torch.arange(columns, device=DEVICE) < lengths


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def _grid(x: Tensor) -> Tensor:
    """Multiples of 1/64: no token is so near to a clip (0.2, log 0.8, log 1.2) that rounding decides its gradient."""
    return (64 * x).round() / 64


def _name(work: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str:
    return f"{work} {'bf16' if dtype == torch.bfloat16 else 'fp32'} {list(shape)}"


def token_logprobs(
    dtype: torch.dtype, rows: int, vocab: int, *, entropy: bool = False, backward: bool = False
) -> Setup:
    narrow = dtype == torch.bfloat16

    def make():
        logits = _normal(rows, vocab).to(dtype).requires_grad_(backward)
        return {"logits": logits, "labels": torch.randint(vocab, (rows,), device=DEVICE)}

    def plain(logits, labels):
        logp = eager.token_logprobs(logits, labels)
        return (logp, eager.entropy(logits)) if entropy else logp

    work = f"token_logprobs{' + entropy' if entropy else ''}{' fwd+bwd' if backward else ''}"
    return Setup(
        op="token_logprobs",
        work=work,
        name=_name(work, (rows, vocab), dtype),
        make=make,
        run=lambda impl, **inputs: ppo_kernels.token_logprobs(**inputs, entropy=entropy, impl=impl),
        count=lambda inputs: inputs["logits"].nbytes * (3 if backward else 1),
        tolerance=5e-3 if backward and narrow else 2e-5,
        plain=plain,
        eager_tolerance=(1e-1 if entropy else 3e-2) if narrow else 1e-4,  # log p = -12 in bf16: p is off by up to 3 %
        wrt="logits" if backward else None,
    )


def _advantage_inputs(*shape: int) -> Inputs:
    return {"rewards": _normal(*shape), "values": _normal(*shape), "mask": _mask(*shape)}


def _bare_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.ppo_kernels.gae.default(rewards, values, mask, None, None, None, GAMMA, LAM, 0)


def gae(*shape: int) -> Setup:
    return Setup(
        op="gae",
        work="gae",
        name=_name("gae", shape),
        make=lambda: _advantage_inputs(*shape),
        run=lambda impl, **inputs: ppo_kernels.gae(**inputs, gamma=GAMMA, lam=LAM, impl=impl),
        count=lambda inputs: 4 * inputs["values"].nbytes + inputs["mask"].nbytes,
        tolerance=1e-6,
        plain=eager.gae,
        eager_tolerance=1e-5,
        steps=True,
        bare=_bare_gae,
    )


def gae_whiten(*shape: int) -> Setup:
    """What verl and SkyRL call GAE: their function whitens the advantages too."""

    def run(impl, rewards, values, mask):
        advantages, returns = ppo_kernels.gae(rewards, values, mask, gamma=GAMMA, lam=LAM, impl=impl)
        return ppo_kernels.whiten(advantages, mask, impl=impl), returns

    def plain(rewards, values, mask):
        advantages, returns = eager.gae(rewards, values, mask)
        return eager.whiten(advantages, mask), returns

    return Setup(
        op="gae",
        work="gae + whiten",
        name=_name("gae + whiten", shape),
        make=lambda: _advantage_inputs(*shape),
        run=run,
        count=lambda inputs: 7 * inputs["values"].nbytes + 3 * inputs["mask"].nbytes,
        tolerance=2e-6,
        plain=plain,
        eager_tolerance=1e-5,
        steps=True,
    )


def _rollout(*shape: int) -> Inputs:
    logprobs, ref_logprobs = -torch.rand(2, *shape, device=DEVICE)
    return {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "scores": _normal(shape[0]), "mask": _mask(*shape)}


def _kl_rewards(impl: str, estimator: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return ppo_kernels.kl_rewards(**inputs, kl_coef=KL_COEF, kl_estimator=estimator, score_clip=SCORE_CLIP, impl=impl)


def kl_rewards(estimator: str, *shape: int) -> Setup:
    return Setup(
        op="kl_rewards",
        work=f"kl_rewards {estimator}",
        name=_name(f"kl_rewards {estimator}", shape),
        make=lambda: _rollout(*shape),
        run=lambda impl, **inputs: _kl_rewards(impl, estimator, inputs),
        count=lambda inputs: 3 * inputs["logprobs"].nbytes + inputs["mask"].nbytes,
        tolerance=5e-6,
        plain=lambda **inputs: eager.kl_rewards(**inputs, estimator=estimator),
        eager_tolerance=1e-5,
    )


def whiten(*shape: int) -> Setup:
    return Setup(
        op="whiten",
        work="whiten",
        name=_name("whiten", shape),
        make=lambda: {"x": _normal(*shape), "mask": _mask(*shape)},
        run=lambda impl, **inputs: ppo_kernels.whiten(**inputs, impl=impl),
        count=lambda inputs: 3 * inputs["x"].nbytes + 2 * inputs["mask"].nbytes,
        tolerance=2e-6,
        plain=eager.whiten,
        eager_tolerance=1e-5,
    )


def experience(*shape: int) -> Setup:
    """kl_rewards, gae and whiten, one after another."""

    def run(impl, values, **rollout):
        mask = rollout["mask"]
        rewards, kl = _kl_rewards(impl, "k1", rollout)
        advantages, returns = ppo_kernels.gae(rewards, values, mask, gamma=GAMMA, lam=LAM, impl=impl)
        return ppo_kernels.whiten(advantages, mask, impl=impl), returns, kl

    def plain(values, **rollout):
        advantages, returns = eager.gae(eager.kl_rewards(**rollout, estimator="k1"), values, rollout["mask"])
        return eager.whiten(advantages, rollout["mask"]), returns

    return Setup(
        op="gae",
        work="kl_rewards + gae + whiten",
        name=_name("kl_rewards + gae + whiten", shape),
        make=lambda: _rollout(*shape) | {"values": _normal(*shape)},
        run=run,
        count=lambda inputs: 10 * inputs["values"].nbytes + 4 * inputs["mask"].nbytes,
        tolerance=5e-6,
        plain=plain,
        eager_tolerance=1e-5,
        steps=True,
    )


def policy_loss(*shape: int, ref: bool = False) -> Setup:
    penalty = {"kl_coef": KL_COEF, "kl_estimator": "k3"} if ref else {}

    def make():
        logprobs = _grid(-torch.rand(shape, device=DEVICE)).requires_grad_()
        old_logprobs, ref_logprobs = _grid(logprobs.detach() + 0.1 * torch.randn(2, *shape, device=DEVICE))
        inputs = {
            "logprobs": logprobs,
            "old_logprobs": old_logprobs,
            "advantages": _normal(*shape),
            "mask": _mask(*shape),
        }
        return inputs | ({"ref_logprobs": ref_logprobs} if ref else {})

    work = f"policy_loss{' + ref KL k3' if ref else ''} fwd+bwd"
    return Setup(
        op="policy_loss",
        work=work,
        name=_name(work, shape),
        make=make,
        run=lambda impl, **inputs: ppo_kernels.policy_loss(**inputs, cliprange=CLIP, impl=impl, **penalty),
        count=lambda inputs: (6 + ref) * inputs["logprobs"].nbytes + inputs["mask"].nbytes,
        tolerance=1e-5,
        plain=eager.policy_loss,
        eager_tolerance=1e-4,
        wrt="logprobs",
    )


def _away_from_the_clip(logprobs: Tensor) -> Tensor:
    """Log-ratios within 0.1 or of size 0.5: a log-probability rounded to bf16 clips the same tokens."""
    small, sign = 0.2 * torch.rand_like(logprobs) - 0.1, torch.randn_like(logprobs).sign()
    return torch.where(torch.rand_like(logprobs) < 0.2, 0.5 * sign, small)


def policy_loss_from_logits(dtype: torch.dtype, rows: int, columns: int, vocab: int) -> Setup:
    """token_logprobs and policy_loss, differentiated down to the logits. The last column predicts no token."""
    work = "token_logprobs + policy_loss fwd+bwd"

    def make():
        logits = _normal(rows, columns + 1, vocab).to(dtype)
        labels = torch.randint(vocab, (rows, columns), device=DEVICE)
        logprobs = eager.token_logprobs(logits[:, :-1].float(), labels)
        return {
            "logits": logits.requires_grad_(),
            "labels": labels,
            "old_logprobs": logprobs + _away_from_the_clip(logprobs),
            "advantages": _normal(rows),
            "mask": _mask(rows, columns),
        }

    def run(impl, logits, labels, old_logprobs, advantages, mask):
        logprobs = ppo_kernels.token_logprobs(logits[:, :-1], labels, mask=mask, impl=impl)
        advantages = advantages[:, None].expand_as(logprobs)
        return ppo_kernels.policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=CLIP, impl=impl)[0]

    def plain(logits, labels, old_logprobs, advantages, mask):
        logprobs = eager.token_logprobs(logits[:, :-1], labels)
        return eager.policy_loss(logprobs, old_logprobs, advantages[:, None], mask)[0]

    return Setup(
        op="policy_loss",
        work=work,
        name=_name(work, (rows, columns, vocab), dtype),
        make=make,
        run=run,
        count=lambda inputs: 3 * inputs["logits"].nbytes,
        tolerance=5e-3 if dtype == torch.bfloat16 else 1e-4,
        plain=plain,
        eager_tolerance=1e-1,  # a log-probability of -12 in bf16 is off by up to 3 %
        wrt="logits",
    )


def value_loss(*shape: int) -> Setup:
    def make():
        values = _grid(_normal(*shape)).requires_grad_()
        old_values = _grid(values.detach() + 0.3 * torch.randn_like(values))
        return {"values": values, "old_values": old_values, "returns": _grid(_normal(*shape)), "mask": _mask(*shape)}

    return Setup(
        op="value_loss",
        work="value_loss fwd+bwd",
        name=_name("value_loss fwd+bwd", shape),
        make=make,
        run=lambda impl, **inputs: ppo_kernels.value_loss(**inputs, cliprange_value=CLIP, impl=impl),
        count=lambda inputs: 6 * inputs["values"].nbytes + inputs["mask"].nbytes,
        tolerance=1e-5,
        plain=eager.value_loss,
        eager_tolerance=1e-4,
        wrt="values",
    )


def p3o_loss(batch: int, length: int, group_size: int) -> Setup:
    def make():
        logprobs = (-torch.rand(batch, length, device=DEVICE)).requires_grad_()
        steps = torch.randn(2, batch, length, device=DEVICE) * 0.3 / length**0.5
        old_logprobs, ref_logprobs = logprobs.detach() + steps
        inputs = {"logprobs": logprobs, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
        return inputs | {"scores": _normal(batch), "mask": _mask(batch, length)}

    return Setup(
        op="p3o_loss",
        work=f"p3o_loss of {group_size} fwd+bwd",
        name=_name(f"p3o_loss of {group_size} fwd+bwd", (batch, length)),
        make=make,
        run=lambda impl, **inputs: ppo_kernels.p3o_loss(**inputs, group_size=group_size, impl=impl),
        count=lambda inputs: 6 * inputs["logprobs"].nbytes + 2 * inputs["mask"].nbytes,
        tolerance=1e-5,
        plain=lambda **inputs: eager.p3o_loss(**inputs, group_size=group_size),
        eager_tolerance=1e-3,
        wrt="logprobs",
    )


def group_advantages(prompts: int, responses: int) -> Setup:
    ids = torch.arange(prompts, device=DEVICE).repeat(responses)
    return Setup(
        op="group_advantages",
        work="group_advantages grpo",
        name=_name("group_advantages grpo", (prompts * responses,)),
        make=lambda: {"scores": _normal(prompts * responses), "group_ids": ids},
        run=lambda impl, **inputs: ppo_kernels.group_advantages(**inputs, mode="grpo", impl=impl),
        count=lambda inputs: 2 * inputs["scores"].nbytes + inputs["group_ids"].nbytes,
        tolerance=1e-5,
        plain=eager.group_advantages,
        eager_tolerance=1e-3,
    )
