"""The clipped policy loss with its statistics, forward and backward; also from the logits on."""

from __future__ import annotations

import torch

from bench import rows, setups

SHAPES = {"small": (64, 2048), "full": (512, 2048)}
LOGITS = {"small": (2, 16, 32000), "full": (4, 31, 151936)}


def rows_of(size: str) -> list[rows.Row]:
    return [
        *rows.of(setups.policy_loss(*SHAPES[size])),
        *rows.of(setups.policy_loss(*SHAPES[size], ref=True), compiled=size == "full"),
        *rows.of(setups.policy_loss_from_logits(torch.bfloat16, *LOGITS[size]), compiled=size == "full"),
    ]


def bench_policy_loss(measure, row):
    measure(row)
