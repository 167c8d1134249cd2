"""gae: a recursion over time. With whitening, as verl and SkyRL do both in one function that they call GAE."""

from __future__ import annotations

import torch

import ppo_kernels
from bench.cases import (
    GAMMA,
    LAM,
    ROLLOUT,
    SMALL_CALL_TARGETS,
    TOKEN_AXES,
    Case,
    Data,
    DeviceTarget,
    Target,
    meetings,
    normal,
    packed,
    right_padded,
    rows,
    tokens,
)
from bench.cases.whiten import eager as eager_whiten


def eager(rewards, values, mask, gamma=GAMMA, lam=LAM):
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


def bare(rewards, values, mask):
    return torch.ops.ppo_kernels.gae.default(rewards, values, mask, None, None, None, GAMMA, LAM, 0)


def gae_and_whiten(rewards, values, mask, gamma, lam, impl):
    advantages, returns = ppo_kernels.gae(rewards, values, mask, gamma=gamma, lam=lam, impl=impl)
    return ppo_kernels.whiten(advantages, mask, impl=impl), returns


def eager_gae_and_whiten(rewards, values, mask):
    advantages, returns = eager(rewards, values, mask)
    return eager_whiten(advantages, mask), returns


def inputs(g, dtype, batch, length):
    rewards, values = normal(g, batch, length), normal(g, batch, length)
    return {"rewards": rewards, "values": values, "mask": right_padded(g, batch, length)}


def contract_inputs(g, dtype, batch, length):
    x = tokens(g, dtype, batch, length, "rewards", "values")
    return x | rows(g, dtype, batch, "lam", "bootstrap_value")


def accuracy(g):
    for length, gamma, lam in ((1024, 1.0, 0.95), (32768, 1.0, 1.0), (32768, 0.999, 0.99)):
        r, v = torch.randn(2, length, generator=g) * 0.1, torch.randn(2, length, generator=g)
        mask = torch.ones(2, length, dtype=torch.bool)
        options = {"gamma": gamma, "lam": lam}
        yield Data({"rewards": r, "values": v, "mask": mask}, ("advantages", "returns"), options)


CONTRACT = Case(
    op="gae",
    contract=True,
    inputs=contract_inputs,
    options={"gamma": 0.97, "masked_steps": "zero"},
    choices={"masked_steps": ("skip", "zero", "keep")},
    meetings=meetings(((64, 32768),), ((2, 8193),), masked_steps=("skip", "zero", "keep")),
)
SHAPES = ROLLOUT | {"small": [(64, 1024)]}
CASES = (
    CONTRACT,
    packed(CONTRACT),
    Case(
        op="gae",
        work="gae",
        inputs=inputs,
        options={"gamma": GAMMA, "lam": LAM},
        eager=eager,
        time_loop=True,
        bare=bare,
        moved=lambda x: 4 * x["values"].nbytes + x["mask"].nbytes,
        device_target=DeviceTarget(seconds={(512, 2048): 6e-6, (64, 32768): 11e-6}, call_seconds=15e-6),
        tolerance=1e-6,
        eager_tolerance=1e-5,
        shapes=SHAPES,
        small_call=(8, 128),
        axes=TOKEN_AXES,
        threads=(64, 8192),
        targets=(Target("eager", 60), Target("OpenRLHF", 25)),
        small_call_targets=SMALL_CALL_TARGETS,
        accuracy=accuracy,
    ),
    Case(
        op="gae",
        work="gae + whiten",
        inputs=inputs,
        options={"gamma": GAMMA, "lam": LAM},
        function=gae_and_whiten,
        eager=eager_gae_and_whiten,
        time_loop=True,
        moved=lambda x: 7 * x["values"].nbytes + 3 * x["mask"].nbytes,
        tolerance=2e-6,
        eager_tolerance=1e-5,
        shapes={size: SHAPES[size] for size in ("small", "full")},
        targets=(Target("verl", 60),),
    ),
)
