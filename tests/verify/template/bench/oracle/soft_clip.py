"""Soft clipping, element by element."""

from __future__ import annotations

import numpy as np


def soft_clip(x, mask=None, *, cap=5.0):
    valid = np.ones(x.numel()) if mask is None else mask.double().flatten().tolist()
    values = [
        v / (1.0 + abs(v) / cap) if ok else 0.0 for v, ok in zip(x.double().flatten().tolist(), valid, strict=True)
    ]
    return np.array(values).reshape(tuple(x.shape))
