"""What the oracles share: tensors in, Python floats by flat positions, numpy arrays out."""

from __future__ import annotations

import itertools
import math

import numpy as np


def floats(x) -> list[float]:
    return [float(v) for v in x.detach().double().reshape(-1).tolist()]


def bools(mask, like) -> list[bool]:
    if mask is None:
        return [True] * like.numel()
    return [v != 0 for v in mask.detach().reshape(-1).tolist()]


def rows_of(like, cu_seqlens=None) -> list[range]:
    """For each row the flat positions of its tokens."""
    if cu_seqlens is None:
        batch, length = like.shape
        return [range(b * length, (b + 1) * length) for b in range(batch)]
    cu = [int(c) for c in cu_seqlens.tolist()]
    return [range(start, end) for start, end in itertools.pairwise(cu)]


def shaped(values: list[float], like) -> np.ndarray:
    return np.array(values, dtype=np.float64).reshape(tuple(like.shape))


def exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def expm1(x: float) -> float:
    try:
        return math.expm1(x)
    except OverflowError:
        return math.inf


def total(values) -> float:
    """The exact sum; with infinities or an overflow among the terms, whatever adding them gives."""
    values = list(values)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return sum(values)


def clamp(x: float, bound: float | None) -> tuple[float, float]:
    """The clamped value and its derivative. NaN stays NaN, and passes no gradient."""
    if bound is None or -bound <= x <= bound:
        return x, 1.0
    return (x if math.isnan(x) else math.copysign(bound, x)), 0.0


def maximum(a: float, b: float) -> tuple[float, float, float]:
    """The larger and its derivatives, as autograd has them: half each in a tie, all of both if one is NaN."""
    if math.isnan(a) or math.isnan(b):
        return math.nan, 1.0, 1.0
    share = 0.5 if a == b else float(a > b)
    return max(a, b), share, 1.0 - share


def scaled_or_off(coef: float, term: float) -> float:
    """A coefficient of 0 switches its term off, be that infinite or NaN."""
    return coef * term if coef else 0.0


def per_token(x, like, rows) -> list[float]:
    """A token-level input as it is, a row-level one repeated over the tokens of its rows."""
    if tuple(x.shape) == tuple(like.shape):
        return floats(x)
    out = [0.0] * like.numel()
    for value, row in zip(floats(x), rows, strict=True):
        for t in row:
            out[t] = value
    return out


def effective_share(weights) -> float:
    """The effective sample size over the number of weights."""
    squares = total(w * w for w in weights)
    return total(weights) ** 2 / squares / len(weights) if squares else 0.0


def mean_of(values) -> float:
    values = list(values)
    return total(values) / len(values) if values else 0.0
