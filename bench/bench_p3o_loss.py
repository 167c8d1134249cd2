"""The pairwise policy loss with its statistics, forward and backward."""

from __future__ import annotations

from bench import rows, setups

SHAPES = {"small": [(64, 2048, 2)], "full": [(512, 2048, 2), (512, 2048, 8)]}


def rows_of(size: str) -> list[rows.Row]:
    return [row for shape in SHAPES[size] for row in rows.of(setups.p3o_loss(*shape))]


def bench_p3o_loss(measure, row):
    measure(row)
