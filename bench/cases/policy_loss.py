"""policy_loss with its statistics, forward and backward; also from the logits on."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

import ppo_kernels
from bench.cases import (
    CLIP,
    ENTROPY_COEF,
    ESTIMATORS,
    GPU,
    KL_COEF,
    MINIBATCH,
    ONE_LAUNCH,
    SMALL_CALL_TARGETS,
    TOKEN_AXES,
    Case,
    Data,
    Target,
    differentiated,
    grid,
    mean,
    meetings,
    normal,
    packed,
    right_padded,
    rows,
    tokens,
    uniform,
)
from bench.cases.token_logprobs import eager as eager_logprobs


def eager(logprobs, old_logprobs, advantages, mask, ref_logprobs=None):
    d = (logprobs - old_logprobs).clamp(-20.0, 20.0)
    ratio = d.exp()
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    x = torch.zeros_like(d) if ref_logprobs is None else (ref_logprobs - logprobs).clamp(-20.0, 20.0)
    k3 = x.exp() - 1 - x
    loss = mean(losses + KL_COEF * k3, mask)
    with torch.no_grad():
        ratio_mean = mean(ratio, mask)
        return (
            loss,
            mean(-d, mask),
            mean(0.5 * d * d, mask),
            mean(ratio - 1 - d, mask),
            ratio_mean,
            mean((ratio - ratio_mean).square(), mask),
            torch.where(mask, ratio, 0.0).max(),
            mean((ratio > 1 + CLIP) & (advantages > 0), mask),
            mean((ratio < 1 - CLIP) & (advantages < 0), mask),
            torch.zeros_like(ratio_mean),
            mean(k3, mask),
        )


def bare(logprobs, old_logprobs, advantages, mask):
    inputs = (old_logprobs, advantages, mask, *(None,) * 6)
    options = (CLIP, CLIP, math.inf, 20.0, 0.0, 2, 20.0, math.inf, False, 0, 0, math.inf, 1.0, 1.05)
    return differentiated(torch.ops.ppo_kernels.policy_loss.default, logprobs, *inputs, *options)


def inputs(g, dtype, *shape, ref=False):
    logprobs = grid(-uniform(g, *shape))
    old_logprobs, ref_logprobs = grid(logprobs + 0.1 * normal(g, 2, *shape))
    x = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": normal(g, *shape)}
    return x | {"mask": right_padded(g, *shape)} | ({"ref_logprobs": ref_logprobs} if ref else {})


def inputs_with_reference(*args):
    return inputs(*args, ref=True)


def inputs_by_row(*args):
    x = inputs(*args)
    row_weight, normalizer = ppo_kernels.aggregation_weights(x["mask"], "seq-mean-token-mean")
    return x | {"row_weight": row_weight, "normalizer": normalizer}


def inputs_with_entropy(g, dtype, *shape):
    return inputs(g, dtype, *shape) | {"entropy": 4 * uniform(g, *shape)}


def eager_with_entropy(logprobs, old_logprobs, advantages, mask, entropy):
    return eager(logprobs, old_logprobs, advantages, mask)[0] - ENTROPY_COEF * mean(entropy, mask)


def contract_inputs(g, dtype, batch, length):
    names = ("logprobs", "old_logprobs", "advantages", "weights", "ref_logprobs")
    x = tokens(g, dtype, batch, length, *names) | rows(g, dtype, batch, "row_weight")
    return x | {"normalizer": torch.tensor(17.0)}


def entropy_inputs(g, dtype, batch, length):
    return {"entropy": tokens(g, dtype, batch, length, "entropy")["entropy"], "entropy_normalizer": torch.tensor(11.0)}


def inputs_from_logits(g, dtype, batch, columns, vocab):
    """The last column predicts no token. Log-ratios are within 0.1 or of size 0.5: rounding clips none of them."""
    logits = normal(g, batch, columns + 1, vocab).to(dtype)
    labels = torch.randint(vocab, (batch, columns), generator=g, device=g.device)
    logprobs = eager_logprobs(logits[:, :-1].float(), labels)
    small, sign = 0.2 * uniform(g, batch, columns) - 0.1, normal(g, batch, columns).sign()
    apart = torch.where(uniform(g, batch, columns) < 0.2, 0.5 * sign, small)
    x = {"logits": logits, "labels": labels, "old_logprobs": logprobs + apart, "advantages": normal(g, batch)}
    return x | {"mask": right_padded(g, batch, columns)}


def from_logits(logits, labels, old_logprobs, advantages, mask, impl):
    logprobs = ppo_kernels.token_logprobs(logits[:, :-1], labels, mask=mask, impl=impl)
    advantages = advantages[:, None].expand_as(logprobs)
    return ppo_kernels.policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=CLIP, impl=impl)[0]


def eager_from_logits(logits, labels, old_logprobs, advantages, mask):
    return eager(eager_logprobs(logits[:, :-1], labels), old_logprobs, advantages[:, None], mask)[0]


def accuracy(g):
    for spread in (0.01, 0.5):
        old = -torch.rand(64, 1024, generator=g) * 6
        logp, adv = old + torch.randn(64, 1024, generator=g) * spread, torch.randn(64, 1024, generator=g)
        mask = torch.ones(64, 1024, dtype=torch.bool)
        yield Data({"logprobs": logp, "old_logprobs": old, "advantages": adv, "mask": mask}, ("loss", "gradient"))


CONTRACT = Case(
    op="policy_loss",
    contract=True,
    inputs=contract_inputs,
    options={"cliprange": (0.2, 0.3), "dual_clip": 3.0, "kl_coef": 0.1, "kl_estimator": "k3"},
    leaf="logprobs",
    per_row=("advantages", "weights"),
    choices={"kl_estimator": ESTIMATORS, "kl_coef": (torch.tensor(0.1), 0.1)},
    bare_options={"kl_coef": 0.0},
    meetings=meetings(tuple(GPU), ((2, 9001),)),
)
#: Other forms have kernels of their own.
SURROGATE = replace(
    CONTRACT,
    variant="surrogate",
    options={"surrogate": "sapo", "kl_coef": 0.1, "kl_estimator": "k3", "unbiased_kl": True},
    choices={"surrogate": ("cispo", "dppo_tv", "dppo_kl", "sapo")},
    meetings={},
)
LEVEL = replace(
    CONTRACT,
    variant="level",
    options={"importance_sampling_level": "sequence", "cliprange": (0.2, 0.3), "kl_coef": 0.1, "kl_estimator": "k3"},
    choices={"importance_sampling_level": ("geometric", "sequence_token", "sequence")},
)
#: The entropy is a second input with a gradient.
ENTROPY = replace(
    CONTRACT,
    variant="entropy",
    inputs=lambda *args: contract_inputs(*args) | entropy_inputs(*args),
    options={"entropy_coef": 0.1},
    leaf="entropy",
    choices={},
    bare_options={"entropy_coef": 0.0},
    meetings={},
)


def gspo(logprobs, old_logprobs, advantages, mask):
    """The mean log-ratio of a row as a constant, times the token's own over itself (GSPO-token)."""
    d = logprobs - old_logprobs
    of_row = (d * mask).sum(-1) / mask.sum(-1)
    ratio = (logprobs - logprobs.detach() + of_row.detach()[:, None]).clamp(max=10.0).exp()
    return mean(torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)), mask)


