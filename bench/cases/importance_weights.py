"""importance_weights with its statistics."""

from __future__ import annotations

import torch

import ppo_kernels
from bench.cases import GPU, ROLLOUT, Case, Data, Target, grid, meetings, normal, packed, right_padded, tokens, uniform

HIGH = 2.0


def eager(logprobs, rollout_logprobs, mask):
    d = (logprobs - rollout_logprobs).clamp(-20.0, 20.0)
    ratio = d.exp() * mask
    return ratio.clamp(max=HIGH), mask


def inputs(g, dtype, *shape):
    rollout = grid(-6.0 * uniform(g, *shape))
    near = rollout + grid(0.1 * normal(g, *shape))
    return {"logprobs": near, "rollout_logprobs": rollout, "mask": right_padded(g, *shape)}


def contract_inputs(g, dtype, batch, length):
    return tokens(g, dtype, batch, length, "logprobs", "rollout_logprobs")


def in_numbers(**inputs):
    """What is kept, as numbers of the weights' dtype, and the statistics."""
    weights, keep, stats = ppo_kernels.importance_weights(**inputs)
    return weights, keep.to(weights.dtype), stats


def accuracy(g):
    for gap in (0.01, 0.5):
        rollout = -torch.rand(64, 1024, generator=g) * 6
        logprobs = rollout + torch.randn(64, 1024, generator=g) * gap
        mask = torch.ones(64, 1024, dtype=torch.bool)
        inputs = {"logprobs": logprobs, "rollout_logprobs": rollout, "mask": mask}
        yield Data(inputs, ("weights",), view=lambda out: [out[0]])


CONTRACT = Case(
    op="importance_weights",
    contract=True,
    function=in_numbers,
    inputs=contract_inputs,
    options={"bounds": (0.5, 2.0)},
    choices={"mode": ("mask", "icepop", "truncate")},
    meetings=meetings(tuple(GPU), ((2, 9001),)),
)
ROWS = Case(
    op="importance_weights",
    variant="rows",
    contract=True,
    function=in_numbers,
    inputs=contract_inputs,
    options={"level": "geometric", "mode": "mask", "bounds": (0.5, 2.0), "reject": "k3", "reject_level": "max"},
    choices={"reject": ("k2", "k3"), "reject_level": ("mean", "sum", "max")},
)
CASES = (
    CONTRACT,
    packed(CONTRACT),
    ROWS,
    Case(
        op="importance_weights",
        work="importance_weights TIS",
        inputs=inputs,
        options={"bounds": (None, HIGH)},
        eager=eager,
        moved=lambda x: 3 * x["logprobs"].nbytes + 2 * x["mask"].nbytes,
        shapes=ROLLOUT | {"gpu": GPU},
        compiled=("quick", "full", "gpu"),
        targets=(Target("verl", 5),),
        accuracy=accuracy,
    ),
)
