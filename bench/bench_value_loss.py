"""The clipped value loss with its statistics, forward and backward."""

from __future__ import annotations

from bench import rows, setups

SHAPES = {"small": (64, 2048), "full": (512, 2048)}


def rows_of(size: str) -> list[rows.Row]:
    return rows.of(setups.value_loss(*SHAPES[size]))


def bench_value_loss(measure, row):
    measure(row)
