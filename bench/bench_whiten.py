"""Masked whitening."""

from __future__ import annotations

from bench import rows, setups

SHAPES = {"small": (64, 2048), "full": (256, 8192)}


def rows_of(size: str) -> list[rows.Row]:
    return rows.of(setups.whiten(*SHAPES[size]))


def bench_whiten(measure, row):
    measure(row)
