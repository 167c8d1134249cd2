"""What the figures of Triton's interpreter need to be those of a GPU."""

from __future__ import annotations

import functools

import torch


@functools.cache  # once in a process
def round_to_bfloat16() -> None:
    """Make Triton's interpreter round a float32 that becomes a bfloat16, as a GPU does: it cuts off digits."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def round_to_nearest(x, from_dtype, to_dtype, rounding_mode):
        # Without a mode the cast is one of the language, which rounds to nearest.
        if from_dtype.name == "fp32" and to_dtype.name == "bf16" and rounding_mode is None:
            return torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
        return convert(x, from_dtype, to_dtype, rounding_mode)

    interpreter._convert_float = round_to_nearest
