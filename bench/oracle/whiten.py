"""Whitening over the valid tokens."""

from __future__ import annotations

import math

import numpy as np

from bench.oracle._tokens import bools, floats, shaped
from bench.oracle.moments import moments


def whiten(x, mask=None, *, shift_mean=True, unbiased=True, eps=1e-8, statistics=None) -> np.ndarray:
    count, mean, m2 = moments(x, mask) if statistics is None else statistics
    variance = m2 / (count - 1 if unbiased else count) if count > 1 else 0.0
    out = []
    for value, m in zip(floats(x), bools(mask, x), strict=True):
        scaled = (value - mean) / math.sqrt(variance + eps) if m and variance + eps != 0 else 0.0
        out.append((scaled if shift_mean else scaled + mean) if m else 0.0)
    return shaped(out, x)
