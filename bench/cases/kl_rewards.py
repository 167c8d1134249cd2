"""kl_rewards: per token the drift from the reference model, and the score at the end."""

from __future__ import annotations

import torch

from bench.cases import (
    ESTIMATORS,
    KL_COEF,
    MEASURED,
    ROLLOUT,
    SCORE_CLIP,
    TOKEN_AXES,
    Case,
    Data,
    meetings,
    normal,
    packed,
    right_padded,
    rows,
    tokens,
    uniform,
)


def eager(logprobs, ref_logprobs, scores, mask, kl_estimator):
    x = ref_logprobs - logprobs
    k = -x if kl_estimator == "k1" else torch.exp(x) - 1 - x
    rewards = torch.where(mask, -KL_COEF * k, 0.0)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    rewards[torch.arange(len(scores)), last] += scores.clamp(-SCORE_CLIP, SCORE_CLIP)
    return rewards


def inputs(g, dtype, batch, length):
    logprobs, ref_logprobs = -uniform(g, 2, batch, length)
    scores = normal(g, batch)
    return {
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "scores": scores,
        "mask": right_padded(g, batch, length),
    }


def contract_inputs(g, dtype, batch, length):
    x = tokens(g, dtype, batch, length, "logprobs", "ref_logprobs") | rows(g, dtype, batch, "scores")
    return x | {"score_index": torch.randint(-1, length, (batch,), generator=g)}


def work(estimator, **more):
    return Case(
        op="kl_rewards",
        work=f"kl_rewards {estimator}",
        inputs=inputs,
        options={"kl_coef": KL_COEF, "kl_estimator": estimator, "score_clip": SCORE_CLIP},
        eager=lambda **x: eager(**x, kl_estimator=estimator),
        moved=lambda x: 3 * x["logprobs"].nbytes + x["mask"].nbytes,
        tolerance=5e-6,
        eager_tolerance=1e-5,
        shapes=ROLLOUT if estimator == "k3" else {size: ROLLOUT[size] for size in MEASURED},
        **more,
    )


def accuracy(g):
    for gap in (1e-3, 1e-2, 0.3):
        logp = -torch.rand(8, 1024, generator=g) * 4
        ref, scores = logp + torch.randn(8, 1024, generator=g) * gap, torch.randn(8, generator=g)
        yield Data(
            {"logprobs": logp, "ref_logprobs": ref, "scores": scores},
            ("k3 rewards", "k3 sums"),
            {"score_clip": None},
            lambda out: [out[0][:, :-1], out[1]],  # the score hides the KL of the last token
        )


def accurate_eager(logprobs, ref_logprobs, scores, **options):
    d = ref_logprobs - logprobs
    k3 = d.exp() - d - 1
    return -KL_COEF * k3, k3.sum(1)


CONTRACT = Case(
    op="kl_rewards",
    contract=True,
    inputs=contract_inputs,
    options={"kl_estimator": "k3", "kl_log_clamp": 20.0, "kl_clamp": 10.0},
    choices={"kl_estimator": ESTIMATORS, "kl_coef": (torch.tensor(0.1), 0.1)},
    bare_options={"score_clip": None, "kl_log_clamp": None, "kl_clamp": None},
    meetings=meetings(((64, 32768),), ((2, 8193),), kl_estimator=("k1", "k3")),
)
CASES = (
    CONTRACT,
    packed(CONTRACT),
    work("k1", small_call=(8, 128), compiled=("full",)),
    work("k3", axes=TOKEN_AXES, threads=(64, 8192), accuracy=accuracy, accurate_eager=accurate_eager),
)