def sapo(logprobs, old_logprobs, advantages, mask, row_weight, normalizer):
    ratio = (logprobs - old_logprobs).clamp(-20.0, 20.0).exp()
    tau = torch.where(advantages > 0, 1.0, 1.05)
    losses = -advantages * torch.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau
    return ((losses * mask).sum(-1) / mask.sum(-1)).mean()


def dppo(logprobs, old_logprobs, advantages, mask):
    ratio = (logprobs - old_logprobs).clamp(-20.0, 20.0).exp()
    with torch.no_grad():
        moved = logprobs.exp() - old_logprobs.exp()
        kept = torch.where(advantages > 0, moved <= CLIP, moved >= -CLIP)
    return mean(-advantages * ratio.clamp(max=DELTA).detach() * logprobs * kept, mask)


DELTA = 20.0
TIMED = Case(
    op="policy_loss",
    inputs=inputs,
    leaf="logprobs",
    moved=lambda x: 4 * x["logprobs"].nbytes + x["mask"].nbytes,
    device_target=ONE_LAUNCH,
    shapes=MINIBATCH,
    compiled=("quick", "full", "gpu"),
)
CASES = (
    CONTRACT,
    packed(CONTRACT),
    SURROGATE,
    LEVEL,
    ENTROPY,
    replace(
        TIMED,
        work="policy_loss GSPO-token fwd+bwd",
        options={"cliprange": CLIP, "importance_sampling_level": "sequence_token"},
        eager=gspo,
        moved=lambda x: 6 * x["logprobs"].nbytes + 2 * x["mask"].nbytes,
        device_target=None,
        targets=(Target("verl", 5),),
    ),
    replace(
        TIMED,
        work="policy_loss SAPO fwd+bwd",
        inputs=inputs_by_row,
        options={"surrogate": "sapo"},
        eager=sapo,
        targets=(Target("eager", 5, reached=4, limit="one sigmoid and a product: seven passes"),),
    ),
    replace(
        TIMED,
        work="policy_loss DPPO-TV fwd+bwd",
        options={"surrogate": "dppo_tv", "cliprange": CLIP, "delta": DELTA},
        eager=dppo,
        targets=(Target("verl", 5),),
    ),
    Case(
        op="policy_loss",
        work="policy_loss fwd+bwd",
        inputs=inputs,
        options={"cliprange": CLIP},
        leaf="logprobs",
        eager=eager,
        bare=bare,
        moved=lambda x: 4 * x["logprobs"].nbytes + x["mask"].nbytes,
        device_target=ONE_LAUNCH,
        shapes=MINIBATCH,
        small_call=(8, 128),
        small_call_targets=SMALL_CALL_TARGETS,
        axes=TOKEN_AXES,
        threads=(64, 8192),
        targets=(Target("eager", 10), Target("torch.compile", 1.5)),
        accuracy=accuracy,
    ),
    replace(
        TIMED,
        work="policy_loss + entropy bonus fwd+bwd",
        inputs=inputs_with_entropy,
        options={"cliprange": CLIP, "entropy_coef": ENTROPY_COEF},
        also=("entropy",),
        eager=eager_with_entropy,
        moved=lambda x: 6 * x["logprobs"].nbytes + 2 * x["mask"].nbytes,
        device_target=None,
        targets=(Target("verl", 5),),
        shapes={size: shapes for size, shapes in MINIBATCH.items() if size not in ("gpu", "tiny")},
    ),
    Case(
        op="policy_loss",
        work="policy_loss + ref KL k3 fwd+bwd",
        inputs=inputs_with_reference,
        options={"cliprange": CLIP, "kl_coef": KL_COEF, "kl_estimator": "k3"},
        leaf="logprobs",
        eager=eager,
        moved=lambda x: 5 * x["logprobs"].nbytes + x["mask"].nbytes,
        device_target=ONE_LAUNCH,
        shapes=MINIBATCH,
        compiled=("quick", "full", "gpu"),
    ),
    Case(
        op="policy_loss",
        work="token_logprobs + policy_loss fwd+bwd",
        dtype=torch.bfloat16,
        inputs=inputs_from_logits,
        function=from_logits,
        leaf="logits",
        eager=eager_from_logits,
        moved=lambda x: 3 * x["logits"].nbytes,
        tolerance=5e-3,
        eager_tolerance=1e-1,  # a log-probability of -12 in bf16 is off by up to 3 %
        shapes={"small": [(2, 16, 32000)], "full": [(4, 31, 151936)]},
        compiled=("full",),
    ),
)
