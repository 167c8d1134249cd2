"""Small calls: what a call costs when there is next to nothing to compute."""

from __future__ import annotations

import torch

from bench import rows, setups

SHAPE = (8, 128)


def rows_of(size: str) -> list[rows.Row]:
    small = [
        setups.gae(*SHAPE),
        setups.kl_rewards("k1", *SHAPE),
        setups.whiten(*SHAPE),
        setups.policy_loss(*SHAPE),
        setups.value_loss(*SHAPE),
        setups.token_logprobs(torch.bfloat16, 8, 1000),
    ]
    return [row for setup in small for row in rows.of(setup, compiled=False)]


def bench_small_call(measure, row):
    measure(row)
