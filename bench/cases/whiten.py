"""whiten: values to mean 0 and variance 1 over the valid tokens."""

from __future__ import annotations

import torch

from bench.cases import GPU, ROLLOUT, TOKEN_AXES, Case, Data, meetings, normal, right_padded, tokens


def eager(x, mask):
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def inputs(g, dtype, batch, length):
    return {"x": normal(g, batch, length), "mask": right_padded(g, batch, length)}


def in_a_group(x, mask=None):
    count, mean, squares = (torch.tensor(v, dtype=torch.float64) for v in (10.0, 0.5, 3.0))
    return x, mask, count, mean, squares, False, False, 1e-8


def accuracy(g):
    for mean in (0.0, 100.0, 1e4):
        yield Data({"x": torch.randn(8, 4096, generator=g) + mean}, ("whitened",))


def accurate_eager(x):
    return (x - x.mean()) * torch.rsqrt(x.var() + 1e-8)


CASES = (
    Case(
        op="whiten",
        contract=True,
        rowwise=False,
        dense=True,
        inputs=lambda *args: tokens(*args, "x"),
        meetings=meetings(tuple(GPU), ((3, 9001),)),
        bare_options={"shift_mean": False, "unbiased": False},
        in_a_group=in_a_group,
    ),
    Case(
        op="whiten",
        work="whiten",
        inputs=inputs,
        eager=eager,
        moved=lambda x: 3 * x["x"].nbytes + 2 * x["mask"].nbytes,
        tolerance=2e-6,
        eager_tolerance=1e-5,
        shapes=ROLLOUT,
        small_call=(8, 128),
        axes=TOKEN_AXES,
        threads=(64, 8192),
        compiled=("small", "full", "gpu"),
        accuracy=accuracy,
        accurate_eager=accurate_eager,
    ),
)
