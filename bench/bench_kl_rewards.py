"""KL-shaped rewards."""

from __future__ import annotations

from bench import rows, setups

SHAPES = {"small": (64, 2048), "full": (256, 8192)}


def rows_of(size: str) -> list[rows.Row]:
    shape = SHAPES[size]
    return rows.of(setups.kl_rewards("k1", *shape), compiled=size == "full") + rows.of(setups.kl_rewards("k3", *shape))


def bench_kl_rewards(measure, row):
    measure(row)
