"""The advantage chain, timed: KL-shaped rewards, GAE and whitening in one call."""

from __future__ import annotations

import torch

from bench.cases import GAMMA, KL_COEF, LAM, ONE_LAUNCH, ROLLOUT, SCORE_CLIP, Case, Data, Target, normal
from bench.cases.gae import eager as eager_gae
from bench.cases.kl_rewards import eager as eager_kl_rewards
from bench.cases.kl_rewards import inputs as rollout
from bench.cases.whiten import eager as eager_whiten


def eager(values, **rollout):
    rewards = eager_kl_rewards(**rollout, kl_estimator="k1")
    advantages, returns = eager_gae(rewards, values, rollout["mask"])
    return rewards, eager_whiten(advantages, rollout["mask"]), returns


def accuracy(g):
    shape = (4, 512)
    x = {"logprobs": -torch.rand(shape, generator=g), "ref_logprobs": -torch.rand(shape, generator=g)}
    x |= {"values": torch.randn(shape, generator=g), "scores": torch.randn(4, generator=g)}
    yield Data(x | {"mask": torch.ones(shape, dtype=torch.bool)}, ("rewards", "whitened", "returns"))


CASES = (
    Case(
        op="prepare_experience",
        work="kl_rewards + gae + whiten",
        inputs=lambda g, dtype, *shape: rollout(g, dtype, *shape) | {"values": normal(g, *shape)},
        options={"kl_coef": KL_COEF, "score_clip": SCORE_CLIP, "gamma": GAMMA, "lam": LAM},
        eager=eager,
        time_loop=True,
        moved=lambda x: 5 * x["values"].nbytes + x["mask"].nbytes,
        device_target=ONE_LAUNCH,
        tolerance=5e-6,
        eager_tolerance=1e-5,
        shapes=ROLLOUT | {"small": [(64, 1024)]},
        targets=(Target("eager", 60), Target("verl", 60)),
        accuracy=accuracy,
    ),
)
