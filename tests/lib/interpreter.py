"""Triton's interpreter, faster and rounding as a GPU does.

At every call of a device function it wraps all of ``triton.language`` anew, which is more than half of its time. Here
the modules that a function sees are wrapped at its first call and stay so. It scans element by element, a call of the
combine function for each; here by doubling, as a GPU does. It cuts digits of a float32 that becomes a bfloat16; here it
is rounded (bench/interpreter.py). All else is computed as the interpreter computes it.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np

from bench.interpreter import round_to_bfloat16


@functools.cache  # once in a process
def improve() -> None:
    """Make it wrap what a function sees at the first call alone, scan by doubling, and round to bfloat16."""
    from triton.runtime import interpreter

    round_to_bfloat16()
    interpreter.ScanOps.own_scan, interpreter.ScanOps.generic_scan = interpreter.ScanOps.generic_scan, scan_by_doubling
    wrap = interpreter._patch_lang

    @functools.cache
    def wrap_for(function):
        wrap(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = wrap_for


def scan_by_doubling(scan, inputs):
    """The inclusive scan of vectors, in log2(n) steps: ``scan`` is the interpreter's ScanOps."""
    (size,) = inputs[0].handle.data.shape
    lane = np.arange(size)
    step = 1
    while step < size:
        before = np.maximum(lane - step, 0)
        earlier = [scan.to_tensor(x.handle.data[before], x.dtype) for x in inputs]
        joint = scan.combine_fn.fn(*earlier, *inputs)
        data = [np.where(lane >= step, new.handle.data, x.handle.data) for new, x in zip(joint, inputs, strict=True)]
        inputs = [scan.to_tensor(x, like.dtype) for x, like in zip(data, inputs, strict=True)]
        step *= 2
    return inputs
