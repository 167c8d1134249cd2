"""moments: the first half of whiten, which is timed there."""

from __future__ import annotations

import torch

from bench.cases import GPU, Case, meetings, tokens

CASES = (
    Case(
        op="moments",
        not_timed="it is the first half of whiten, which is timed",
        contract=True,
        rowwise=False,
        dense=True,
        per_token=False,
        output_dtype=torch.float64,
        inputs=lambda *args: tokens(*args, "x"),
        meetings=meetings(tuple(GPU), ((3, 9001),)),
    ),
)
