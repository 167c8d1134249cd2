"""value_loss with its statistics, forward and backward."""

from __future__ import annotations

import torch

from bench.cases import (
    CLIP,
    GPU,
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
)


def eager(values, old_values, returns, mask):
    clipped = values.clamp(old_values - CLIP, old_values + CLIP)
    plain_error, clipped_error = (values - returns).square(), (clipped - returns).square()
    loss = 0.5 * mean(torch.max(plain_error, clipped_error), mask)
    with torch.no_grad():
        error = mean(values - returns, mask)
        target = mean(returns, mask)
        unexplained = mean((values - returns - error).square(), mask)
        explained = 1 - unexplained / mean((returns - target).square(), mask)
        return loss, mean(clipped_error > plain_error, mask), error, explained


def bare(values, old_values, returns, mask):
    op = torch.ops.ppo_kernels.value_loss.default
    return differentiated(op, values, old_values, returns, mask, None, None, None, CLIP)


def inputs(g, dtype, *shape):
    values = grid(normal(g, *shape))
    old_values, returns = grid(values + 0.3 * normal(g, *shape)), grid(normal(g, *shape))
    return {"values": values, "old_values": old_values, "returns": returns, "mask": right_padded(g, *shape)}


def contract_inputs(g, dtype, batch, length):
    x = tokens(g, dtype, batch, length, "values", "old_values", "returns")
    return x | rows(g, dtype, batch, "row_weight") | {"normalizer": torch.tensor(9.0)}


def accuracy(g):
    for spread in (0.01, 0.5):
        v, ret = torch.randn(64, 1024, generator=g), torch.randn(64, 1024, generator=g) + 10.0
        x = {"values": v, "old_values": v + torch.randn(64, 1024, generator=g) * spread, "returns": ret}
        yield Data(x | {"mask": torch.ones(64, 1024, dtype=torch.bool)}, ("loss", "gradient"))


CONTRACT = Case(
    op="value_loss",
    contract=True,
    inputs=contract_inputs,
    options={"cliprange_value": 0.3},
    leaf="values",
    bare_options={"cliprange_value": None},
    meetings=meetings(tuple(GPU), ((2, 9001),)),
)
CASES = (
    CONTRACT,
    packed(CONTRACT),
    Case(
        op="value_loss",
        work="value_loss fwd+bwd",
        inputs=inputs,
        options={"cliprange_value": CLIP},
        leaf="values",
        eager=eager,
        bare=bare,
        moved=lambda x: 4 * x["values"].nbytes + x["mask"].nbytes,
        device_target=ONE_LAUNCH,
        targets=(Target("eager", 10), Target("torch.compile", 1.5)),
        shapes=MINIBATCH,
        small_call=(8, 128),
        small_call_targets=SMALL_CALL_TARGETS,
        axes=TOKEN_AXES,
        threads=(64, 8192),
        accuracy=accuracy,
    ),
)
