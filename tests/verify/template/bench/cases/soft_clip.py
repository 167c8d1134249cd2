"""soft_clip: values bounded without a corner."""

from __future__ import annotations

import torch

from bench.cases import ROLLOUT, TOKEN_AXES, Case, Data, normal, right_padded, tokens

CAP = 5.0


def eager(x, mask):
    return x / (1 + x.abs() / CAP) * mask


def inputs(g, dtype, batch, length):
    return {"x": normal(g, batch, length), "mask": right_padded(g, batch, length)}


def accuracy(g):
    yield Data({"x": torch.randn(8, 4096, generator=g) * 10}, ("clipped",))


CASES = (
    Case(
        op="soft_clip",
        contract=True,
        inputs=lambda *args: tokens(*args, "x"),
        options={"cap": 2.0},
    ),
    Case(
        op="soft_clip",
        work="soft_clip",
        inputs=inputs,
        eager=eager,
        moved=lambda x: 2 * x["x"].nbytes + x["mask"].nbytes,
        shapes=ROLLOUT,
        small_call=(8, 128),
        axes=TOKEN_AXES,
        accuracy=accuracy,
        accurate_eager=lambda x: x / (1 + x.abs() / CAP),
    ),
)
