"""Generalised advantage estimation; with whitening, as verl and SkyRL do both in one function."""

from __future__ import annotations

from bench import rows, setups

SHAPES = {"small": (64, 1024), "full": (256, 8192)}


def rows_of(size: str) -> list[rows.Row]:
    return rows.of(setups.gae(*SHAPES[size])) + rows.of(setups.gae_whiten(*SHAPES[size]))


def bench_gae(measure, row):
    measure(row)
