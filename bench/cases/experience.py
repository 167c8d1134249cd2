"""The advantage chain: KL-shaped rewards, GAE and whitening, one after another."""

from __future__ import annotations

import ppo_kernels
from bench.cases import GAMMA, KL_COEF, LAM, ONE_LAUNCH, ROLLOUT, SCORE_CLIP, Case, Target, normal
from bench.cases.gae import eager as eager_gae
from bench.cases.kl_rewards import eager as eager_kl_rewards
from bench.cases.kl_rewards import inputs as rollout
from bench.cases.whiten import eager as eager_whiten


def chain(values, impl, **rollout):
    mask = rollout["mask"]
    rewards, kl = ppo_kernels.kl_rewards(**rollout, kl_coef=KL_COEF, score_clip=SCORE_CLIP, impl=impl)
    advantages, returns = ppo_kernels.gae(rewards, values, mask, gamma=GAMMA, lam=LAM, impl=impl)
    return ppo_kernels.whiten(advantages, mask, impl=impl), returns, kl


def eager(values, **rollout):
    advantages, returns = eager_gae(eager_kl_rewards(**rollout, kl_estimator="k1"), values, rollout["mask"])
    return eager_whiten(advantages, rollout["mask"]), returns


CASES = (
    Case(
        op="whiten",
        work="kl_rewards + gae + whiten",
        inputs=lambda g, dtype, *shape: rollout(g, dtype, *shape) | {"values": normal(g, *shape)},
        function=chain,
        eager=eager,
        time_loop=True,
        moved=lambda x: 5 * x["values"].nbytes + x["mask"].nbytes,
        device_target=ONE_LAUNCH,
        tolerance=5e-6,
        eager_tolerance=1e-5,
        shapes=ROLLOUT | {"small": [(64, 1024)]},
        targets=(Target("eager", 60), Target("verl", 60)),
    ),
)
