"""Advantages over the responses to one prompt, in the order of a shuffled batch."""

from __future__ import annotations

from bench import rows, setups

SHAPES = {"small": (512, 8), "full": (8192, 8)}


def rows_of(size: str) -> list[rows.Row]:
    return rows.of(setups.group_advantages(*SHAPES[size]))


def bench_group_advantages(measure, row):
    measure(row)
