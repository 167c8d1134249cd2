"""Count, mean and sum of squared deviations over the valid tokens."""

from __future__ import annotations

from bench.oracle._tokens import bools, floats, total


def moments(x, mask=None) -> tuple[int, float, float]:
    chosen = [v for v, m in zip(floats(x), bools(mask, x), strict=True) if m]
    if not chosen:
        return 0, 0.0, 0.0
    mean = total(chosen) / len(chosen)
    return len(chosen), mean, total((v - mean) ** 2 for v in chosen)
