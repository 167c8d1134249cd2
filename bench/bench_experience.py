"""The advantage chain: KL-shaped rewards, GAE and whitening, one after another."""

from __future__ import annotations

from bench import rows, setups

SHAPES = {"small": (64, 1024), "full": (256, 8192)}


def rows_of(size: str) -> list[rows.Row]:
    return rows.of(setups.experience(*SHAPES[size]))


def bench_experience(measure, row):
    measure(row)
